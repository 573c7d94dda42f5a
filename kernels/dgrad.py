"""dgrad: the gradient of a convolution's input, fused with the backward passes of the BatchNorms around it.

    dx[n, h, w, c] = sum over r, s, k of w[k, r, s, c] dz[n, p, q, k]
        with p stride = h + pad - r dilation, and q likewise from the column w and s

Prologue, while loading: dz = c_g[k] dy + c_z[k] z + c_1[k], the backward pass of the BatchNorm after the convolution
(see `dz`). Without it, dz = dy. Outside the image dz is 0, although c_1 is not.

Epilogue, before storing. Every part is optional:

    1. dx += residual, the gradient that arrives through the shortcut; not where residual_mask is <= 0.
    2. dx is masked by the ReLU whose output the convolution read (the ReLU below): dx = 0 where relu_mask, the saved
       output of that ReLU, is <= 0, or where scale[c] z_below + shift[c], its recomputed input, is <= 0.
    3. Each tile of pixels stores its partial sums of dx and of dx (z_below - mean[c]), where z_below and mean are the
       input and batch mean of the BatchNorm before the ReLU below. From these sums, `batch_norm.finish_backward`
       computes that BatchNorm's parameter gradients and its coefficients of dz. If the output of a projection's
       BatchNorm was added before the ReLU, the same sums with z_proj and mean_proj are stored as well.

Layouts: activations [N, H, W, C] and [N, P, Q, K], filters [K, R, S, C/groups], all contiguous. As a GEMM: channels c
are GEMM_M, pixels are GEMM_N, and the sum over (tap, k) is GEMM_K. This makes dz, which the prologue computes, the
second operand of the product, which wgmma reads from shared memory.

A strided convolution reads the input pixels (h, w) of each class (h % stride, w % stride) through a different subset of
the filter's taps. Within a class, the problem has stride 1. So every class is one launch, which writes the strided view
dx[:, h::stride, w::stride].
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
    """Compute one tile of dx per program: BM channels of one group and BN pixels of one class of pixels.

    The class has ROWS x COLS pixels (i, j) per image and TAPS_R x TAPS_S taps. Its tap a reads row
    p = i + offset_h - a STEP_H of dz with row r = first_r + a SKIP_R of the filter; columns work likewise. If no tap
    reaches the class, the sum is 0 and only the epilogue runs.

    With TN > 0, the kernel uses TMA: dy and z [N, P, Q, K], w [K, R S C], dx and the tensors of dx's shape
    [N, ROWS, COLS, C] are descriptors, and the pixels of a tile are the box [TN, TH, TW]. With TN = 0, all of these are
    pointers, and the pixels of a tile are BN consecutive ones.

    UNIFORM: every reduction step covers BK channels of one tap. Otherwise a step covers BK of all (tap, k), for groups
    of fewer than BK channels. PADDED: dz must be masked outside the image. INT64: element offsets can exceed 2**31 - 1.

    Consecutive programs compute different channels of the same pixels, so that L2 serves most of their loads of dz.
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
    """Load the tile [BM channels, BN pixels] of a tensor with dx's shape.

    TMA: from the box at (n0, i0, j0, c0). Otherwise from the offsets `at` [BM, BN] where `writable`, and 0 elsewhere.
    """
    if TMA:
        return tensor.load([n0, i0, j0, c0]).reshape((BN, BM)).T
    else:
        return tl.load(tensor + at, mask=writable, other=0.0)


@triton.jit
def store_sums(sums, total, stored, before, mean, channel, c_valid, C):
    """Store a tile's sums over pixels for BM channels each: of dx at `sums`, and of dx (z - mean) at `sums` + C.

    total: the sums of dx [BM]. stored: dx [BM, BN] rounded to its dtype, as fp32. before: z [BM, BN]. mean: a pointer.
    Subtracting the mean from z first avoids cancellation in the second sum.
    """
    centre = tl.load(mean + channel, mask=c_valid, other=0.0)[:, None]
    tl.store(sums, total, mask=c_valid)
    tl.store(sums + C, tl.sum(stored * (before - centre), 1), mask=c_valid)


class _Reach(NamedTuple):
    """The filter taps along one axis that reach one class of input positions.

    The class has the positions h = phase + i stride, 0 <= i < length. Its taps are numbered a = 0 ... count - 1. Tap a
    is tap first + a skip of the filter, and reads position p = i + offset - a step of the convolution's output.
    """

    phase: int
    length: int
    count: int
    first: int
    skip: int
    offset: int
    step: int


def _reach(size: int, taps: int, stride: int, pad: int, dilation: int) -> Iterator[_Reach]:
    """Yield one `_Reach` per class along an axis of `size` positions; classes without positions are left out."""
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
    """Launch the input gradient of a convolution and return dx [N, H, W, C], with `below` the pair (dx, partial sums).

    Equivalent to, with nchw = lambda t: t.permute(0, 3, 1, 2):

        sizes = problem.stride, problem.pad, problem.dilation, problem.groups
        dz = dy if bn_backward is None else c_g * dy + c_z * z + c_1  # [N, P, Q, K]
        dx = torch.nn.grad.conv2d_input((N, C, H, W), nchw(w), nchw(dz), *sizes).permute(0, 2, 3, 1)
        dx = dx + torch.where(residual_mask <= 0, 0, residual)  # optional
        dx = torch.where(relu_mask <= 0, 0, dx)  # optional; for a pair, relu_mask = scale * z_below + shift
        sums = dx.sum((0, 1, 2)), (dx * (z_below - mean)).sum((0, 1, 2))  # with below; likewise with projection

    Prologue and epilogue compute in fp32; dz is rounded to dy's dtype before the product.

    dy: [N, P, Q, K] in bfloat16, float16 or float32. Every other activation has the same dtype.
    w: [K, R, S, C/groups] in dy's dtype.
    bn_backward: (z, c_g, c_z, c_1). dy is then the gradient of a BatchNorm's output, z [N, P, Q, K] that BatchNorm's
        input, and the coefficients are fp32 [K].
    residual: [N, H, W, C], a gradient to add.
    residual_mask: [N, H, W, C]. The residual counts as 0 where the mask is <= 0.
    relu_mask: the saved output [N, H, W, C] of the ReLU below, or its pair (scale, shift) of fp32 [C], from which the
        kernel recomputes the ReLU's input scale z_below + shift. dx, residual included, is set to 0 where it is <= 0.
    below: (z_below, mean) of the BatchNorm whose output dx is the gradient of: its input z_below [N, H, W, C] and batch
        mean, fp32 [C]. dx is then returned with partial sums, fp32 [tiles, 2, C]: for every tile of pixels and every
        channel the sum of dx and the sum of dx (z_below - mean), for dx as stored. A persistent program accumulates all
        its tiles into one row.
    projection: (z_proj, mean_proj), likewise, of a second BatchNorm whose output was added to the first one's. The
        partial sums are then a pair, (below's, projection's).
    precision: of fp32 products, "ieee" or "tf32".
    tile: by default chosen from the measured tables or the heuristic (`tables.backward_tile`).

    All tensors must be contiguous and on one device. There are no atomics, so equal inputs give equal bits.

    Raises ValueError for a wrong shape, dtype, layout or device, for an option whose prerequisite is missing, and for a
    tile that cannot serve.

    Source: Ioffe and Szegedy (2015), section 3, for BatchNorm's backward pass; `batch_norm` has it in these symbols.
    """
    load = check_dz(dy, problem, bn_backward, precision)
    check_tensor("w", w, problem.w_shape, dy)
    recomputed = relu_mask is not None and not isinstance(relu_mask, Tensor)
    scale, shift = relu_mask if recomputed else (None, None)
    z_below, mean = below or (None, None)
    z_proj, mean_proj = projection or (None, None)
    if residual is None and residual_mask is not None:
        raise ValueError("residual_mask requires a residual")
    if below is None and (recomputed or projection is not None):
        name = "relu_mask=(scale, shift)" if recomputed else "projection"
        raise ValueError(f"{name} requires below=(z_below, mean)")
    if recomputed and (scale is None or shift is None):
        raise ValueError("relu_mask must be a tensor of dx's shape or the pair (scale, shift), neither of them None")
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
    """Launch `dgrad_kernel` once per class of input pixels and return (partials, partials_proj).

    partials is None if like_dx["z_below"] is None, and partials_proj if like_dx["z_proj"] is None. like_dy, like_dx:
    the kernel's tensors with the shape of dy (dy, z) and of dx (dx and others), by argument name; None where absent.
    rest: the kernel's other arguments.
    """
    N, H, W, C, P, Q, K = *problem.x_shape, *problem.y_shape[1:]
    c_group, k_group, stride = C // problem.groups, K // problem.groups, problem.stride
    if problem.pointwise:  # a plain GEMM: view all pixels as one row
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
