"""Residual blocks, plain blocks and the stem as fused, differentiable functions; `reference` defines what they compute.

Consecutive blocks (one stage, or a single block) are one autograd node, fused across the blocks. In the forward, the
end of a block, relu(BN(z) + shortcut), is left to the next block's first convolution, which may compute it on load. In
the backward, the gradient that a block passes to the previous one may already be masked by that block's last ReLU, with
the partial sums of its last BatchNorms computed. A `Boundary` does the same between two stages. Stages remain separate
autograd nodes, so that a stage's saved tensors are freed and its gradients are ready before the backward of the
previous stage begins.

A block whose BatchNorms all use running statistics runs as `frozen` describes, and so does a stage of such blocks.

`ends.BlockKept` and `conv_bn.Kept` list the tensors that are saved for backward. `_Blocks.forward` saves them together
with the original input, the parameters, the output if the end's backward reads it, and a pool's taps (the position of
each maximum within its window). The activation between two convolutions, a = relu(scale z + shift), is recomputed from
z wherever it is read, unless the fusion `keep_activation` saves it. With the fusion `recompute`, the inputs of all
blocks but the first are recomputed, too, in one elementwise pass each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastres.ops import dispatch, eligibility, frozen, reference
from fastres.ops.backward import Backward
from fastres.ops.call import Block, Call, Pair, prepare, split
from fastres.ops.conv_bn import Kept, refuse_capture, uses_batch_statistics
from fastres.ops.ends import Add, BlockKept, Gradient, Pad, Pending, Pool, Project, Relu
from fastres.ops.frozen import FrozenBackward
from fastres.ops.layout import cast_gradients, nchw, nhwc, read_weights, unaliased
from fastres.ops.reference import EndNorms


def residual_block(x: Tensor, pairs: Sequence[Pair], shortcut: nn.Module | None) -> Tensor:
    """Run a residual block, fused: relu(F(x) + shortcut(x)), where F is the conv-BN `pairs` with ReLU between them.

    x: [N, C, H, W]; call this only if `eligibility.serves` accepts the call. pairs: (`nn.Conv2d`, `nn.BatchNorm2d`) in
    order. shortcut: None (the identity), `nn.Sequential(conv, norm)` (a projection) or a `PadShortcut` (option A).
    Returns [N, K, P, Q], channels_last, in autocast's dtype if autocast is on, else in x's. In training mode this
    updates the running statistics.

    Equivalent to `reference.residual_block`:

        y = nn.Sequential(*pairs[0])(x)
        for conv, norm in pairs[1:]:
            y = norm(conv(F.relu(y)))
        y = F.relu(y + (x if shortcut is None else shortcut(x)))

    Raises ValueError, as `nn.BatchNorm2d` does, if batch statistics would be computed from one value per channel, and
    RuntimeError if a CUDA graph captures a BatchNorm with momentum=None in training.

    Source: the ResNet paper, equations 1 and 2.
    """
    return _run(x, [_residual((pairs, shortcut))])


def plain_block(x: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Run a block of a net without shortcuts, fused: relu(F(x)), where F is the conv-BN `pairs` with ReLU between them.

    x, pairs, result and errors are those of `residual_block`.

    Equivalent to `reference.plain_block`:

        for conv, norm in pairs:
            x = F.relu(norm(conv(x)))

    Source: the ResNet paper, section 3.3 (plain network).
    """
    return _run(x, [(pairs, Relu())])


def stem(x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module) -> Tensor:
    """Run the stem of a net, fused: x [N, C, H, W] -> [N, K, U, V], channels_last; errors as `residual_block`.

    If no kernel serves the sizes of `pool` (`eligibility.pool_sizes`), the modules run one by one.

    Equivalent to `reference.stem`:

        pool(F.relu(bn(conv(x))))

    Source: the ResNet paper, Table 1 (conv1 and the max pool of conv2_x).
    """
    sizes = eligibility.pool_sizes(pool)
    return reference.stem(x, conv, bn, pool) if sizes is None else _run(x, [([(conv, bn)], Pool(*sizes))])


def stages(x: Tensor, of_stages: Sequence[Sequence[tuple[Sequence[Pair], nn.Module | None]]]) -> Tensor:
    """Run consecutive stages on x [N, C, H, W], fused across the boundaries of blocks and of stages.

    For forward passes that need gradients. Each stage is a list of blocks (pairs, shortcut); a block's arguments,
    result and errors are those of `residual_block`. `eligibility.serves_stages` returns how many of a net's remaining
    stages may be passed, counted from the first.

    Equivalent to:

        for stage in of_stages:
            for pairs, shortcut in stage:
                x = residual_block(x, pairs, shortcut)
    """
    before, parts = None, []  # (whether they are frozen, the blocks of one autograd node)
    for stage in of_stages:
        parts += [(fixed, list(blocks)) for fixed, blocks in groupby(map(_residual, stage), _is_frozen)]
    for i, (fixed, blocks) in enumerate(parts):
        joins = not fixed and i + 1 < len(parts) and not parts[i + 1][0]
        after = Boundary() if joins else None
        x, before = _run(x, blocks, before, after), after
    return x


def _is_frozen(block: Block) -> bool:
    return not any(uses_batch_statistics(bn) for _, bn in block[0])


def _residual(block: tuple[Sequence[Pair], nn.Module | None]) -> Block:
    pairs, shortcut = block
    if shortcut is None:
        return pairs, Add()
    if isinstance(shortcut, nn.Sequential):
        return [*pairs, (shortcut[0], shortcut[1])], Project()
    return pairs, Pad(shortcut.stride)  # type: ignore[arg-type]


def _run(x: Tensor, blocks: Sequence[Block], before: Boundary | None = None, after: Boundary | None = None) -> Tensor:
    for _, bn in chain.from_iterable(pairs for pairs, _ in blocks):
        refuse_capture(bn)
    if dispatch.wants_reference():
        for pairs, end in blocks:
            x = end.definition(x, pairs)
        return x
    dtype = dispatch.compute_dtype(x)
    choice = dispatch.choice(dtype, x.device)
    calls, parameters = prepare(x.shape, blocks, dtype, x.device, choice)
    with torch.autocast(x.device.type, enabled=False):
        if torch._C._len_torch_dispatch_stack():  # a dispatch mode (FlopCounterMode) must see operators
            for call, own in zip(calls, split(calls, parameters, 3), strict=True):
                x = _by_operator(call, x.to(dtype), own)
            return x
        keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
        if keeps or before or after or any(pair.batch_statistics for call in calls for pair in call.pairs):
            return _Blocks.apply(calls, dtype, before, after, x, *parameters)
        for call, own in zip(calls, split(calls, parameters, 3), strict=True):
            x = nchw(frozen.infer(call, call.read(x, dtype), dtype, own))
        return x


def _by_operator(call: Call, x: Tensor, parameters: Sequence[Any]) -> Tensor:
    """Run one block as the operator `conv_bn_act`, which mutates nothing; then update the BatchNorm buffers.

    The operator returns the new running statistics, which are copied into the buffers. The batch counters go up by one.
    """
    read = [b.moves or not pair.batch_statistics for pair, b in zip(call.pairs, call.buffers, strict=True)]
    running = [t if reads else None for b, reads in zip(call.buffers, read, strict=True) for t in (b.mean, b.var)]
    out, moved, _, _ = torch.ops.fastres.conv_bn_act(x, list(parameters), running, None, *call.words)
    tracked = [t for each in call.buffers if each.moves for t in (each.mean, each.var) if t is not None]
    with torch.no_grad():
        for each in call.buffers:
            if each.counter is not None:
                each.counter.add_(1)
        for home, value in zip(tracked, moved.split([t.numel() for t in tracked]), strict=True):
            home.copy_(value)
    return out


def forward(
    calls: Sequence[Call],
    x: Tensor | Pending,
    weights: Sequence[Tensor],
    parameters: Sequence[Any],
    after: Boundary | None = None,
) -> tuple[list[BlockKept], Tensor, Tensor | None]:
    """Run the blocks; return the tensors saved for backward, the output, NHWC, and a pool's taps or None.

    x: the first block's input as returned by `Call.read`, or a `Pending` to be computed with the first convolution.
    weights: the filters of each pair as returned by `krsc`. parameters: (filters, BN weight, BN bias) for each pair.
    after: if given, the end of the last block is left to it, and z takes the place of the output.
    """
    kept: list[BlockKept] = []
    for call, own_weights, own in zip(calls, split(calls, weights, 1), split(calls, parameters, 3), strict=True):
        if kept:
            x = calls[len(kept) - 1].pending(kept[-1])
        kept.append(_convolutions(call, x, own_weights, own))
    last = calls[-1]
    if after is None:
        return kept, *last.end.finish(last.pairs, kept[-1])
    after.pending, after.end_below = last.pending(kept[-1]), last.end.batch_norms(kept[-1])
    return kept, after.pending.z, None


def _convolutions(call: Call, x: Tensor | Pending, weights: Sequence[Tensor], parameters: Sequence[Any]) -> BlockKept:
    kept: list[Kept] = []
    a, prologue = x, None
    for i, (pair, buffers, w) in enumerate(zip(call.pairs, call.buffers, weights, strict=True)):
        filters, weight, bias = parameters[3 * i : 3 * i + 3]
        activation = None
        if i == call.depth:  # the projection reads the block's input again
            a, prologue = x, None
        if isinstance(a, Pending):
            x, z, partials = pair.fprop_joined(a.z, a.affine, w, **a.addend)
        else:
            if prologue is not None and pair.engines.keeps_activation and filters.requires_grad:
                a = activation = pair.passes.normalize(a, *prologue, relu=True)
                prologue = None
            z, partials = pair.fprop(a, w, prologue)
        mean, rstd, scale, shift = pair.statistics(partials, weight, bias, buffers)
        kept.append(Kept(z, mean, rstd, scale, shift, w, activation))
        a, prologue = z, (scale, shift)
    assert not isinstance(x, Pending)
    return BlockKept(x, kept)


class Boundary:
    """The boundary between two stages, which are separate autograd nodes.

    The output y of the first stage is computed by the second one. So the first node returns z, the result of its last
    convolution, in place of y: z has y's shape, and autograd's gradient at z is understood as the gradient at y. No
    other code may use z or its gradient.
    """

    pending: Pending | None = None  # y, handed from the first stage's forward to the second's
    end_below: EndNorms | None = None
    back: tuple[Gradient, Tensor] | None = None  # the gradient at y, and y, handed from the second's backward

    def take(self) -> tuple[Pending, EndNorms]:
        """Return y, not computed yet, and (z, mean) of the BatchNorms before its ReLU, and forget both."""
        pending, end_below = self.pending, self.end_below
        self.pending = self.end_below = None
        assert pending is not None
        assert end_below is not None
        return pending, end_below

    def take_back(self, dy: Tensor) -> tuple[Tensor | None, Gradient]:
        """Return y, if the second stage's backward handed it over, and the gradient at y.

        dy [N, H, W, C] is the gradient that autograd passes. It may be another tensor than the second stage handed
        over, for example if autograd has added gradients in a second-order backward. Then the partial sums that were
        handed over don't belong to it. Whether dy is masked or not makes no difference, as masking it again changes
        nothing.
        """
        if self.back is None:
            return None, Gradient(dy)
        (gradient, out), self.back = self.back, None
        same = gradient.value.data_ptr() == dy.data_ptr() and gradient.value.stride() == dy.stride()
        return out, gradient if same else Gradient(dy)


class _Blocks(torch.autograd.Function):
    """Consecutive blocks as one node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any, calls: tuple[Call, ...], dtype: Any, before: Any, after: Any, x: Tensor, *parameters: Any
    ) -> Tensor:
        read, end_below = (calls[0].read(x, dtype), None) if before is None else before.take()
        weights, last = read_weights(parameters[::3], dtype), calls[-1]
        if last.frozen:
            kept, out, taps = frozen.forward(calls, read, weights, parameters, ctx.needs_input_grad[4:])
        else:
            kept, out, taps = forward(calls, read, weights, parameters, after)
        y = unaliased(out)
        ctx.calls, ctx.dtype, ctx.x_dtype, ctx.before, ctx.after = calls, dtype, x.dtype, before, after
        read_out = y if after is None and last.end.keeps_output(last.frozen) else None
        of_below = [None, None, None] if end_below is None else [end_below[0][1], *(end_below[1] or (None, None))]
        recompute = last.pairs[0].engines.fusions.recompute and not last.frozen
        inputs = [None if recompute and i else nchw(block.x) for i, block in enumerate(kept)]
        of_pairs = [t for block in kept for pair in block.pairs for t in pair]
        ctx.save_for_backward(x, read_out, taps, *of_below, *inputs, *parameters, *of_pairs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        calls: tuple[Call, ...] = ctx.calls
        x, y, taps, mean, z_proj, mean_proj, *rest = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[4:]
        n = len(calls)
        pairs_at = n + len(needs)
        inputs, parameters = rest[:n], rest[n:pairs_at]
        first = calls[0].read(inputs[0], ctx.dtype)
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition instead
            value = None if ctx.before is None else nchw(first)
            return *(None,) * 4, *_differentiable(calls, ctx.dtype, x, value, parameters, dy, (needs_x, *needs))
        size = len(Kept._fields)
        of_pairs = split(calls, [Kept(*rest[i : i + size]) for i in range(pairs_at, len(rest), size)], 1)
        kept = [BlockKept(first, of_pairs[0])]
        for b in range(1, n):
            again = inputs[b] is None
            kept += [BlockKept(calls[b - 1].pending(kept[-1]).compute() if again else nhwc(inputs[b]), of_pairs[b])]
        dy = nhwc(dy.to(ctx.dtype))
        out, dout = (None if y is None else nhwc(y), Gradient(dy)) if ctx.after is None else ctx.after.take_back(dy)
        if out is None and calls[-1].end.keeps_output(calls[-1].frozen):
            out = calls[-1].pending(kept[-1]).compute()
        end_below: EndNorms | None = None
        if ctx.before is not None:
            end_below = (nhwc(x), mean), None if z_proj is None else (z_proj, mean_proj)
        grads: list[Tensor | None] = []
        own, wanted = split(calls, parameters, 3), split(calls, needs, 3)
        for b in reversed(range(n)):
            call, block = calls[b], kept.pop()
            needs_input = needs_x or any(map(any, wanted[:b]))
            under = calls[b - 1].end.batch_norms(kept[-1]) if b else end_below
            of_call = call.pairs, call.end, block, out, taps, own[b], needs_input, wanted[b], under
            dx, of_block = (FrozenBackward if call.frozen else Backward)(*of_call).run(dout)
            grads[:0] = of_block
            if dx is None:
                break
            out, dout = block.x, dx
        grads[:0] = [None] * (len(parameters) - len(grads))
        dparameters = cast_gradients(grads, parameters)
        if dx is None:
            return *(None,) * 5, *dparameters
        if ctx.before is not None:
            ctx.before.back = dx, out
        return *(None,) * 4, nchw(dx.value).to(ctx.x_dtype), *dparameters


class _InPlaceOf(torch.autograd.Function):
    """Return `value` in the forward, but send the gradient to x in the backward.

    At a stage boundary (see `Boundary`), value is the first stage's output y, and x is z, which stands for y.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _differentiable(
    calls: Sequence[Call], dtype: Any, x: Tensor, value: Any, parameters: Any, dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x and the parameters, computed by autograd through the definition with `create_graph`.

    needs: whether x and each parameter require a gradient; the others get None. value: the first block's input, if x
    only stands for it (after a stage boundary, see `Boundary`), else None.
    """
    with torch.enable_grad():
        out = x.to(dtype) if value is None else _InPlaceOf.apply(x, value)
        for call, own in zip(calls, split(calls, parameters, 3), strict=True):
            out = call.definition(out, own)
        inputs = [t for t, need in zip((x, *parameters), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(out, inputs, dy, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]
