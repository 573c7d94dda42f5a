"""dgrad: the gradient of a convolution with respect to its input, with BatchNorm's backward around it.

    dx[n, h, w, c] = sum over r, s, k of w[k, r, s, c] dz[n, p, q, k],   p stride = h + pad - r dilation, likewise q

    on load    dz = c_g[k] dy + c_z[k] z + c_1[k]  (optional: BatchNorm's backward; zero outside the image although
                     c_1 is not)
    on store   dx += residual where residual_mask is > 0 (optional: the gradient that came along the shortcut)
               dx  = dx where the ReLU below was open (optional): where relu_mask is > 0, its saved output, or where
                     scale[c] z_below + shift[c] is; and then per tile of pixels the partial sums over dx and
                     dx (z_below - mean[c]), from which the coefficients of the BatchNorm below follow, and the same for
                     the BatchNorm of a projection that joins there

Layouts: activations [N, H, W, C] and [N, P, Q, K], filters [K, R, S, C/groups], all contiguous. GEMM view: channels c
on GEMM_M, pixels on GEMM_N, (tap, k) on GEMM_K; so the operand that is computed on load stands second, where wgmma
reads it from shared memory.

A strided convolution reaches the pixels (h, w) of each class (h % stride, w % stride) through taps of its own; within a
class the problem has stride 1. Every class is one launch on the strided view dx[:, h::stride, w::stride].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import persistent
from .checks import check_tensor, check_vectors, tma_refusal
from .device_functions import box_origin, box_pixels, unravel
from .dz import check_dz, choose_tile, load_dz, tiles_along
from .launcher import empty, launch, remembered, view
from .problem import ConvProblem, cdiv
from .tiles import Tile


@triton.jit(do_not_specialize=["first_r", "first_s", "offset_h", "offset_w", "tiles_h", "tiles_w", "N", "P", "Q"])
def dgrad_kernel(
    dy, z, w, dx, z_below, z_proj, relu_mask, residual, residual_mask, c_g, c_z, c_1, scale, shift, mean, mean_proj,
    partials, partials_proj, N, P, Q, K, C, K_GROUP, C_GROUP, ROWS, COLS, stride_n, stride_h, stride_w, tiles_h,
    tiles_w, first_r, first_s, offset_h, offset_w,
    R: tl.constexpr, S: tl.constexpr, TAPS_R: tl.constexpr, TAPS_S: tl.constexpr, SKIP_R: tl.constexpr,
    SKIP_S: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, UNIFORM: tl.constexpr,
    PADDED: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM channels of one group x BN pixels of one parity class, for all of its TAPS_R x TAPS_S taps.

    TMA (TN > 0): dy, z [N, P, Q, K], dx and what is like it [N, ROWS, COLS, C], w [K, R S C] are descriptors; a tile is
    the box [TN, TH, TW]. Otherwise they are pointers and a tile is BN consecutive pixels; UNIFORM: a step of BK stays
    within one tap. Tap a of TAPS_R reads row p = i + offset_h - a STEP_H with filter row
    r = first_r + a SKIP_R.
    """
    TMA: tl.constexpr = TN > 0
    TAPS: tl.constexpr = TAPS_R * TAPS_S
    tiles_c = tl.cdiv(C_GROUP, BM)
    groups = C // C_GROUP
    pid = tl.program_id(0)
    group = (pid // tiles_c) % groups
    tile_c = pid % tiles_c
    tile_px = pid // (tiles_c * groups)
    if TMA:
        DTYPE: tl.constexpr = dx.dtype
        n0, i0, j0 = box_origin(tile_px, tiles_h, tiles_w, TN, TH, TW)
        n, i, j = box_pixels(n0, i0, j0, TN, TH, TW)
    else:
        DTYPE: tl.constexpr = dx.dtype.element_ty
        n, i, j = unravel(tile_px * BN + tl.arange(0, BN), ROWS, COLS)
        n0 = 0
        i0 = 0
        j0 = 0
    valid = (n < N) & (i < ROWS) & (j < COLS)
    c = tile_c * BM + tl.arange(0, BM)
    c_valid = c < C_GROUP
    if INT64:
        n, i, j, group = n.to(tl.int64), i.to(tl.int64), j.to(tl.int64), group.to(tl.int64)
    channel = group * C_GROUP + c

    acc = tl.zeros((BM, BN), tl.float32)
    if TAPS > 0:
        steps = tl.cdiv(K_GROUP, BK) * TAPS if UNIFORM else tl.cdiv(K_GROUP * TAPS, BK)
        tl.assume(steps > 0)
        for step in range(steps):
            if UNIFORM:
                tap = step % TAPS
                k = step // TAPS * BK + tl.arange(0, BK)
                k_valid = k < K_GROUP
                a = tap // TAPS_S
                b = tap % TAPS_S
            else:
                column = step * BK + tl.arange(0, BK)
                k = column % K_GROUP
                k_valid = column < K_GROUP * TAPS
                tap = column // K_GROUP
                a = (tap // TAPS_S)[None, :]
                b = (tap % TAPS_S)[None, :]
            rs = (first_r + a * SKIP_R) * S + first_s + b * SKIP_S
            dp = offset_h - a * STEP_H
            dq = offset_w - b * STEP_W
            row = i[:, None] + dp
            col = j[:, None] + dq
            inside = valid[:, None] & (row >= 0) & (row < P) & (col >= 0) & (col < Q)
            k_channel = group * K_GROUP + k
            if TMA:
                filters = w.load([step // TAPS * BK, rs * C + tile_c * BM]).T
            else:
                at_w = (k_channel[None, :] * (R * S) + rs) * C_GROUP + c[:, None]
                filters = tl.load(w + at_w, mask=c_valid[:, None] & k_valid[None, :], other=0.0)
            dz = load_dz(
                dy, z, c_g, c_z, c_1, n0, i0 + dp, j0 + dq, step // TAPS * BK, n[:, None], row, col,
                k_channel, k_valid, inside, P, Q, K, (BN, BK), TMA, PADDED,
            )  # fmt: skip
            acc = tl.dot(filters, dz.T, acc, input_precision=PRECISION)

    at = n * stride_n + i * stride_h + j * stride_w
    at = at[None, :] + channel[:, None]
    writable = c_valid[:, None] & valid[None, :]
    if residual is not None:
        res = load_across(residual, n0, i0, j0, tile_c * BM, at, writable, BM, BN, TMA)
        if residual_mask is not None:
            passed = load_across(residual_mask, n0, i0, j0, tile_c * BM, at, writable, BM, BN, TMA)
            res = tl.where(passed <= 0, 0.0, res)
        acc += res.to(tl.float32)
    if relu_mask is not None:
        acc = tl.where(load_across(relu_mask, n0, i0, j0, tile_c * BM, at, writable, BM, BN, TMA) <= 0, 0.0, acc)
    if z_below is not None:
        before = load_across(z_below, n0, i0, j0, tile_c * BM, at, writable, BM, BN, TMA).to(tl.float32)
        if scale is not None:
            slope = tl.load(scale + channel, mask=c_valid, other=0.0)[:, None]
            start = tl.load(shift + channel, mask=c_valid, other=0.0)[:, None]
            acc = tl.where(before * slope + start <= 0, 0.0, acc)
        stored = tl.where(writable, acc.to(DTYPE).to(tl.float32), 0.0)
        total = tl.sum(stored, 1)
        sums = tile_px.to(tl.int64) * 2 * C + channel
        store_sums(partials + sums, total, stored, before, mean, channel, c_valid, C)
        if z_proj is not None:
            before = load_across(z_proj, n0, i0, j0, tile_c * BM, at, writable, BM, BN, TMA).to(tl.float32)
            store_sums(partials_proj + sums, total, stored, before, mean_proj, channel, c_valid, C)
    if TMA:
        dx.store([n0, i0, j0, tile_c * BM], acc.to(DTYPE).T.reshape((TN, TH, TW, BM)))
    else:
        tl.store(dx + at, acc.to(DTYPE), mask=writable)


@triton.jit
def load_across(tensor, n0, i0, j0, c0, at, writable, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """The tile [BM, BN] of a tensor like dx: by its box or by pointers."""
    if TMA:
        return tensor.load([n0, i0, j0, c0]).reshape((BN, BM)).T
    else:
        return tl.load(tensor + at, mask=writable, other=0.0)


@triton.jit
def store_sums(sums, total, stored, before, mean, channel, c_valid, C):
    """sums[0], sums[C] = over pixels of dx (`total`), dx (z - mean), for dx as stored and z = before, [BM, BN]."""
    centre = tl.load(mean + channel, mask=c_valid, other=0.0)[:, None]
    tl.store(sums, total, mask=c_valid)
    tl.store(sums + C, tl.sum(stored * (before - centre), 1), mask=c_valid)


class _Reach(NamedTuple):
    """The filter taps of one axis that reach one class of input pixels h = phase + i stride, i < length: tap number a
    of `count` is tap first + a skip of the filter and reads row p = i + offset - a step."""

    phase: int
    length: int
    count: int
    first: int
    skip: int
    offset: int
    step: int


def _reach(size: int, taps: int, stride: int, pad: int, dilation: int) -> Iterator[_Reach]:
    """One `_Reach` per parity class that has pixels at all."""
    skip = stride // gcd(stride, dilation)
    for phase in range(min(stride, size)):
        firsts = [tap for tap in range(min(skip, taps)) if (phase + pad - tap * dilation) % stride == 0]
        first = firsts[0] if firsts else 0
        yield _Reach(
            phase=phase,
            length=-(-(size - phase) // stride),
            count=-(-(taps - first) // skip) if firsts else 0,
            first=first,
            skip=skip,
            offset=(phase + pad - first * dilation) // stride,
            step=skip * dilation // stride,
        )


@remembered
def conv_dgrad(
    dy: Tensor,
    w: Tensor,
    problem: ConvProblem,
    *,
    bn_backward: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    residual_mask: Tensor | None = None,
    relu_mask: Tensor | tuple[Tensor, Tensor] | None = None,
    below: tuple[Tensor, Tensor] | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor | tuple[Tensor, Any]:
    """dx [N, H, W, C] of a convolution with filters w [K, R, S, C/groups], from dy [N, P, Q, K].

    bn_backward (z, c_g, c_z, c_1): dy is the gradient of BatchNorm's output and z [N, P, Q, K] its input; the
    coefficients are fp32 [K].
    residual: a gradient like dx to add; residual_mask: a tensor like dx, only where it is > 0.
    below (z_below, mean): dx is the gradient of the output of a BatchNorm, whose input z_below is like dx, mean fp32
    [C]; dx is then returned with partial sums, fp32 [tiles, 2, C]: of dx and of dx (z_below - mean), dx as stored.
    projection (z_proj, mean_proj): likewise for a second BatchNorm whose output was added to the first one's; then the
    sums are a pair.
    relu_mask: dx (residual included) is kept where this tensor like dx is > 0, or, for a pair (scale, shift) of fp32
    [C], where scale z_below + shift > 0.
    precision of fp32 products: "ieee" or "tf32". tile: by default from `tables`.

    Activations of one dtype (bf16, fp16, fp32), contiguous. No atomics: equal inputs give equal bits.
    Raises ValueError for shapes, dtypes, layouts or devices that do not fit together.
    """
    load = check_dz(dy, problem, bn_backward, precision)
    check_tensor("w", w, problem.w_shape, dy)
    recomputed = relu_mask is not None and not isinstance(relu_mask, Tensor)
    scale, shift = relu_mask if recomputed else (None, None)
    z_below, mean = below or (None, None)
    z_proj, mean_proj = projection or (None, None)
    if residual is None and residual_mask is not None:
        raise ValueError("residual_mask masks a residual; there is none")
    if below is None and (recomputed or projection is not None):
        name = "relu_mask=(scale, shift)" if recomputed else "projection"
        raise ValueError(f"{name} belongs to a BatchNorm below; below=(z_below, mean) is missing")
    if recomputed and (scale is None or shift is None):
        raise ValueError("relu_mask must be a tensor like dx or the pair (scale, shift)")
    like_dx = {
        "residual": residual, "residual_mask": residual_mask, "z_below": z_below, "z_proj": z_proj,
        "relu_mask": None if recomputed else relu_mask,
    }  # fmt: skip
    for name, tensor in like_dx.items():
        check_tensor(name, tensor, problem.x_shape, dy)
    vectors = {"scale": scale, "shift": shift, "mean": mean, "mean_proj": mean_proj}
    check_vectors(problem.C, dy, **vectors)
    dx = empty(problem.x_shape, dy.dtype, dy.device)
    refusal = tma_refusal(problem, dy, load.z, w, dx, *like_dx.values())
    if tile is not None:
        persistent.check(tile, problem, dy.dtype)
    epilogue = sum(tensor is not None for tensor in like_dx.values())
    tile = choose_tile(tile, "dgrad", problem, dy, refusal, precision, load.operands, epilogue)

    launch_tiles = persistent.launch_dgrad if tile.persistent else _launch_classes
    coefficients = {"c_g": load.c_g, "c_z": load.c_z, "c_1": load.c_1}
    sums = launch_tiles(
        problem, tile, w, {"dy": dy, "z": load.z}, {"dx": dx, **like_dx}, **coefficients, **vectors, PRECISION=precision
    )
    if below is None:
        return dx
    return dx, sums[0] if projection is None else sums


def _launch_classes(
    problem: ConvProblem,
    tile: Tile,
    w: Tensor,
    like_dy: Mapping[str, Tensor | None],
    like_dx: Mapping[str, Tensor | None],
    **rest: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Launches `dgrad_kernel` for every class of input pixels, over tensors by the kernel's names; returns the partials
    of the BatchNorm below and of the projection's, where there are any."""
    N, H, W, C, P, Q, K = *problem.x_shape, *problem.y_shape[1:]
    c_group, k_group, stride = C // problem.groups, K // problem.groups, problem.stride
    if problem.pointwise:  # a plain GEMM: let all pixels lie in one row
        N, H, W, P, Q = 1, 1, N * H * W, 1, N * P * Q
        tile = replace(tile, box=tile.box and (1, 1, tile.BN))
    classes = [
        (rows, cols)
        for rows in _reach(H, problem.R, stride, problem.pad, problem.dilation)
        for cols in _reach(W, problem.S, stride, problem.pad, problem.dilation)
        if N > 0
    ]
    tiles = [tiles_along(tile.box, tile.BN, N, rows.length, cols.length) for rows, cols in classes]
    partials, partials_proj = (
        None if z is None else empty((sum(map(prod, tiles)), 2, C), torch.float32, w.device)
        for z in (like_dx["z_below"], like_dx["z_proj"])
    )
    TN, TH, TW = box = tile.box or (0, 0, 0)
    dy_box, dx_box, w_box = (*box, tile.BK), (*box, tile.BM), (tile.BK, tile.BM)
    if tile.box is None:
        dy_box = dx_box = w_box = None
    first_tile = 0
    for (rows, cols), (tiles_n, tiles_h, tiles_w) in zip(classes, tiles, strict=True):
        of_class = (slice(None), slice(rows.phase, None, stride), slice(cols.phase, None, stride))
        pixels = tiles_n * tiles_h * tiles_w
        launch(
            dgrad_kernel, (cdiv(c_group, tile.BM) * problem.groups * pixels,),
            **{name: view(tensor, (N, P, Q, K), dy_box) for name, tensor in like_dy.items()},
            **{name: view(tensor, (N, H, W, C), dx_box, of_class) for name, tensor in like_dx.items()},
            w=view(w, (K, w.numel() // K), w_box),
            partials=None if partials is None else partials[first_tile:],
            partials_proj=None if partials_proj is None else partials_proj[first_tile:],
            N=N, P=P, Q=Q, K=K, C=C, K_GROUP=k_group, C_GROUP=c_group, ROWS=rows.length, COLS=cols.length,
            stride_n=H * W * C, stride_h=stride * W * C, stride_w=stride * C, tiles_h=tiles_h, tiles_w=tiles_w,
            first_r=rows.first, first_s=cols.first, offset_h=rows.offset, offset_w=cols.offset,
            R=problem.R, S=problem.S, TAPS_R=rows.count, TAPS_S=cols.count, SKIP_R=rows.skip, SKIP_S=cols.skip,
            STEP_H=rows.step, STEP_W=cols.step, BM=tile.BM, BN=tile.BN, BK=tile.BK, TN=TN, TH=TH, TW=TW,
            UNIFORM=tile.box is not None or k_group >= tile.BK, PADDED=tile.box is None or not problem.pointwise,
            INT64=not problem.int32_safe, num_warps=tile.warps, num_stages=tile.stages, **rest,
        )  # fmt: skip
        first_tile += pixels
    return partials, partials_proj
