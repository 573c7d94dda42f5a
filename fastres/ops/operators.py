"""The fused blocks as PyTorch operators, for `torch.compile`, FlopCounterMode and other dispatch modes.

    conv_bn_act       a whole block, as `block` runs one: conv-BN pairs and the block's end; differentiable once
    conv_affine_act   [relu](scale conv(x, w) + shift + residual), one pair in inference; not differentiable

On every device, an operator runs the same code as the eager call of a single block, but never uses the fusions
`keep_activation` and `overlap`. PyTorch allows no autograd formula for an operator that mutates its inputs, so
`conv_bn_act` returns the updated running statistics, and the caller copies them into the buffers. Inputs may have any
strides; results and the gradient of x are channels_last. The caller casts x under autocast, so that the cast is visible
in a graph. Weights and BatchNorm vectors are passed in their own dtype, as in the eager call.

BN -> ReLU and add -> ReLU without a convolution have no operators: Inductor generates the same memory-bound kernels for
them (two reductions and two elementwise kernels for a BatchNorm's forward and backward, fused with their neighbours),
and an opaque operator would prevent it from fusing further.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fastres.ops import dispatch, ends, frozen
from fastres.ops.backward import Backward
from fastres.ops.block import forward
from fastres.ops.call import Call, bound
from fastres.ops.conv_bn import Buffers, ConvBN, Kept
from fastres.ops.ends import BlockKept, End, Gradient
from fastres.ops.frozen import FrozenBackward
from fastres.ops.layout import Geometry, cast_gradients, krsc, nchw, nhwc, unaliased, wide


def digest(files: Iterable[Path]) -> str:
    """Return a name of 17 characters that changes with the names and contents of `files`."""
    parts = [
        hashlib.sha256(part).digest() for file in sorted(files) for part in (file.name.encode(), file.read_bytes())
    ]
    return f"v{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"


# AOTAutograd and Inductor store compiled graphs on disk, and find them by the names of their operators. Such a graph
# relies on what an operator returned and saved when it was compiled. The files of this folder say what that is, so
# their digest is the name of the overload: no version of fastres runs a graph that another one compiled.
OVERLOAD = digest(Path(__file__).parent.glob("*.py"))
_lib = torch.library.Library("fastres", "FRAGMENT")
for _schema in (
    # Arguments, for each layer: parameters: (weight, BN weight, BN bias); running: (mean, var); geometry: stride, pad,
    # dilation, groups; training: whether it uses batch statistics. end, sizes: `End.word` and `End.sizes`.
    # Results: moved: the new running mean and var of each layer that updates them, concatenated; statistics: mean,
    # rstd, scale and shift of each layer, concatenated; kept: every z (of a frozen block: the input of every
    # convolution on the main branch but the first), the pool's taps, and every weight that had to be copied for its
    # dtype or layout.
    "conv_bn_act(Tensor x, Tensor?[] parameters, Tensor?[] running, Tensor? residual, int[] geometry, float[] eps,"
    " float[] momentum, bool[] training, str end, int[] sizes)"
    " -> (Tensor out, Tensor moved, Tensor statistics, Tensor[] kept)",
    # Returns the gradients that output_mask (x, then the parameters) selects, in that order. out: the block's output
    # if the ReLU's mask is read from it, else None.
    "conv_bn_act_backward(Tensor dy, Tensor x, Tensor? out, Tensor?[] parameters, Tensor statistics, Tensor[] kept,"
    " int[] geometry, bool[] training, str end, int[] sizes, bool[] output_mask) -> Tensor[]",
    "conv_affine_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int[] geometry, bool relu)"
    " -> Tensor",
):
    _name, _, _rest = _schema.partition("(")
    _lib.define(f"{_name}.{OVERLOAD}({_rest}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

conv_bn_act = getattr(torch.ops.fastres.conv_bn_act, OVERLOAD)
conv_bn_act_backward = getattr(torch.ops.fastres.conv_bn_act_backward, OVERLOAD)
conv_affine_act = getattr(torch.ops.fastres.conv_affine_act, OVERLOAD)


def _pairs(tensors: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(tensors[::2], tensors[1::2], strict=True)


def _is_copied(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether `krsc` copies weight instead of returning a view."""
    return weight.dtype != dtype or not weight.permute(0, 2, 3, 1).is_contiguous()


# Implementations.


def _pairs_of(
    x: Tensor, weights: Sequence[Any], geometry: Any, eps: Any, training: Any, end: End
) -> tuple[ConvBN, ...]:
    shapes = [tuple(weight.shape) for weight in weights]
    geometries = [Geometry(*geometry[i : i + 4]) for i in range(0, len(geometry), 4)]
    statics = [*zip(shapes, geometries, eps, training, strict=True)]
    with dispatch.fusions(keep_activation=False, overlap=False):  # fixed by the schema
        return bound(x.shape, statics, end, x.dtype, x.device, dispatch.choice(x.dtype, x.device))


def _moved(x: Tensor, running: Sequence[Any], training: Sequence[bool]) -> Tensor:
    """Return a copy of the running statistics of the layers that update them, concatenated: mean, var of each layer."""
    homes = [t for pair, moves in zip(_pairs(running), training, strict=True) for t in pair if moves and t is not None]
    return torch.cat(homes) if homes else x.new_empty(0, dtype=wide(x.dtype))


def _forward(x: Tensor, parameters: Sequence[Any], running: Sequence[Any], residual: Any, *words: Any) -> Any:
    geometry, eps, momentum, training, end, sizes = words
    moved, at, buffers = _moved(x, running, training), 0, []
    for (mean, var), moves, move in zip(_pairs(running), training, momentum, strict=True):
        if moves and mean is not None:
            mean, var = moved[at : (at := at + mean.numel())], moved[at : (at := at + var.numel())]
        buffers.append(Buffers(mean, var, moves, move))
    weights = parameters[::3]
    with torch._C._DisableAutocast():
        ending = ends.of_words(end, sizes, residual)
        call = Call(_pairs_of(x, weights, geometry, eps, training, ending), tuple(buffers), ending)
        read = [krsc(weight, x.dtype) for weight in weights]
        run = call.read(x, x.dtype), read, parameters
        if call.frozen:
            (kept,), out, taps = frozen.forward([call], *run, [True] * (1 + len(parameters)))
        else:
            (kept,), out, taps = forward([call], *run)
    copies = [w for w, weight in zip(read, weights, strict=True) if _is_copied(weight, x.dtype)]
    statistics = torch.cat([t for pair in kept.pairs for t in (pair.mean, pair.rstd, pair.scale, pair.shift)])
    activations = [t for pair in kept.pairs if (t := pair.activation if call.frozen else pair.z) is not None]
    return unaliased(out), moved, statistics, [*activations, *([] if taps is None else [taps]), *copies]


def _backward(
    dy: Tensor, x: Tensor, out: Tensor | None, parameters: Sequence[Any], statistics: Tensor, kept: Sequence[Tensor],
    geometry: Any, training: Any, end: str, sizes: Any, output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    weights = parameters[::3]
    n, rest, ending, fixed = len(weights), iter(kept), ends.of_words(end, sizes), not any(training)
    stats = statistics.split([weight.shape[0] for weight in weights for _ in range(4)])
    inputs = {i: next(rest) for i in range(1, n + ending.last + 1)} if fixed else {}
    zs = {} if fixed else {i: next(rest) for i in range(n)}
    taps = next(rest) if isinstance(ending, ends.Pool) else None
    read = [next(rest) if _is_copied(weight, x.dtype) else krsc(weight, x.dtype) for weight in weights]
    pairs = [Kept._make((zs.get(i), *stats[4 * i : 4 * i + 4], read[i], inputs.get(i))) for i in range(n)]
    with torch._C._DisableAutocast():
        call = Call(_pairs_of(x, weights, geometry, [0.0] * n, training, ending), (), ending)
        block, masked = BlockKept(call.read(x, x.dtype), pairs), None if out is None else nhwc(out)
        needs_x, *needs = output_mask
        kind = FrozenBackward if fixed else Backward
        walk = kind(call.pairs, ending, block, masked, taps, parameters, needs_x, needs)
        dx, grads = walk.run(Gradient(nhwc(dy.to(x.dtype))))
    found = [None if dx is None else nchw(dx.value), *cast_gradients(grads, parameters)]
    return [grad for grad, wanted in zip(found, output_mask, strict=True) if wanted and grad is not None]


def _affine(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, geometry: Any, relu: bool
) -> Tensor:
    with torch._C._DisableAutocast():
        (pair,) = _pairs_of(x, [weight], geometry, [0.0], [False], ends.Linear())
        added = None if residual is None else nhwc(residual)
        return unaliased(pair.infer(nhwc(x), krsc(weight, x.dtype), scale, shift, added, relu))


# Fake implementations: shapes, strides and dtypes of the results.


def _conv_shape(x: Sequence[Any], filters: Sequence[Any], geometry: Sequence[int]) -> tuple[Any, ...]:
    """Return the shape [N, P, Q, K] of a convolution's output, given those of x [N, H, W, ...] and its filters."""
    n, h, w = x[:3]
    k, _, r, s = filters
    stride, pad, dilation, _ = geometry
    p, q = ((size + 2 * pad - dilation * (side - 1) - 1) // stride + 1 for size, side in ((h, r), (w, s)))
    return n, p, q, k


def _conv_shapes(
    x: Sequence[Any], filters: Sequence[Sequence[Any]], geometry: Sequence[int], end: End
) -> list[tuple[Any, ...]]:
    """Return the shape of each convolution's output in a block, given those of x [N, C, H, W] and of the filters."""
    n, _, h, w = x
    shapes: list[tuple[Any, ...]] = []
    for i, each in enumerate(filters):
        on_x = i == 0 or (end.projects and i + 1 == len(filters))
        shapes.append(_conv_shape((n, h, w) if on_x else shapes[-1], each, geometry[4 * i : 4 * i + 4]))
    return shapes


def _forward_fake(x: Tensor, parameters: Sequence[Any], running: Sequence[Any], residual: Any, *words: Any) -> Any:
    geometry, _, _, training, end, sizes = words
    weights, ending = parameters[::3], ends.of_words(end, sizes)
    shapes = _conv_shapes(x.shape, [weight.shape for weight in weights], geometry, ending)
    # A frozen block keeps the input of every convolution on the main branch but the first.
    kept = [x.new_empty(each) for each in (shapes if any(training) else shapes[: ending.last])]
    shape = ending.out_shape(shapes[ending.last])
    if isinstance(ending, ends.Pool):
        kept.append(x.new_empty(shape, dtype=torch.uint8))
    out = nchw(x.new_empty(shape))
    kept += [krsc(weight, x.dtype) for weight in weights if _is_copied(weight, x.dtype)]
    statistics = x.new_empty(4 * sum(weight.shape[0] for weight in weights), dtype=wide(x.dtype))
    return out, _moved(x, running, training), statistics, kept


def _backward_fake(
    dy: Tensor, x: Tensor, out: Any, parameters: Sequence[Any], statistics: Any, kept: Any, geometry: Any,
    training: Any, end: Any, sizes: Any, output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    n, c, h, w = x.shape
    grads = [nchw(x.new_empty((n, h, w, c)))] if output_mask[0] else []
    wanted = zip(parameters, output_mask[1:], strict=True)
    return grads + [torch.empty_like(p) for p, wants in wanted if wants and p is not None]


def _affine_fake(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, geometry: Any, relu: bool
) -> Tensor:
    n, _, h, w = x.shape
    return nchw(x.new_empty(_conv_shape((n, h, w), weight.shape, geometry)))


# Autograd, registered by hand on the Autograd key: `torch.library.register_autograd` doesn't support lists that contain
# None, and silently gives zero tangents in forward mode.


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Any, words: Any, x: Tensor, residual: Tensor | None, *parameters: Any) -> Any:
        out, moved, statistics, kept = below()
        ctx.words, ctx.layers = words, len(parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moved, statistics, *kept)
        *_, training, end, sizes = words
        read = out if ends.of_words(end, sizes).keeps_output(not any(training)) else None
        ctx.save_for_backward(x, read, statistics, *parameters, *kept)
        return out, moved, statistics, *kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fastres::conv_bn_act has no second derivative. Compute second derivatives outside torch.compile and "
                "dispatch modes: there, fastres's modules differentiate plain PyTorch instead"
            )
        x, out, statistics, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.layers], rest[ctx.layers :]
        _, _, needs_x, needs_residual, *needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        geometry, _, _, training, end, sizes = ctx.words
        found: Iterator[Tensor] = iter(())
        if needs_x or any(needs):
            found = iter(
                conv_bn_act_backward(
                    dy, x, out, parameters, statistics, kept, geometry, training, end, sizes, [needs_x, *needs]
                )
            )  # fmt: skip
        dx = next(found) if needs_x else None
        dresidual = torch.ops.aten.threshold_backward.default(dy, out, 0) if needs_residual else None
        return None, None, dx, dresidual, *(next(found) if need else None for need in needs)


def _refuse_transforms(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise NotImplementedError in forward-mode AD and under `torch.func` transforms.

    Without this check, forward mode would give zero tangents, and `torch.func` a graph of the wrong level.
    """
    dual = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if dual or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"fastres::{name} supports reverse-mode autograd only. Use forward-mode differentiation and torch.func "
            "transforms on fastres's modules, which then run plain PyTorch"
        )


def _forward_autograd(
    keyset: Any, x: Tensor, parameters: Sequence[Any], running: Sequence[Any], residual: Tensor | None, *static: Any
) -> Any:
    differentiable = (x, residual, *parameters)
    _refuse_transforms("conv_bn_act", differentiable)

    def below() -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            after = keyset & torch._C._after_autograd_keyset
            return conv_bn_act.redispatch(after, x, parameters, running, residual, *static)

    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)):
        return below()
    out, moved, statistics, *kept = _Function.apply(below, static, x, residual, *parameters)
    return out, moved, statistics, kept


def _affine_autograd(keyset: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Tensor:
    tensors = (x, weight, scale, shift, rest[0])
    _refuse_transforms("conv_affine_act", tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError("fastres::conv_affine_act has no derivative; use fastres::conv_bn_act")
    with torch._C._AutoDispatchBelowAutograd():
        after = keyset & torch._C._after_autograd_keyset
        return conv_affine_act.redispatch(after, x, weight, scale, shift, *rest)


for _op, _body, _fake in (
    (conv_bn_act, _forward, _forward_fake),
    (conv_bn_act_backward, _backward, _backward_fake),
    (conv_affine_act, _affine, _affine_fake),
):
    _lib.impl(_op, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(_op.name(), _fake, lib=_lib)
_lib.impl(conv_bn_act, _forward_autograd, "Autograd", with_keyset=True)
_lib.impl(conv_affine_act, _affine_autograd, "Autograd", with_keyset=True)


# FLOP formulas: `torch.utils.flop_counter` counts zero for an operator without one. It passes shapes for tensors.


def _conv_flops(z: Sequence[int], w: Sequence[int]) -> int:
    """Return the FLOPs of a convolution's fprop, dgrad or wgrad: 2 numel(z) numel(w) / K.

    z: shape of its output; w: shape of its filters, K first.
    """
    return 2 * math.prod(z) * math.prod(w[1:])


@register_flop_formula(torch.ops.fastres.conv_affine_act)
def _affine_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return _conv_flops(out_shape, weight)


@register_flop_formula(torch.ops.fastres.conv_bn_act)
def _forward_flops(
    x: Any, parameters: Sequence[Any], running: Any, residual: Any, geometry: Any, eps: Any, momentum: Any,
    training: Any, end: str, sizes: Any, **_: Any,
) -> int:  # fmt: skip
    weights = parameters[::3]
    return sum(map(_conv_flops, _conv_shapes(x, weights, geometry, ends.of_words(end, sizes)), weights))


@register_flop_formula(torch.ops.fastres.conv_bn_act_backward)
def _backward_flops(
    dy: Any, x: Any, out: Any, parameters: Sequence[Any], statistics: Any, kept: Sequence[Any], geometry: Any,
    training: Any, end: str, sizes: Any, output_mask: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    weights, total, ending, fixed = parameters[::3], 0, ends.of_words(end, sizes), not any(training)
    for i, (weight, z) in enumerate(zip(weights, _conv_shapes(x, weights, geometry, ending), strict=True)):
        on_shortcut = ending.projects and i + 1 == len(weights)
        dgrad = output_mask[0] or (not on_shortcut and any(output_mask[: 3 * i + 1]))
        wgrad = output_mask[3 * i + 1] or (fixed and output_mask[3 * i + 2])
        total += (dgrad + wgrad) * _conv_flops(z, weight)
    return total
