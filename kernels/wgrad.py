"""wgrad: the gradient of a convolution's filters.

    dw[k, r, s, c] = sum over n, p, q of dz[n, p, q, k] a[n, h, w, c]
        with h = p stride - pad + r dilation, and the column w likewise from q and s

Both operands can be computed while the kernel loads them, so that neither has to be stored:

    dz = c_g[k] dy + c_z[k] z + c_1[k]   the backward pass of the BatchNorm after the convolution (see `dz`), else dy
    a = relu(scale[c] x + shift[c])      the convolution's input, padded with zeros, else x

Layouts: activations [N, H, W, C] and [N, P, Q, K], filters [K, R, S, C/groups], all contiguous.

The sum runs over pixels (GEMM_K). It is cut into splits, so that there are enough programs to fill the GPU.
`wgrad_kernel` stores fp32 partial sums [splits, K, R, S, C/groups], and `wgrad_reduce_kernel` adds them in a fixed
order.

A computed operand should be the second one of the product, which wgmma reads from shared memory. So filters k are
GEMM_N if dz is computed, and GEMM_M otherwise. If both operands are computed, wgmma reads a, the first one, from
registers, and the kernel waits for every product to finish (see `device_functions.wait_for_wgmma`).
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor, check_vectors, tma_refusal
from .device_functions import affine_relu, box_origin, box_pixels, unravel, wait_for_wgmma
from .dz import check_dz, choose_tile, load_dz, tiles_along
from .launcher import empty, launch, remembered, view
from .problem import ConvProblem, cdiv
from .tiles import Tile


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "tiles_h", "tiles_w", "steps_in_all", "steps_per_split"])
def wgrad_kernel(
    dy, z, x, dw, c_g, c_z, c_1, scale, shift, N, H, W, C, P, Q, K, C_GROUP, K_GROUP, tiles_h, tiles_w, steps_in_all,
    steps_per_split,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    TAPS: tl.constexpr, TMA_DZ: tl.constexpr, TMA_A: tl.constexpr, UNIFORM: tl.constexpr, SHIFT_DZ: tl.constexpr,
    PADDED_DZ: tl.constexpr, PADDED_A: tl.constexpr, WAIT: tl.constexpr, INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum one tile of dw over one split of the pixels: BM filters, BN channels, and TAPS (1 or 3) taps of a filter row.

    program_id(0) selects the tile of dw and its group, program_id(1) the split. dw is [splits, K, R, S, C/groups] in
    any floating-point dtype.

    A step reduces over BK pixels: the box [TN, TH, TW], or BK consecutive pixels if TN = 0. TMA_DZ: dy and z are
    descriptors of [N, P, Q, K]. TMA_A: x is a descriptor of [N, H, W, C], for STRIDE 2 of [N, H/2, 2, W/2, 2 C].
    Otherwise they are pointers.

    UNIFORM: the BN columns of a tile are channels of one tap (TAPS tiles, one per tap). Otherwise they are any BN of
    the R S C/groups pairs (tap, c), and TAPS is 1.

    SHIFT_DZ (STRIDE 1): the pixels of a step are those of x. Its tile a is loaded and computed once for all TAPS taps,
    and dz is loaded once per tap, at pixels shifted by the tap. Otherwise dz stays in place and a is shifted.

    PADDED_DZ, PADDED_A: where the pixel is outside the image, that operand must be set to zero if it is computed.
    WAIT: wait for each product before overwriting its operands. INT64: element offsets can exceed 2**31 - 1.
    """
    TMA: tl.constexpr = TN > 0
    SWAP: tl.constexpr = z is not None
    tiles_k = tl.cdiv(K_GROUP, BM)
    if UNIFORM:
        tiles_c = tl.cdiv(C_GROUP, BN)
        columns = tiles_c * (R * S // TAPS)
    else:
        columns = tl.cdiv(R * S * C_GROUP, BN)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    group = pid // (tiles_k * columns)
    if INT64:
        group = group.to(tl.int64)
    tile_k = pid % tiles_k
    tile_column = pid // tiles_k % columns

    k = tile_k * BM + tl.arange(0, BM)
    k_valid = k < K_GROUP
    k_channel = group * K_GROUP + k
    if UNIFORM:
        c0 = tile_column % tiles_c * BN
        first_tap = tile_column // tiles_c * TAPS
        tap_r = first_tap // S
        tap_s = first_tap % S
        c = c0 + tl.arange(0, BN)
        c_valid = c < C_GROUP
        column = first_tap * C_GROUP + c
    else:
        c0 = 0
        column = tile_column * BN + tl.arange(0, BN)
        c_valid = column < R * S * C_GROUP
        c = column % C_GROUP
        tap_r = (column // C_GROUP // S)[None, :]
        tap_s = (column // C_GROUP % S)[None, :]
    c_channel = group * C_GROUP + c
    slope = None
    start = None
    if scale is not None:
        slope = tl.load(scale + c_channel, mask=c_valid, other=0.0)
        start = tl.load(shift + c_channel, mask=c_valid, other=0.0)

    SHAPE: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    acc0 = tl.zeros(SHAPE, tl.float32)
    if TAPS == 3:
        acc1 = tl.zeros(SHAPE, tl.float32)
        acc2 = tl.zeros(SHAPE, tl.float32)
    first = split * steps_per_split
    steps = tl.minimum(steps_per_split, steps_in_all - first)
    tl.assume(steps > 0)
    for step in range(steps):
        if TMA:
            n0, i0, j0 = box_origin(first + step, tiles_h, tiles_w, TN, TH, TW)
            n, i, j = box_pixels(n0, i0, j0, TN, TH, TW)
        else:
            n0 = 0
            i0 = 0
            j0 = 0
            n, i, j = unravel((first + step) * BK + tl.arange(0, BK), P, Q)
        if INT64:
            n = n.to(tl.int64)
        n = n[:, None]
        i = i[:, None]
        j = j[:, None]
        if SHIFT_DZ:
            a = x.load([n0, i0, j0, c0]).reshape((BK, BN))
            a = affine_relu(a, slope, start, (i < H) & (j < W), PADDED_A)
        else:
            dz = load_dz(
                dy, z, c_g, c_z, c_1, n0, i0, j0, tile_k * BM, n, i, j,
                k_channel, k_valid, (n < N) & (i < P) & (j < Q), P, Q, K, (BK, BM), TMA_DZ, PADDED_DZ,
            )  # fmt: skip
        for tap in tl.static_range(TAPS):
            down = tap_r * DILATION
            right = (tap_s + tap) * DILATION
            if SHIFT_DZ:
                row = i + PAD - down
                col = j + PAD - right
                inside = (n < N) & (row >= 0) & (row < P) & (col >= 0) & (col < Q)
                dz = load_dz(
                    dy, z, c_g, c_z, c_1, n0, 0, 0, 0, n, row, col,
                    k_channel, k_valid, inside, P, Q, K, (BK, BM), False, False,
                )  # fmt: skip
            else:
                h = i * STRIDE - PAD + down
                w = j * STRIDE - PAD + right
                inside = (n < N) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                if not TMA_A:
                    at = ((n * H + h) * W + w) * C + c_channel[None, :]
                    a = tl.load(x + at, mask=inside & c_valid[None, :], other=0.0)
                elif STRIDE == 1:
                    a = x.load([n0, i0 - PAD + down, j0 - PAD + right, c0]).reshape((BK, BN))
                else:  # row 2 i - PAD + down as (pair of rows, row within the pair); columns likewise
                    h2 = i0 + (PAD + down) // 2 - PAD
                    w2 = j0 + (PAD + right) // 2 - PAD
                    a = x.load([n0, h2, (PAD + down) % 2, w2, (PAD + right) % 2 * C + c0]).reshape((BK, BN))
                if scale is not None:
                    a = affine_relu(a, slope, start, inside, PADDED_A)
            if tap == 0:
                acc0 = wait_for_wgmma(wgrad_dot(dz, a, acc0, SWAP, PRECISION), WAIT)
            if tap == 1:
                acc1 = wait_for_wgmma(wgrad_dot(dz, a, acc1, SWAP, PRECISION), WAIT)
            if tap == 2:
                acc2 = wait_for_wgmma(wgrad_dot(dz, a, acc2, SWAP, PRECISION), WAIT)

    LENGTH = R * S * C_GROUP
    at = dw + split.to(tl.int64) * K * LENGTH
    if SWAP:
        at += k_channel[None, :] * LENGTH + column[:, None]
        valid = k_valid[None, :] & c_valid[:, None]
    else:
        at += k_channel[:, None] * LENGTH + column[None, :]
        valid = k_valid[:, None] & c_valid[None, :]
    tl.store(at, acc0.to(dw.dtype.element_ty), mask=valid)
    if TAPS == 3:
        tl.store(at + C_GROUP, acc1.to(dw.dtype.element_ty), mask=valid)
        tl.store(at + 2 * C_GROUP, acc2.to(dw.dtype.element_ty), mask=valid)


@triton.jit
def wgrad_dot(dz, a, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + dz^T a, [BM, BN]; for SWAP its transpose acc + a^T dz, [BN, BM]. dz is [BK, BM], a [BK, BN]."""
    return tl.dot(a.T, dz, acc, input_precision=PRECISION) if SWAP else tl.dot(dz.T, a, acc, input_precision=PRECISION)


@triton.jit
def wgrad_reduce_kernel(partials, dw, numel, splits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the sum of partials [splits, numel] over the splits in dw [numel], BLOCK values per program.

    Every iteration adds ROWS splits. The order depends on the sizes only, so equal inputs give equal bits.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, ROWS):
        split = first + tl.arange(0, ROWS)[:, None]
        valid = (split < splits) & (at < numel)[None, :]
        total += tl.sum(tl.load(partials + split.to(tl.int64) * numel + at[None, :], mask=valid, other=0.0), 0)
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=at < numel)


@remembered
def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    problem: ConvProblem,
    *,
    bn_backward: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    prologue: tuple[Tensor, Tensor] | None = None,
    precision: str = "ieee",
    out_dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the filter gradient of a convolution and return dw [K, R, S, C/groups], contiguous, in `out_dtype`.

    Equivalent to, with nchw = lambda t: t.permute(0, 3, 1, 2):

        sizes = problem.stride, problem.pad, problem.dilation, problem.groups
        dz = dy if bn_backward is None else c_g * dy + c_z * z + c_1  # [N, P, Q, K]
        a = x if prologue is None else F.relu(scale * x + shift)  # [N, H, W, C]
        dw = torch.nn.grad.conv2d_weight(nchw(a), (K, C // groups, R, S), nchw(dz), *sizes).permute(0, 2, 3, 1)

    dz and a are computed in fp32 and rounded to dy's dtype before the product. Sums are fp32.

    dy: [N, P, Q, K] in bfloat16, float16 or float32.
    x: [N, H, W, C] in dy's dtype.
    bn_backward: (z, c_g, c_z, c_1). dy is then the gradient of a BatchNorm's output, z [N, P, Q, K] that BatchNorm's
        input, and the coefficients are fp32 [K].
    prologue: (scale, shift), each fp32 [C]. The convolution's input was then relu(scale x + shift), padded with zeros.
    precision: of fp32 products, "ieee" or "tf32".
    out_dtype: any floating-point dtype.
    tile: by default chosen from the measured tables or the heuristic (`tables.backward_tile`).

    All tensors must be contiguous and on one device. There are no atomics, so equal inputs give equal bits.

    Raises ValueError for a wrong shape, dtype, layout or device, and for a tile that cannot serve.

    Source: Ioffe and Szegedy (2015), section 3, for BatchNorm's backward pass; `batch_norm` has it in these symbols.
    """
    load = check_dz(dy, problem, bn_backward, precision)
    check_tensor("x", x, problem.x_shape, dy)
    scale, shift = prologue or (None, None)
    check_vectors(problem.C, dy, **{"prologue's scale": scale, "prologue's shift": shift})
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating-point dtype, got {out_dtype}")
    if problem.N == 0:
        return torch.zeros(problem.w_shape, dtype=out_dtype, device=dy.device)
    refusal, stride = tma_refusal(problem, dy, load.z, x), problem.stride
    if stride > 2 or (stride == 2 and (problem.H % 2 or problem.W % 2)):
        refusal = (
            refusal or f"stride {stride} on {problem.H}x{problem.W}; only 1, and 2 with even H and W, are supported"
        )
    tile = choose_tile(tile, "wgrad", problem, dy, refusal, precision, load.operands, prologue is not None)
    if tile.splits < 1:
        raise ValueError(f"splits must be >= 1, got {tile.splits}")
    if tile.taps != 1 and (tile.taps != 3 or problem.S != 3 or tile.box is None):
        raise ValueError(f"taps must be 1, or 3 for a filter of width 3 and a tile with a box, got {tile.taps}")

    seen = _view(problem, tile, load.operands > 1, prologue is not None)
    dw = empty(problem.w_shape, out_dtype, dy.device)
    partials = dw if seen.splits == 1 else empty((seen.splits, *problem.w_shape), torch.float32, dy.device)
    _launch_splits(
        problem, tile, seen, dy, load.z, x, dw=partials, c_g=load.c_g, c_z=load.c_z, c_1=load.c_1, scale=scale,
        shift=shift, PRECISION=precision,
    )  # fmt: skip
    return reduce_splits(partials, dw)


class _View(NamedTuple):
    """How `wgrad_kernel` reads its operands: x as [N, H, W, C], dy and z as [N, P, Q, K].

    box: the pixels of a step, or None for consecutive pixels. tma_dz, tma_a: whether dz and a are loaded by TMA.
    shift_dz: True if dz is shifted from tap to tap, False if a is. steps: the number of steps along images, rows and
    columns; without a box, all count along images. steps_per_split, splits: how the steps are divided.
    """

    N: int
    H: int
    W: int
    P: int
    Q: int
    box: tuple[int, int, int] | None
    tma_dz: bool
    tma_a: bool
    shift_dz: bool
    steps: tuple[int, int, int]
    steps_per_split: int
    splits: int


def _view(problem: ConvProblem, tile: Tile, computes_dz: bool, computes_a: bool) -> _View:
    N, H, W, P, Q, box = problem.N, problem.H, problem.W, problem.P, problem.Q, tile.box
    if problem.pointwise:  # a plain GEMM: view all pixels as one row
        N, H, W, P, Q, box = 1, 1, N * H * W, 1, N * P * Q, box and (1, 1, tile.BK)
    # If the first operand were a reshaped box, wgmma would read it from registers. So it is loaded by pointers, except
    # where boxes need no reshaping beyond a matrix (pointwise) or the product waits anyway (both operands computed).
    flat = problem.pointwise or (computes_dz and computes_a)
    shift_dz = box is not None and not problem.pointwise and problem.stride == 1 and computes_a and not computes_dz
    tma_dz, tma_a = (box is not None and (flat or needed) for needed in (computes_dz, not computes_dz))
    steps = tiles_along(box, tile.BK, N, *((H, W) if shift_dz else (P, Q)))
    per_split = cdiv(prod(steps), tile.splits)
    return _View(N, H, W, P, Q, box, tma_dz, tma_a, shift_dz, steps, per_split, cdiv(prod(steps), per_split))


def _launch_splits(
    problem: ConvProblem, tile: Tile, seen: _View, dy: Tensor, z: Tensor | None, x: Tensor, **rest: Any
) -> None:
    N, H, W, P, Q, box, tma_dz, tma_a, shift_dz, (tiles_n, tiles_h, tiles_w), steps_per_split, splits = seen
    TN, TH, TW = box or (0, 0, 0)
    R, S, C, K, stride = problem.R, problem.S, problem.C, problem.K, problem.stride
    c_group, k_group = C // problem.groups, K // problem.groups
    uniform = box is not None or c_group >= tile.BN
    columns = R * S // tile.taps * cdiv(c_group, tile.BN) if uniform else cdiv(R * S * c_group, tile.BN)
    # If boxes divide the images, then at each position outside of them one operand is loaded as zero without being
    # computed, and the other one needs no mask.
    rows, cols = (H, W) if shift_dz else (P, Q)
    boxes_fit = box is not None and rows % TH == 0 and cols % TW == 0
    of_x = (N, H, W, C), (TN, TH, TW, tile.BN) if tma_a else None
    if tma_a and stride == 2:
        of_x = (N, H // 2, 2, W // 2, 2 * C), (TN, TH, 1, TW, tile.BN)
    of_dy = (N, P, Q, K), (TN, TH, TW, tile.BM) if tma_dz else None
    launch(
        wgrad_kernel, (cdiv(k_group, tile.BM) * columns * problem.groups, splits),
        dy=view(dy, *of_dy), z=view(z, *of_dy), x=view(x, *of_x), N=N, H=H, W=W, C=C, P=P, Q=Q, K=K, C_GROUP=c_group,
        K_GROUP=k_group, tiles_h=tiles_h, tiles_w=tiles_w, steps_in_all=tiles_n * tiles_h * tiles_w,
        steps_per_split=steps_per_split, R=R, S=S, STRIDE=stride,
        PAD=problem.pad, DILATION=problem.dilation, BM=tile.BM, BN=tile.BN, BK=tile.BK, TN=TN, TH=TH, TW=TW,
        TAPS=tile.taps, TMA_DZ=tma_dz, TMA_A=tma_a, UNIFORM=uniform, SHIFT_DZ=shift_dz, PADDED_DZ=not boxes_fit,
        PADDED_A=not (boxes_fit if shift_dz else problem.pointwise), INT64=not problem.int32_safe,
        WAIT=z is not None and rest["scale"] is not None and not triton.knobs.runtime.interpret,
        num_warps=tile.warps, num_stages=tile.stages, **rest,
    )  # fmt: skip


def reduce_splits(partials: Tensor, dw: Tensor) -> Tensor:
    """Launch `wgrad_reduce_kernel` to sum partials [splits, *dw.shape] into dw, in a fixed order, and return dw.

    If partials is dw itself, nothing is launched.
    """
    if partials is not dw:
        numel, splits = dw.numel(), partials.shape[0]
        launch(
            wgrad_reduce_kernel, (cdiv(numel, 128),), partials=partials, dw=dw, numel=numel, splits=splits,
            ROWS=min(16, triton.next_power_of_2(splits)), BLOCK=128,
        )  # fmt: skip
    return dw
