"""Consecutive residual blocks as one differentiable call: fusion across the border of two blocks.

Forward, a block's end relu(BN(z) + shortcut) is left to the next block's first convolution, which may compute it while
loading. Backward, the gradient that leaves a block may have met the mask and the sums of the end before it already. A
`Border` does the same for the last block of a stage and the first one of the next, whose calls stay two: so a stage's
tensors are given back, and its gradients are ready, before the backward of the stage before it begins.

With `dispatch.fusions(recompute=True)` no block's output is kept for backward: each is one pass over tensors that are
kept anyway, so they can be computed again just before they are needed; less is kept, for one such pass a block. The
values are those of the blocks run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fastres.ops import dispatch
from fastres.ops.conv_bn_act import (
    Backward,
    Call,
    Gradient,
    Pending,
    Unit,
    convolutions,
    definition,
    krsc,
    norms,
    pending,
    prepare,
    unaliased,
    with_end,
)
from fastres.ops.launch import Norms
from fastres.ops.steps import dense, nchw, nhwc


class Border:
    """Where one stage's call hands over to the next one's.

    Between the two autograd sees z, the result of the last convolution, in the place of the block's output y, which is
    computed behind the border: z has its shape, and its gradient is taken for that of y. Nobody else may see either.
    """

    pending: Pending | None = None  # y, on its way forward
    below: Norms | None = None
    back: tuple[Gradient, Tensor] | None = None  # the gradient at y, and y, on their way back

    def take(self) -> tuple[Pending, Norms]:
        """y and the BatchNorms before its ReLU, as the forward of the stage before left them."""
        pending, below = self.pending, self.below
        self.pending = self.below = None
        assert pending is not None
        assert below is not None
        return pending, below

    def take_back(self, dy: Tensor) -> tuple[Tensor | None, Gradient]:
        """y, if somebody has brought it, and the gradient there, of which autograd says that it is dy [N, H, W, C].

        It is another one than was handed over in a gradient's own backward. Whether that is masked already or not,
        masking it again changes nothing.
        """
        if self.back is None:
            return None, Gradient(dy)
        (gradient, out), self.back = self.back, None
        same = gradient.value.data_ptr() == dy.data_ptr() and gradient.value.stride() == dy.stride()
        return out, gradient if same else Gradient(dy)


def stages(x: Tensor, of_stages: Sequence[Sequence[tuple[Sequence[Unit], nn.Module | None]]]) -> Tensor:
    """Stages, each as `stage` takes it, one after the other on x [N, C, H, W]; for a forward that needs gradients."""
    before = None
    for blocks in of_stages[:-1]:
        after = Border()
        x, before = stage(x, blocks, before, after), after
    return stage(x, of_stages[-1], before)


def stage(
    x: Tensor,
    blocks: Sequence[tuple[Sequence[Unit], nn.Module | None]],
    before: Border | None = None,
    after: Border | None = None,
) -> Tensor:
    """The blocks, each (units, shortcut) as `conv_bn_act.residual_block` takes them, one after the other on x
    [N, C, H, W]; for a forward that needs gradients. `before` and `after` as of `stages`."""
    dtype = dispatch.compute_dtype(x)
    calls, parameters, shape = [], [], tuple(x.shape)
    for units, shortcut in blocks:
        call, own = prepare(shape, *with_end(units, shortcut), dtype, x.device)
        calls.append(call)
        parameters += own
        problem = call.steps[call.depth - 1].problem
        shape = (problem.N, problem.K, problem.P, problem.Q)
    with torch.autocast(x.device.type, enabled=False):
        return _Stage.apply(tuple(calls), dtype, dispatch.recomputes(), before, after, x, *parameters)


_ALIGNED = 128  # bytes; TMA wants 16


def read_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`krsc` of every weight; those that only change their dtype share one memory, and on a GPU a launch or few."""
    first, device = weights[0].dtype, weights[0].device  # what is elsewhere is refused by the kernel that reads it
    alike = [w for w in weights if w.dtype == first != dtype and w.device == device]
    cast = [w for w in alike if w.permute(0, 2, 3, 1).is_contiguous()]
    if len(cast) < 2:
        return [krsc(weight, dtype) for weight in weights]
    step = _ALIGNED // dtype.itemsize
    starts = [0, *accumulate(-(-w.numel() // step) * step for w in cast)]
    memory = torch.empty(starts[-1], dtype=dtype, device=cast[0].device)
    # Strides like the weights', as one kernel copies only between such.
    copies = [memory.as_strided(w.shape, w.stride(), start) for w, start in zip(cast, starts, strict=False)]
    torch._foreach_copy_(copies, [w.detach() for w in cast])
    found = {id(weight): copy for weight, copy in zip(cast, copies, strict=True)}
    return [nhwc(found[id(w)]) if id(w) in found else krsc(w, dtype) for w in weights]


def cast_gradients(grads: list[Any], parameters: Sequence[Any]) -> list[Any]:
    """The gradients of parameters (each a tensor or None), with their dtypes; those that change theirs get the
    parameters' strides, too, and on a GPU a launch or few do it."""
    cast: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (grad, parameter) in enumerate(zip(grads, parameters, strict=True)):
        if grad is not None and grad.dtype != parameter.dtype:
            cast.setdefault((grad.dtype, parameter.dtype), []).append(i)
    for of_dtypes in cast.values():
        found = [torch.empty_like(parameters[i], memory_format=torch.preserve_format) for i in of_dtypes]
        torch._foreach_copy_(found, [grads[i] for i in of_dtypes])
        for i, grad in zip(of_dtypes, found, strict=True):
            grads[i] = grad
    return grads


def _split(calls: Sequence[Call], tensors: Sequence[Any], per_layer: int) -> list[Sequence[Any]]:
    """`tensors`, `per_layer` for every layer of every call, call by call."""
    parts, at = [], 0
    for call in calls:
        size = per_layer * len(call.layers)
        parts.append(tensors[at : at + size])
        at += size
    return parts


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        calls: tuple[Call, ...],
        dtype: torch.dtype,
        recompute: bool,
        before: Border | None,
        after: Border | None,
        x: Tensor,
        *parameters: Any,
    ) -> Tensor:
        a: Tensor | Pending
        a, below = (dense(x, dtype), None) if before is None else before.take()
        inputs: list[Tensor] = []
        zs: list[Tensor] = []
        stats: list[Tensor] = []
        activations: list[Tensor | None] = []
        weights = read_weights(parameters[::3], dtype)
        of_blocks = (_split(calls, parameters, 3), _split(calls, weights, 1))
        for call, own, own_weights in zip(calls, *of_blocks, strict=True):
            read, own_zs, own_stats, own_activations = convolutions(call, a, own_weights, own)
            inputs.append(read)
            zs += own_zs
            stats += own_stats
            activations += own_activations
            a = pending(call, read, own_zs, own_stats)
        assert isinstance(a, Pending)
        if after is None:
            y = unaliased(a.compute())
        else:
            after.pending, after.below = a, norms(calls[-1], own_zs, own_stats)
            y = unaliased(a.z)
        ctx.calls, ctx.dtype, ctx.x_dtype, ctx.layers = calls, dtype, x.dtype, len(parameters) // 3
        ctx.before, ctx.after = before, after
        read_again = [nchw(read) for read in (inputs[:1] if recompute else inputs)]
        of_below = [None, None, None] if below is None else [below[0][1], *(below[1] or (None, None))]
        ctx.save_for_backward(
            x, y if after is None else None, *of_below, *parameters, *zs, *stats, *weights, *activations, *read_again
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        calls, n, before = ctx.calls, ctx.layers, ctx.before
        x, y, mean, z_side, mean_side, *rest = ctx.saved_tensors
        parameters, (needs_input, *needs_parameters) = rest[: 3 * n], ctx.needs_input_grad[5:]
        inputs = [nhwc(read) for read in rest[10 * n :]]
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition instead
            value = None if before is None else nchw(inputs[0])
            needs_all = (needs_input, *needs_parameters)
            return *(None,) * 5, *_differentiable(calls, ctx.dtype, x, value, parameters, dy, needs_all)
        zs, stats, weights, activations = (
            _split(calls, rest[a * n : b * n], b - a) for a, b in ((3, 4), (4, 8), (8, 9), (9, 10))
        )
        while (b := len(inputs) - 1) < len(calls) - 1:  # none where they were kept
            inputs.append(pending(calls[b], inputs[b], zs[b], stats[b]).compute())
        needs = _split(calls, needs_parameters, 3)
        own = _split(calls, parameters, 3)
        grads: list[Sequence[Tensor | None]] = [[None] * len(p) for p in own]
        dy = nhwc(dy.to(ctx.dtype))
        out, dout = (nhwc(y), Gradient(dy)) if ctx.after is None else ctx.after.take_back(dy)
        if out is None:
            out = pending(calls[-1], inputs[-1], zs[-1], stats[-1]).compute()
        projection = None if z_side is None else (z_side, mean_side)
        at_border = None if before is None else ((nhwc(x), mean), projection)
        for b in reversed(range(len(calls))):
            needs_x = needs_input or any(any(flags) for flags in needs[:b])
            below = norms(calls[b - 1], zs[b - 1], stats[b - 1]) if b else at_border
            a, of_block = inputs.pop(), (zs[b], stats[b], weights[b], activations[b])
            dx, grads[b] = Backward(
                calls[b], a, out, None, *of_block, own[b], needs_x, needs[b], below, casts=False
            ).run(dout)
            if dx is None:
                break
            out, dout = a, dx
        dparameters = cast_gradients([grad for of_block in grads for grad in of_block], parameters)
        if dx is None:
            return *(None,) * 6, *dparameters
        if before is not None:
            before.back = dx, out
        return *(None,) * 5, nchw(dx.value).to(ctx.x_dtype), *dparameters


class _InPlaceOf(torch.autograd.Function):
    """`value`, to autograd x: what stands behind a border in the place of what came to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _differentiable(
    calls: Sequence[Call],
    dtype: torch.dtype,
    x: Tensor,
    value: Tensor | None,
    parameters: Sequence[Any],
    dy: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """By autograd. value: what the first block reads, where x only stands for it."""
    with torch.enable_grad():
        out = x.to(dtype) if value is None else _InPlaceOf.apply(x, value)
        for call, own in zip(calls, _split(calls, parameters, 3), strict=True):
            out = definition(call, out, own)
        inputs = [t for t, need in zip((x, *parameters), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(out, inputs, dy, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]
