"""Tiles: the tables that are read and written, and what the heuristics promise of every problem of the nets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conv_cases import GATHERED, net_problems

import fastres
from fastres.kernels import config
from fastres.kernels.config import H200, Gpu, Measurement, Tile, fprop_tile, fprop_tiles
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import stem_columns
from fastres.ops import dispatch

PROBLEM = ConvProblem(8, 14, 14, 64, 64, 3, 3, 1, 1)
TILE = Tile(64, 128, 64, 4, 2, (2, 8, 8))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    config.forget_tables()
    yield
    config.forget_tables()


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = {
        ("fprop", PROBLEM, torch.bfloat16): Measurement("triton", TILE),
        ("wgrad", PROBLEM, torch.float16): Measurement("cudnn", Tile(64, 64, 32, 4, 3, splits=7), on_load=False),
        ("dgrad", PROBLEM, torch.float8_e4m3fn): Measurement("cudnn", None),
    }
    path = tmp_path / "deep" / "table.json"
    config.write_table(table, path)  # type: ignore[arg-type]
    assert config.read_table(path) == table
    assert config.read_table(tmp_path / "none.json") == {}


def test_the_measured_tile_wins_over_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    heuristic = fprop_tile(PROBLEM, torch.bfloat16, True)
    slower = fprop_tiles(PROBLEM, 2, True)[-1]
    assert heuristic != slower
    table = {("fprop", PROBLEM, torch.bfloat16): Measurement("triton", slower)}
    config.write_table(table, config.table_file(H200.name))  # type: ignore[arg-type]
    assert fprop_tile(PROBLEM, torch.bfloat16, True) == heuristic, "tables are read once"
    config.forget_tables()
    assert fprop_tile(PROBLEM, torch.bfloat16, True) == slower
    assert fprop_tile(PROBLEM, torch.float16, True) == heuristic, "of another dtype nothing is known"
    assert fprop_tile(PROBLEM, torch.bfloat16, True, Gpu("another", 132, 232448)) == heuristic
    assert fprop_tile(PROBLEM, torch.bfloat16, False).box is None, "a tile for TMA is no tile for pointers"
    assert config.measured_winner("fprop", PROBLEM, torch.bfloat16, H200.name) == "triton"
    assert config.measured_winner("dgrad", PROBLEM, torch.bfloat16, H200.name) is None


def test_who_computes_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200.name)
    measured = ConvProblem(256, 14, 14, 256, 256, 3, 3, 1, 1)
    table = {("fprop", measured, dtype): Measurement("triton", None) for dtype in (torch.bfloat16, torch.float32)}
    config.write_table(table, config.table_file(H200.name))  # type: ignore[arg-type]

    def engine(problem: ConvProblem, dtype: torch.dtype) -> str:
        return dispatch.conv_engine("fprop", problem, dtype, torch.device("cuda", 0))

    assert engine(measured, torch.bfloat16) == "triton"
    assert engine(measured, torch.float16) == "cudnn", "bound by arithmetic, not measured"
    thin = ConvProblem(256, 56, 56, 64, 64)
    assert engine(thin, torch.float16) == "triton", "bound by memory"
    assert engine(thin, torch.float32) == engine(measured, torch.float32) == "triton"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert engine(thin, torch.float32) == engine(measured, torch.float32) == "cudnn"
    assert engine(measured, torch.bfloat16) == "triton"
    with fastres.backend("triton"):
        assert engine(thin, torch.float32) == "triton"
    with fastres.backend("cudnn"):
        assert engine(measured, torch.bfloat16) == "cudnn"


def test_what_is_computed_on_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200.name)
    table = {
        (pass_, PROBLEM, torch.bfloat16): Measurement("triton", None, on_load=pass_ == "dgrad")
        for pass_ in ("fprop", "wgrad", "dgrad")
    }
    config.write_table(table, config.table_file(H200.name))  # type: ignore[arg-type]

    def answers(dtype: torch.dtype, device: str) -> list[bool]:
        return [dispatch.on_load(p, PROBLEM, dtype, torch.device(device)) for p in ("fprop", "wgrad", "dgrad")]

    assert answers(torch.bfloat16, "cuda") == [False, False, True], "as measured"
    assert answers(torch.float16, "cuda") == answers(torch.bfloat16, "cpu") == [True, True, False], "by rule: a 3x3"


def test_a_table_file_is_named_after_its_gpu(tmp_path: Path) -> None:
    assert config.table_file("NVIDIA H100 80GB HBM3", tmp_path) == tmp_path / "nvidia-h100-80gb-hbm3.json"
    assert config.table_file("x") == tmp_path / "tables" / "x.json"


@pytest.mark.parametrize("text", ["", "{", "[{}]", '[{"pass": 1}]', "[1]"])
def test_a_broken_table_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is no table of tiles .*bench/tune\.py"):
        config.read_table(path)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_tiles_keep_the_rules_of_the_kernels(itemsize: int, tma: bool, prologue: bool) -> None:
    problems = [*net_problems("resnet50", 256), *net_problems("resnext50_32x4d", 1), *GATHERED.values()]
    for gpu in (H200, Gpu("small", 58, 101376)):
        for problem in problems:
            if tma and (problem.groups > 1 or (problem.C % 32 and not problem.pointwise)):
                continue
            tiles = fprop_tiles(problem, itemsize, tma, gpu, computed=int(prologue))
            assert tiles, problem
            for tile in tiles:
                held = (tile.BM + tile.BN) * tile.BK * itemsize * tile.stages
                assert held <= gpu.shared, (problem, tile)
                assert 128 * 32 * tile.warps >= tile.BM * tile.BN, "accumulators take at most half of the registers"
                assert (32 if itemsize == 1 else 16) <= tile.BK
                assert (tile.box is not None) == tma
                if tma:
                    assert math.prod(tile.box) == tile.BN  # type: ignore[arg-type]
                    assert problem.pointwise or problem.C % tile.BK == 0


def test_boxes_waste_no_pixel_of_a_large_batch() -> None:
    for side in (56, 28, 14, 7):
        for pixels in (64, 128, 256):
            box = config.cover(256, side, side, pixels)
            assert math.prod(box) == pixels
            assert config.boxes(256, side, side, box) * pixels == 256 * side * side


def test_the_stems_tile_is_the_tables() -> None:
    """By the pass that was measured; where the gather kernel won, or nothing was measured, the first candidate."""
    problem, dtype = ConvProblem(24, 224, 224, 3, 64, 7, 7, 2, 3), torch.bfloat16
    columns = stem_columns(problem)
    candidates = config.fprop_tiles(columns, 2, True, H200)
    wanted = replace(candidates[1], box=(1, 16, 8))
    gathered = Tile(64, 64, 32, 4, 3)

    def chosen() -> list[Tile]:
        config.forget_tables()
        return [config.stem_tile(problem, columns, dtype, H200, False, pass_) for pass_ in ("infer", "fprop")]

    assert chosen() == [candidates[0], candidates[0]]
    table = {("infer", problem, dtype): Measurement("stem", wanted)}
    table["fprop", problem, dtype] = Measurement("triton", gathered)
    config.write_table(table, config.table_file(H200.name))  # type: ignore[arg-type]
    assert chosen() == [wanted, candidates[0]]
