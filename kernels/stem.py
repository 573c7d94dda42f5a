"""The stem: a convolution of stride 2 over images of at most 4 channels, fetched by TMA.

One row of the filter covers at most 8 neighbouring pixels; with 4 channels each they are 32 values in a row, one step
of the reduction. So images are packed to 4 channels, and a view whose windows overlap,

    [N, H/2, 2, Q, 32]  over rows of pixels, window q starting at pixel 2 q,

makes the stem an R x 1 convolution of 32 channels for `conv_fprop_tma_kernel`. The packing takes images in any layout
and dtype, so that it is at once the one conversion that a net's input needs anyway.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .config import Tile, pixel_tiles, reduction_steps, stem_tile
from .conv import FLOATS, launch_boxes
from .launch import cdiv, check_device, check_tensor, gpu_of, tma_refusal
from .problem import ConvProblem
from .replay import empty, launch, remembered

WINDOW, CHANNELS = 8, 4


@triton.jit(do_not_specialize=["C", "H", "W", "COLUMNS", "ROWS"])
def pack_images_kernel(
    x, packed, C, H, W, stride_n, stride_c, stride_h, stride_w, COLUMNS, ROWS, PAD: tl.constexpr, BW: tl.constexpr
):
    """packed[n, h, col, c] = x[n, c, h, col - PAD], zero outside; BW columns of one row per program."""
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


def stem_refusal(problem: ConvProblem) -> str | None:
    """Why `conv_stem` can't serve a convolution, or None where it can."""
    if problem.C > CHANNELS or problem.S > WINDOW:
        return f"{problem.C} channels under rows of {problem.S}; at most {CHANNELS} under {WINDOW} fit a window"
    if (problem.stride, problem.dilation, problem.groups) != (2, 1, 1):
        return f"stride={problem.stride}, dilation={problem.dilation}, groups={problem.groups}; 2, 1 and 1 are served"
    return None


def stem_columns(problem: ConvProblem) -> ConvProblem:
    """The convolution without stride of the same sums over the same pixels: R x 1 over one window's values a pixel."""
    return ConvProblem(problem.N, problem.P + problem.R - 1, problem.Q, WINDOW * CHANNELS, problem.K, problem.R, 1)


@remembered
def pack_images(x: Tensor, problem: ConvProblem, dtype: torch.dtype) -> Tensor:
    """Images x [N, C, H, W], any strides and floating dtype, as `conv_stem` reads them: [N, rows, columns, 4] in
    `dtype`, where the left padding is stored and the rest of the padding is not."""
    if tuple(x.shape) != (problem.N, problem.C, problem.H, problem.W) or not x.is_floating_point():
        raise ValueError(f"x must be floating [N, C, H, W] of {problem}, got {x.dtype} {list(x.shape)}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if (reason := stem_refusal(problem)) is not None:
        raise ValueError(reason)
    check_device(x, dtype)
    rows, columns = problem.H + problem.H % 2, 2 * (problem.Q - 1) + WINDOW
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
    """Filters w [K, R, S, C] as `conv_stem` reads them: [K, R, 8, 4], zeros at the end of each row and pixel."""
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
    """y [N, P, Q, K] = [relu](scale conv + shift), with `statistics` also its partials, as `conv_fprop` gives them, for
    images from `pack_images` and filters from `pack_filters` of one dtype. Raises ValueError where they don't fit."""
    if (reason := stem_refusal(problem)) is not None:
        raise ValueError(reason)
    N, P, Q, K, R = problem.N, problem.P, problem.Q, problem.K, problem.R
    rows, columns = problem.H + problem.H % 2, 2 * (Q - 1) + WINDOW
    check_tensor("packed", packed, (N, rows, columns, CHANNELS), packed)
    check_tensor("filters", filters, (K, R, WINDOW, CHANNELS), packed)
    for name, tensor in (("scale", scale), ("shift", shift)):
        check_tensor(name, tensor, (K,), packed, torch.float32)
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    check_device(packed, packed.dtype)
    y = empty((N, P, Q, K), packed.dtype, packed.device)
    as_columns = stem_columns(problem)
    if (reason := tma_refusal(as_columns, packed, filters, y)) is not None:
        raise ValueError(f"conv_stem is impossible here: {reason}")
    if tile is None:
        ieee = packed.dtype == torch.float32 and precision == "ieee"
        pass_: Literal["infer", "fprop"] = "fprop" if statistics else "infer"
        tile = stem_tile(problem, as_columns, packed.dtype, gpu_of(packed.device), ieee, pass_)
    tiles = pixel_tiles(as_columns, tile.BN, tile.box)
    partials = empty((tiles, 3, K), torch.float32, packed.device) if statistics else None
    if problem.pixels:
        row = columns * CHANNELS
        windows = packed.as_strided(
            (N, rows // 2, 2, Q, WINDOW * CHANNELS), (rows * row, 2 * row, row, 2 * CHANNELS, 1)
        )
        launch_boxes(
            tile, windows, filters, y, H=problem.H, W=problem.W, C=WINDOW * CHANNELS,
            steps=reduction_steps(as_columns, tile), steps_per_split=None, R=R, S=1, STRIDE=2, PAD_H=problem.pad,
            PAD_W=0, DILATION=1,
            prologue_scale=None, prologue_shift=None, side_scale=None, side_shift=None,
            scale=scale, shift=shift, mean=None, var=None, eps=None, partials=partials, residual_scale=None,
            out_scale=None,
            RELU=relu, PRECISION=precision,
        )  # fmt: skip
    return y if partials is None else (y, partials)
