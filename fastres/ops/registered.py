"""The fused calls as PyTorch operators: what `torch.compile`, FlopCounterMode and other dispatch modes see.

    conv_bn_act       a chain of conv-BN units with its end, `conv_bn_act.forward`; trains
    conv_affine_act   [relu](scale conv(x, w) + shift + residual), one unit whose statistics are given; no gradient

Bodies are those of the eager call, on every device. An operator that mutates can have no derivative, so `conv_bn_act`
returns the moved running statistics and the caller copies them home. Inputs may have any strides; results, and the
gradient for x, are channels_last. Casts of x under autocast are the caller's, so that they show in a graph; weights and
BN vectors are taken in the dtype they are kept in, as the eager call takes them.

BN -> ReLU and add -> ReLU without a convolution are no operators: Inductor makes the same passes over memory of them
(BN's two reductions and its two maps, each with its neighbours), and an opaque operator would only keep it from fusing
those further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fastres.ops import dispatch, launch
from fastres.ops.conv_bn_act import Backward, Call, End, Gradient, Layer, choose_steps, forward, krsc, unaliased
from fastres.ops.flop_formulas import conv_flops, register_conv_flops
from fastres.ops.steps import Geometry, nchw, nhwc, wide

_lib = torch.library.Library("fastres", "FRAGMENT")
for _schema in (
    # parameters: (weight, BN weight, BN bias) a layer; running: (mean, var) a layer; geometry: stride, pad, dilation,
    # groups a layer; training: whether a layer takes the batch's statistics; end, sizes: the fields of `End`.
    # moved: running mean and var of every layer that moves them, behind one another; statistics: mean, rstd, scale,
    # shift a layer, behind one another; kept: every z, the pool's taps, every weight that had to be cast or laid out.
    "conv_bn_act(Tensor x, Tensor?[] parameters, Tensor?[] running, Tensor? residual, int[] geometry, float[] eps,"
    " float[] momentum, bool[] training, str end, int[] sizes)"
    " -> (Tensor out, Tensor moved, Tensor statistics, Tensor[] kept)",
    # The gradients that output_mask (x, then the parameters) asks for, in that order. out: where the ReLU's mask is
    # read from it.
    "conv_bn_act_backward(Tensor dy, Tensor x, Tensor? out, Tensor?[] parameters, Tensor statistics, Tensor[] kept,"
    " int[] geometry, bool[] training, str end, int[] sizes, bool[] output_mask) -> Tensor[]",
    "conv_affine_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int[] geometry, bool relu)"
    " -> Tensor",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

conv_bn_act = torch.ops.fastres.conv_bn_act.default
conv_bn_act_backward = torch.ops.fastres.conv_bn_act_backward.default
conv_affine_act = torch.ops.fastres.conv_affine_act.default


@dataclass(frozen=True)
class Chain:
    """The static arguments of `conv_bn_act`, by layer."""

    geometry: Sequence[int]
    eps: Sequence[float]
    momentum: Sequence[float]
    training: Sequence[bool]
    end: str
    sizes: Sequence[int]

    @staticmethod
    def of(layers: Sequence[Layer], end: End) -> Chain:
        return Chain(
            [size for layer in layers for size in layer.geometry],
            [layer.eps for layer in layers],
            [layer.momentum for layer in layers],
            [layer.batch_statistics for layer in layers],
            end.kind,
            [end.kernel, end.stride, end.pad],
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.geometry, self.eps, self.momentum, self.training, self.end, self.sizes


def run(call: Call, x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """`conv_bn_act` on what the eager call was given; moves the running statistics."""
    running = [t for layer in call.layers for t in layer.running or (None, None)]
    out, moved, _, _ = conv_bn_act(x, list(parameters), running, None, *Chain.of(call.layers, call.end).arguments)
    tracked = [t for layer in call.layers if layer.tracked for t in layer.running or ()]
    with torch.no_grad():
        for layer in call.layers:
            if layer.counter is not None:
                layer.counter.add_(1)
        for home, value in zip(tracked, moved.split([t.numel() for t in tracked]), strict=True):
            home.copy_(value)
    return out


def _layers(
    geometry: Sequence[int],
    training: Sequence[bool],
    eps: Sequence[float] | None = None,
    momentum: Sequence[float] | None = None,
    running: Sequence[tuple[Tensor, Tensor] | None] | None = None,
) -> tuple[Layer, ...]:
    n = len(training)
    eps, momentum, running = eps or [0.0] * n, momentum or [0.0] * n, running or [None] * n
    return tuple(
        Layer(Geometry(*geometry[4 * i : 4 * i + 4]), eps[i], momentum[i], training[i], running[i] is not None, at)
        for i, at in enumerate(running)
    )


def _pairs(tensors: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(tensors[::2], tensors[1::2], strict=True)


def _is_copied(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `krsc` makes a new tensor of it."""
    return weight.dtype != dtype or not weight.permute(0, 2, 3, 1).is_contiguous()


# Bodies.


def _call(x: Tensor, weights: Sequence[Any], layers: tuple[Layer, ...], end: End) -> Call:
    with dispatch.fusions(keep_activation=False, overlap=False):  # the schema names what is kept
        return Call(layers, end, choose_steps(x.shape, weights, layers, end, x.dtype, x.device))


def _forward(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    residual: Tensor | None,
    geometry: Sequence[int],
    eps: Sequence[float],
    momentum: Sequence[float],
    training: Sequence[bool],
    end: str,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    homes = [t for pair, moves in zip(_pairs(running), training, strict=True) for t in pair if moves and t is not None]
    moved = torch.cat(homes) if homes else x.new_empty(0, dtype=wide(x.dtype))
    views = iter(moved.split([t.numel() for t in homes]))
    pairs = [
        None if mean is None or var is None else (next(views), next(views)) if moves else (mean, var)
        for (mean, var), moves in zip(_pairs(running), training, strict=True)
    ]
    layers = _layers(geometry, training, eps, momentum, pairs)
    weights: Any = parameters[::3]
    with torch._C._DisableAutocast():
        call = _call(x, weights, layers, End(end, *sizes))
        out, zs, stats, read, _, taps = forward(call, x, x.dtype, parameters, residual)
        copies = [w for w, weight in zip(read, weights, strict=True) if _is_copied(weight, x.dtype)]
        return unaliased(out), moved, torch.cat(stats), [*zs, *([] if taps is None else [taps]), *copies]


def _backward(
    dy: Tensor,
    x: Tensor,
    out: Tensor | None,
    parameters: Sequence[Tensor | None],
    statistics: Tensor,
    kept: Sequence[Tensor],
    geometry: Sequence[int],
    training: Sequence[bool],
    end: str,
    sizes: Sequence[int],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    layers, weights = _layers(geometry, training), list(parameters[::3])
    channels = [weight.shape[0] for weight in weights if weight is not None]
    stats = statistics.split([k for k in channels for _ in range(4)])
    zs, rest = kept[: len(layers)], iter(kept[len(layers) :])
    taps = next(rest) if end == "pool" else None
    read = [next(rest) if _is_copied(w, x.dtype) else krsc(w, x.dtype) for w in weights if w is not None]
    with torch._C._DisableAutocast():
        call = _call(x, weights, layers, End(end, *sizes))
        a = call.read(x, x.dtype)
        masked = a if out is None else nhwc(out)  # not read where there is no `out`
        of_layers = (zs, stats, read, [None] * len(layers))
        work = Backward(call, a, masked, taps, *of_layers, parameters, output_mask[0], output_mask[1:])
        dx, grads = work.run(Gradient(nhwc(dy.to(x.dtype))))
    found = [None if dx is None else nchw(dx.value), *grads]
    return [grad for grad, wanted in zip(found, output_mask, strict=True) if wanted and grad is not None]


def _affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    geometry: Sequence[int],
    relu: bool,
) -> Tensor:
    n, _, h, w = x.shape
    with torch._C._DisableAutocast():
        step = launch.step((n, h, w), weight, Geometry(*geometry), x.dtype, x.device)
        added = None if residual is None else nhwc(residual)
        return unaliased(step.infer(nhwc(x), krsc(weight, x.dtype), scale, shift, added, relu))


# Fake: shapes, strides and dtypes of the results.


def _conv_shape(x: Sequence[Any], weight: Tensor, geometry: Sequence[int]) -> tuple[Any, ...]:
    """[N, P, Q, K] from [N, H, W, ...]."""
    n, h, w = x[:3]
    k, _, r, s = weight.shape
    stride, pad, dilation, _ = geometry
    p, q = ((size + 2 * pad - dilation * (side - 1) - 1) // stride + 1 for size, side in ((h, r), (w, s)))
    return n, p, q, k


def _forward_fake(
    x: Tensor,
    parameters: Sequence[Any],
    running: Sequence[Tensor | None],
    residual: Tensor | None,
    geometry: Sequence[int],
    eps: Sequence[float],
    momentum: Sequence[float],
    training: Sequence[bool],
    end: str,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    n, _, h, w = x.shape
    first, kept, weights = (n, h, w), [], parameters[::3]
    at: Sequence[Any] = first
    depth = len(weights) - (end == "project")
    for i, weight in enumerate(weights):
        at = _conv_shape(first if i == depth else at, weight, geometry[4 * i : 4 * i + 4])
        kept.append(x.new_empty(at))
    shape: Sequence[Any] = kept[depth - 1].shape
    if end == "pool":
        kernel, stride, pad = sizes
        p, q = ((size + 2 * pad - kernel) // stride + 1 for size in shape[1:3])
        shape = (n, p, q, shape[3])
        kept.append(x.new_empty(shape, dtype=torch.uint8))
    out = nchw(x.new_empty(shape))
    for weight in weights:
        if _is_copied(weight, x.dtype):
            kept.append(krsc(weight, x.dtype))
    homes = [t for pair, moves in zip(_pairs(running), training, strict=True) for t in pair if moves and t is not None]
    moved = torch.cat(homes) if homes else x.new_empty(0, dtype=wide(x.dtype))
    return out, moved, x.new_empty(4 * sum(weight.shape[0] for weight in weights), dtype=wide(x.dtype)), kept


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    out: Tensor | None,
    parameters: Sequence[Tensor | None],
    statistics: Tensor,
    kept: Sequence[Tensor],
    geometry: Sequence[int],
    training: Sequence[bool],
    end: str,
    sizes: Sequence[int],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    n, c, h, w = x.shape
    grads = [nchw(x.new_empty((n, h, w, c)))] if output_mask[0] else []
    wanted = zip(parameters, output_mask[1:], strict=True)
    return grads + [torch.empty_like(p) for p, wants in wanted if wants and p is not None]


def _affine_fake(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, geometry: Any, relu: bool
) -> Tensor:
    n, _, h, w = x.shape
    return nchw(x.new_empty(_conv_shape((n, h, w), weight, geometry)))


# Autograd. By hand on the Autograd key: `torch.library.register_autograd` takes no list that holds None, and it answers
# forward-mode differentiation with zeros.

_MASKED_BY_OUTPUT = ("add", "project", "pad", "join")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Any, chain: Chain, x: Tensor, residual: Tensor | None, *parameters: Any) -> Any:
        out, moved, statistics, kept = below()
        ctx.chain, ctx.layers = chain, len(parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moved, statistics, *kept)
        read = out if chain.end in _MASKED_BY_OUTPUT else None
        ctx.save_for_backward(x, read, statistics, *parameters, *kept)
        return out, moved, statistics, *kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fastres::conv_bn_act has no second derivative; differentiate twice outside torch.compile and dispatch "
                "modes, where fastres's modules take the plain formulation"
            )
        x, out, statistics, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.layers], rest[ctx.layers :]
        _, _, needs_x, needs_residual, *needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        chain: Chain = ctx.chain
        found: Iterator[Tensor] = iter(())
        if needs_x or any(needs):
            found = iter(
                conv_bn_act_backward(
                    dy, x, out, parameters, statistics, kept,
                    chain.geometry, chain.training, chain.end, chain.sizes, [needs_x, *needs],
                )
            )  # fmt: skip
        dx = next(found) if needs_x else None
        dresidual = torch.ops.aten.threshold_backward.default(dy, out, 0) if needs_residual else None
        return None, None, dx, dresidual, *(next(found) if need else None for need in needs)


def _refuse_transforms(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Forward mode would get zero tangents, `torch.func` a graph of the wrong level."""
    dual = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if dual or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"fastres::{name} serves reverse-mode autograd only; forward-mode differentiation and torch.func "
            "transforms work on fastres's modules, which then take the plain path"
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
    out, moved, statistics, *kept = _Function.apply(below, Chain(*static), x, residual, *parameters)
    return out, moved, statistics, kept


def _affine_autograd(keyset: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Tensor:
    tensors = (x, weight, scale, shift, rest[0])
    _refuse_transforms("conv_affine_act", tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError("fastres::conv_affine_act has no derivative; fastres::conv_bn_act has one")
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


# FLOPs.

register_conv_flops(torch.ops.fastres.conv_affine_act, (0, "weight"))


@register_flop_formula(torch.ops.fastres.conv_bn_act)
def _forward_flops(x: Any, parameters: Sequence[Any], *_: Any, out_shape: Any, **__: Any) -> int:
    return sum(map(conv_flops, out_shape[3], parameters[::3]))


@register_flop_formula(torch.ops.fastres.conv_bn_act_backward)
def _backward_flops(
    dy: Any, x: Any, out: Any, parameters: Sequence[Any], statistics: Any, kept: Sequence[Any], geometry: Any,
    training: Any, end: str, sizes: Any, output_mask: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    weights, total = parameters[::3], 0
    for i, weight in enumerate(weights):
        on_shortcut = end == "project" and i == len(weights) - 1
        dgrad = output_mask[0] or (not on_shortcut and any(output_mask[: 3 * i + 1]))
        total += (dgrad + output_mask[3 * i + 1]) * conv_flops(kept[i], weight)
    return total
