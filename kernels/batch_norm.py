"""BatchNorm around convolutions, forward and backward, with few passes over memory.

z is the output of a convolution. M = N P Q is the number of pixels that enter the statistics of each channel (Ioffe &
Szegedy, 2015):

    mean = Σ z / M,  var = Σ (z - mean)² / M,  rstd = (var + eps)^-½        `statistics`, `finish_statistics`
    scale = weight rstd,  shift = bias - mean scale
    y = relu(scale z + shift + shortcut)                                   `normalize`

The shortcut is absent, the block's input x, a projection scale_proj z_proj + shift_proj, or option A: x at every
stride-th pixel with zero channels appended.

    g = 0 where y <= 0, else dy                                            gradient at the BatchNorm's output
    dbias = Σ g,  dweight = rstd Σ g (z - mean)                            `backward_reduce`, `finish_backward`
    dz = c_g g + c_z z + c_1,  c_g = weight rstd,                          `backward_apply`
         c_z = -c_g rstd dweight / M,  c_1 = -c_g dbias / M - c_z mean

With fixed statistics (eval mode) no gradient flows through mean and rstd, so c_z = c_1 = 0; the launchers then use
None for both.

These kernels never store g. `backward_reduce` and `backward_apply` both compute it from dy and the ReLU's mask. If a
max pool follows the ReLU, they gather g from the gradient of the pool's output (`max_pool.gather`).

Reductions are deterministic and run in two stages. First each program reduces one chunk of pixels to fp32 partials.
Then a small kernel merges the partials of all chunks; more than 512 are merged in groups before that. The epilogues of
convolutions write partials of the same form:

    statistics [T, 3, K]: count, mean and M2 = Σ (z - mean)² of chunk t, computed on z as stored. They are merged by
                          Chan's rule (Chan, Golub & LeVeque, 1979), because Σz² - (Σz)²/M cancels if |mean| >> std.
    backward   [T, 2, K]: Σ g and Σ g (z - mean) of chunk t. z is centred for the same reason.

Layouts: activations are contiguous [N, P, Q, K] and viewed as a matrix [M, K] (row, channel). Vectors are fp32 [K].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor, check_vectors
from .device_functions import bn_affine, relu
from .launcher import empty, launch, remembered
from .max_pool import Pool, block_pixel, check_pool, gather, normalize_max_pool
from .problem import FLOATS, cdiv
from .rows import REDUCED, STREAMED, WARPS, WINDOWED, Rows, at, rows, strided_row, tile_of, vector

# A program of the last stage loops over at most _PARTIALS partials, one tile [_BT, _BK] at a time. If there are more,
# `_merge` first merges them in groups of _GROUP, in tiles whose rows of 32 fp32 channels fill a cache line.
_PARTIALS = 512
_GROUP = 128
_BT, _BK = 128, 8
_MERGED_BT, _MERGED_BK = 32, 32


@triton.jit
def pooled_statistics(count, mean, m2):
    """Return count, mean and M2, each [BK], merged over the first axis of [BT, BK] inputs by Chan's rule.

    The mean takes two steps: the second adds the mean deviation from the first estimate and so corrects its rounding
    error.
    """
    total = tl.sum(count, 0)
    share = 1.0 / tl.maximum(total, 1.0)
    centre = tl.sum(count * mean, 0) * share
    centre += tl.sum(count * (mean - centre[None, :]), 0) * share
    delta = mean - centre[None, :]
    return total, centre, tl.sum(m2 + count * delta * delta, 0)


@triton.jit(do_not_specialize=["M", "K_VECS", "steps"])
def statistics_kernel(z, partials, M, K_VECS, steps, VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Write partials [T, 3, K] of z [M, K]. A program reduces one chunk of steps * BM pixels for BK channels.

    Each element of the tile runs Welford's update on z minus the chunk's first pixel. Subtracting that pixel avoids
    cancellation and keeps rounding errors proportional to the spread of the values, not to their size.
    """
    K = K_VECS * VEC
    chunk = tl.program_id(0)
    row, channel = tile_of(tl.program_id(1), K, BM, BK)
    first = chunk * steps * BM
    row += first
    origin = vector(z + first.to(tl.int64) * K, channel, K)
    count = tl.zeros((BM, 1), tl.float32)
    mean = tl.zeros((BM, BK), tl.float32)
    m2 = tl.zeros((BM, BK), tl.float32)
    for step in range(steps):
        inside = (row < M)[:, None]
        x = tl.load(z + at(row, channel, K), mask=inside & (channel < K)[None, :], other=0.0).to(tl.float32)
        share = 1.0 / (step + 1)
        delta = x - origin - mean
        mean += delta * tl.where(inside, share, 0.0)
        m2 += delta * delta * tl.where(inside, 1.0 - share, 0.0)
        count += inside.to(tl.float32)
        row += BM
    total, centre, m2 = pooled_statistics(tl.broadcast_to(count, (BM, BK)), mean, m2)
    out = partials + chunk * 3 * K + channel
    tl.store(out, total, mask=channel < K)
    tl.store(out + K, tl.reshape(origin, (BK,)) + centre, mask=channel < K)
    tl.store(out + 2 * K, m2, mask=channel < K)


@triton.jit
def merged_statistics(partials, first, last, channel, K, BT: tl.constexpr, BK: tl.constexpr):
    """Return count, mean and M2, each [BK], merged from the partials first <= t < last."""
    count = tl.zeros((BT, BK), tl.float32)
    mean = tl.zeros((BT, BK), tl.float32)
    m2 = tl.zeros((BT, BK), tl.float32)
    for t in range(first, last, BT):
        row = t + tl.arange(0, BT)
        valid = (row < last)[:, None] & (channel < K)[None, :]
        here = partials + at(row, channel, 3 * K)
        n = tl.load(here, mask=valid, other=0.0)
        delta = tl.load(here + K, mask=valid, other=0.0) - mean
        total = count + n
        share = n / tl.maximum(total, 1.0)
        m2 += tl.load(here + 2 * K, mask=valid, other=0.0)
        m2 += tl.where(n > 0, delta * delta * (count * share), 0.0)
        mean += tl.where(n > 0, delta * share, 0.0)
        count = total
    return pooled_statistics(count, mean, m2)


@triton.jit
def merged_sums(partials, first, last, channel, K, BT: tl.constexpr, BK: tl.constexpr):
    """Return Σ g and Σ g (z - mean), each [BK], summed over the backward partials first <= t < last."""
    a = tl.zeros((BT, BK), tl.float32)
    b = tl.zeros((BT, BK), tl.float32)
    for t in range(first, last, BT):
        row = t + tl.arange(0, BT)
        valid = (row < last)[:, None] & (channel < K)[None, :]
        here = partials + at(row, channel, 2 * K)
        a += tl.load(here, mask=valid, other=0.0)
        b += tl.load(here + K, mask=valid, other=0.0)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit(do_not_specialize=["T", "K"])
def merge_kernel(partials, merged, T, K, ROWS: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Merge each GROUP of partials [T, ROWS, K] into one row of merged [ceil(T / GROUP), ROWS, K].

    ROWS selects the kind of partials: 3 for statistics, 2 for backward sums.
    """
    group = tl.program_id(0)
    channel = tl.program_id(1) * BK + tl.arange(0, BK)
    valid = channel < K
    first = group * GROUP
    last = tl.minimum(first + GROUP, T)
    out = merged + group * ROWS * K + channel
    if ROWS == 3:
        count, mean, m2 = merged_statistics(partials, first, last, channel, K, BT, BK)
        tl.store(out, count, mask=valid)
        tl.store(out + K, mean, mask=valid)
        tl.store(out + 2 * K, m2, mask=valid)
    else:
        a, b = merged_sums(partials, first, last, channel, K, BT, BK)
        tl.store(out, a, mask=valid)
        tl.store(out + K, b, mask=valid)


@triton.jit(do_not_specialize=["T", "K"])
def finish_statistics_kernel(
    partials, weight, bias, running_mean, running_var, counter, vectors, T, K, eps, momentum,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write vectors [4, K] = mean, rstd, scale, shift, and increment counter, if there is one.

    With partials [T, 3, K], the statistics are those of the batch, and running_mean and running_var, where given, are
    updated in place. If partials is None, the statistics are running_mean and running_var.
    """
    if counter is not None:
        tl.store(counter, tl.load(counter) + 1, mask=tl.program_id(0) == 0)
    channel = tl.program_id(0) * BK + tl.arange(0, BK)
    valid = channel < K
    if partials is None:
        mean = tl.load(running_mean + channel, mask=valid, other=0.0).to(tl.float32)
        var = tl.load(running_var + channel, mask=valid, other=1.0).to(tl.float32)
    else:
        count, mean, m2 = merged_statistics(partials, 0, T, channel, K, BT, BK)
        count = tl.where(valid, count, 2.0)
        var = tl.div_rn(m2, count)
        if running_mean is not None:
            old = tl.load(running_mean + channel, mask=valid, other=0.0).to(tl.float32)
            new = old + momentum * (mean - old)
            tl.store(running_mean + channel, new.to(running_mean.dtype.element_ty), mask=valid)
        if running_var is not None:
            old = tl.load(running_var + channel, mask=valid, other=0.0).to(tl.float32)
            new = old + momentum * (tl.div_rn(m2, count - 1.0) - old)
            tl.store(running_var + channel, new.to(running_var.dtype.element_ty), mask=valid)
    rstd, scale, shift = bn_affine(mean, var, weight, bias, eps, channel, valid)
    tl.store(vectors + channel, mean, mask=valid)
    tl.store(vectors + K + channel, rstd, mask=valid)
    tl.store(vectors + 2 * K + channel, scale, mask=valid)
    tl.store(vectors + 3 * K + channel, shift, mask=valid)


@triton.jit(do_not_specialize=["M", "K_VECS", "P", "Q", "H", "W", "C_VECS"])
def normalize_kernel(
    z, scale, shift, residual, residual_scale, residual_shift, y, M, K_VECS, P, Q, H, W, C_VECS,
    RELU: tl.constexpr, STRIDE: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y = [relu](scale z + shift [+ shortcut]), [M, K].

    The shortcut is `residual` or, if residual_scale is given, residual_scale residual + residual_shift.
    STRIDE 0: residual is [M, K]. STRIDE > 0: residual is [N, H, W, C], the input of an option-A shortcut. It is read at
    every STRIDE-th row and column, and its channels from C to K count as zero.
    """
    K = K_VECS * VEC
    row, channel = tile_of(tl.program_id(0), K, BM, BK)
    valid = (row < M)[:, None] & (channel < K)[None, :]
    out = tl.load(z + at(row, channel, K), mask=valid, other=0.0).to(tl.float32)
    out = out * vector(scale, channel, K) + vector(shift, channel, K)
    if residual is not None:
        if STRIDE == 0:
            x = tl.load(residual + at(row, channel, K), mask=valid, other=0.0).to(tl.float32)
        else:
            C = C_VECS * VEC
            strided = at(strided_row(row, P, Q, H, W, STRIDE), channel, C)
            x = tl.load(residual + strided, mask=valid & (channel < C)[None, :], other=0.0).to(tl.float32)
        if residual_scale is not None:
            x = x * vector(residual_scale, channel, K) + vector(residual_shift, channel, K)
        out += x
    if RELU:
        out = relu(out)
    tl.store(y + at(row, channel, K), out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def gradient(
    dy, y, tap, z, scale, shift, here, block, channel, valid, K, P, Q, U, V, a: tl.constexpr, b: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Return g, fp32 [BM, BK], the gradient at the BatchNorm's output for pixel (a, b) of each of BM blocks.

    Without a pool (tap is None), a block is one pixel, and g is dy before masking. If a max pool follows the ReLU, a
    block is STRIDE x STRIDE pixels, and g is gathered from dy by tap. Then g is set to zero where y <= 0, if y is
    given, and where scale z + shift <= 0, if scale is given. `here` [BM, BK]: the element offsets of the pixels in y
    and, without a pool, in dy.
    """
    if tap is None:
        g = tl.load(dy + here, mask=valid, other=0.0).to(tl.float32)
    else:
        g = gather(dy, tap, block, channel, valid, K, P, Q, U, V, a, b, KERNEL, STRIDE, PAD)
    if y is not None:
        g = tl.where(tl.load(y + here, mask=valid, other=0.0) <= 0, 0.0, g)
    if scale is not None:
        g = tl.where(z * vector(scale, channel, K) + vector(shift, channel, K) <= 0, 0.0, g)
    return g


@triton.jit(do_not_specialize=["M", "K_VECS", "P", "Q", "U", "V", "steps"])
def backward_reduce_kernel(
    dy, y, tap, scale, shift, z, mean, partials, z_proj, mean_proj, partials_proj, M, K_VECS, P, Q, U, V, steps,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write partials [T, 2, K] = Σ g, Σ g (z - mean). A program reduces one chunk of steps * BM pixels for BK channels.

    With z_proj it also writes partials_proj for the projection's BatchNorm, which has the same g. If a max pool
    follows, the rows of a chunk are blocks of STRIDE x STRIDE pixels instead of pixels, and M counts the blocks.
    """
    K = K_VECS * VEC
    SIDE: tl.constexpr = 1 if tap is None else STRIDE
    chunk = tl.program_id(0)
    block, channel = tile_of(tl.program_id(1), K, BM, BK)
    block += chunk * steps * BM
    centre = vector(mean, channel, K)
    sum_g = tl.zeros((BM, BK), tl.float32)
    sum_gz = tl.zeros((BM, BK), tl.float32)
    if z_proj is not None:
        centre_proj = vector(mean_proj, channel, K)
        sum_gz_proj = tl.zeros((BM, BK), tl.float32)
    for _ in range(steps):
        for a in tl.static_range(SIDE):
            for b in tl.static_range(SIDE):
                row, inside = block_pixel(block, M, P, Q, a, b, SIDE)
                here, valid = at(row, channel, K), inside[:, None] & (channel < K)[None, :]
                x = tl.load(z + here, mask=valid, other=0.0).to(tl.float32)
                g = gradient(
                    dy, y, tap, x, scale, shift, here, block, channel, valid, K, P, Q, U, V, a, b, KERNEL, STRIDE, PAD,
                )  # fmt: skip
                sum_g += g
                sum_gz += g * (x - centre)
                if z_proj is not None:
                    x = tl.load(z_proj + here, mask=valid, other=0.0).to(tl.float32)
                    sum_gz_proj += g * (x - centre_proj)
        block += BM
    out = chunk * 2 * K + channel
    total = tl.sum(sum_g, 0)
    tl.store(partials + out, total, mask=channel < K)
    tl.store(partials + out + K, tl.sum(sum_gz, 0), mask=channel < K)
    if z_proj is not None:
        tl.store(partials_proj + out, total, mask=channel < K)
        tl.store(partials_proj + out + K, tl.sum(sum_gz_proj, 0), mask=channel < K)


@triton.jit(do_not_specialize=["T", "K"])
def finish_backward_kernel(
    partials, weight, mean, rstd, dweight, dbias, vectors, T, K, inverse_count,
    BATCH_STATISTICS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write dweight [K], dbias [K] and the coefficients of dz from partials [T, 2, K].

    vectors is [3, K] = c_g, c_z, c_1 with BATCH_STATISTICS, and [1, K] = c_g without.
    """
    channel = tl.program_id(0) * BK + tl.arange(0, BK)
    valid = channel < K
    sum_g, sum_gz = merged_sums(partials, 0, T, channel, K, BT, BK)
    inverse_std = tl.load(rstd + channel, mask=valid, other=0.0)
    c_g = inverse_std
    if weight is not None:
        c_g *= tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    sum_gz *= inverse_std
    if BATCH_STATISTICS:
        c_z = -c_g * inverse_std * sum_gz * inverse_count
        c_1 = -c_g * sum_g * inverse_count - c_z * tl.load(mean + channel, mask=valid, other=0.0)
        tl.store(vectors + K + channel, c_z, mask=valid)
        tl.store(vectors + 2 * K + channel, c_1, mask=valid)
    tl.store(dweight + channel, sum_gz.to(dweight.dtype.element_ty), mask=valid)
    tl.store(dbias + channel, sum_g.to(dbias.dtype.element_ty), mask=valid)
    tl.store(vectors + channel, c_g, mask=valid)


@triton.jit
def bn_backward(g, z, c_g, c_z, c_1, channel, K):
    """Return dz = c_g g + c_z z + c_1, fp32 [BM, BK]; without c_z and c_1 (None) dz = c_g g."""
    dz = vector(c_g, channel, K) * g
    if c_z is not None:
        dz += vector(c_z, channel, K) * z + vector(c_1, channel, K)
    return dz


@triton.jit(do_not_specialize=["M", "K_VECS", "P", "Q", "U", "V"])
def backward_apply_kernel(
    dy, y, tap, scale, shift, z, c_g, c_z, c_1, dz, z_proj, c_g_proj, c_z_proj, c_1_proj, dz_proj, M, K_VECS, P, Q, U,
    V,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dz = c_g g + c_z z + c_1 and, if dz_proj is given, the same tile of dz_proj.

    If a max pool follows the ReLU, the rows of a tile are blocks of STRIDE x STRIDE pixels, and M counts the blocks.
    """
    K = K_VECS * VEC
    SIDE: tl.constexpr = 1 if tap is None else STRIDE
    block, channel = tile_of(tl.program_id(0), K, BM, BK)
    for a in tl.static_range(SIDE):
        for b in tl.static_range(SIDE):
            row, inside = block_pixel(block, M, P, Q, a, b, SIDE)
            here, valid = at(row, channel, K), inside[:, None] & (channel < K)[None, :]
            x = None
            if (c_z is not None) or (scale is not None):
                x = tl.load(z + here, mask=valid, other=0.0).to(tl.float32)
            g = gradient(
                dy, y, tap, x, scale, shift, here, block, channel, valid, K, P, Q, U, V, a, b, KERNEL, STRIDE, PAD,
            )  # fmt: skip
            tl.store(dz + here, bn_backward(g, x, c_g, c_z, c_1, channel, K).to(dz.dtype.element_ty), mask=valid)
            if dz_proj is not None:
                x_proj = None
                if c_z_proj is not None:
                    x_proj = tl.load(z_proj + here, mask=valid, other=0.0).to(tl.float32)
                out = bn_backward(g, x_proj, c_g_proj, c_z_proj, c_1_proj, channel, K)
                tl.store(dz_proj + here, out.to(dz.dtype.element_ty), mask=valid)


class Statistics(NamedTuple):
    """Per-channel vectors of a BatchNorm, fp32 [K], from batch or running statistics.

    scale = weight rstd and shift = bias - mean scale, so that the BatchNorm is scale z + shift.
    """

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


class BackwardVectors(NamedTuple):
    """Parameter gradients of a BatchNorm, and the coefficients of dz = c_g g + c_z z + c_1.

    z, dz: the BatchNorm's input and its gradient. g: the gradient at its output, masked by the ReLU. dweight, dbias:
    [K] in the dtype of weight, fp32 if weight is None. c_g, c_z, c_1: fp32 [K]. c_z and c_1 are None if the statistics
    were fixed (eval mode).
    """

    dweight: Tensor
    dbias: Tensor
    c_g: Tensor
    c_z: Tensor | None = None
    c_1: Tensor | None = None


@remembered
def statistics(z: Tensor) -> Tensor:
    """Return the partial statistics of z, fp32 [T, 3, K]: count, mean and M2 = Σ (z - mean)² of each chunk of pixels.

    z: [..., K], contiguous, bfloat16, float16 or float32. The shape and dtype of z determine the number of chunks T.
    `finish_statistics` merges the chunks.

    Equivalent to, for T = 1:

        var, mean = torch.var_mean(z.float().flatten(0, -2), 0, correction=0)
        count = torch.full_like(mean, z.numel() // z.shape[-1])
        partials = torch.stack([count, mean, var * count])[None]

    Raises ValueError for other dtypes and layouts, and if z is empty.

    Source: Welford (1962) within a chunk, Chan, Golub & LeVeque (1979) across lanes and chunks.
    """
    view = _nonempty(rows("z", z, REDUCED))
    chunks, steps = view.chunks()
    partials = empty((chunks, 3, view.K), torch.float32, z.device)
    launch(
        statistics_kernel, (chunks, cdiv(view.K, view.BK)), z=z, partials=partials, M=view.M, K_VECS=view.K // view.VEC,
        steps=steps, VEC=view.VEC, BM=view.BM, BK=view.BK, num_warps=WARPS,
    )  # fmt: skip
    return partials


@remembered
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
) -> Statistics:
    """Merge partial statistics; return mean, rstd, scale and shift, fp32 [K], and update the running statistics.

    partials: fp32 [T, 3, K], from `statistics` or from the epilogue of a convolution.
    weight, bias: [K] in bfloat16, float16 or float32; None stands for ones and zeros.
    running_mean, running_var: [K] in the same dtypes, updated in place; None: not tracked. As in `nn.BatchNorm2d`,
    running_var tracks the unbiased variance, and momentum is the weight of the new value.
    counter: int64 [], increased by one (`num_batches_tracked`), or None.

    Equivalent to, for partials of z:

        var, mean = torch.var_mean(z.float().flatten(0, -2), 0, correction=0)
        rstd = (var + eps).rsqrt()
        scale, shift = weight * rstd, bias - mean * weight * rstd
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * M / (M - 1), momentum)      # M = z.numel() // K
        counter += 1

    Raises ValueError for a wrong shape, dtype, layout or device.

    Source: Ioffe & Szegedy (2015), algorithm 1; Chan, Golub & LeVeque (1979).
    """
    K = _check_partials(partials, 3)
    check_tensor("counter", counter, (), partials, torch.int64)
    partials = _merge(partials)
    return _finish_statistics(
        K, partials, weight=weight, bias=bias, eps=eps, running_mean=running_mean, running_var=running_var,
        counter=counter, partials=partials, T=partials.shape[0], momentum=momentum,
    )  # fmt: skip


@remembered
def running_statistics(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Statistics:
    """Return mean, rstd, scale and shift, fp32 [K], of a BatchNorm in eval mode, from its running statistics.

    All arguments are [K] in bfloat16, float16 or float32; weight and bias may be None. Nothing is updated.

    Equivalent to:

        mean, rstd = running_mean.float(), (running_var.float() + eps).rsqrt()
        scale, shift = weight * rstd, bias - mean * weight * rstd

    Raises ValueError for a wrong shape, dtype, layout or device.

    Source: Ioffe & Szegedy (2015), algorithm 2.
    """
    return _finish_statistics(
        running_mean.numel(), running_mean, weight=weight, bias=bias, eps=eps,
        running_mean=running_mean, running_var=running_var, counter=None, partials=None, T=0, momentum=0.0,
    )  # fmt: skip


def _finish_statistics(
    K: int,
    like: Tensor,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    partials: Tensor | None,
    T: int,
    eps: float,
    momentum: float,
) -> Statistics:
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_vectors(K, like, *FLOATS, **given)
    vectors = empty((4, K), torch.float32, like.device)
    launch(
        finish_statistics_kernel, (cdiv(K, _BK),), partials=partials, counter=counter, vectors=vectors, T=T, K=K,
        eps=eps, momentum=momentum, BT=_BT, BK=_BK, **given,
    )  # fmt: skip
    return Statistics(*vectors.unbind())


@remembered
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
    """Return y = [relu](scale z + shift [+ shortcut]), the end of a residual block, with the shape and dtype of z.

    z: [..., K], contiguous, bfloat16, float16 or float32. scale, shift: fp32 [K].
    residual: the shortcut, contiguous, in the dtype of z, or None. It is one of
      - the block's input, with the shape of z;
      - the raw output of a projection, with the shape of z; residual_scale and residual_shift, fp32 [K], then apply
        the projection's BatchNorm;
      - the block's input x [N, H, W, C] of an option-A shortcut to z [N, P, Q, K], where C <= K,
        P = ceil(H / residual_stride) and Q = ceil(W / residual_stride). The kernel reads x directly, so the subsampled
        and padded tensor is never stored.

    Equivalent to, in fp32 with one rounding to the dtype of z at the end:

        shortcut = residual                                                               # identity
        shortcut = residual * residual_scale + residual_shift                             # projection
        shortcut = F.pad(residual[:, ::residual_stride, ::residual_stride], (0, K - C))   # option A
        y = F.relu(z * scale + shift + shortcut)

    Raises ValueError if an argument doesn't match z.

    Source: paper, equations 1 and 2, and section 3.3 for option A.
    """
    view = rows("z", z, STREAMED, also=0 if residual is None else residual.shape[-1])
    vectors = {"scale": scale, "shift": shift, "residual_scale": residual_scale, "residual_shift": residual_shift}
    check_vectors(view.K, z, **vectors)
    if (residual_scale is None) != (residual_shift is None) or (residual_scale is not None and residual is None):
        raise ValueError("residual_scale and residual_shift must be given together, and only with a residual")
    P = Q = H = W = C = stride = 0
    if residual is not None and (residual_stride != 1 or residual.shape != z.shape):
        H, W, C = check_shortcut("residual", residual, z, residual_stride)
        P, Q, stride = z.shape[1], z.shape[2], residual_stride
    else:
        check_tensor("residual", residual, tuple(z.shape), z)
    y = empty(z.shape, z.dtype, z.device)
    if y.numel():
        launch(
            normalize_kernel, (view.tiles,), z=z, residual=residual, y=y, M=view.M, K_VECS=view.K // view.VEC,
            P=P, Q=Q, H=H, W=W, C_VECS=C // view.VEC, RELU=relu, STRIDE=stride, VEC=view.VEC, BM=view.BM, BK=view.BK,
            num_warps=WARPS, **vectors,
        )  # fmt: skip
    return y


def check_shortcut(name: str, x: Tensor, z: Tensor, stride: int) -> tuple[int, int, int]:
    """Return (H, W, C) of x [N, H, W, C], the input of an option-A shortcut to z [N, P, Q, K].

    Raises ValueError unless P = ceil(H / stride), Q = ceil(W / stride), 1 <= C <= K and x is contiguous with the dtype
    and device of z. `name` names x in the message.
    """
    check_tensor(name, x, tuple(x.shape), z)
    rows(name, x, STREAMED)
    fits = x.dim() == z.dim() == 4 and stride >= 1 and x.shape[0] == z.shape[0] and 1 <= x.shape[3] <= z.shape[3]
    if not fits or any(-(-x.shape[i] // stride) != z.shape[i] for i in (1, 2)):
        raise ValueError(
            f"{name} {list(x.shape)} at stride {stride} does not fit an option-A shortcut to {list(z.shape)}: "
            "the target must be [N, ceil(H / stride), ceil(W / stride), K] with K >= C"
        )
    return x.shape[1], x.shape[2], x.shape[3]


# The ReLU that masks dy: by its saved output y, by (scale, shift), which recompute its input from z, or None: no ReLU.
Mask = Tensor | tuple[Tensor, Tensor] | None


@remembered
def backward_reduce(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    *,
    mask: Mask = None,
    pool: Pool | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the partial sums Σ g and Σ g (z - mean) of a BatchNorm's backward pass, fp32 [T, 2, K].

    z: [..., K], contiguous, bfloat16, float16 or float32. dy: like z. mean: fp32 [K].
    mask: the ReLU after the BatchNorm. Either its saved output y, like z (g = 0 where y <= 0, else dy), or
    (scale, shift), fp32 [K], to recompute its input (g = 0 where scale z + shift <= 0, else dy), or None if there is no
    ReLU (g = dy).
    pool: the max pool after the ReLU, if any. Then z is [N, P, Q, K], and dy is the gradient [N, U, V, K] of the pool's
    output.
    projection: (z_proj, mean_proj) of the projection's BatchNorm, which has the same g. The result is then
    (partials, partials_proj).

    `finish_backward` merges the T chunks of pixels. For T = 1 and without a pool, equivalent to:

        g = torch.where(y <= 0, 0, dy.float())      # a NaN in y lets the gradient through, as in torch.relu
        gz = g * (z - mean)
        partials = torch.stack([g.flatten(0, -2).sum(0), gz.flatten(0, -2).sum(0)])[None]

    Raises ValueError if an argument doesn't match z, and if z is empty.

    Source: Ioffe & Szegedy (2015), section 3.
    """
    view = _nonempty(rows("z", z, REDUCED if pool is None else WINDOWED))
    of_gradient = _gradient_arguments(dy, z, mask, pool)
    view = _blocks(view, z, pool)
    z_proj, mean_proj = projection or (None, None)
    check_tensor("z_proj", z_proj, tuple(z.shape), z)
    check_vectors(view.K, z, mean=mean, mean_proj=mean_proj)
    chunks, steps = view.chunks()
    shape = (chunks, 2, view.K)
    partials = empty(shape, torch.float32, z.device)
    partials_proj = None if projection is None else empty(shape, torch.float32, z.device)
    launch(
        backward_reduce_kernel, (chunks, cdiv(view.K, view.BK)), z=z, mean=mean, partials=partials, z_proj=z_proj,
        mean_proj=mean_proj, partials_proj=partials_proj, M=view.M, K_VECS=view.K // view.VEC, steps=steps,
        VEC=view.VEC, BM=view.BM, BK=view.BK, num_warps=WARPS, **of_gradient,
    )  # fmt: skip
    return partials if partials_proj is None else (partials, partials_proj)


@remembered
def finish_backward(
    partials: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, count: int, *, batch_statistics: bool
) -> BackwardVectors:
    """Merge the partial sums of a BatchNorm's backward pass; return dweight, dbias and the coefficients of dz.

    partials: fp32 [T, 2, K], from `backward_reduce` or from the epilogue of `conv_dgrad`. weight: [K] in bfloat16,
    float16 or float32, or None. mean, rstd: fp32 [K]. count: number of pixels, N P Q.
    batch_statistics: True if the forward pass normalised by the batch's own statistics, so that the gradient flows
    through mean and rstd. False if they were fixed: then dz = c_g g, and c_z and c_1 are None.

    Equivalent to:

        sum_g, sum_gz = partials.sum(0)
        dbias, dweight, c_g = sum_g, rstd * sum_gz, weight * rstd
        c_z = -c_g * rstd * dweight / count
        c_1 = -c_g * dbias / count - c_z * mean

    Raises ValueError for a wrong shape, dtype, layout or device, and if count < 1.

    Source: Ioffe & Szegedy (2015), section 3.
    """
    K = _check_partials(partials, 2)
    check_vectors(K, partials, mean=mean, rstd=rstd)
    check_vectors(K, partials, *FLOATS, weight=weight)
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    partials = _merge(partials)
    vectors = empty((3 if batch_statistics else 1, K), torch.float32, partials.device)
    dtype = torch.float32 if weight is None else weight.dtype
    dweight, dbias = (empty((K,), dtype, partials.device) for _ in range(2))
    launch(
        finish_backward_kernel, (cdiv(K, _BK),), partials=partials, weight=weight, mean=mean, rstd=rstd,
        dweight=dweight, dbias=dbias, vectors=vectors, T=partials.shape[0], K=K, inverse_count=1.0 / count,
        BATCH_STATISTICS=batch_statistics, BT=_BT, BK=_BK,
    )  # fmt: skip
    return BackwardVectors(dweight, dbias, *vectors.unbind())


@remembered
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Return dz = c_g g + c_z z + c_1, the gradient at the input of a BatchNorm, with the shape and dtype of z.

    dy, z, mask, pool: as for `backward_reduce`. c_g, c_z, c_1: fp32 [K], from `finish_backward`. c_z and c_1 are None
    for fixed statistics; z is then read only if the mask needs it.
    projection: (z_proj, c_g_proj, c_z_proj, c_1_proj) of the projection's BatchNorm, which has the same g. The result
    is then (dz, dz_proj).

    Equivalent to, without a pool, in fp32 with one rounding at the end:

        g = torch.where(y <= 0, 0, dy)
        dz = c_g * g + c_z * z + c_1
        dz_proj = c_g_proj * g + c_z_proj * z_proj + c_1_proj

    Raises ValueError if an argument doesn't match z, and if only one of c_z and c_1 is None.

    Source: Ioffe & Szegedy (2015), section 3.
    """
    z_proj, c_g_proj, c_z_proj, c_1_proj = projection or (None, None, None, None)
    if (c_z is None) != (c_1 is None) or (c_z_proj is None) != (c_1_proj is None):
        raise ValueError("c_z and c_1 must be given together, or both be None")
    check_tensor("z_proj", z_proj, tuple(z.shape), z)
    dz = empty(z.shape, z.dtype, z.device)
    dz_proj = None if projection is None else empty(z.shape, z.dtype, z.device)
    vectors = {"c_g": c_g, "c_z": c_z, "c_1": c_1, "c_g_proj": c_g_proj, "c_z_proj": c_z_proj, "c_1_proj": c_1_proj}
    view = rows("z", z, STREAMED if pool is None else WINDOWED)
    of_gradient = _gradient_arguments(dy, z, mask, pool)
    view = _blocks(view, z, pool)
    check_vectors(view.K, z, **vectors)
    if view.M:
        launch(
            backward_apply_kernel, (view.tiles,), z=z, dz=dz, z_proj=z_proj, dz_proj=dz_proj, M=view.M,
            K_VECS=view.K // view.VEC, VEC=view.VEC, BM=view.BM, BK=view.BK, num_warps=WARPS, **of_gradient, **vectors,
        )  # fmt: skip
    return dz if dz_proj is None else (dz, dz_proj)


def _gradient_arguments(dy: Tensor, z: Tensor, mask: Mask, pool: Pool | None) -> dict[str, Any]:
    """Check dy, mask and pool against z; return the kernels' arguments for `gradient` by parameter name."""
    y = mask if isinstance(mask, Tensor) else None
    scale, shift = (None, None) if mask is None or isinstance(mask, Tensor) else mask
    check_tensor("mask", y, tuple(z.shape), z)
    check_vectors(z.shape[-1], z, scale=scale, shift=shift)
    P = Q = U = V = 1
    kernel, stride, pad = (1, 1, 0) if pool is None else pool[1:]
    if pool is None:
        check_tensor("dy", dy, tuple(z.shape), z)
    else:
        shape = check_pool(z, kernel, stride, pad)
        check_tensor("dy", dy, shape, z)
        check_tensor("tap", pool.tap, shape, z, torch.uint8)
        (_, P, Q, _), (_, U, V, _) = z.shape, shape
    return {
        "dy": dy, "y": y, "tap": None if pool is None else pool.tap, "scale": scale, "shift": shift,
        "P": P, "Q": Q, "U": U, "V": V, "KERNEL": kernel, "STRIDE": stride, "PAD": pad,
    }  # fmt: skip


def _blocks(view: Rows, z: Tensor, pool: Pool | None) -> Rows:
    """Return `view`; with a pool, M counts blocks of stride x stride pixels. The pool must be checked before."""
    if pool is None:
        return view
    N, P, Q, _ = z.shape
    return view._replace(M=N * cdiv(P, pool.stride) * cdiv(Q, pool.stride))


def _nonempty(view: Rows) -> Rows:
    if view.M == 0:
        raise ValueError("z is empty, but a reduction needs at least one value per channel")
    return view


def _check_partials(partials: Tensor, sums: int) -> int:
    """Return K. Raise ValueError unless partials is a contiguous fp32 [T >= 1, sums, K]."""
    if partials.dim() != 3 or partials.shape[0] < 1 or partials.shape[1] != sums:
        raise ValueError(f"partials must be [T >= 1, {sums}, K], got shape {tuple(partials.shape)}")
    if partials.dtype != torch.float32 or not partials.is_contiguous():
        raise ValueError(f"partials must be contiguous float32, got {partials.dtype}, strides {partials.stride()}")
    return partials.shape[2]


def _merge(partials: Tensor) -> Tensor:
    """Merge partials in groups, repeatedly, until at most _PARTIALS are left; return them."""
    while partials.shape[0] > _PARTIALS:
        T, sums, K = partials.shape
        groups = cdiv(T, _GROUP)
        merged = empty((groups, sums, K), torch.float32, partials.device)
        launch(
            merge_kernel, (groups, cdiv(K, _MERGED_BK)), partials=partials, merged=merged, T=T, K=K, ROWS=sums,
            GROUP=_GROUP, BT=_MERGED_BT, BK=_MERGED_BK,
        )  # fmt: skip
        partials = merged
    return partials


__all__ = [
    "BackwardVectors",
    "Pool",
    "Statistics",
    "backward_apply",
    "backward_reduce",
    "finish_backward",
    "finish_statistics",
    "normalize",
    "normalize_max_pool",
    "running_statistics",
    "statistics",
]
