"""The steps of a fused block in plain PyTorch, with the signatures of the kernel launchers in `fastres.kernels`.

They serve where no kernel does, and they are what each kernel is held against. Activations are NHWC-contiguous
[N, H, W, C], weights KRSC-contiguous [K, R, S, C/groups]; per-channel vectors [C] and partial sums are float32 (float64
for float64 activations). Equations: paper section 3.4 and Ioffe & Szegedy (2015), with

    ẑ = (z - mean) rstd,   a = relu(scale z + shift),   scale = weight rstd,   shift = bias - mean scale
    g = dy [a > 0],        dz = p g + q z + r per channel
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """The static sizes of a convolution, the same in both directions of the image."""

    stride: int = 1
    pad: int = 0
    dilation: int = 1
    groups: int = 1


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and per-channel vectors that accompany activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nchw(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C, H, W], a view; also [K, R, S, C] -> [K, C, R, S]."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], contiguous: a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, C, H, W] as [N, H, W, C], contiguous, in `dtype`: a view where it is that already, else one pass over
    memory."""
    return nhwc(x if x.dtype == dtype else x.to(dtype, memory_format=torch.channels_last))


def conv_fprop(x: Tensor, w: Tensor, *, geometry: Geometry) -> Tensor:
    """z [N, P, Q, K] = conv(x, w)."""
    return nhwc(F.conv2d(nchw(x), nchw(w), None, *_conv_args(geometry)))


def conv_dgrad(dy: Tensor, w: Tensor, x_shape: Sequence[int], *, geometry: Geometry) -> Tensor:
    """dx [N, H, W, C] from dy [N, P, Q, K]."""
    x = nchw(dy.new_empty(tuple(x_shape)))  # never read, but ATen computes in its layout
    return nhwc(_conv_backward(nchw(dy), x, nchw(w), geometry, (True, False, False))[0])


def conv_wgrad(dy: Tensor, x: Tensor, filter_shape: Sequence[int], *, geometry: Geometry) -> Tensor:
    """dw [K, R, S, C/groups] from dy [N, P, Q, K] and x [N, H, W, C]."""
    k, r, s, c = filter_shape
    w = dy.new_empty(()).expand(k, c, r, s)
    return nhwc(_conv_backward(nchw(dy), nchw(x), w, geometry, (False, True, False))[1])


def _conv_args(geometry: Geometry) -> tuple[int, int, int, int]:
    return geometry.stride, geometry.pad, geometry.dilation, geometry.groups


def _conv_backward(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, pad, dilation, groups = ([v, v] for v in geometry)
    return torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, pad, dilation, False, [0, 0], groups[0], list(mask)
    )


def statistics(z: Tensor) -> Tensor:
    """Partials [tiles, 3, K] = (count, mean, M2 = sum of squared distances to that mean) of z [N, P, Q, K], of the
    values as stored. Here one tile; kernels give one per program, to be merged by Chan's rule."""
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
    """(mean, rstd, scale, shift), each [K], and running statistics moved towards mean and unbiased variance in place:
    running = (1 - momentum) running + momentum new; one more in counter, an integer []."""
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
    """(mean, rstd, scale, shift) of a BatchNorm in eval mode, from its running statistics."""
    mean, rstd = running_mean.to(wide(running_mean.dtype)), (running_var.to(wide(running_var.dtype)) + eps).rsqrt()
    return mean, rstd, *affine(mean, rstd, weight, bias)


def affine(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """scale = weight rstd, shift = bias - mean scale."""
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
    """[relu](scale z + shift [+ residual | + residual_scale residual + residual_shift]).

    A residual [N, H, W, C] with fewer channels or more pixels than z is option A's: read every `residual_stride`-th
    pixel, absent channels as zero.
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
    """y = max_pool(relu(scale z + shift)) and, where `taps` are wanted, per value of y, which tap of its window it came
    from (uint8, in scan order; the first of equals, NaN wins, as `torch.max_pool2d`)."""
    a = nchw(normalize(z, scale, shift, relu=True))
    if not taps:
        return nhwc(F.max_pool2d(a, kernel, stride, pad)), None
    y, flat = F.max_pool2d(a, kernel, stride, pad, return_indices=True)
    h, w = flat // a.shape[3], flat % a.shape[3]
    top = torch.arange(y.shape[2], device=z.device)[:, None] * stride - pad
    left = torch.arange(y.shape[3], device=z.device)[None, :] * stride - pad
    return nhwc(y), nhwc(((h - top) * kernel + (w - left)).to(torch.uint8))


class Pool(NamedTuple):
    """A max pool behind the ReLU: the taps that `normalize_max_pool` chose [N, U, V, K], and its sizes."""

    tap: Tensor
    kernel: int
    stride: int
    pad: int


Mask = Tensor | tuple[Tensor, Tensor] | None


def gradient(dy: Tensor, z: Tensor, mask: Mask, pool: Pool | None) -> Tensor:
    """g: dy, behind a max pool sent back to the taps it came from, where the ReLU was open.

    `mask` is the ReLU's saved output, or (scale, shift) to recompute its input from z. A NaN there lets the gradient
    through, as in `torch.relu`.
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


def backward_reduce(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    *,
    mask: Mask = None,
    pool: Pool | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Partials [tiles, 2, K] = (sum g, sum g (z - mean)) over the pixels of a tile; with projection = (z_d, mean_d),
    whose BatchNorm has the same g, a pair of partials."""
    g = gradient(dy, z, mask, pool).to(mean.dtype)
    pairs = [(z, mean)] if projection is None else [(z, mean), projection]
    both = [torch.stack([g.sum((0, 1, 2)), (g * (t - m)).sum((0, 1, 2))])[None] for t, m in pairs]
    return both[0] if projection is None else tuple(both)


def finish_backward(
    partials: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, count: int, *, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dweight, dbias, p, q, r), each [K]: dz = p g + q z + r.

    With batch statistics dz = weight rstd (g - mean(g) - z_hat mean(g z_hat)); with given ones dz = weight rstd g, and
    q and r are None.
    """
    sum_g, sum_gz = partials.sum(0)
    dweight, p = sum_gz * rstd, rstd if weight is None else weight.to(rstd.dtype) * rstd
    if not batch_statistics:
        return dweight, sum_g, p, None, None
    q = -p * rstd * dweight / count
    return dweight, sum_g, p, q, -p * sum_g / count - q * mean


def backward_apply(
    dy: Tensor,
    z: Tensor,
    p: Tensor,
    q: Tensor | None,
    r: Tensor | None,
    *,
    mask: Mask = None,
    pool: Pool | None = None,
    projection: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
) -> Any:
    """dz = p g + q z + r, or p g where q and r are None; with projection = (z_d, p_d, q_d, r_d) the pair (dz, dz_d)."""
    g = gradient(dy, z, mask, pool)
    sides = [(z, p, q, r)] if projection is None else [(z, p, q, r), projection]
    both = [(b * g if c is None or d is None else b * g + c * t + d).to(dy.dtype) for t, b, c, d in sides]
    return both[0] if projection is None else tuple(both)


def pad_shortcut_backward(dx: Tensor, dy: Tensor, *, stride: int, mask: Tensor | None = None) -> Tensor:
    """dx [N, H, W, C] with the shortcut's share of dy [N, P, Q, K], masked by the block's output, added in place:
    option A's, or with stride 1 the identity's."""
    read = dx[:, ::stride, ::stride]
    read += _masked(dy, dy, mask)[..., : dx.shape[-1]]
    return dx
