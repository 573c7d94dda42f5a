"""Reading, writing and choosing from tables of tiles, and the properties of the heuristics' candidates."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_cases import GATHERED, net_problems, put

from fastres.kernels import tables, tiles
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import stem_columns
from fastres.kernels.tables import Measurement, fprop_tile
from fastres.kernels.tiles import H200, Gpu, Tile, fprop_tiles

PROBLEM = ConvProblem(8, 14, 14, 64, 64, 3, 3, 1, 1)
TILE = Tile(64, 128, 64, 4, 2, (2, 8, 8))
H100 = H200._replace(name="NVIDIA H100 80GB HBM3")
HEAD = {"gpu": H200._asdict()}
BF16, CUDA = torch.bfloat16, torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    tables.forget_tables()
    yield
    tables.forget_tables()


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = {
        ("fprop", PROBLEM, torch.bfloat16): Measurement("triton", TILE),
        ("wgrad", PROBLEM, torch.float16): Measurement("cudnn", Tile(64, 64, 32, 4, 3, splits=7), on_load=False),
        ("dgrad", PROBLEM, torch.float8_e4m3fn): Measurement("cudnn", None, note="hung"),
        ("dgrad", PROBLEM, torch.bfloat16): Measurement("triton", Tile(64, 64, 64, 4, 3, (1, 1, 64), persistent=3)),
    }
    path = tmp_path / "deep" / "table.json"
    tables.write_table(table, path, H200)  # type: ignore[arg-type]
    assert tables.read_table(path) == table
    assert path.read_text().count("note") == 1
    assert len(path.read_text().splitlines()) == len(table) + 5, "a line per problem"
    assert tables.read_table(tmp_path / "none.json") == {}


def test_the_measured_tile_wins_over_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    heuristic = fprop_tile(PROBLEM, torch.bfloat16, True)
    slower = fprop_tiles(PROBLEM, 2, True)[-1]
    assert heuristic != slower
    table = {("fprop", PROBLEM, torch.bfloat16): Measurement("triton", slower)}
    tables.write_table(table, tables.table_file(H200.name), H200)  # type: ignore[arg-type]
    assert fprop_tile(PROBLEM, torch.bfloat16, True) == heuristic, "tables are read once"
    tables.forget_tables()
    assert fprop_tile(PROBLEM, torch.bfloat16, True) == slower
    assert fprop_tile(PROBLEM, torch.float16, True) == heuristic, "nothing was measured for another dtype"
    assert fprop_tile(PROBLEM, torch.bfloat16, True, H200._replace(name="another", sms=114)) == heuristic
    assert fprop_tile(PROBLEM, torch.bfloat16, False).box is None, "a tile for TMA cannot be used with pointers"
    assert tables.measured("fprop", PROBLEM, torch.bfloat16, H200) == (Measurement("triton", slower), 8, H200.name)
    assert tables.measured("dgrad", PROBLEM, torch.bfloat16, H200) is None


def test_a_persistent_tile_runs_only_where_it_was_measured() -> None:
    """The heuristic ranks persistent tiles last. An old table without the field `persistent` has none."""
    problem = ConvProblem(256, 56, 56, 64, 256)
    first, *others = fprop_tiles(problem, 2, True)
    assert not first.persistent
    wanted = others[-1]
    assert wanted.persistent
    tables.write_table({("fprop", problem, BF16): Measurement("triton", wanted)}, tables.table_file(H200.name), H200)
    tables.forget_tables()
    assert fprop_tile(problem, BF16, True) == wanted
    assert fprop_tile(replace(problem, N=128), BF16, True) == wanted
    assert fprop_tile(replace(problem, N=1), BF16, True).persistent == 0, "fewer than two tiles per program"
    path = tables.table_file(H200.name)
    path.write_text(re.sub(r', "persistent": \d', "", path.read_text()))
    tables.forget_tables()
    assert fprop_tile(problem, BF16, True).persistent == 0
    assert tables.measured("fprop", problem, BF16, H200).measurement.tile == replace(wanted, persistent=0)


def test_a_table_file_is_named_after_its_gpu(tmp_path: Path) -> None:
    assert tables.table_file("NVIDIA H100 80GB HBM3", tmp_path) == tmp_path / "nvidia-h100-80gb-hbm3.json"
    assert tables.table_file("x") == tmp_path / "tables" / "x.json"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '[{"pass": 1}]', "{}", '{"gpu": {}, "problems": []}', json.dumps(HEAD | {"problems": [1]})],
)
def test_the_error_names_a_broken_table(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is not a table of tiles .* write it again with bench/tune\.py"):
        tables.read_table(path)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_tiles_keep_the_rules_of_the_kernels(itemsize: int, tma: bool, prologue: bool) -> None:
    problems = [*net_problems("resnet50", 256), *net_problems("resnext50_32x4d", 1), *GATHERED.values()]
    for gpu in (H200, Gpu("small", 58, 101376, (8, 9))):
        for problem in problems:
            if tma and (problem.groups > 1 or (problem.C % 32 and not problem.pointwise)):
                continue
            found = fprop_tiles(problem, itemsize, tma, gpu, computed=int(prologue))
            assert found, problem
            for tile in found:
                buffers = (tile.BM + tile.BN) * tile.BK * itemsize * tile.stages
                assert buffers <= gpu.shared, (problem, tile)
                assert 128 * 32 * tile.warps >= tile.BM * tile.BN, "accumulators take at most half of the registers"
                assert (32 if itemsize == 1 else 16) <= tile.BK
                assert (tile.box is not None) == tma
                if tma:
                    assert math.prod(tile.box) == tile.BN  # type: ignore[arg-type]
                    assert problem.pointwise or problem.C % tile.BK == 0


LAST = ConvProblem(1, 7, 7, 2048, 512)


def programs(problem: ConvProblem, tile: Tile) -> int:
    whole = tiles.pixel_tiles(problem, tile.BN, tile.box) * math.ceil(problem.K // problem.groups / tile.BM)
    return whole * problem.groups * tile.splits


@pytest.mark.parametrize("tma", [False, True])
def test_splits_fill_the_gpu_if_tiles_are_few(tma: bool) -> None:
    """There are splits only if there are fewer tiles than multiprocessors.

    They make at most two programs per multiprocessor. Every split has at least two steps, and none is empty.
    """
    small = Gpu("small", 58, 101376, (8, 9))
    for gpu, name, batch in ((H200, "resnet50", 1), (small, "resnext50_32x4d", 1), (H200, "resnet50", 8)):
        cut = 0
        for problem in net_problems(name, batch):
            if tma and (problem.groups > 1 or problem.C % 16):
                continue
            whole, found = (fprop_tiles(problem, 2, tma, gpu, split=split) for split in (False, True))
            assert [tile for tile in found if tile.splits == 1] == whole, "the tiles without splits keep their order"
            for tile in set(found) - set(whole):
                steps = tiles.reduction_steps(problem, tile)
                each = math.ceil(steps / tile.splits)
                assert each >= 2, (problem, tile)
                assert math.ceil(steps / each) == tile.splits, (problem, tile)
                assert programs(problem, tile) // tile.splits < gpu.sms, (problem, tile)
                assert programs(problem, tile) <= 2 * gpu.sms, (problem, tile)
                cut += 1
            assert len(set(found)) == len(found)
        assert cut > 50
    for problem in net_problems("resnet50", 256):
        if problem.C > 3:
            assert all(tile.splits == 1 for tile in fprop_tiles(problem, 2, tma, split=True)[:6]), problem


def test_without_a_table_layers_of_a_single_image_are_split() -> None:
    """The heuristic splits those layers of ResNet-50 whose best tile leaves three quarters of an H200 idle."""
    chosen = {}
    for problem in net_problems("resnet50", 1):
        if problem.C > 3:
            whole = fprop_tile(problem, torch.float16, True, pass_="fprop")
            tile = fprop_tile(problem, torch.float16, True, pass_="infer")
            assert whole.splits == 1, "there is no table for float16, and training has no splits"
            if tile.splits > 1:
                sizes = problem.H, problem.C, problem.K, problem.R, problem.stride
                chosen[sizes] = programs(problem, whole), programs(problem, tile)
    assert set(chosen) == {(28, 256, 256, 3, 2), (14, 256, 256, 3, 1), (14, 512, 512, 3, 2), (7, 512, 512, 3, 1)} | {
        (7, 2048, 512, 1, 1)
    }
    assert all(before < H200.sms / 4 and after > 0.9 * H200.sms for before, after in chosen.values()), chosen


def test_splits_are_taken_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    split = next(tile for tile in fprop_tiles(LAST, 2, True, split=True) if tile.splits == 4)
    whole = replace(split, splits=1, stages=6)

    def chosen(N: int, pass_: str = "infer") -> Tile:
        return fprop_tile(replace(LAST, N=N), BF16, True, pass_=pass_)  # type: ignore[arg-type]

    put({("infer", LAST): Measurement("triton", split), ("fprop", LAST): Measurement("triton", split)})
    assert tables.read_table(tables.table_file(H200.name))["infer", LAST, BF16].tile == split
    assert chosen(1) == split
    assert chosen(2) in [tile for tile in fprop_tiles(replace(LAST, N=2), 2, True, split=True) if tile.splits > 1]
    assert chosen(2).splits <= 8, "the number of splits depends on its own tiles"
    for N in (64, 256):
        assert chosen(N).splits == 1
    for N in (1, 2, 256):
        assert chosen(N, "fprop").splits == 1, "statistics require whole sums, even if a table has splits"
    put({("infer", LAST): Measurement("triton", whole)})
    assert chosen(1) == whole
    assert [chosen(N).splits for N in (2, 4, 8)] == [1, 1, 1], "splits were not even faster with fewer programs"
    monkeypatch.setattr(tables, "SHIPPED", Path("none"))
    put({})
    assert chosen(1).splits > 1


def test_a_measured_tile_for_pointers_is_used() -> None:
    """A table may choose a tile for pointers although TMA could serve."""
    found = fprop_tiles(LAST, 2, False, split=True)
    for pass_, tile in (("infer", found[0]), ("infer", found[-1]), ("fprop", found[-1])):
        tile = tile if pass_ == "infer" else replace(tile, splits=1)
        put({(pass_, LAST): Measurement("triton", tile)})
        assert fprop_tile(LAST, BF16, True, pass_=pass_) == tile  # type: ignore[arg-type]
        assert fprop_tile(LAST, torch.float16, True, pass_=pass_).box is not None  # type: ignore[arg-type]


def test_the_shipped_table_holds_what_was_measured() -> None:
    path = tables.table_file(H200.name, tables.SHIPPED)
    table = tables.read_table(path)
    assert len(table) == 140
    assert not any(found.note for found in table.values())
    assert tables.read_table_of(path)[0] == H200
    assert [entries[:2] for entries in tables.serving(H200)] == [(H200.name, table)]


@pytest.mark.parametrize("pass_", ["infer", "fprop", "dgrad", "wgrad", "chain"])
def test_the_nearest_batch_decides(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearness is the ratio of batch sizes; of two equally near ones, the larger is taken.

    Only N may differ. An entry with a note, whose measurement failed, is used for its own batch size only.
    """
    at = {N: replace(PROBLEM, N=N) for N in (1, 8, 64, 512)}
    found = {N: Measurement("triton", replace(TILE, warps=N)) for N in at}
    found[512] = Measurement("cudnn", None, note="hung")
    put({(pass_, problem): found[N] for N, problem in at.items()})

    def batch(N: int, **other: int) -> int | None:
        nearest = tables.measured(pass_, replace(PROBLEM, N=N, **other), BF16, H200)  # type: ignore[arg-type]
        assert nearest is None or nearest.measurement == found[nearest.N]
        return None if nearest is None else nearest.N

    asked = {0: 1, 1: 1, 2: 1, 3: 8, 8: 8, 22: 8, 23: 64, 64: 64, 511: 64, 512: 512, 4096: 64}
    assert {N: batch(N) for N in asked} == asked
    put({(pass_, at[N]): found[N] for N in (1, 64)})
    assert batch(8) == 64, "the ratio is eight for both"
    for size in ("H", "C", "K", "stride", "pad"):
        assert batch(8, **{size: 2 * asdict(PROBLEM)[size]}) is None, size
    assert tables.measured(pass_, PROBLEM, torch.float16, H200) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("pass_", ["infer", "fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("tma", [False, True])
def test_another_batch_gets_the_measured_program_with_its_own_sizes(pass_: str, tma: bool) -> None:
    """For another batch size, the measured tile keeps its block sizes and warps.

    Box, splits and stages are those of a candidate for the problem itself.
    """

    def candidates(problem: ConvProblem) -> list[Tile]:
        if pass_ in ("infer", "fprop"):
            return fprop_tiles(problem, 2, tma)
        return (tiles.dgrad_tiles if pass_ == "dgrad" else tiles.wgrad_tiles)(problem, 2, tma)

    def chosen(problem: ConvProblem) -> Tile:
        if pass_ in ("infer", "fprop"):
            return fprop_tile(problem, BF16, tma, pass_=pass_)  # type: ignore[arg-type]
        return tables.backward_tile(pass_, problem, BF16, tma, H200, False, 1, 0)  # type: ignore[arg-type]

    def program(tile: Tile) -> Tile:
        return replace(tile, box=None, splits=1, stages=1)

    wide = ConvProblem(256, 30, 30, 128, 128, 3, 3, 1, 1)
    for tile in candidates(wide):
        put({(pass_, wide): Measurement("triton", tile)})
        assert chosen(wide) == tile
        for N in (1, 7, 32, 300):
            problem = replace(wide, N=N)
            of_this = candidates(problem)
            alike = [candidate for candidate in of_this if program(candidate) == program(tile)]
            assert chosen(problem) == (alike or of_this)[0]
    put({(pass_, wide): Measurement("triton", Tile(512, 512, 64, 8, 2, (1, 1, 512) if tma else None))})
    assert chosen(replace(wide, N=8)) == candidates(replace(wide, N=8))[0], "no such program"


def test_the_table_of_a_similar_gpu_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For problems that a GPU's own table lacks, the largest table of a similar GPU is used.

    Similar GPUs have the same compute capability and number of multiprocessors.
    """
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    small = H200._replace(name="NVIDIA H100 PCIe", sms=114)
    newer = H200._replace(name="NVIDIA H300", capability=(10, 0))
    like = H200._replace(name="NVIDIA GH200")
    others = [replace(PROBLEM, K=64 * k) for k in (2, 3, 4)]
    put({("fprop", problem): Measurement("cudnn", None) for problem in others}, small)
    put({("fprop", problem): Measurement("cudnn", None) for problem in others}, newer, tables.SHIPPED)

    def lent(gpu: Gpu = H100) -> Any:
        found = [(entries.gpu, len(entries.table)) for entries in tables.serving(gpu)]
        return found[0] if len(found) == 1 else found

    assert lent() == []
    put({("fprop", PROBLEM): Measurement("cudnn", None), ("fprop", others[0]): Measurement("cudnn", None)}, like)
    assert lent() == (like.name, 2)
    put({("fprop", PROBLEM): Measurement("cudnn", None)}, H200, tables.SHIPPED)
    assert lent() == (like.name, 2)
    put({("fprop", others[0]): Measurement("cudnn", None)}, H200)
    assert lent() == (like.name, 2), "of equally large tables, the first by name"
    put({("fprop", problem): Measurement("triton", TILE) for problem in others}, H200)
    assert lent() == (H200.name, 4), "the package's and the user's entries count together"
    assert tables.measured("fprop", others[0], BF16, H100) == (Measurement("triton", TILE), 8, H200.name)
    assert lent(small) == (small.name, 3)
    hung, mine = Measurement("cudnn", None, note="hung"), Measurement("cudnn", TILE)
    put({("fprop", others[0]): hung, ("fprop", others[1]): Measurement("cudnn", None, note=tables.UNFINISHED)}, H100)
    assert lent() == [(H100.name, 1), (H200.name, 4)]
    assert tables.measured("fprop", others[0], BF16, H100) == (hung, 8, H100.name)
    assert tables.measured("fprop", others[1], BF16, H100) == (Measurement("triton", TILE), 8, H200.name)
    put({("fprop", replace(others[1], N=2)): mine}, H100)
    assert tables.measured("fprop", others[1], BF16, H100) == (Measurement("triton", TILE), 8, H200.name), (
        "an exact match of a similar GPU comes before a near one of its own"
    )
    assert tables.measured("fprop", replace(others[1], N=9), BF16, H100) == (mine, 2, H100.name), (
        "of two near ones, its own comes first"
    )
    assert tables.measured("fprop", others[2], BF16, H100) == (Measurement("triton", TILE), 8, H200.name)


def test_unfinished_entries_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    put({("fprop", PROBLEM): Measurement("triton", TILE)}, folder=tables.SHIPPED)
    for note, found in ((tables.UNFINISHED, Measurement("triton", TILE)), ("hung", None)):
        entry = Measurement("cudnn", None, note=note)
        put({("fprop", PROBLEM): entry})
        assert tables.measured("fprop", PROBLEM, BF16, H200) == (found or entry, 8, H200.name)


def test_a_similar_gpus_tile_must_be_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with less shared memory has other candidates, so a tile of a similar GPU may not fit."""
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    narrow = H200._replace(name="narrow", shared=65536)
    ours, theirs = (fprop_tiles(PROBLEM, 2, True, gpu) for gpu in (narrow, H200))
    large = next(tile for tile in theirs if tile not in ours)
    for tile, chosen in ((ours[-1], ours[-1]), (large, ours[0])):
        put({("fprop", PROBLEM): Measurement("triton", tile)})
        assert fprop_tile(PROBLEM, BF16, True, narrow) == chosen


def test_a_broken_table_of_another_gpu_gives_a_warning() -> None:
    folder = tables.table_file(H200.name).parent
    folder.mkdir(parents=True)
    (folder / "nvidia-a100.json").write_text("[]")
    for gpu in (H200, H100):
        with pytest.warns(UserWarning, match=r"nvidia-a100\.json is not a table of tiles"):
            assert [entries.gpu for entries in tables.serving(gpu)] == [H200.name]
    tables.table_file(H100.name).write_text("[]")
    tables.forget_tables()
    with pytest.raises(ValueError, match="is not a table of tiles"):
        tables.serving(H100)


def test_boxes_waste_no_pixel_of_a_large_batch() -> None:
    for side in (56, 28, 14, 7):
        for pixels in (64, 128, 256):
            box = tiles.cover(256, side, side, pixels)
            assert math.prod(box) == pixels
            assert tiles.boxes(256, side, side, box) * pixels == 256 * side * side


def test_the_stems_tile_comes_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile measured for the same pass is used; if there is none, or another kernel won, the first candidate is."""
    monkeypatch.setattr(tables, "SHIPPED", Path("none"))
    problem, dtype = ConvProblem(24, 224, 224, 3, 64, 7, 7, 2, 3), torch.bfloat16
    columns = stem_columns(problem)
    candidates = tiles.fprop_tiles(columns, 2, True, H200)
    wanted = replace(candidates[1], box=(1, 16, 8))
    gathered = Tile(64, 64, 32, 4, 3)

    def chosen() -> list[Tile]:
        tables.forget_tables()
        return [tables.stem_tile(problem, columns, dtype, True, H200, False, pass_) for pass_ in ("infer", "fprop")]

    assert chosen() == [candidates[0], candidates[0]]
    table = {("infer", problem, dtype): Measurement("stem", wanted)}
    table["fprop", problem, dtype] = Measurement("triton", gathered)
    tables.write_table(table, tables.table_file(H200.name), H200)  # type: ignore[arg-type]
    assert chosen() == [wanted, candidates[0]]
    by_pointers = next(tile for tile in tiles.stem_tiles(columns, 2, True, H200)[1:] if tile.box is None)
    table["fprop", problem, dtype] = Measurement("stem", by_pointers)
    table["wgrad", problem, dtype] = Measurement("stem", of_wgrad := tiles.stem_wgrad_tiles(problem, 2)[1])
    tables.write_table(table, tables.table_file(H200.name), H200)  # type: ignore[arg-type]
    assert chosen() == [wanted, by_pointers]
    assert tables.stem_wgrad_tile(problem, dtype, H200, False) == of_wgrad
    assert tables.stem_wgrad_tile(problem, torch.float16, H200, False) == tiles.stem_wgrad_tiles(problem, 2)[0]
    table["fprop", problem, dtype] = Measurement("triton", by_pointers)
    tables.write_table(table, tables.table_file(H200.name), H200)  # type: ignore[arg-type]
    assert chosen() == [wanted, candidates[0]], "the tile belongs to another kernel"
    measured, problem = problem, replace(problem, N=48)
    columns = stem_columns(problem)
    candidates = tiles.fprop_tiles(columns, 2, True, H200)
    alike = next(tile for tile in candidates if tables._same_program(replace(wanted, stages=tile.stages), tile))
    assert chosen() == [alike, candidates[0]], f"near {measured}"
