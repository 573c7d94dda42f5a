"""Consecutive residual blocks as one differentiable call: fusion across the border of two blocks.

Forward, a block's end relu(BN(z) + shortcut) is left to the next block's first convolution, which may compute it while
loading. Backward, the gradient that leaves a block may have met the mask and the sums of the end before it already.

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
from fastres.ops.steps import dense, nchw, nhwc


def stage(x: Tensor, blocks: Sequence[tuple[Sequence[Unit], nn.Module | None]]) -> Tensor:
    """The blocks, each (units, shortcut) as `conv_bn_act.residual_block` takes them, one after the other on x
    [N, C, H, W]; for a forward that needs gradients."""
    dtype = dispatch.compute_dtype(x)
    calls, parameters, shape = [], [], tuple(x.shape)
    for units, shortcut in blocks:
        call, own = prepare(shape, *with_end(units, shortcut), dtype, x.device)
        calls.append(call)
        parameters += own
        problem = call.steps[call.depth - 1].problem
        shape = (problem.N, problem.K, problem.P, problem.Q)
    with torch.autocast(x.device.type, enabled=False):
        return _Stage.apply(tuple(calls), dtype, dispatch.recomputes(), x, *parameters)


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
        ctx: Any, calls: tuple[Call, ...], dtype: torch.dtype, recompute: bool, x: Tensor, *parameters: Any
    ) -> Tensor:
        a: Tensor | Pending = dense(x, dtype)
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
        y = unaliased(a.compute())
        ctx.calls, ctx.x_dtype, ctx.layers = calls, x.dtype, len(parameters) // 3
        read_again = [nchw(read) for read in (inputs[:1] if recompute else inputs)]
        ctx.save_for_backward(x, y, *parameters, *zs, *stats, *weights, *activations, *read_again)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        calls, n = ctx.calls, ctx.layers
        x, y, *rest = ctx.saved_tensors
        parameters = rest[: 3 * n]
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition instead
            return None, None, None, *_differentiable(calls, y.dtype, x, parameters, dy, ctx.needs_input_grad[3:])
        zs, stats, weights, activations = (
            _split(calls, rest[a * n : b * n], b - a) for a, b in ((3, 4), (4, 8), (8, 9), (9, 10))
        )
        inputs = [nhwc(read) for read in rest[10 * n :]]
        while (b := len(inputs) - 1) < len(calls) - 1:  # none where they were kept
            inputs.append(pending(calls[b], inputs[b], zs[b], stats[b]).compute())
        needs = _split(calls, ctx.needs_input_grad[4:], 3)
        own = _split(calls, parameters, 3)
        grads: list[Sequence[Tensor | None]] = [[None] * len(p) for p in own]
        out, dout = nhwc(y), Gradient(nhwc(dy.to(y.dtype)))
        for b in reversed(range(len(calls))):
            needs_x = ctx.needs_input_grad[3] or any(any(flags) for flags in needs[:b])
            below = norms(calls[b - 1], zs[b - 1], stats[b - 1]) if b else None
            a, of_block = inputs.pop(), (zs[b], stats[b], weights[b], activations[b])
            dx, grads[b] = Backward(
                calls[b], a, out, None, *of_block, own[b], needs_x, needs[b], below, casts=False
            ).run(dout)
            if dx is None:
                break
            out, dout = a, dx
        dparameters = cast_gradients([grad for of_block in grads for grad in of_block], parameters)
        return None, None, None, None if dx is None else nchw(dx.value).to(ctx.x_dtype), *dparameters


def _differentiable(
    calls: Sequence[Call], dtype: torch.dtype, x: Tensor, parameters: Sequence[Any], dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    with torch.enable_grad():
        out = x.to(dtype)
        for call, own in zip(calls, _split(calls, parameters, 3), strict=True):
            out = definition(call, out, own)
        inputs = [t for t, need in zip((x, *parameters), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(out, inputs, dy, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]
