"""Convolution with its BatchNorm folded in, for inference: the folding, and one function per engine that runs it.

With scale = weight / sqrt(running_var + eps) per channel, bn(conv(x, w) + b) = conv(x, scale w) + shift where
shift = bias + (b - running_mean) scale. Activations NHWC-contiguous [N, H, W, C], weights KRSC-contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops.layout import Geometry, nchw, nhwc, wide


class Folded(NamedTuple):
    """w: KRSC. shift [K]: float32 (float64 for float64 weights), `bias` the same rounded to w's dtype, as ATen wants
    it; None where nothing is added. scale [K], for a w of 8 bits only: w stands for scale w."""

    w: Tensor
    shift: Tensor | None
    bias: Tensor | None
    scale: Tensor | None = None


def fold(conv: nn.Conv2d, norm: Any, layer: str) -> tuple[Tensor, Tensor]:
    """(scale w [K, C/groups, R, S], shift [K]) in float64; norm: a BatchNorm2d with running statistics, or None.

    Raises ValueError naming `layer` if a scale, a weight or a shift isn't finite.
    """
    w = conv.weight.detach().double()
    shift = w.new_zeros(w.shape[0]) if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        _require_finite(scale, layer, "the folded scale weight / sqrt(running_var + eps)")
        shift = (shift - norm.running_mean.detach().double()) * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        w = w * scale.view(-1, 1, 1, 1)
    _require_finite(w, layer, "the folded weight")
    _require_finite(shift, layer, "the folded shift")
    return w, shift


def pack(w: Tensor, shift: Tensor | None, dtype: torch.dtype, layer: str) -> Folded:
    """`fold`'s result in `dtype`. Raises ValueError naming `layer` if it leaves dtype's range."""
    bias = None if shift is None else shift.to(dtype)
    krsc = nhwc(w.to(dtype))
    for tensor, what in ((krsc, "weight"), (bias, "shift")):
        if tensor is not None:
            _require_finite(tensor, layer, f"the folded {what} in {dtype}")
    return Folded(krsc, None if shift is None else shift.to(wide(dtype)), bias)


def _require_finite(tensor: Tensor, layer: str, what: str) -> None:
    finite = tensor.isfinite()
    if not finite.all():
        channels = (~finite.reshape(finite.shape[0], -1)).any(1).nonzero().flatten().tolist()
        raise ValueError(f"layer {layer!r}: {what} isn't finite in output channels {channels[:8]} of {len(finite)}")


def by_library(x: Tensor, residual: Tensor | None = None, *, weights: Folded, geometry: Geometry, relu: bool) -> Tensor:
    """[relu](conv(x, w) + shift + residual) by ATen, one pass after the other."""
    y = nhwc(F.conv2d(nchw(x), nchw(weights.w), weights.bias, *geometry))
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def by_library_and_kernel(
    x: Tensor, residual: Tensor | None = None, *, weights: Folded, ones: Tensor, geometry: Geometry, relu: bool
) -> Tensor:
    """[relu](conv(x, w) + shift + residual): the convolution by ATen, the rest by our kernel in one pass; ones [K]."""
    from fastres.kernels.batch_norm import normalize

    z = nhwc(F.conv2d(nchw(x), nchw(weights.w), None, *geometry))
    return normalize(
        z, ones, torch.zeros_like(ones) if weights.shift is None else weights.shift, relu=relu, residual=residual
    )


def by_cudnn(x: Tensor, residual: Tensor | None = None, *, weights: Folded, geometry: Geometry) -> Tensor:
    """relu(conv(x, w) + shift + residual) by cuDNN's fused convolution."""
    sizes = geometry.both
    if residual is None:
        return nhwc(torch.cudnn_convolution_relu(nchw(x), nchw(weights.w), weights.bias, *sizes))
    return nhwc(torch.cudnn_convolution_add_relu(nchw(x), nchw(weights.w), nchw(residual), 1.0, weights.bias, *sizes))


def by_triton(
    x: Tensor, residual: Tensor | None = None, *, weights: Folded, geometry: Geometry, **epilogue: Any
) -> Tensor:
    """out_scale [relu](scale conv(x, w) + shift + residual_scale residual) by our kernel, whose further arguments
    `epilogue` is."""
    from fastres.kernels.fprop import conv_fprop
    from fastres.kernels.problem import ConvProblem

    terms = {"scale": weights.scale, "shift": weights.shift, "residual": residual}
    y = conv_fprop(x, weights.w, ConvProblem.of(x.shape, weights.w.shape, *geometry), **terms, **epilogue)
    assert isinstance(y, Tensor)  # a pair only where statistics are asked for
    return y


def by_stem(x: Tensor, *, weights: Folded, geometry: Geometry, relu: bool, precision: Any) -> Tensor:
    """[relu](conv(x, w) + shift) of images of few channels by our kernel over packed images."""
    from fastres.kernels.problem import ConvProblem
    from fastres.kernels.stem import conv_stem, pack_filters, pack_images

    problem = ConvProblem.of(x.shape, weights.w.shape, *geometry)
    images = pack_images(nchw(x), problem, x.dtype)
    y = conv_stem(images, pack_filters(weights.w), problem, shift=weights.shift, relu=relu, precision=precision)
    assert isinstance(y, Tensor)
    return y


def by_chain(x: Tensor, residual: Tensor, *, weights: Sequence[Folded]) -> tuple[Tensor, Tensor]:
    """A block's 3x3, its 1x1 expansion with residual, and the next block's 1x1 reduction, each with ReLU, by one
    kernel: (the block's output, the reduction)."""
    from fastres.kernels.chain import bottleneck_chain

    spatial, expand, reduce = weights
    shifts = [torch.zeros(f.w.shape[0], device=x.device) if f.shift is None else f.shift for f in weights]
    return bottleneck_chain(x, spatial.w, shifts[0], expand.w, shifts[1], residual, reduce.w, shifts[2])


def by_pool(x: Tensor, *, sizes: tuple[int, int, int]) -> Tensor:
    """max_pool(x) by our kernel: the library's writes the index of every maximum, too, eight bytes each; sizes: kernel,
    stride and pad."""
    from fastres.kernels.max_pool import max_pool

    kernel, stride, pad = sizes
    return max_pool(x, kernel=kernel, stride=stride, pad=pad)
