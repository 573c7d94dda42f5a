"""Persistent kernels for 1x1 convolutions with short reductions: fprop and dgrad, with the fusions of those modules.

If a whole sum takes only a few steps, a program that computes a single tile spends its time waiting: for its operands,
for its product, for its store. A persistent program keeps one tile of channels and loops over many tiles of pixels:

- It loads the filters once.
- While it finishes one tile, TMA loads the operands of the next tiles.
- Statistics and sums stay in registers, so the partials have one row per program instead of one per tile.

Operands are matrices: activations [pixels, channels], filters [K, C].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import gpu_of
from .device_functions import COMPILED, affine_relu, finish, join_relu, tile_statistics, wait_for_wgmma
from .launcher import empty, launch, view
from .problem import ConvProblem, cdiv
from .tiles import Tile


def check(tile: Tile, problem: ConvProblem, dtype: torch.dtype) -> None:
    """Raise ValueError if `tile` asks for persistent programs and they don't support the problem, dtype or tile."""
    if not tile.persistent:
        return
    if not problem.pointwise or problem.groups > 1 or dtype.itemsize != 2:
        raise ValueError(
            f"{tile} is persistent, which requires a 16-bit 1x1 convolution of stride 1 without padding and groups; "
            f"got {dtype}, {problem}"
        )
    if tile.box != (1, 1, tile.BN) or tile.splits != 1:
        raise ValueError(f"{tile} is persistent, which requires the box (1, 1, {tile.BN}) and splits=1")


def programs(pixels: int, channels: int, tile: Tile, device: torch.device) -> int:
    """Return the number of programs per tile of channels.

    All tiles of channels together get `tile.persistent` programs per multiprocessor, rounded down. A tile of channels
    gets at least one program, and at most one per tile of pixels, so that no program is idle.
    """
    resident = gpu_of(device).sms * tile.persistent
    return min(cdiv(pixels, tile.BN), max(1, resident // cdiv(channels, tile.BM)))


@triton.jit
def load_ahead(operand, tensor, row, column):
    """Return (operand, box): a dot's operand, unchanged, and a box of `tensor` that is used only after that dot.

    The purpose is that the box is loaded ahead, too. Triton's pipeliner loads ahead only what a dot's operands depend
    on. So an inline assembly of no instructions takes both values and returns the operand: this costs nothing, but
    makes the operand depend on the box. It requires equal shapes and element widths; otherwise, and in the interpreter,
    the box is loaded after the dot. Without a tensor, the operand is returned twice.
    """
    box = operand
    if tensor is not None:
        box = tensor.load([row, column])
        if COMPILED and operand.shape == box.shape and operand.dtype.primitive_bitwidth == box.dtype.primitive_bitwidth:
            operand = tl.inline_asm_elementwise("", "=r,0,r", [operand, box], dtype=operand.dtype, is_pure=True, pack=2)
    return operand, box


@triton.jit(do_not_specialize=["pixels", "tiles", "residual_scale", "out_scale", "eps"])
def pointwise_fprop_kernel(
    x, w, y, residual, prologue_scale, prologue_shift, shortcut, shortcut_scale, shortcut_shift, joined, scale, shift,
    mean, var, eps, partials, residual_scale, out_scale, pixels, C, K, tiles,
    STEPS: tl.constexpr, FULL: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute y for one tile of BM output channels and every n-th tile of BN pixels.

    n is the number of programs per tile of channels. For each tile of channels, program i starts at tile i of the
    pixels and writes its BM channels of row i of partials [n, 3, K]. The other arguments are those of
    `fprop.conv_fprop_tma_kernel`. Descriptors: x, shortcut and joined [pixels, C]; y and residual [pixels, K]; w [K,
    C].

    STEPS * BK >= C. FULL: BN divides the number of pixels. Consecutive programs compute different channels of the
    same pixels.
    """
    tiles_k = tl.cdiv(K, BM)
    k0 = tl.program_id(0) % tiles_k * BM
    first = tl.program_id(0) // tiles_k
    k = k0 + tl.arange(0, BM)
    filters, slopes, starts = (), (), ()
    for step in tl.static_range(STEPS):
        filters += (w.load([k0, step * BK]),)
        if prologue_scale is not None and shortcut is None:
            c = step * BK + tl.arange(0, BK)
            slopes += (tl.load(prologue_scale + c, mask=c < C, other=0.0),)
            starts += (tl.load(prologue_shift + c, mask=c < C, other=0.0),)

    count = 0.0
    centre = tl.zeros((BM,), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    tl.assume(first < tiles)
    for tile in range(first, tiles, tl.num_programs(0) // tiles_k):
        pixel = tile * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for step in tl.static_range(STEPS):
            a = x.load([pixel, step * BK])
            if shortcut is not None:
                c = step * BK + tl.arange(0, BK)
                addend = shortcut.load([pixel, step * BK])
                a = join_relu(a, addend, prologue_scale, prologue_shift, shortcut_scale, shortcut_shift, c, c < C)
                joined.store([pixel, step * BK], a)
            elif prologue_scale is not None:
                a = affine_relu(a, slopes[step], starts[step], None, False)
            if step == 0:
                a, res = load_ahead(a, residual, pixel, k0)
            acc = tl.dot(filters[step], a.T, acc, input_precision=PRECISION)
        acc = wait_for_wgmma(acc, COMPILED)  # else the product starts from the epilogue's addend (ptxas: C7519)
        addend = None
        if residual is not None:
            addend = res.T
        out = finish(acc, addend, scale, shift, mean, var, eps, k, k < K, residual_scale, out_scale, RELU, y.dtype)
        y.store([pixel, k0], out.T)
        if partials is not None:
            n = tl.minimum(BN, pixels - pixel).to(tl.float32)
            of_tile, apart = tile_statistics(out, n, pixel + tl.arange(0, BN) < pixels, FULL)
            total = count + n  # Chan's rule, as in `batch_norm.merged_statistics`
            delta = of_tile - centre
            centre += delta * (n / total)
            squares += apart + delta * delta * (count * (n / total))
            count = total
    if partials is not None:
        at = partials + first * 3 * K + k
        tl.store(at, tl.zeros_like(centre) + count, mask=k < K)
        tl.store(at + K, centre, mask=k < K)
        tl.store(at + 2 * K, squares, mask=k < K)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def pointwise_dgrad_kernel(
    dy, z, w, dx, z_below, z_proj, relu_mask, residual, residual_mask, c_g, c_z, c_1, scale, shift, mean, mean_proj,
    partials, partials_proj, pixels, K, C, tiles,
    STEPS: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Compute dx for one tile of BM input channels and every n-th tile of BN pixels.

    n is the number of programs per tile of channels. For each tile of channels, program i starts at tile i of the
    pixels and writes its BM channels of row i of partials and partials_proj [n, 2, C]. The other arguments are those of
    `dgrad.dgrad_kernel`. Descriptors: dy and z [pixels, K]; dx and the tensors of its shape [pixels, C]; w [K, C].

    STEPS * BK >= K. FULL: BN divides the number of pixels. Consecutive programs compute different channels of the
    same pixels.
    """
    tiles_c = tl.cdiv(C, BM)
    c0 = tl.program_id(0) % tiles_c * BM
    first = tl.program_id(0) // tiles_c
    c = c0 + tl.arange(0, BM)
    filters, c_gs, c_zs, c_1s = (), (), (), ()
    for step in tl.static_range(STEPS):
        filters += (w.load([step * BK, c0]).T,)
        if z is not None:
            k = step * BK + tl.arange(0, BK)
            c_gs += (tl.load(c_g + k, mask=k < K, other=0.0)[None, :],)
            c_zs += (tl.load(c_z + k, mask=k < K, other=0.0)[None, :],)
            c_1s += (tl.load(c_1 + k, mask=k < K, other=0.0)[None, :],)
    if z_below is not None:
        centre = tl.load(mean + c, mask=c < C, other=0.0)[:, None]
        if scale is not None:
            slope = tl.load(scale + c, mask=c < C, other=0.0)[:, None]
            start = tl.load(shift + c, mask=c < C, other=0.0)[:, None]
        if z_proj is not None:
            centre_proj = tl.load(mean_proj + c, mask=c < C, other=0.0)[:, None]

    total = tl.zeros((BM,), tl.float32)
    of_below = tl.zeros((BM,), tl.float32)
    of_proj = tl.zeros((BM,), tl.float32)
    tl.assume(first < tiles)
    for tile in range(first, tiles, tl.num_programs(0) // tiles_c):
        pixel = tile * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for step in tl.static_range(STEPS):
            dz = dy.load([pixel, step * BK])
            if z is not None:
                x = z.load([pixel, step * BK]).to(tl.float32)
                dz = (c_gs[step] * dz.to(tl.float32) + (c_zs[step] * x + c_1s[step])).to(dz.dtype)
            if step == 0:
                dz, res = load_ahead(dz, residual, pixel, c0)
                dz, passed = load_ahead(dz, residual_mask, pixel, c0)
                dz, saved = load_ahead(dz, relu_mask, pixel, c0)
                dz, before = load_ahead(dz, z_below, pixel, c0)
                dz, z_tile = load_ahead(dz, z_proj, pixel, c0)
            acc = tl.dot(filters[step], dz.T, acc, input_precision=PRECISION)
        acc = wait_for_wgmma(acc, COMPILED)
        if residual is not None:
            if residual_mask is not None:
                res = tl.where(passed <= 0, 0.0, res)
            acc += res.T.to(tl.float32)
        if relu_mask is not None:
            acc = tl.where(saved.T <= 0, 0.0, acc)
        if z_below is not None:
            before = before.T.to(tl.float32)
            if scale is not None:
                acc = tl.where(before * slope + start <= 0, 0.0, acc)
        stored = acc.to(dx.dtype)
        dx.store([pixel, c0], stored.T)
        if z_below is not None:
            stored = stored.to(tl.float32)
            if not FULL:
                stored = tl.where((pixel + tl.arange(0, BN) < pixels)[None, :], stored, 0.0)
            total += tl.sum(stored, 1)
            of_below += tl.sum(stored * (before - centre), 1)
            if z_proj is not None:
                of_proj += tl.sum(stored * (z_tile.T.to(tl.float32) - centre_proj), 1)
    if z_below is not None:
        at = first * 2 * C + c
        tl.store(partials + at, total, mask=c < C)
        tl.store(partials + at + C, of_below, mask=c < C)
        if z_proj is not None:
            tl.store(partials_proj + at, total, mask=c < C)
            tl.store(partials_proj + at + C, of_proj, mask=c < C)


def launch_fprop(
    problem: ConvProblem, tile: Tile, x: Tensor, w: Tensor, y: Tensor, *same_shape: Tensor | None, **rest: Any
) -> None:
    """Launch `pointwise_fprop_kernel` over the tensors of `conv_fprop`, with activations [N, H, W, channels].

    same_shape: residual, shortcut and joined, each of them or None. rest: the kernel's other arguments.
    """
    residual, shortcut, joined = same_shape
    C, K = problem.C, problem.K
    of_x, of_y = ((-1, C), (tile.BN, tile.BK)), ((-1, K), (tile.BN, tile.BM))
    launch(
        pointwise_fprop_kernel, (programs(problem.pixels, K, tile, x.device) * cdiv(K, tile.BM),),
        x=view(x, *of_x), w=view(w, (-1, C), (tile.BM, tile.BK)), y=view(y, *of_y), residual=view(residual, *of_y),
        shortcut=view(shortcut, *of_x), joined=view(joined, *of_x), C=C, K=K, STEPS=cdiv(C, tile.BK),
        **_sizes(problem, tile), **rest,
    )  # fmt: skip


def launch_dgrad(
    problem: ConvProblem,
    tile: Tile,
    w: Tensor,
    like_dy: Mapping[str, Tensor | None],
    like_dx: Mapping[str, Tensor | None],
    **rest: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch `pointwise_dgrad_kernel` and return (partials, partials_proj), each fp32 [programs, 2, C] or None.

    like_dy, like_dx: the kernel's tensors with the shape of dy (dy, z) and of dx (dx and others), by argument name;
    None where absent. rest: the kernel's other arguments. partials is None if like_dx["z_below"] is None, partials_proj
    if like_dx["z_proj"] is None.
    """
    C, K, count = problem.C, problem.K, programs(problem.pixels, problem.C, tile, w.device)
    partials, partials_proj = (
        None if z is None else empty((count, 2, C), torch.float32, w.device)
        for z in (like_dx["z_below"], like_dx["z_proj"])
    )
    if problem.pixels:
        launch(
            pointwise_dgrad_kernel, (count * cdiv(C, tile.BM),),
            **{name: view(tensor, (-1, K), (tile.BN, tile.BK)) for name, tensor in like_dy.items()},
            **{name: view(tensor, (-1, C), (tile.BN, tile.BM)) for name, tensor in like_dx.items()},
            w=view(w, (-1, C), (tile.BK, tile.BM)), partials=partials, partials_proj=partials_proj, K=K, C=C,
            STEPS=cdiv(K, tile.BK), **_sizes(problem, tile), **rest,
        )  # fmt: skip
    return partials, partials_proj


def _sizes(problem: ConvProblem, tile: Tile) -> dict[str, Any]:
    """Return the arguments of both kernels that describe the pixels and the tile."""
    return {
        "pixels": problem.pixels, "tiles": cdiv(problem.pixels, tile.BN), "FULL": problem.pixels % tile.BN == 0,
        "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
