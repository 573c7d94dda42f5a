"""Consecutive residual blocks as one differentiable call that keeps no block's output for backward.

A block's output relu(BN(z) + shortcut) is one pass over tensors that are kept anyway, so backward can compute a stage's
outputs again just before it needs them: less is kept, for one more such pass a block. The values are those of the
blocks run one by one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.ops import dispatch
from fastres.ops.conv_bn_act import Backward, Call, Unit, definition, finish, forward, prepare, with_end
from fastres.ops.steps import nchw, nhwc


def stage(x: Tensor, blocks: Sequence[tuple[Sequence[Unit], nn.Module | None]]) -> Tensor:
    """The blocks, each (units, shortcut) as `conv_bn_act.residual_block` takes them, one after the other on x
    [N, C, H, W]; for a forward that needs gradients."""
    dtype = dispatch.compute_dtype(x)
    calls, parameters, seen = [], [], x
    for units, shortcut in blocks:
        call, own = prepare(seen, *with_end(units, shortcut), dtype)
        calls.append(call)
        parameters += own
        problem = call.steps[call.depth - 1].problem
        seen = x.new_empty(()).expand(
            problem.N, problem.K, problem.P, problem.Q
        )  # the shape is all that is asked of it
    with torch.autocast(x.device.type, enabled=False):
        return _Stage.apply(tuple(calls), dtype, x, *parameters)


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
    def forward(ctx: Any, calls: tuple[Call, ...], dtype: torch.dtype, x: Tensor, *parameters: Any) -> Tensor:
        a = x_read = nchw(nhwc(x.to(dtype)))
        kept: tuple[list[Tensor], ...] = ([], [], [])
        for call, own in zip(calls, _split(calls, parameters, 3), strict=True):
            out, *of_block, _ = forward(call, a, own)
            for all_blocks, one in zip(kept, of_block, strict=True):
                all_blocks.extend(one)
            a = nchw(out)
        ctx.calls, ctx.x_dtype, ctx.layers = calls, x.dtype, len(parameters) // 3
        ctx.save_for_backward(x, x_read, a, *parameters, *(t for tensors in kept for t in tensors))
        return a

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        calls, n = ctx.calls, ctx.layers
        x, x_read, y, *rest = ctx.saved_tensors
        parameters = rest[: 3 * n]
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition instead
            return None, None, *_differentiable(calls, y.dtype, x, parameters, dy, ctx.needs_input_grad[2:])
        zs, stats, weights = (
            _split(calls, tensors, k)
            for tensors, k in ((rest[3 * n : 4 * n], 1), (rest[4 * n : 8 * n], 4), (rest[8 * n :], 1))
        )
        inputs = [nhwc(x_read)]
        for call, z, four in zip(calls[:-1], zs, stats, strict=False):
            inputs.append(finish(call, inputs[-1], z, four)[0])
        needs = _split(calls, ctx.needs_input_grad[3:], 3)
        own = _split(calls, parameters, 3)
        grads: list[Sequence[Tensor | None]] = [[None] * len(p) for p in own]
        out, dout = nhwc(y), nhwc(dy.to(y.dtype))
        for b in reversed(range(len(calls))):
            below = ctx.needs_input_grad[2] or any(any(flags) for flags in needs[:b])
            a = inputs.pop()
            work = Backward(calls[b], a, out, None, zs[b], stats[b], weights[b], own[b], below, needs[b])
            dx, grads[b] = work.run(dout)
            if dx is None:
                return None, None, None, *(g for of_block in grads for g in of_block)
            out, dout = a, dx
        return None, None, nchw(dout).to(ctx.x_dtype), *(g for of_block in grads for g in of_block)


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
