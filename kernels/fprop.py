"""fprop: the forward pass of a convolution, with a fused prologue and epilogue.

    y[n, p, q, k] = out_scale [relu](scale[k] conv[n, p, q, k] + shift[k] + residual_scale residual[n, p, q, k])
    conv[n, p, q, k] = sum over r, s, c of w[k, r, s, c] a[n, h, w, c]
        with h = p stride + r dilation - pad, and the column w likewise from q and s

Prologue: what the kernel does to x while loading it. Without one, a = x. With one, a = relu(s[c] x + t[c]), which is
the BatchNorm and ReLU of the previous layer, so that layer's activation need not be stored. Outside the image a is 0.

Epilogue: what the kernel does to the sum before storing it. Every part of the first line besides conv is optional. The
kernel can also store statistics of each tile of y, which `batch_norm.finish_statistics` merges into batch statistics.

Join: for a 1x1 convolution, the prologue can compute the end of the previous residual block, that is, everything after
its last convolution: a = relu(s[c] x + t[c] + shortcut). The shortcut is either the block's input or s'[c] z' + t'[c],
the BatchNorm of a projection's raw output z'. The kernel then stores a as well, because the next block's shortcut and
the backward pass read it.

Layouts: x [N, H, W, C], w [K, R, S, C/groups], y and residual [N, P, Q, K], all contiguous. As a GEMM: output channels
k are GEMM_M, pixels are GEMM_N, and the sum over (tap, c) is GEMM_K. This makes a, which the prologue computes, the
second operand of the product, which wgmma reads from shared memory. Sums are fp32. There are no atomics, so equal
inputs give equal bits.

Two kernels compute convolutions. `conv_fprop_tma_kernel` loads boxes of pixels by TMA; reads outside the tensor return
zero, which serves as the padding. `conv_fprop_gather_kernel` loads by pointers and supports every shape. If there are
too few tiles to keep all multiprocessors busy, both can cut the sum over (tap, c) into splits. They then store fp32
sums [splits, N, P, Q, K], and `fprop_reduce_kernel` adds the splits in a fixed order and applies the epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import persistent
from .checks import check_device, check_product, check_tensor, check_vectors, gpu_of, tma_refusal
from .device_functions import (
    affine_relu,
    box_origin,
    box_pixels,
    filter_tap,
    finish,
    join_relu,
    store_statistics,
    unravel,
)
from .launcher import empty, launch, remembered, view
from .problem import FLOATS, ConvProblem, cdiv
from .tables import fprop_tile
from .tiles import Tile, pixel_tiles, reduction_steps, row_channels

FP8 = torch.float8_e4m3fn


@triton.jit(
    do_not_specialize=[
        *("N", "H", "W", "P", "Q", "tiles_p", "tiles_q", "steps", "steps_per_split"),
        *("residual_scale", "out_scale", "eps"),
    ]
)
def conv_fprop_tma_kernel(
    x, w, y, residual, prologue_scale, prologue_shift, shortcut, shortcut_scale, shortcut_shift, joined, scale, shift,
    mean, var, eps, partials, residual_scale, out_scale, N, H, W, C, P, Q, K, tiles_p, tiles_q, steps, steps_per_split,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION: tl.constexpr, FULL: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, TN: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one tile [BM channels, TN x TH x TW pixels] of y per program. Loads and stores go through TMA.

    Consecutive programs compute different channels of the same pixels, so that L2 serves most of their loads of x.

    Descriptors: w [K, R S C]; y and residual [N, P, Q, K]; x, shortcut and joined (where a is stored) [N, H, W, C]. For
    stride 2, x is viewed as [N, H/2, 2, W/2, 2 C], so that a tap reads rows of one parity and columns of one parity.

    BK must divide C, because a box must not reach into the channels of another tap or column. Exception: for a single
    tap and stride 1 C may be any size, since TMA fills with zeros past C.

    FULL: TN, TH and TW divide N, P and Q, so every tile is full and the statistics need no mask. With steps_per_split,
    y is [splits, N, P, Q, K], and program_id(1) is the split, a sum over that many steps.
    """
    BN: tl.constexpr = TN * TH * TW
    tiles_k = tl.cdiv(K, BM)
    tile_k = tl.program_id(0) % tiles_k
    tile = tl.program_id(0) // tiles_k
    n0, p0, q0 = box_origin(tile, tiles_p, tiles_q, TN, TH, TW)
    if prologue_scale is not None and shortcut is None:
        _, p, q = box_pixels(n0, p0, q0, TN, TH, TW)

    first = 0
    if steps_per_split is not None:
        first = tl.program_id(1) * steps_per_split
        steps = tl.minimum(steps_per_split, steps - first)
    acc = tl.zeros((BM, BN), tl.float32)
    tl.assume(steps > 0)  # without it ptxas serialises wgmma (warning C7515)
    for step in range(steps):
        r, s, block = filter_tap(first + step, S, R * S)
        c0 = block * BK
        if STRIDE == 1:
            a = x.load([n0, p0 + r * DILATION - PAD_H, q0 + s * DILATION - PAD_W, c0])
        else:
            down, right = r * DILATION + PAD_H, s * DILATION + PAD_W  # the tap's offset + 2 PAD, never negative
            a = x.load([n0, p0 + down // 2 - PAD_H, down % 2, q0 + right // 2 - PAD_W, right % 2 * C + c0])
        a = a.reshape((BN, BK))
        if shortcut is not None:
            c = c0 + tl.arange(0, BK)
            addend = shortcut.load([n0, p0, q0, c0]).reshape((BN, BK))
            a = join_relu(a, addend, prologue_scale, prologue_shift, shortcut_scale, shortcut_shift, c, c < C)
            joined.store([n0, p0, q0, c0], a.reshape((TN, TH, TW, BK)))
        elif prologue_scale is not None:
            c = c0 + tl.arange(0, BK)
            h = p * STRIDE + r * DILATION - PAD_H
            col = q * STRIDE + s * DILATION - PAD_W
            a = affine_relu(
                a,
                tl.load(prologue_scale + c, mask=c < C, other=0.0),
                tl.load(prologue_shift + c, mask=c < C, other=0.0),
                ((h >= 0) & (h < H) & (col >= 0) & (col < W))[:, None],
                PAD_H > 0 or PAD_W > 0,
            )
        acc = tl.dot(w.load([tile_k * BM, (r * S + s) * C + c0]), a.T, acc, input_precision=PRECISION)

    k = tile_k * BM + tl.arange(0, BM)
    res = None
    if residual is not None:
        res = residual.load([n0, p0, q0, tile_k * BM]).reshape((BN, BM)).T
    out = finish(acc, res, scale, shift, mean, var, eps, k, k < K, residual_scale, out_scale, RELU, y.dtype)
    if steps_per_split is None:
        y.store([n0, p0, q0, tile_k * BM], out.T.reshape((TN, TH, TW, BM)))
    else:
        y.store([tl.program_id(1), n0, p0, q0, tile_k * BM], out.T.reshape((1, TN, TH, TW, BM)))
    if partials is not None:
        count = tl.minimum(TN, N - n0) * tl.minimum(TH, P - p0) * tl.minimum(TW, Q - q0)
        n, p, q = box_pixels(n0, p0, q0, TN, TH, TW)
        store_statistics(partials, out, tile, count, (n < N) & (p < P) & (q < Q), k, k < K, K, FULL)


@triton.jit(
    do_not_specialize=["pixels", "H", "W", "P", "Q", "steps", "steps_per_split", "residual_scale", "out_scale", "eps"]
)
def conv_fprop_gather_kernel(
    x, w, y, residual, prologue_scale, prologue_shift, shortcut, shortcut_scale, shortcut_shift, joined, scale, shift,
    mean, var, eps, partials, residual_scale, out_scale, pixels, H, W, C, P, Q, K, C_GROUP, K_GROUP, steps,
    steps_per_split,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
    FULL: tl.constexpr, ROW: tl.constexpr, INT64: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one tile [BM channels, BN consecutive pixels] of y per program, with loads and stores by pointers.

    program_id(1) is the group that the channels belong to.

    A reduction step covers BK channels of one filter tap. If there are too few channels per group to fill a step, the
    launcher sets ROW = C_GROUP (`tiles.row_channels`); a step then covers BK of the S ROW values under one row of the
    filter. Otherwise ROW is 0.

    FULL: BN divides the number of pixels, so every tile is full and the statistics need no mask. INT64: element offsets
    can exceed 2**31 - 1. With steps_per_split, y is [splits, N, P, Q, K], and program_id(2) is the split, a sum over
    that many steps.
    """
    channels = C_GROUP
    if ROW > 0:
        channels = ROW  # a constexpr, whose divisors tell the compiler how wide the copies may be
    tiles_k = tl.cdiv(K_GROUP, BM)
    tile_k = tl.program_id(0) % tiles_k
    tile = tl.program_id(0) // tiles_k
    group = tl.program_id(1)
    if INT64:
        tile = tile.to(tl.int64)
        group = group.to(tl.int64)
    pixel = tile * BN + tl.arange(0, BN)
    inside = pixel < pixels
    n, p, q = unravel(pixel, P, Q)
    h0 = p * STRIDE - PAD
    col0 = q * STRIDE - PAD
    x_pixel = x + (((n * H + h0) * W + col0) * C + group * channels)[:, None]
    k = tile_k * BM + tl.arange(0, BM)
    w_row = w + ((group * K_GROUP + k) * (R * S * channels))[:, None]

    first = 0
    if steps_per_split is not None:
        first = tl.program_id(2) * steps_per_split
        steps = tl.minimum(steps_per_split, steps - first)
        y += tl.program_id(2).to(tl.int64) * pixels * K
    acc = tl.zeros((BM, BN), tl.float32)
    tl.assume(steps > 0)
    for step in range(steps):
        if ROW > 0:
            r = (first + step) % R
            j = (first + step) // R * BK + tl.arange(0, BK)
            s = j // ROW
            c = j % ROW
            col = col0[:, None] + (s * DILATION)[None, :]
            in_k = j < S * ROW
            w_at = r * S * ROW + j
        else:
            r, s, block = filter_tap(first + step, S, R * S)
            c = block * BK + tl.arange(0, BK)
            col = (col0 + s * DILATION)[:, None]
            in_k = c < channels
            w_at = (r * S + s) * channels + c
        h = (h0 + r * DILATION)[:, None]
        valid = inside[:, None] & (h >= 0) & (h < H) & (col >= 0) & (col < W)
        at_x = ((r * W + s) * DILATION * C + c)[None, :]
        a = tl.load(x_pixel + at_x, mask=valid & in_k[None, :], other=0.0)
        filters = tl.load(w_row + w_at[None, :], mask=(k < K_GROUP)[:, None] & in_k[None, :], other=0.0)
        if shortcut is not None:
            at_x += (pixel * C)[:, None]
            addend = tl.load(shortcut + at_x, mask=valid & in_k[None, :], other=0.0)
            a = join_relu(a, addend, prologue_scale, prologue_shift, shortcut_scale, shortcut_shift, c, in_k)
            tl.store(joined + at_x, a, mask=valid & in_k[None, :])
        elif prologue_scale is not None:
            channel = group * channels + c
            a = affine_relu(
                a,
                tl.load(prologue_scale + channel, mask=in_k, other=0.0),
                tl.load(prologue_shift + channel, mask=in_k, other=0.0),
                valid,
                PAD > 0,
            )
        acc = tl.dot(filters, a.T, acc, input_precision=PRECISION)

    channel = group * K_GROUP + k
    at = pixel[None, :] * K + channel[:, None]
    writable = inside[None, :] & (k < K_GROUP)[:, None]
    res = None
    if residual is not None:
        res = tl.load(residual + at, mask=writable, other=0.0)
    out = finish(
        acc, res, scale, shift, mean, var, eps, channel, k < K_GROUP, residual_scale, out_scale, RELU,
        y.dtype.element_ty,
    )  # fmt: skip
    tl.store(y + at, out, mask=writable)
    if partials is not None:
        store_statistics(partials, out, tile, tl.minimum(BN, pixels - tile * BN), inside, channel, k < K_GROUP, K, FULL)


@triton.jit(do_not_specialize=["pixels", "residual_scale", "out_scale", "eps"])
def fprop_reduce_kernel(
    sums, y, residual, scale, shift, mean, var, eps, residual_scale, out_scale, pixels, K,
    RELU: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add sums [SPLITS, pixels, K] in the order of the splits, apply the epilogue (`finish`) and store y [pixels, K].

    One program computes a tile of BM channels and BN pixels.
    """
    first = tl.program_id(0).to(tl.int64) * BN
    start = first * K
    pixel = tl.arange(0, BN)
    k = tl.program_id(1) * BM + tl.arange(0, BM)
    at = pixel[None, :] * K + k[:, None]
    valid = (first + pixel < pixels)[None, :] & (k < K)[:, None]
    numel = pixels.to(tl.int64) * K
    total = tl.zeros((BM, BN), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + (split * numel + start) + at, mask=valid, other=0.0)
    res = None
    if residual is not None:
        res = tl.load(residual + start + at, mask=valid, other=0.0)
    out = finish(
        total, res, scale, shift, mean, var, eps, k, k < K, residual_scale, out_scale, RELU, y.dtype.element_ty
    )
    tl.store(y + start + at, out, mask=valid)


class Join(NamedTuple):
    """The shortcut that a prologue adds to compute the end of a residual block, and where to store the result.

    shortcut: [N, H, W, C], the block's input or the raw output z of its projection.
    scale, shift: for a projection, its BatchNorm as fp32 [C]; otherwise None.
    out: [N, H, W, C], filled with relu(s x + t + shortcut), the output of the block.
    """

    shortcut: Tensor
    scale: Tensor | None
    shift: Tensor | None
    out: Tensor


class RunningNorm(NamedTuple):
    """A BatchNorm in eval mode: running statistics, weight and bias (either may be None), and eps.

    All tensors are [K] in bfloat16, float16 or float32.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@remembered
def conv_fprop(
    x: Tensor,
    w: Tensor,
    problem: ConvProblem,
    *,
    prologue: tuple[Tensor, Tensor] | None = None,
    join: Join | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    norm: RunningNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    statistics: bool = False,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Launch the forward pass of a convolution and return y [N, P, Q, K], with `statistics` the pair (y, partials).

    Equivalent to, with nchw = lambda t: t.permute(0, 3, 1, 2) and nhwc = lambda t: t.permute(0, 2, 3, 1):

        a = x if prologue is None else F.relu(s * x + t)  # [N, H, W, C]; with a join F.relu(s * x + t + shortcut)
        z = nhwc(F.conv2d(nchw(a), nchw(w), None, problem.stride, problem.pad, problem.dilation, problem.groups))
        z = scale * z + shift + residual_scale * residual  # [N, P, Q, K]; each part is optional
        y = out_scale * (F.relu(z) if relu else z)

    Prologue and epilogue compute in fp32. a is rounded to x's dtype before the product, and y to its own when stored.

    x: [N, H, W, C] in bfloat16, float16, float32 or, without a prologue, float8_e4m3fn.
    w: [K, R, S, C/groups] in x's dtype.
    prologue: (s, t), each fp32 [C].
    join: adds a residual block's shortcut inside the prologue and fills `join.out` with a. For 1x1 convolutions of
        stride 1 without padding and groups. Every tile of channels computes and stores all of a again, so a join is
        worthwhile if one tile covers all K.
    scale, shift: fp32 [K].
    norm: an eval-mode BatchNorm, from which the kernel computes scale and shift. Excludes those two.
    residual: [N, P, Q, K] in x's or y's dtype.
    statistics: also return partials, fp32 [tiles, 3, K]: for every tile of pixels and every channel the number of
        values of y, their mean, and the sum of their squared distances from that mean, after rounding to y's dtype.
        A persistent program accumulates all its tiles into one row.
    residual_scale, out_scale: numbers, for quantised tensors.
    out: where to store y. By default y is allocated.
    out_dtype: y's dtype. By default that of `out` if given, otherwise bfloat16 for float8 x and x's dtype for all
        others.
    precision: of fp32 products, "ieee" or "tf32".
    tile: by default chosen from the measured tables or the heuristic (`tables.fprop_tile`). A tile with a box is
        loaded by TMA, one without by pointers. A tile with splits > 1 needs a second launch and excludes
        `statistics` and `join`.

    All tensors must be contiguous and on one device.

    Raises ValueError for a wrong shape, dtype, layout or device, for options that exclude each other, and for a tile
    that cannot serve.

    Source: He et al. (2015), section 3.4 (BatchNorm after each convolution, before the ReLU), equations 1 and 2 (the
    join); Chan, Golub and LeVeque (1979) for the partials.
    """
    shape, K = problem.y_shape, problem.K
    if x.dtype not in (*FLOATS, FP8):
        raise ValueError(f"x must be bfloat16, float16, float32 or float8_e4m3fn, got {x.dtype}")
    check_tensor("x", x, problem.x_shape, x)
    check_tensor("w", w, problem.w_shape, x)
    if join is not None and (prologue is None or not problem.pointwise or problem.groups > 1):
        raise ValueError("join needs a prologue and a 1x1 convolution of stride 1, without padding and groups")
    if prologue is not None and x.dtype == FP8:
        raise ValueError("a prologue needs a bfloat16, float16 or float32 x, got float8_e4m3fn")
    y_dtype = out_dtype or (out.dtype if out is not None else torch.bfloat16 if x.dtype == FP8 else x.dtype)
    if y_dtype not in (*FLOATS, FP8):
        raise ValueError(f"out_dtype must be bfloat16, float16, float32 or float8_e4m3fn, got {y_dtype}")
    if norm is not None and (scale is not None or shift is not None):
        raise ValueError("norm already determines scale and shift: pass either norm or scale and shift")
    s, t = prologue or (None, None)
    mean, var, weight, bias, eps = norm or (None, None, scale, shift, None)
    shortcut, shortcut_scale, shortcut_shift, joined = join or (None, None, None, None)
    for name, tensor in (("join.shortcut", shortcut), ("join.out", joined)):
        check_tensor(name, tensor, problem.x_shape, x)
    check_vectors(problem.C, x, prologue_scale=s, prologue_shift=t)
    check_vectors(problem.C, x, **{"join.scale": shortcut_scale, "join.shift": shortcut_shift})
    check_vectors(K, x, scale=scale, shift=shift)
    if norm is not None:
        check_vectors(
            K, x, *FLOATS, **dict(zip(("norm.mean", "norm.var", "norm.weight", "norm.bias"), norm, strict=False))
        )
    check_tensor("residual", residual, shape, x, x.dtype, y_dtype)
    check_tensor("out", out, shape, x, y_dtype)
    check_device(x, x.dtype, y_dtype)
    check_product(x, precision)

    y = empty(shape, y_dtype, x.device) if out is None else out
    computed = 0 if prologue is None else 1 if join is None else 2
    tile = _choose(tile, problem, (x, w, y, residual, shortcut, joined), computed, statistics, precision)
    splits = _splits(problem, tile, join, statistics)
    tiles = pixel_tiles(problem, tile.BN, tile.box)
    launch_tiles = _launch_gather if tile.box is None else _launch_tma
    if tile.persistent:
        tiles, launch_tiles = persistent.programs(problem.pixels, K, tile, x.device), persistent.launch_fprop
    partials = empty((tiles, 3, K), torch.float32, x.device) if statistics else None
    epilogue = {
        "scale": weight, "shift": bias, "mean": mean, "var": var, "eps": eps,
        "residual_scale": None if residual_scale == 1.0 else residual_scale,
        "out_scale": None if out_scale == 1.0 else out_scale,
    }  # fmt: skip
    if problem.pixels and splits == 1:
        launch_tiles(
            problem, tile, x, w, y, residual, shortcut, joined,
            prologue_scale=s, prologue_shift=t, shortcut_scale=shortcut_scale, shortcut_shift=shortcut_shift,
            partials=partials, **epilogue, RELU=relu, PRECISION=precision,
        )  # fmt: skip
    elif problem.pixels:
        sums = empty((splits, *shape), torch.float32, x.device)
        launch_tiles(
            problem, tile, x, w, sums, None, None, None,
            prologue_scale=s, prologue_shift=t, shortcut_scale=None, shortcut_shift=None,
            partials=None, **dict.fromkeys(epilogue), RELU=False, PRECISION=precision,
        )  # fmt: skip
        _launch_reduce(sums, y, residual, **epilogue, RELU=relu)
    return y if partials is None else (y, partials)


def fprop_tma_refusal(problem: ConvProblem, *tensors: Tensor | None) -> str | None:
    """Return the reason why `conv_fprop_tma_kernel` cannot serve, or None if it can.

    tensors: all that the kernel would access, x first.
    """
    if not problem.pointwise:
        least = 32 if tensors[0] is not None and tensors[0].dtype == FP8 else 16
        if problem.C % least:
            return f"C={problem.C} is not a multiple of {least}, the shortest reduction step"
        if problem.stride > 2:
            return f"stride={problem.stride} is greater than 2"
        if problem.stride == 2 and (problem.H % 2 or problem.W % 2):
            return f"stride 2 requires even H and W, got {problem.H}x{problem.W}"
    return tma_refusal(problem, *tensors)


def _choose(
    tile: Tile | None,
    problem: ConvProblem,
    tensors: Sequence[Tensor | None],
    computed: int,
    statistics: bool,
    precision: str,
) -> Tile:
    x = tensors[0]
    assert x is not None
    if tile is not None:
        persistent.check(tile, problem, x.dtype)
    if tile is not None and tile.box is None:
        return tile
    refusal = fprop_tma_refusal(problem, *tensors)
    if tile is None:
        ieee = x.dtype == torch.float32 and precision == "ieee"
        pass_: Literal["infer", "fprop"] = "fprop" if computed or statistics else "infer"
        return fprop_tile(problem, x.dtype, refusal is None, gpu_of(x.device), ieee, computed, pass_)
    if refusal is not None:
        raise ValueError(f"a tile with a box is fetched by TMA, which is impossible here: {refusal}")
    if math.prod(tile.box) != tile.BN or (problem.pointwise and tile.box[:2] != (1, 1)):
        raise ValueError(f"{tile}: the box must contain BN pixels, for a pointwise convolution as (1, 1, BN)")
    if not problem.pointwise and problem.C % tile.BK:
        raise ValueError(
            f"BK={tile.BK} must divide C={problem.C} unless the convolution is 1x1 with stride 1 and no padding"
        )
    return tile


def _splits(problem: ConvProblem, tile: Tile, join: Join | None, statistics: bool) -> int:
    """Return the number of splits: `tile.splits`, or fewer if the last ones would have no step to sum."""
    if tile.splits < 1:
        raise ValueError(f"splits must be >= 1, got {tile.splits}")
    if tile.splits > 1 and (join is not None or statistics):
        asked = "join" if join is not None else "statistics"
        raise ValueError(
            f"splits={tile.splits}: {asked} requires splits=1, because a split computes only a part of the sum"
        )
    steps = reduction_steps(problem, tile)
    return cdiv(steps, cdiv(steps, tile.splits))


def _launch_tma(
    problem: ConvProblem, tile: Tile, x: Tensor, w: Tensor, y: Tensor, *same_shape: Tensor | None, **rest: Any
) -> None:
    residual, shortcut, joined = same_shape
    if problem.pointwise:
        x, y = x.view(1, 1, -1, problem.C), y.view(*y.shape[:-4], 1, 1, -1, problem.K)
        residual = None if residual is None else residual.view(y.shape)
        shortcut, joined = (None if each is None else each.view(x.shape) for each in (shortcut, joined))
    elif problem.stride == 2:
        x = x.view(problem.N, problem.H // 2, 2, problem.W // 2, 2 * problem.C)
    launch_boxes(
        tile, x, w, y, residual, shortcut, joined, H=problem.H, W=problem.W, C=problem.C,
        **_steps(problem, tile, y), R=problem.R, S=problem.S, STRIDE=problem.stride, PAD_H=problem.pad,
        PAD_W=problem.pad, DILATION=problem.dilation, **rest,
    )  # fmt: skip


def launch_boxes(
    tile: Tile,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    joined: Tensor | None = None,
    **rest: Any,
) -> None:
    """Launch `conv_fprop_tma_kernel`.

    x is in the view that the kernel reads: 4-D [N, H, W, C], or 5-D for stride 2. shortcut and joined have the shape
    of x. y and residual are [N, P, Q, K]; for splits, y is their fp32 sums [splits, N, P, Q, K]. rest: the kernel's
    other arguments.
    """
    assert tile.box is not None
    TN, TH, TW = tile.box
    *splits, N, P, Q, K = y.shape
    tiles_n, tiles_p, tiles_q = cdiv(N, TN), cdiv(P, TH), cdiv(Q, TW)
    out_box = [TN, TH, TW, tile.BM]
    x_box = [TN, TH, TW, tile.BK] if x.dim() == 4 else [TN, TH, 1, TW, tile.BK]

    def boxes(tensor: Tensor | None, box: list[int]) -> Any:
        # An axis of size 1 may have any stride, even one that TMA rejects; `view` replaces it with the regular one.
        return None if tensor is None else view(tensor, tensor.shape, box)

    launch(
        conv_fprop_tma_kernel, (tiles_n * tiles_p * tiles_q * cdiv(K, tile.BM), *splits),
        x=boxes(x, x_box), w=boxes(w.view(K, -1), [tile.BM, tile.BK]), y=boxes(y, [1] * len(splits) + out_box),
        residual=boxes(residual, out_box), shortcut=boxes(shortcut, x_box), joined=boxes(joined, x_box),
        N=N, P=P, Q=Q, K=K, tiles_p=tiles_p, tiles_q=tiles_q,
        FULL=(N % TN, P % TH, Q % TW) == (0, 0, 0), TN=TN, TH=TH, TW=TW, BM=tile.BM, BK=tile.BK,
        num_warps=tile.warps, num_stages=tile.stages, **rest,
    )  # fmt: skip


def _launch_gather(
    problem: ConvProblem, tile: Tile, x: Tensor, w: Tensor, y: Tensor, *same_shape: Tensor | None, **rest: Any
) -> None:
    residual, shortcut, joined = same_shape
    k_group = problem.K // problem.groups
    tiles = cdiv(problem.pixels, tile.BN) * cdiv(k_group, tile.BM)
    launch(
        conv_fprop_gather_kernel, (tiles, problem.groups, *y.shape[:-4]),
        x=x, w=w, y=y, residual=residual, shortcut=shortcut, joined=joined,
        pixels=problem.pixels, H=problem.H, W=problem.W, C=problem.C, P=problem.P, Q=problem.Q, K=problem.K,
        C_GROUP=problem.C // problem.groups, K_GROUP=k_group,
        R=problem.R, S=problem.S, STRIDE=problem.stride, PAD=problem.pad, DILATION=problem.dilation,
        **_steps(problem, tile, y), FULL=problem.pixels % tile.BN == 0,
        ROW=row_channels(problem), INT64=not problem.int32_safe,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages, **rest,
    )  # fmt: skip


def _steps(problem: ConvProblem, tile: Tile, y: Tensor) -> dict[str, int | None]:
    """Return the number of reduction steps and, if y is the splits' sums [splits, N, P, Q, K], of steps per split."""
    steps = reduction_steps(problem, tile)
    return {"steps": steps, "steps_per_split": None if y.dim() == 4 else cdiv(steps, y.shape[0])}


def _launch_reduce(sums: Tensor, y: Tensor, residual: Tensor | None, **epilogue: Any) -> None:
    """Launch `fprop_reduce_kernel` with one warp per program.

    A launch has many small programs even at batch 1, so one warp each is enough. With two warps, ptxas gives a thread
    fewer registers, and in some variants of the kernel it no longer issues the loads of all 8 splits before the first
    addition.
    """
    splits, N, P, Q, K = sums.shape
    BM = min(64, triton.next_power_of_2(K))
    BN = 128 // BM
    launch(
        fprop_reduce_kernel, (cdiv(N * P * Q, BN), cdiv(K, BM)),
        sums=sums, y=y, residual=residual, pixels=N * P * Q, K=K, SPLITS=splits, BM=BM, BN=BN, num_warps=1, **epilogue,
    )  # fmt: skip
