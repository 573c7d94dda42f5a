"""Run every kernel at small sizes under `compute-sanitizer`: `tests-memcheck` and `tests-racecheck` of bench/gpu.py.

Tiles have 16 and 64 rows, because on Hopper they compile to mma and wgmma respectively. The checks are those of the
kernels' other tests. Reference convolutions run on the CPU, because the sanitizer would spend most of its time in the
library's kernels.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import conv_cases
import pytest
import test_batch_norm as passes
import test_chain as chain
import test_conv_backward as backward
import test_fprop as forward
import test_persistent as persistent
import test_shortcut as shortcut
import test_stem as stem
import torch
from cases import check_statistics
from conv_cases import BOXED, GATHERED
from torch import Tensor

import fastres.kernels
from fastres.kernels.chain import ChainTile
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import Tile
from fastres.ops import extension

HALF = torch.bfloat16 if forward.DEVICE == "cuda" else torch.float16
MODULES = [importlib.import_module(f"fastres.kernels.{m.name}") for m in pkgutil.iter_modules(fastres.kernels.__path__)]
KERNELS = {name: getattr(module, name) for module in MODULES for name in vars(module) if name.endswith("_kernel")}


def fprop(problem: ConvProblem, tile: Tile | None) -> None:
    forward.check(problem, HALF, tile, "prologue", "scale", "shift", "residual", "relu")
    if tile is None or tile.splits == 1:
        x, w = forward.operands(problem, HALF)
        y, partials = forward.conv_fprop(x, w, problem, statistics=True, tile=tile)
        check_statistics(partials, y)


def block_end(problem: ConvProblem, tile: Tile) -> None:
    forward.check_block_end(problem, HALF, True, tile)


def dgrad(problem: ConvProblem, tile: Tile | None) -> None:
    for features in ("bn relu residual out", "bn residual out end projection"):
        backward.check_dgrad(backward.make(problem, HALF), features, tile)


def wgrad(problem: ConvProblem, tile: Tile | None) -> None:
    backward.check_wgrad(backward.make(problem, HALF), "bn activation", tile)


def bottleneck(channels: int, tile: ChainTile | None) -> None:
    chain.hold(chain.operands(2, 7, 7, channels, HALF), tile)


def block(end: str) -> None:
    for shape in passes.SMALL[:3]:
        passes.hold(passes.Case(shape, HALF, end))


def cases() -> Iterator[Any]:
    """Yield pytest parameters: the name of a kernel, and a function that launches and checks it."""

    def case(kernel: str, what: str, run: Callable[..., None], *given: Any) -> Any:
        return pytest.param(kernel, partial(run, *given), id=f"{kernel}, {what}")

    joined, images = ConvProblem(2, 5, 7, 40, 24), stem.PROBLEMS["7x7"]
    for rows in (16, 64):
        for name in ("1x1", "3x3", "3x3 stride 2"):
            tile = replace(forward.small_tile(BOXED[name], True), BM=rows)
            yield case("conv_fprop_tma_kernel", f"{name}, {rows} rows", fprop, BOXED[name], tile)
        tile = replace(forward.small_tile(joined, True), BM=rows)
        yield case("conv_fprop_tma_kernel", f"end of a block, {rows} rows", block_end, joined, tile)
        tile = replace(forward.small_tile(BOXED["3x3"], True), BM=rows, splits=3)
        yield case("fprop_reduce_kernel", f"{rows} rows", fprop, BOXED["3x3"], tile)
        for name in ("odd everything", "stride 2, odd image", "wide groups, stride 2"):
            tile = replace(forward.small_tile(GATHERED[name], False), BM=rows)
            yield case("conv_fprop_gather_kernel", f"{name}, {rows} rows", fprop, GATHERED[name], tile)
        for name, tile in persistent.TILES.items():
            tile, tails = replace(tile, BM=rows), persistent.PROBLEMS["tails everywhere"]
            yield case("pointwise_fprop_kernel", f"{name}, {rows} rows", fprop, tails, tile)
            yield case("pointwise_fprop_kernel", f"{name}, end of a block, {rows} rows", block_end, tails, tile)
            yield case("pointwise_dgrad_kernel", f"{name}, {rows} rows", dgrad, tails, tile)
        for name in ("3x3", "3x3 stride 2", "1x1 stride 2 odd", "odd"):
            problem = backward.SHAPES[name]
            for tile in backward.tiles_of_dgrad(problem):
                what = f"{name}, {'boxes' if tile.box else 'gather'}, {rows} rows"
                yield case("dgrad_kernel", what, dgrad, problem, replace(tile, BM=rows))
            for tile in backward.tiles_of_wgrad(problem):
                kind = f"{tile.taps} taps" if tile.taps > 1 else "boxes" if tile.box else "gather"
                wide = replace(tile, BM=rows, BN=rows)
                yield case("wgrad_kernel", f"{name}, {kind}, {rows} rows", wgrad, problem, wide)
        for name, kernel in (("boxes", "conv_fprop_tma_kernel"), ("a row", "stem_fprop_kernel")):
            tile = replace(stem.FPROP[name], BM=rows)
            yield case(kernel, f"images, {name}, {rows} rows", stem.hold_fprop, images, HALF, tile)
        tile = replace(stem.WGRAD["a row, 3 splits"], BM=rows)
        yield case("stem_wgrad_kernel", f"{rows} rows", stem.hold_wgrad, images, HALF, tile)
    for problem in (ConvProblem(2, 14, 14, 64, 64, 3, 3, 1, 1), ConvProblem(2, 14, 14, 64, 128)):
        by_default = f"{problem.R}x{problem.S} by default"
        yield case("conv_fprop_tma_kernel", by_default, fprop, problem, None)
        yield case("dgrad_kernel", by_default, dgrad, problem, None)
        yield case("wgrad_kernel", by_default, wgrad, problem, None)
    for boxed, kernel in ((False, "conv_fprop_gather_kernel"), (True, "conv_fprop_tma_kernel")):
        yield case(kernel, "float8", forward.test_fp8, boxed, 1)
    yield case("wgrad_reduce_kernel", "stem", stem.hold_wgrad, images, HALF, stem.WGRAD["all rows, 2 splits"])
    yield case("pack_images_kernel", "by default", stem.hold_fprop, images, HALF, None)
    yield case("bottleneck_chain_kernel", "tails", bottleneck, 32, ChainTile(64, 32, 16, 4, 2))
    yield case("bottleneck_chain_kernel", "by default", bottleneck, 64, None)
    for kernel in ("statistics", "finish_statistics", "normalize", "backward_reduce", "finish_backward"):
        yield case(f"{kernel}_kernel", "add", block, "add")
    yield case("backward_apply_kernel", "project", block, "project")
    yield case("pad_shortcut_backward_kernel", "pad", block, "pad")
    yield case("merge_kernel", "statistics", passes.test_merge_of_uneven_tiles, 700)
    yield case("merge_kernel", "sums", passes.test_merge_of_sums, 700)
    yield case("max_pool_kernel", "vectors", passes.hold_pool, (1, 7, 12, 16), HALF, 3, 2, 1)
    yield case("max_pool_kernel", "odd", passes.hold_pool, (2, 9, 8, 5), HALF, 3, 2, 1)
    yield case("backward_apply_kernel", "pool", passes.hold_pool, (1, 7, 12, 16), HALF, 3, 2, 1)


CASES = [*cases()]


class Noted:
    """A wrapper of a kernel that adds its name to `launched` on each launch."""

    def __init__(self, kernel: Any, launched: set[str]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.add(self.kernel.__name__)
        return self.kernel[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


def on_cpu(convolve: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    tensors = [value for value in args if isinstance(value, Tensor)]
    args = tuple(value.cpu() if isinstance(value, Tensor) else value for value in args)
    return convolve(*args, **kwargs).to(tensors[0].device)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kernel", "run"), CASES)
def test_kernel(kernel: str, run: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (conv_cases, backward, chain, stem):
        monkeypatch.setattr(module, "by_library", on_cpu)
    launched: set[str] = set()
    for module in MODULES:
        for name in vars(module).keys() & KERNELS.keys():
            monkeypatch.setattr(module, name, Noted(KERNELS[name], launched))
    run()
    assert kernel in launched


@pytest.mark.gpu
@pytest.mark.interpret
@pytest.mark.parametrize("layout", shortcut.LAYOUTS)
def test_shortcut_of_option_a(layout: str) -> None:
    assert extension.load("cuda"), extension.status().reason
    for case in shortcut.CASES:
        tensors = shortcut.tensors(case, torch.bfloat16, layout, "cuda")
        shortcut.hold(shortcut.THROUGH_DISPATCHER, case, *tensors)


@pytest.mark.interpret
def test_every_kernel_is_there() -> None:
    assert {case.values[0] for case in CASES} == KERNELS.keys()


@pytest.mark.gpu
@pytest.mark.interpret
@pytest.mark.skipif("PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ, reason="bench/gpu.py sets it under a sanitizer")
def test_a_sanitizer_watches() -> None:
    """The sanitizer is loaded into this process; if it weren't, it would report no errors either."""
    torch.zeros(1, device="cuda")
    assert "libsanitizer-collection" in Path("/proc/self/maps").read_text()
