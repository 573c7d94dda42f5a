"""The definition of every fused operation in plain PyTorch. Start reading here.

    residual_block, plain_block, stem       the blocks of a net, which call its modules
    conv_bias_act, conv_quantised           a convolution of `optimize`'s plan, in floating point and in 8 bits
    conv_fprop ... pad_shortcut_backward    the steps of a fused block's forward and backward, as kernels compute them

Tests compare kernels with these functions, benchmarks use them as a baseline, and they are the fallback where no kernel
is available. The block functions take x [N, C, H, W] of any floating dtype and are differentiable; their only side
effects are those of the modules. The steps take the same tensors as the kernel launchers in `fastres.kernels`:
activations are contiguous NHWC [N, H, W, C], weights are contiguous KRSC [K, R, S, C/groups], and per-channel vectors
[C] and partial sums are float32 (float64 for float64 activations). Source of the equations: section 3.4 of the ResNet
paper, and Ioffe & Szegedy (2015), with

    z_hat = (z - mean) rstd,   a = relu(scale z + shift),   scale = weight rstd,   shift = bias - mean scale
    g = dy [a > 0],        dz = c_g g + c_z z + c_1 per channel

z is the output of a convolution and the input of its BatchNorm; a is the activation after BatchNorm and ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops.layout import Geometry, nchw, nhwc, wide

Function = Callable[[Tensor], Tensor]
Pair = tuple[Function, Function]  # (conv, BatchNorm): modules, or functions of a tensor
Affine = tuple[Tensor, Tensor]  # (scale, shift), each [C]
Prologue = Affine | None  # if given, a convolution reads relu(scale a + shift) instead of a
# (z, mean) of a block's last BN; the same of its projection's BN, or None.
EndNorms = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]


class BNBackward(NamedTuple):
    """The coefficients of BatchNorm's backward, dz = c_g g + c_z z + c_1, each [K]; z is [N, P, Q, K].

    With running statistics dz = c_g g; c_z and c_1 are None, and z is not read.
    """

    z: Any
    c_g: Tensor
    c_z: Tensor | None
    c_1: Tensor | None


OnLoad = BNBackward | None  # if given, the argument `dz` holds g, and the operation computes c_g g + c_z z + c_1


def branch(x: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Run F(x), the main branch of a block: conv-BN pairs with ReLU between them, and none after the last.

    Source: section 3.4 of the paper ("BN right after each convolution and before activation").
    """
    for conv, bn in pairs[:-1]:
        x = F.relu(bn(conv(x)))
    conv, bn = pairs[-1]
    return bn(conv(x))


def residual_block(x: Tensor, pairs: Sequence[Pair], shortcut: Function | None = None) -> Tensor:
    """Run a residual block, relu(F(x) + shortcut(x)), where F is `branch`.

    shortcut: None for the identity, else a projection `Sequential(conv, bn)` or an option-A module. Source: equations 1
    and 2 of the paper.
    """
    return F.relu(branch(x, pairs) + (x if shortcut is None else shortcut(x)))


def plain_block(x: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Run relu(F(x)), a block without a shortcut. Source: the plain nets of the paper, section 3.3."""
    return F.relu(branch(x, pairs))


def stem(x: Tensor, conv: Function, bn: Function, pool: Function) -> Tensor:
    """Run the stem of a net, maxpool(relu(bn(conv(x)))). Source: Table 1 of the paper, conv1 and conv2_x's pool."""
    return pool(F.relu(bn(conv(x))))


def pad_shortcut(x: Tensor, stride: int, channels: int) -> Tensor:
    """Return option A's shortcut: every `stride`-th pixel of x [N, C, H, W], with zero channels appended.

    The result is [N, channels, ceil(H/stride), ceil(W/stride)]. Source: section 3.3 of the paper.
    """
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, channels - x.shape[1]))


def pad_shortcut_add_relu(y: Tensor, x: Tensor, stride: int) -> Tensor:
    """Return relu(y + pad_shortcut(x)) [N, K, P, Q], the end of a block with an option-A shortcut."""
    return F.relu(y + pad_shortcut(x, stride, y.shape[1]))


def conv_bias_act(
    x: Tensor, residual: Any, *, w: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool
) -> Tensor:
    """Return [relu](conv(x, w) + bias + residual), one convolution of an inference plan, with its BatchNorm folded in.

    x: [N, C, H, W]; w: [K, C/groups, R, S]; bias: [K] or None; residual: [N, K, P, Q] or None; result: [N, K, P, Q].
    """
    y = F.conv2d(x, w, bias, *geometry)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def conv_quantised(
    x: Tensor, residual: Tensor | None = None, *, weights: Any, geometry: Geometry, relu: bool, grids: Any,
    dtype: torch.dtype, wide: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return [relu](scale conv(x, w) + shift + residual), a convolution of an 8-bit plan, simulated in dtype `wide`.

    x: quantised, NHWC; residual: quantised, may broadcast, or None; weights: `folded.Folded`; grids:
    `quantised.Quantised`, the quantisation grids of x, residual and output. The result is rounded to the output's grid,
    or has dtype `dtype` if there is none. float8 products are exact in float32 (and TF32), and sums of int8 products
    in float64.
    """
    y = nhwc(F.conv2d(nchw(grids.x.units(x, wide)), nchw(weights.w.to(wide)), None, *geometry)) * weights.scale
    if weights.shift is not None:
        y += weights.shift
    if residual is not None:
        y = y + grids.residual.units(residual, wide) * grids.residual.scale
    y = y.relu_() if relu else y
    return y.to(dtype) if grids.out is None else grids.out.nearest(y * (1 / grids.out.scale))


def conv_fprop(x: Tensor, w: Tensor, *, geometry: Geometry) -> Tensor:
    """Return z [N, P, Q, K] = conv(x, w) for x [N, H, W, C] and w [K, R, S, C/groups]."""
    return nhwc(F.conv2d(nchw(x), nchw(w), None, *geometry))


def conv_dgrad(dy: Tensor, w: Tensor, x_shape: Sequence[int], *, geometry: Geometry) -> Tensor:
    """Return dx of x_shape (N, H, W, C) from dy [N, P, Q, K] and w [K, R, S, C/groups]."""
    x = nchw(dy.new_empty(tuple(x_shape)))  # never read; its memory format tells ATen to compute in channels_last
    return nhwc(_conv_backward(nchw(dy), x, nchw(w), geometry, (True, False, False))[0])


def conv_wgrad(dy: Tensor, x: Tensor, filter_shape: Sequence[int], *, geometry: Geometry) -> Tensor:
    """Return dw of filter_shape (K, R, S, C/groups) from dy [N, P, Q, K] and x [N, H, W, C]."""
    k, r, s, c = filter_shape
    w = dy.new_empty(()).expand(k, c, r, s)
    return nhwc(_conv_backward(nchw(dy), nchw(x), w, geometry, (False, True, False))[1])


def _conv_backward(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    *sizes, groups = geometry.both
    return torch.ops.aten.convolution_backward(dy, x, w, None, *sizes, False, [0, 0], groups, list(mask))


def statistics(z: Tensor) -> Tensor:
    """Return partial statistics [tiles, 3, K] of z [N, P, Q, K]: (count, mean, M2) for each tile and channel.

    M2 is the sum of squared distances from the tile's mean. Mean and M2 are of the values as stored, that is, rounded
    to z's dtype. This function treats all pixels as one tile; kernels return several. `finish_statistics` merges them.
    """
    var, mean = torch.var_mean(z.to(wide(z.dtype)), (0, 1, 2), correction=0)
    count = z.numel() // z.shape[-1]
    return torch.stack([torch.full_like(mean, count), mean, var * count])[None]


def finish_statistics(
    partials: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge partials by Chan's rule; return (mean, rstd, scale, shift), each [K].

    Running statistics, if given, are updated in place with the mean and the unbiased variance:
    running = (1 - momentum) running + momentum new. counter, an integer [], goes up by one in place.
    """
    if counter is not None:
        counter.add_(1)
    count, mean, m2 = partials[0]
    for n, tile_mean, tile_m2 in partials[1:]:
        total, delta = count + n, tile_mean - mean
        share = torch.where(total > 0, n / total, 0.0)
        m2 = m2 + tile_m2 + delta * delta * count * share
        mean, count = mean + delta * share, total
    rstd = (m2 / count + eps).rsqrt()
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((m2 / (count - 1)).to(running_var.dtype), momentum)
    return mean, rstd, *affine(mean, rstd, weight, bias)


def running_statistics(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (mean, rstd, scale, shift), each [K], of a BatchNorm in eval mode, from its running statistics."""
    mean, rstd = running_mean.to(wide(running_mean.dtype)), (running_var.to(wide(running_var.dtype)) + eps).rsqrt()
    return mean, rstd, *affine(mean, rstd, weight, bias)


def affine(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each [K]: scale = weight rstd, shift = bias - mean scale."""
    scale = rstd if weight is None else weight.to(rstd.dtype) * rstd
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.to(rstd.dtype)


def normalize(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    relu: bool,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    residual_stride: int = 1,
) -> Tensor:
    """Return [relu](scale z + shift [+ residual | + residual_scale residual + residual_shift]) in z's dtype.

    A residual [N, H, W, C] whose shape differs from z's is option A's: every `residual_stride`-th pixel is read, and
    missing channels are zero.
    """
    y = z * scale + shift
    if residual is not None:
        if residual.shape != z.shape:
            residual = residual[:, ::residual_stride, ::residual_stride]
            residual = F.pad(residual, (0, z.shape[-1] - residual.shape[-1]))
        if residual_scale is not None and residual_shift is not None:
            residual = residual * residual_scale + residual_shift
        y = y + residual
    return (F.relu(y) if relu else y).to(z.dtype)


def normalize_max_pool(
    z: Tensor, scale: Tensor, shift: Tensor, *, kernel: int, stride: int, pad: int, taps: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return y = max_pool(relu(scale z + shift)) [N, U, V, K], and its taps, or None without `taps`.

    The tap of a value is its position in the pooling window, row by row, as uint8 [N, U, V, K]. Among equal values it
    is the first, and NaN counts as the largest, as in `torch.max_pool2d`.
    """
    a = nchw(normalize(z, scale, shift, relu=True))
    if not taps:
        return nhwc(F.max_pool2d(a, kernel, stride, pad)), None
    y, flat = F.max_pool2d(a, kernel, stride, pad, return_indices=True)
    h, w = flat // a.shape[3], flat % a.shape[3]
    top = torch.arange(y.shape[2], device=z.device)[:, None] * stride - pad
    left = torch.arange(y.shape[3], device=z.device)[None, :] * stride - pad
    return nhwc(y), nhwc(((h - top) * kernel + (w - left)).to(torch.uint8))


class Pool(NamedTuple):
    """A max pool after the ReLU: the taps [N, U, V, K] that `normalize_max_pool` returned, and the pool's sizes."""

    tap: Tensor
    kernel: int
    stride: int
    pad: int


Mask = Tensor | tuple[Tensor, Tensor] | None


def gradient(dy: Tensor, z: Tensor, mask: Mask, pool: Pool | None) -> Tensor:
    """Return g: dy, scattered back through the max pool if there is one, and set to zero where the ReLU is off.

    mask: the ReLU's saved output, or (scale, shift), from which its input is recomputed as scale z + shift; None if
    there is no ReLU or dy is masked already. Where the ReLU's output or input is NaN, the gradient passes, as in
    `torch.relu`. pool: None if there is no max pool.
    """
    return _masked(dy if pool is None else _unpooled(dy, z, pool), z, mask)


def _unpooled(dy: Tensor, z: Tensor, pool: Pool) -> Tensor:
    n, h, w, c = z.shape
    top = torch.arange(dy.shape[1], device=z.device)[:, None, None] * pool.stride - pool.pad
    left = torch.arange(dy.shape[2], device=z.device)[None, :, None] * pool.stride - pool.pad
    tap = pool.tap.to(torch.int64)
    flat = ((tap // pool.kernel + top) * w + tap % pool.kernel + left).reshape(n, -1, c)
    g = torch.zeros(n, h * w, c, dtype=wide(dy.dtype), device=z.device)
    return g.scatter_add_(1, flat, dy.reshape(n, -1, c).to(g.dtype)).view(n, h, w, c)


def _masked(dy: Tensor, z: Tensor, mask: Mask) -> Tensor:
    if mask is None:
        return dy
    before = mask if isinstance(mask, Tensor) else z * mask[0] + mask[1]
    return torch.where(before <= 0, 0.0, dy)


def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """Return dy, set to zero where y, the output of a ReLU, is <= 0. dy, y and the result have the same shape."""
    return torch.ops.aten.threshold_backward(dy, y, 0)


def backward_reduce(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    *,
    mask: Mask = None,
    pool: Pool | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Return partial sums [tiles, 2, K] = (sum g, sum g (z - mean)) over the pixels of each tile; here one tile.

    projection: (z, mean) of a projection's BatchNorm, which has the same g. With it, the result is a pair of partials.
    """
    g = gradient(dy, z, mask, pool).to(mean.dtype)
    pairs = [(z, mean)] if projection is None else [(z, mean), projection]
    both = [torch.stack([g.sum((0, 1, 2)), (g * (t - m)).sum((0, 1, 2))])[None] for t, m in pairs]
    return both[0] if projection is None else tuple(both)


def finish_backward(
    partials: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, count: int, *, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (dweight, dbias, c_g, c_z, c_1), each [K], from the partials of `backward_reduce`.

    The coefficients give dz = c_g g + c_z z + c_1. With batch statistics this is
    dz = weight rstd (g - mean(g) - z_hat mean(g z_hat)), where means are over `count` values per channel. With running
    statistics dz = weight rstd g, and c_z and c_1 are None.
    """
    sum_g, sum_gz = partials.sum(0)
    dweight, c_g = sum_gz * rstd, rstd if weight is None else weight.to(rstd.dtype) * rstd
    if not batch_statistics:
        return dweight, sum_g, c_g, None, None
    c_z = -c_g * rstd * dweight / count
    return dweight, sum_g, c_g, c_z, -c_g * sum_g / count - c_z * mean


def backward_apply(
    dy: Tensor,
    z: Tensor,
    c_g: Tensor,
    c_z: Tensor | None,
    c_1: Tensor | None,
    *,
    mask: Mask = None,
    pool: Pool | None = None,
    projection: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
) -> Any:
    """Return dz = c_g g + c_z z + c_1 in dy's dtype, or c_g g if c_z and c_1 are None.

    projection: (z, c_g, c_z, c_1) of a projection's BatchNorm. With it, the result is the pair (dz, dz_proj).
    """
    g = gradient(dy, z, mask, pool)
    batch_norms = [BNBackward(z, c_g, c_z, c_1)] + ([] if projection is None else [BNBackward(*projection)])
    both = [
        (n.c_g * g if n.c_z is None or n.c_1 is None else n.c_g * g + n.c_z * n.z + n.c_1).to(dy.dtype)
        for n in batch_norms
    ]
    return both[0] if projection is None else tuple(both)


def pad_shortcut_backward(dx: Tensor, dy: Tensor, *, stride: int, mask: Tensor | None = None) -> Tensor:
    """Add the shortcut's share of the gradient to dx [N, H, W, C] in place, and return dx.

    The share is dy [N, P, Q, K], zero where `mask` (the block's output) is <= 0, through option A's shortcut; with
    stride 1 and C = K, this is the identity.
    """
    read = dx[:, ::stride, ::stride]
    read += _masked(dy, dy, mask)[..., : dx.shape[-1]]
    return dx
