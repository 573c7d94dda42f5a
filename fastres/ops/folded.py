"""Convolutions with folded BatchNorm, for inference: `fold`, `pack`, and one function per engine that runs them.

With scale = weight / sqrt(running_var + eps) per channel, bn(conv(x, w) + b) = conv(x, scale w) + shift where
shift = bias + (b - running_mean) scale. Activations are NHWC-contiguous [N, H, W, C], weights KRSC-contiguous
[K, R, S, C/groups]. A residual has the output's shape [N, P, Q, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops.layout import Geometry, nchw, nhwc, wide


class Folded(NamedTuple):
    """The weights of a convolution with folded BatchNorm.

    w [K, R, S, C/groups]: in the dtype of the computation. shift [K]: float32 (float64 for float64 weights).
    bias [K]: shift rounded to w's dtype, as ATen requires it. Both are None if nothing is added.
    scale [K]: only for w in 8 bits, else None. float32, the scale of the weights times that of the input, so that the
    result is scale conv(x, w) + shift for the stored numbers x (minus the zero point in int8) and w. bias is then None.
    """

    w: Tensor
    shift: Tensor | None
    bias: Tensor | None
    scale: Tensor | None = None


def fold(conv: nn.Conv2d, norm: Any, layer: str) -> tuple[Tensor, Tensor]:
    """Return the folded weight scale w [K, C/groups, R, S] and shift [K], both float64.

    norm: a BatchNorm2d with running statistics, or None. layer: the name that the error message gives. Raises
    ValueError if a scale, weight or shift is not finite.
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
    """Return `fold`'s result as `Folded`, with w and bias in the floating-point `dtype`.

    shift may be None. layer: the name that the error message gives. Raises ValueError if a value is not finite in
    `dtype`.
    """
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
    """Return [relu](conv(x, w) + shift + residual) [N, P, Q, K], by separate ATen operators."""
    y = nhwc(F.conv2d(nchw(x), nchw(weights.w), weights.bias, *geometry))
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def by_library_and_kernel(
    x: Tensor, residual: Tensor | None = None, *, weights: Folded, ones: Tensor, geometry: Geometry, relu: bool
) -> Tensor:
    """Return [relu](conv(x, w) + shift + residual) [N, P, Q, K]: ATen convolves, one kernel of ours does the rest.

    ones [K]: float32 ones, because this kernel (`normalize`) also multiplies by a scale.
    """
    from fastres.kernels.batch_norm import normalize

    z = nhwc(F.conv2d(nchw(x), nchw(weights.w), None, *geometry))
    return normalize(
        z, ones, torch.zeros_like(ones) if weights.shift is None else weights.shift, relu=relu, residual=residual
    )


def by_cudnn(x: Tensor, residual: Tensor | None = None, *, weights: Folded, geometry: Geometry) -> Tensor:
    """Return relu(conv(x, w) + shift + residual) [N, P, Q, K], by cuDNN's fused convolution."""
    sizes = geometry.both
    if residual is None:
        return nhwc(torch.cudnn_convolution_relu(nchw(x), nchw(weights.w), weights.bias, *sizes))
    return nhwc(torch.cudnn_convolution_add_relu(nchw(x), nchw(weights.w), nchw(residual), 1.0, weights.bias, *sizes))


def by_triton(
    x: Tensor, residual: Tensor | None = None, *, weights: Folded, geometry: Geometry, **epilogue: Any
) -> Tensor:
    """Return out_scale [relu](scale conv(x, w) + shift + residual_scale residual) [N, P, Q, K], by our kernel.

    epilogue: further arguments of `kernels.fprop.conv_fprop` (relu, precision, out_scale, residual_scale, out_dtype).
    """
    from fastres.kernels.fprop import conv_fprop
    from fastres.kernels.problem import ConvProblem

    terms = {"scale": weights.scale, "shift": weights.shift, "residual": residual}
    y = conv_fprop(x, weights.w, ConvProblem.of(x.shape, weights.w.shape, *geometry), **terms, **epilogue)
    assert isinstance(y, Tensor)  # (z, partials) only with statistics=True
    return y


def by_stem(x: Tensor, *, weights: Folded, geometry: Geometry, relu: bool, precision: Any) -> Tensor:
    """Return [relu](conv(x, w) + shift) [N, P, Q, K] for images x of few channels, by our kernel for packed images."""
    from fastres.kernels.problem import ConvProblem
    from fastres.kernels.stem import conv_stem, pack_filters, pack_images

    problem = ConvProblem.of(x.shape, weights.w.shape, *geometry)
    images = pack_images(nchw(x), problem, x.dtype)
    y = conv_stem(images, pack_filters(weights.w), problem, shift=weights.shift, relu=relu, precision=precision)
    assert isinstance(y, Tensor)
    return y


def by_chain(x: Tensor, residual: Tensor, *, weights: Sequence[Folded]) -> tuple[Tensor, Tensor]:
    """Run a block's 3x3 convolution, its 1x1 expansion and the next block's 1x1 reduction in one kernel.

    Each is followed by a ReLU; the residual is added before that of the expansion. x: the 3x3's input. weights: of the
    three convolutions, in this order. Returns (the block's output, the reduction's output).
    """
    from fastres.kernels.chain import bottleneck_chain

    spatial, expand, reduce = weights
    shifts = [torch.zeros(f.w.shape[0], device=x.device) if f.shift is None else f.shift for f in weights]
    return bottleneck_chain(x, spatial.w, shifts[0], expand.w, shifts[1], residual, reduce.w, shifts[2])


def by_pool(x: Tensor, *, sizes: tuple[int, int, int]) -> Tensor:
    """Return max_pool(x) [N, U, V, C], by our kernel. sizes: kernel, stride and pad.

    The library's max pool also writes the index of every maximum, 8 bytes each.
    """
    from fastres.kernels.max_pool import max_pool

    kernel, stride, pad = sizes
    return max_pool(x, kernel=kernel, stride=stride, pad=pad)
