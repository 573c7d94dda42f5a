"""The stem: a stride-2 convolution over images of at most 4 channels, forward and the gradient of its filters.

With so few channels, the kernels for all shapes load one value at a time. These kernels copy 16 bytes at a time,
because `pack_images` first pads the images to 4 channels. One row of a filter, at most 8 pixels wide, then covers a
window of 32 consecutive values. Window q of a packed row, which includes the left padding, starts at its pixel 2 q:

    y[n, p, q, k]  = sum over r, j of w[k, r, j] window[n, 2 p - pad + r, q, j],   j = 4 s + c
    dw[k, r, j]    = sum over n, p, q of dz[n, p, q, k] window[n, 2 p - pad + r, q, j]

Windows are loaded in one of two ways:

- By pointers, on every GPU. For 16-bit values a window is 64 bytes and starts 16 bytes after its left neighbour, so
  that it takes 4 asynchronous copies of 16 bytes.
- By TMA, forward only. In a view [N, H/2, 2, Q, 32] of the packed images, whose windows overlap, the stem is an R x 1
  convolution of 32 channels, which `conv_fprop_tma_kernel` computes.

Packing accepts images of any layout and floating-point dtype, so the same pass also does the layout and dtype
conversion that the input of a net needs anyway.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_device, check_product, check_tensor, check_vectors, gpu_of, tma_refusal
from .device_functions import finish, store_statistics, unravel
from .fprop import launch_boxes
from .launcher import empty, launch, remembered
from .problem import FLOATS, ConvProblem, cdiv
from .tables import stem_tile, stem_wgrad_tile
from .tiles import STEM_WINDOW, Tile, pixel_tiles, reduction_steps
from .wgrad import reduce_splits

WINDOW, CHANNELS = 8, 4
ROW = tl.constexpr(STEM_WINDOW)

_refusing: dict[torch.device, str] = {}  # GPUs whose driver rejected overlapping windows, and its error message


@triton.jit(do_not_specialize=["C", "H", "W", "COLUMNS", "ROWS"])
def pack_images_kernel(
    x, packed, C, H, W, stride_n, stride_c, stride_h, stride_w, COLUMNS, ROWS, PAD: tl.constexpr, BW: tl.constexpr
):
    """Write packed[n, h, col, c] = x[n, c, h, col - PAD], zero outside of x; BW columns of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    n = row // ROWS
    h = row % ROWS
    col = tl.program_id(1) * BW + tl.arange(0, BW)
    c = tl.arange(0, 4)
    w = col - PAD
    inside = ((h < H) & (w >= 0) & (w < W))[:, None] & (c < C)[None, :]
    at = n * stride_n + h * stride_h + w.to(tl.int64)[:, None] * stride_w + c[None, :] * stride_c
    value = tl.load(x + at, mask=inside, other=0.0)
    tl.store(
        packed + (row * COLUMNS + col[:, None]) * 4 + c[None, :],
        value.to(packed.dtype.element_ty),
        mask=(col < COLUMNS)[:, None],
    )


@triton.jit(do_not_specialize=["pixels", "H", "P", "Q", "rows", "pairs"])
def stem_fprop_kernel(
    packed, filters, y, scale, shift, partials, pixels, H, P, Q, K, rows, pairs,
    R: tl.constexpr, PAD: tl.constexpr, FULL: tl.constexpr, INT64: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y, [BM channels, BN consecutive pixels]; a step reduces over BK of a filter's R x 32 values.

    packed: [N, rows, columns, 4], where `pairs` is half the number of columns; filters: [K, R, 32]; y: [pixels, K];
    scale, shift: fp32 [K] or None; partials: fp32 [tiles, 3, K] or None. FULL: BN divides the number of pixels. INT64:
    element offsets can exceed 2**31 - 1.
    """
    tiles_k = tl.cdiv(K, BM)
    tile_k = tl.program_id(0) % tiles_k
    tile = tl.program_id(0) // tiles_k
    if INT64:
        tile = tile.to(tl.int64)
    pixel = tile * BN + tl.arange(0, BN)
    inside = pixel < pixels
    n, p, q = unravel(pixel, P, Q)
    k = tile_k * BM + tl.arange(0, BM)

    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, R * ROW, BK):
        j = first + tl.arange(0, BK)
        in_filter = j < R * ROW
        windows = load_windows(packed, n, p, q, j, inside, in_filter, H, rows, pairs, PAD)
        w = tl.load(
            filters + (k * (R * ROW))[:, None] + j[None, :], mask=(k < K)[:, None] & in_filter[None, :], other=0.0
        )
        acc = tl.dot(w, windows.T, acc, input_precision=PRECISION)

    out = finish(acc, None, scale, shift, None, None, None, k, k < K, None, None, RELU, y.dtype.element_ty)
    tl.store(y + pixel[None, :] * K + k[:, None], out, mask=inside[None, :] & (k < K)[:, None])
    if partials is not None:
        store_statistics(partials, out, tile, tl.minimum(BN, pixels - tile * BN), inside, k, k < K, K, FULL)


@triton.jit(do_not_specialize=["pixels", "H", "P", "Q", "C", "S", "rows", "pairs", "steps_in_all", "steps_per_split"])
def stem_wgrad_kernel(
    dz, packed, dw, pixels, H, P, Q, K, C, S, rows, pairs, steps_in_all, steps_per_split,
    R: tl.constexpr, PAD: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum all R x 32 values of dw for BM filters over one split of the pixels, BK consecutive pixels per step.

    The R x 32 values are divided into products of BN values (a multiple of 32: whole rows of the filter). All products
    of a step use the same tile of dz, so dz is read only once. dz: [pixels, K]; packed: [N, rows, columns, 4], where
    `pairs` is half the number of columns; dw: [splits, K, R, S, C] in any floating-point dtype. INT64: element offsets
    can exceed 2**31 - 1.
    """
    PRODUCTS: tl.constexpr = (R * ROW + BN - 1) // BN
    split = tl.program_id(1)
    k = tl.program_id(0) * BM + tl.arange(0, BM)

    sums = ()
    for _ in tl.static_range(PRODUCTS):
        sums = sums + (tl.zeros((BM, BN), tl.float32),)  # noqa: RUF005 (Triton has no starred tuples)
    first = split * steps_per_split
    steps = tl.minimum(steps_per_split, steps_in_all - first)
    if INT64:
        first = first.to(tl.int64)
    tl.assume(steps > 0)  # else ptxas serialises wgmma (C7515)
    for step in range(steps):
        pixel = (first + step) * BK + tl.arange(0, BK)
        inside = pixel < pixels
        n, p, q = unravel(pixel, P, Q)
        # Loaded as [filters, pixels], not transposed afterwards, so that sm_80 can use asynchronous copies for it too.
        dz_tile = tl.load(dz + pixel[None, :] * K + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0)
        added = ()
        for i in tl.static_range(PRODUCTS):
            j = i * BN + tl.arange(0, BN)
            windows = load_windows(packed, n, p, q, j, inside, j < R * ROW, H, rows, pairs, PAD)
            added = added + (tl.dot(dz_tile, windows, sums[i], input_precision=PRECISION),)  # noqa: RUF005
        sums = added

    at = dw + (split.to(tl.int64) * K + k[:, None]) * (R * S * C)
    for i in tl.static_range(PRODUCTS):
        j = i * BN + tl.arange(0, BN)
        r, s, c = j // ROW, j % ROW // 4, j % 4
        valid = (k < K)[:, None] & ((r < R) & (s < S) & (c < C))[None, :]
        tl.store(at + ((r * S + s) * C + c)[None, :], sums[i].to(dw.dtype.element_ty), mask=valid)


@triton.jit
def load_windows(packed, n, p, q, j, inside, in_filter, H, rows, pairs, PAD: tl.constexpr):
    """Load values j of the R x 32 under a filter at output pixels (n, p, q), as [pixels, values].

    They are zero where `inside` (pixels) or `in_filter` (values) is False, and outside of the image.
    """
    top = 2 * p - PAD
    r = j // ROW
    h = top[:, None] + r[None, :]
    # Windows start at multiples of 8 values, which lets one copy carry 8 of them.
    at = ((n * rows + top) * pairs + q)[:, None] * 8 + ((r * pairs) * 8 + j % ROW)[None, :]
    return tl.load(packed + at, mask=inside[:, None] & in_filter[None, :] & (h >= 0) & (h < H), other=0.0)


def stem_refusal(problem: ConvProblem) -> str | None:
    """Return why `conv_stem` and `conv_stem_wgrad` don't support a convolution, or None if they do."""
    # With one filter row, `stem_columns` would be pointwise. Tiles of a pointwise convolution run across image rows,
    # but boxes of windows don't.
    if problem.C > CHANNELS or min(problem.R, problem.S) < 2 or max(problem.R, problem.S) > WINDOW:
        return (
            f"the stem's kernels support at most {CHANNELS} channels and 2x2 to {WINDOW}x{WINDOW} filters, "
            f"got {problem.C} channels and {problem.R}x{problem.S} filters"
        )
    if (problem.stride, problem.dilation, problem.groups) != (2, 1, 1):
        return (
            "the stem's kernels need stride=2, dilation=1, groups=1, "
            f"got stride={problem.stride}, dilation={problem.dilation}, groups={problem.groups}"
        )
    return None


def stem_columns(problem: ConvProblem) -> ConvProblem:
    """Return the equivalent stride-1 convolution: R x 1 filters over the windows, 32 channels per output pixel.

    It has the same output pixels, filters and number of multiply-adds over packed images as the stem `problem`, and so
    stands for it in the choice of tiles.
    """
    return ConvProblem(problem.N, problem.P + problem.R - 1, problem.Q, STEM_WINDOW, problem.K, problem.R, 1)


@remembered
def pack_images(x: Tensor, problem: ConvProblem, dtype: torch.dtype) -> Tensor:
    """Return images x [N, C, H, W] in the layout of `conv_stem`: [N, rows, columns, 4] in `dtype`, channels last.

    x: any strides, any floating-point dtype. dtype: bfloat16, float16 or float32. problem: the stem's convolution.
    C <= 4 channels are padded to 4. The left padding of the convolution is stored; kernels mask the padding above and
    below. rows is H, rounded up to an even number, and columns = 2 (Q - 1) + 8 is where the last window ends.

    Equivalent to:

        right, below = columns - W - problem.pad, rows - H
        packed = F.pad(x.permute(0, 2, 3, 1).to(dtype), (0, 4 - C, problem.pad, right, 0, below))

    Raises ValueError if x doesn't match `problem`, if its device or `dtype` isn't supported, and if the stem's kernels
    don't support `problem` (`stem_refusal`).
    """
    if tuple(x.shape) != (problem.N, problem.C, problem.H, problem.W) or not x.is_floating_point():
        raise ValueError(f"x must be floating-point [N, C, H, W] as in {problem}, got {x.dtype} {list(x.shape)}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if (reason := stem_refusal(problem)) is not None:
        raise ValueError(reason)
    check_device(x, dtype)
    rows, columns = _packed_sizes(problem)
    packed = empty((problem.N, rows, columns, CHANNELS), dtype, x.device)
    BW = 128
    if packed.numel():
        launch(
            pack_images_kernel, (problem.N * rows, cdiv(columns, BW)),
            x=x, packed=packed, C=problem.C, H=problem.H, W=problem.W,
            stride_n=x.stride(0), stride_c=x.stride(1), stride_h=x.stride(2), stride_w=x.stride(3),
            COLUMNS=columns, ROWS=rows, PAD=problem.pad, BW=BW, num_warps=4,
        )  # fmt: skip
    return packed


def pack_filters(w: Tensor) -> Tensor:
    """Return filters w [K, R, S, C] in the layout of `conv_stem`: [K, R, 8, 4], rows and channels padded with zeros."""
    return F.pad(w, (0, CHANNELS - w.shape[3], 0, WINDOW - w.shape[2]))


@remembered
def conv_stem(
    packed: Tensor,
    filters: Tensor,
    problem: ConvProblem,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    statistics: bool = False,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y = [relu](scale conv + shift), [N, P, Q, K], of packed images; with `statistics` return (y, partials).

    packed: from `pack_images`. filters: from `pack_filters`. Both have one dtype, bfloat16, float16 or float32, which
    is also that of y. scale, shift: fp32 [K], or None for 1 and 0.
    statistics: also return the partial statistics of y as stored, fp32 [tiles, 3, K], for
    `batch_norm.finish_statistics`.
    precision: of fp32 products, "ieee" or "tf32".
    tile: by default that of `tables`, measured or predicted. A tile with a box loads by TMA, one without by pointers.

    Equivalent to, for images x [N, C, H, W] and filters w [K, R, S, C]:

        conv = F.conv2d(x, w.permute(0, 3, 1, 2), stride=2, padding=problem.pad).permute(0, 2, 3, 1)
        y = F.relu(scale * conv + shift)

    with one exception: a window is 8 pixels wide, and zero weights fill the part that is wider than the filter. An
    infinite or NaN pixel in this part makes y NaN.

    Raises ValueError if an argument doesn't match `problem`, if the stem's kernels don't support `problem`
    (`stem_refusal`), and if `tile` has a box but TMA can't serve the tensors.
    """
    N, P, Q, K, R = problem.N, problem.P, problem.Q, problem.K, problem.R
    _check_packed(packed, problem, precision)
    check_tensor("filters", filters, (K, R, WINDOW, CHANNELS), packed)
    check_vectors(K, packed, scale=scale, shift=shift)
    y = empty((N, P, Q, K), packed.dtype, packed.device)
    columns = stem_columns(problem)
    refusal = tma_refusal(columns, packed, filters, y) or _refusing.get(packed.device)
    if tile is not None and tile.box is not None and refusal is not None:
        raise ValueError(f"a tile with a box is fetched by TMA, which is impossible here: {refusal}")
    chosen = tile
    if chosen is None:
        ieee = packed.dtype == torch.float32 and precision == "ieee"
        pass_: Literal["infer", "fprop"] = "fprop" if statistics else "infer"
        of_gpu = gpu_of(packed.device)
        chosen = stem_tile(problem, columns, packed.dtype, refusal is None, of_gpu, ieee, pass_)
    tiles = pixel_tiles(columns, chosen.BN, chosen.box)
    partials = empty((tiles, 3, K), torch.float32, packed.device) if statistics else None
    rest: dict[str, Any] = {"scale": scale, "shift": shift, "partials": partials, "RELU": relu, "PRECISION": precision}
    if not problem.pixels:
        pass
    elif chosen.box is None:
        _launch_pointers(problem, chosen, packed, filters, y, **rest)
    else:
        try:
            _launch_boxes(problem, columns, chosen, packed, filters, y, **rest)
        except RuntimeError as error:  # overlapping windows break a documented rule that a driver may enforce
            if tile is not None or "tensor map descriptor" not in str(error):
                raise
            _refusing[packed.device] = str(error)
            warnings.warn(
                f"conv_stem loads by pointers, because the driver rejects TMA over its windows: {error}", stacklevel=2
            )
            return conv_stem(
                packed, filters, problem, scale=scale, shift=shift, relu=relu, statistics=statistics,
                precision=precision,
            )  # fmt: skip
    return y if partials is None else (y, partials)


def _check_packed(packed: Tensor, problem: ConvProblem, precision: str) -> None:
    """Raise ValueError if the stem's kernels can't serve `problem`, these packed images or `precision`."""
    if (reason := stem_refusal(problem)) is not None:
        raise ValueError(reason)
    check_tensor("packed", packed, (problem.N, *_packed_sizes(problem), CHANNELS), packed, *FLOATS)
    check_device(packed, packed.dtype)
    check_product(packed, precision)


def _packed_sizes(problem: ConvProblem) -> tuple[int, int]:
    """Return (rows, columns) of packed images."""
    return problem.H + problem.H % 2, 2 * (problem.Q - 1) + WINDOW


def _launch_boxes(
    problem: ConvProblem, columns: ConvProblem, tile: Tile, packed: Tensor, filters: Tensor, y: Tensor, **rest: Any
) -> None:
    """Launch `conv_fprop_tma_kernel` over windows, viewed as [N, rows / 2, 2, Q, 32] because the stem has stride 2."""
    rows, width = _packed_sizes(problem)
    row = width * CHANNELS
    windows = packed.as_strided(
        (problem.N, rows // 2, 2, problem.Q, STEM_WINDOW), (rows * row, 2 * row, row, 2 * CHANNELS, 1)
    )
    launch_boxes(
        tile, windows, filters, y, H=problem.H, W=problem.W, C=STEM_WINDOW,
        steps=reduction_steps(columns, tile), steps_per_split=None, R=problem.R, S=1, STRIDE=2, PAD_H=problem.pad,
        PAD_W=0, DILATION=1,
        prologue_scale=None, prologue_shift=None, shortcut_scale=None, shortcut_shift=None, mean=None, var=None,
        eps=None, residual_scale=None, out_scale=None, **rest,
    )  # fmt: skip


def _launch_pointers(problem: ConvProblem, tile: Tile, packed: Tensor, filters: Tensor, y: Tensor, **rest: Any) -> None:
    launch(
        stem_fprop_kernel, (cdiv(problem.pixels, tile.BN) * cdiv(problem.K, tile.BM),),
        packed=packed, filters=filters, y=y, **_sizes(problem, packed),
        FULL=problem.pixels % tile.BN == 0, BM=tile.BM, BN=tile.BN, BK=tile.BK,
        num_warps=tile.warps, num_stages=tile.stages, **rest,
    )  # fmt: skip


def _sizes(problem: ConvProblem, packed: Tensor) -> dict[str, Any]:
    """Return the arguments of both stem kernels that describe the problem and the packed images, by name."""
    _, rows, width, _ = packed.shape
    return {
        "pixels": problem.pixels, "H": problem.H, "P": problem.P, "Q": problem.Q, "K": problem.K,
        "rows": rows, "pairs": width // 2, "R": problem.R, "PAD": problem.pad,
        "INT64": not problem.int32_safe or packed.numel() >= 2**31,
    }  # fmt: skip


@remembered
def conv_stem_wgrad(
    dz: Tensor,
    packed: Tensor,
    problem: ConvProblem,
    *,
    precision: str = "ieee",
    out_dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
) -> Tensor:
    """Return dw [K, R, S, C], the gradient of the stem's filters, contiguous in `out_dtype`.

    dz: [N, P, Q, K], the gradient of the convolution's output. packed: images from `pack_images`. Both are contiguous
    and have one dtype, bfloat16, float16 or float32.
    precision: of fp32 products, "ieee" or "tf32". out_dtype: any floating-point dtype.
    tile: by default that of `tables`, measured or predicted. With splits > 1, programs sum parts of the pixels in fp32,
    and a second kernel adds the parts in a fixed order. There are no atomics, so equal inputs give equal bits.

    Equivalent to, for images x [N, C, H, W]:

        w_shape = (K, C, R, S)
        dw = torch.nn.grad.conv2d_weight(x, w_shape, dz.permute(0, 3, 1, 2), stride=2, padding=problem.pad)
        dw = dw.permute(0, 2, 3, 1)

    Raises ValueError if an argument doesn't match `problem`, if the stem's kernels don't support `problem`
    (`stem_refusal`), and if `tile` has splits < 1, a box or a BN that is not a multiple of 32.
    """
    _check_packed(packed, problem, precision)
    check_tensor("dz", dz, (problem.N, problem.P, problem.Q, problem.K), packed)
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating-point dtype, got {out_dtype}")
    shape = (problem.K, problem.R, problem.S, problem.C)
    if problem.N == 0:
        return torch.zeros(shape, dtype=out_dtype, device=dz.device)
    if tile is None:
        ieee = dz.dtype == torch.float32 and precision == "ieee"
        tile = stem_wgrad_tile(problem, dz.dtype, gpu_of(dz.device), ieee)
    if tile.splits < 1 or tile.BN % STEM_WINDOW or tile.box is not None:
        raise ValueError(f"conv_stem_wgrad needs splits >= 1, BN a multiple of {STEM_WINDOW} and no box, got {tile}")
    steps = cdiv(problem.pixels, tile.BK)
    steps_per_split = cdiv(steps, tile.splits)
    splits = cdiv(steps, steps_per_split)
    dw = empty(shape, out_dtype, dz.device)
    partials = dw if splits == 1 else empty((splits, *shape), torch.float32, dz.device)
    launch(
        stem_wgrad_kernel, (cdiv(problem.K, tile.BM), splits),
        dz=dz, packed=packed, dw=partials, **_sizes(problem, packed), C=problem.C, S=problem.S,
        steps_in_all=steps, steps_per_split=steps_per_split, PRECISION=precision,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return reduce_splits(partials, dw)
