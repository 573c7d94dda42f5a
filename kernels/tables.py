"""Tables of measured tiles, one file per GPU, and the choice of a launcher's tile.

A table (`tables/<gpu>.json`, written by `bench/tune.py`) takes precedence over the model of `tiles`. It also serves
problems that differ from a measured one only in the batch size N. A GPU whose own table lacks a problem uses that of
another GPU with the same compute capability and number of multiprocessors.

Nothing in this module times a kernel, because autotuning during a CUDA-graph capture would invalidate the capture.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..paths import cache_folder
from . import launcher
from .problem import ConvProblem, Pass
from .tiles import H200, Gpu, Tile, dgrad_tiles, fprop_tiles, stem_tiles, stem_wgrad_tiles, wgrad_tiles


class Measurement(NamedTuple):
    """The result of measuring one problem.

    winner: the fastest engine, "triton", "stem" or "cudnn".
    tile: the fastest tile of fastres's own kernel, if there is one.
    on_load: whether that kernel, with that tile, computed its operands while loading them (`fastres.ops.dispatch`).
    note: empty if the problem was measured. Otherwise the reason why not ("unfinished", "hung", "died", ...); cuDNN
        then runs it.
    """

    winner: str
    tile: Tile | None
    on_load: bool = True
    note: str = ""


UNFINISHED = "unfinished"  # note of a problem whose measurement is running, or was interrupted

Key = tuple[Pass, ConvProblem, torch.dtype]
Table = dict[Key, Measurement]


class Found(NamedTuple):
    """A measurement from a table, with the batch size and the name of the GPU for which it was made."""

    measurement: Measurement
    N: int
    gpu: str


class Entries(NamedTuple):
    """The table of one GPU, and the same measurements indexed by batch size.

    by_batch: for each key of the table with its problem's N replaced by 1, the measurements without a note, by N.
    """

    gpu: str
    table: Table
    by_batch: Mapping[Key, Mapping[int, Measurement]]


SHIPPED = Path(__file__).parent / "tables"


@lru_cache(maxsize=4096)
def fprop_tile(
    problem: ConvProblem,
    dtype: torch.dtype,
    tma: bool,
    gpu: Gpu = H200,
    ieee: bool = False,
    computed: int = 0,
    pass_: Literal["infer", "fprop"] = "fprop",
) -> Tile:
    """Return the tile of `conv_fprop`: the measured one if it is a candidate, otherwise the first of `fprop_tiles`.

    tma: whether TMA can serve. If it can, tiles for pointers are candidates, too, because they may have been faster.
    The other arguments are those of `fprop_tiles`; for "infer", tiles with splits are candidates.
    """
    candidates = fprop_tiles(problem, dtype.itemsize, tma, gpu, ieee, computed, pass_ == "infer")
    if tma:
        candidates += fprop_tiles(problem, dtype.itemsize, False, gpu, ieee, computed, pass_ == "infer")
    return _measured_tile(pass_, problem, dtype, gpu, candidates)


@lru_cache(maxsize=4096)
def stem_tile(
    problem: ConvProblem,
    columns: ConvProblem,
    dtype: torch.dtype,
    tma: bool,
    gpu: Gpu,
    ieee: bool,
    pass_: Literal["infer", "fprop"],
) -> Tile:
    """Return the tile of `conv_stem`: the measured one if it is a candidate, otherwise the first of `stem_tiles`.

    columns: the convolution that `conv_stem` computes for `problem` (`stem.stem_columns`).
    """
    candidates = stem_tiles(columns, dtype.itemsize, tma, gpu, ieee)
    return _measured_tile(pass_, problem, dtype, gpu, candidates, by_stem=True)


@lru_cache(maxsize=4096)
def stem_wgrad_tile(problem: ConvProblem, dtype: torch.dtype, gpu: Gpu, ieee: bool) -> Tile:
    """Return the tile of `conv_stem_wgrad`: the measured one if it is a candidate, else the first candidate."""
    candidates = stem_wgrad_tiles(problem, dtype.itemsize, gpu, ieee)
    return _measured_tile("wgrad", problem, dtype, gpu, candidates, by_stem=True)


@lru_cache(maxsize=4096)
def backward_tile(
    pass_: Literal["dgrad", "wgrad"],
    problem: ConvProblem,
    dtype: torch.dtype,
    tma: bool,
    gpu: Gpu,
    ieee: bool,
    operands: int,
    more: int,
) -> Tile:
    """Return the tile of `conv_dgrad` or `conv_wgrad`: the measured one if it is a candidate, otherwise the first one.

    The candidates are those of `dgrad_tiles` or `wgrad_tiles`. more: their last argument, epilogue or prologue.
    """
    tiles = dgrad_tiles if pass_ == "dgrad" else wgrad_tiles
    candidates = tiles(problem, dtype.itemsize, tma, gpu, ieee, operands, more)
    return _measured_tile(pass_, problem, dtype, gpu, candidates)


def _measured_tile(
    pass_: Pass, problem: ConvProblem, dtype: torch.dtype, gpu: Gpu, candidates: list[Tile], by_stem: bool = False
) -> Tile:
    """Return the measured tile if it fits one of the candidates, otherwise the first candidate.

    A tile measured for the same problem fits if a candidate needs the same registers and shared memory; it is returned
    as measured. For a tile measured at the nearest batch size, the first such candidate is returned; its box, splits
    and stages are this problem's own.

    Splits: if no candidate has splits, the measured tile loses its own. For inference, a tile measured without splits
    matches only candidates without them, because splits were slower or never tried.

    by_stem: whether the caller is a kernel for packed images (`stem`). A measured tile is used only by the kind of
    kernel that it was measured with, because the two kinds have candidates in common.
    """
    found = measured(pass_, problem, dtype, gpu)
    wanted = None if found is None else found.measurement.tile
    if found is not None and wanted is not None and (found.measurement.winner == "stem") == by_stem:
        if all(tile.splits == 1 for tile in candidates):
            wanted = replace(wanted, splits=1)
        for tile in candidates:
            if pass_ == "infer" and wanted.splits == 1 < tile.splits:
                continue
            if found.N == problem.N and _same_program(wanted, tile):
                return wanted
            if found.N != problem.N and _same_program(replace(wanted, stages=tile.stages), tile):
                return tile
    return candidates[0]


def _same_program(a: Tile, b: Tile) -> bool:
    """Return whether two tiles need the same registers and shared memory: at most splits and box sizes differ."""
    return replace(a, box=None, splits=1) == replace(b, box=None, splits=1) and (a.box is None) == (b.box is None)


@lru_cache(maxsize=4096)
def measured(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, gpu: Gpu) -> Found | None:
    """Return the measurement of this problem, or of the same problem at the nearest batch size, or None.

    An exact match comes first. Nearness is the ratio of batch sizes; of two equally near ones the larger is taken. In
    both cases the GPU's own table takes precedence over that of a similar GPU (`serving`).
    """
    wanted = max(problem.N, 1)
    for entries in serving(gpu):
        exact = entries.table.get((pass_, problem, dtype))
        if exact is not None:
            return Found(exact, problem.N, entries.gpu)
    for entries in serving(gpu):
        batches = entries.by_batch.get((pass_, replace(problem, N=1), dtype))
        if batches is not None:
            nearest = min(batches, key=lambda N: (max(N / wanted, wanted / N), -N))
            return Found(batches[nearest], nearest, entries.gpu)
    return None


@lru_cache
def serving(gpu: Gpu) -> tuple[Entries, ...]:
    """Return the entries of the GPU's own table, then those of a similar GPU's (`_lender`). Empty tables are left out.

    `measured` searches them in this order. Raises ValueError if the GPU's own table is broken.
    """
    own = _finished(read_table(table_file(gpu.name, SHIPPED))) | _finished(read_table(table_file(gpu.name)))
    lender, lent = _lender(gpu)
    found = []
    for name, table in ((gpu.name, own), (lender, lent)):
        by_batch: dict[Key, dict[int, Measurement]] = {}
        for (pass_, problem, dtype), measurement in table.items():
            if not measurement.note:
                by_batch.setdefault((pass_, replace(problem, N=1), dtype), {})[problem.N] = measurement
        found += [Entries(name, table, by_batch)] if table else []
    return tuple(found)


def _finished(table: Table) -> Table:
    """Return the table without the problems that an interrupted run of bench/tune.py was measuring."""
    return {key: found for key, found in table.items() if found.note != UNFINISHED}


def _lender(gpu: Gpu) -> tuple[str, Table]:
    """Return the name and the table of the similar GPU with the largest table, or ("", {}).

    Similar means another name with the same compute capability and number of multiprocessors. The user's entries take
    precedence over the package's. A broken file is skipped with a warning.
    """
    found: dict[str, Table] = {}
    for path in (*sorted(SHIPPED.glob("*.json")), *sorted(_users_folder().glob("*.json"))):
        if path.name == table_file(gpu.name).name:
            continue
        try:
            other, table = read_table_of(path)
        except (OSError, ValueError) as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        if (other.capability, other.sms) == (gpu.capability, gpu.sms):
            found[other.name] = found.get(other.name, {}) | _finished(table)
    return min(found.items(), key=lambda one: (-len(one[1]), one[0]), default=("", {}))


def table_file(gpu: str, folder: Path | None = None) -> Path:
    """Return the path of the table of the GPU named `gpu` (`torch.cuda.get_device_name`).

    folder: by default the user's, in `cache_folder()`. Its entries take precedence over those shipped with the package.
    """
    return (folder or _users_folder()) / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def _users_folder() -> Path:
    return cache_folder() / "tables"


def write_table(table: Mapping[Key, Measurement], path: Path, gpu: Gpu) -> None:
    """Write a table measured on `gpu` to `path`, one line per problem.

    A running process that has read its tables already sees the new file only after `forget_tables`.
    """
    lines = [json.dumps(_row(*key, found)) for key, found in table.items()]
    head = f'{{\n"gpu": {json.dumps(gpu._asdict())},\n"problems": [\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")  # replaced at the end, so an interrupted run leaves no partial table
    fresh.write_text(head + ",\n".join(lines) + "\n]\n}\n")
    fresh.replace(path)


def _row(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, found: Measurement) -> dict[str, Any]:
    row = {
        "pass": pass_,
        "dtype": str(dtype).removeprefix("torch."),
        "problem": asdict(problem),
        "winner": found.winner,
        "tile": None if found.tile is None else asdict(found.tile),
        "on_load": found.on_load,
    }
    return row | ({"note": found.note} if found.note else {})


def read_table(path: Path) -> Table:
    """Return the table in a file, empty if the file does not exist. Raises ValueError if it is not a table."""
    return read_table_of(path)[1] if path.exists() else {}


def read_table_of(path: Path) -> tuple[Gpu, Table]:
    """Return the GPU and the table in a file. Raises ValueError if it is not a table."""
    try:
        content = json.loads(path.read_text())
        gpu = Gpu(**{**content["gpu"], "capability": tuple(content["gpu"]["capability"])})
        return gpu, dict(map(_entry, content["problems"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of tiles ({error!r}); remove it and write it again with bench/tune.py"
        ) from error


def _entry(row: Mapping[str, Any]) -> tuple[Key, Measurement]:
    tile = row["tile"]
    if tile is not None:
        tile = Tile(**{**tile, "box": tile["box"] and tuple(tile["box"])})
    key = (row["pass"], ConvProblem(**row["problem"]), getattr(torch, row["dtype"]))
    return key, Measurement(row["winner"], tile, row["on_load"], row.get("note", ""))


def forget_tables() -> None:
    """Clear all caches of tables and launches, so that the next launch reads the tables again."""
    for cached in (serving, measured, fprop_tile, stem_tile, stem_wgrad_tile, backward_tile):
        cached.cache_clear()
    launcher.forget()
