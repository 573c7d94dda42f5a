"""Measured tables of tiles, one file per GPU, and the tile that a launcher takes.

A table (`tables/<gpu>.json`, written by `bench/tune.py`) wins over the model of `tiles`. It serves more than was
measured: a problem that differs from a measured one in N alone, and a GPU without a table that is like the measured
one. Nothing here times anything: autotuning inside a CUDA-graph capture would kill the capture.
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
    """What won for one problem, "triton", "stem" or "cudnn", the tile with which ours ran best, and whether its kernel
    there computed what it reads while it loads (`fastres.ops.dispatch.on_load`).

    note: empty if the problem was measured; else why it was not ("unfinished", "hung", "died", ...), and cuDNN runs it.
    """

    winner: str
    tile: Tile | None
    on_load: bool = True
    note: str = ""


UNFINISHED = "unfinished"  # the note of a problem that is being measured, or was when its run was stopped

Key = tuple[Pass, ConvProblem, torch.dtype]
Table = dict[Key, Measurement]


class Found(NamedTuple):
    """A measurement on record, the batch and the GPU for which it was made."""

    measurement: Measurement
    N: int
    gpu: str


class Entries(NamedTuple):
    """What was measured on the GPU of that name, and what of it has no note by batch, under the key with N=1."""

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
    """The measured tile where the tables have one that fits what else the kernel does, else the first of
    `fprop_tiles`. tma: whether TMA can serve; what was measured may have been faster by pointers."""
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
    """For `conv_stem` of `problem`, which convolves as `columns` does: the measured tile, else the first of
    `stem_tiles`."""
    candidates = stem_tiles(columns, dtype.itemsize, tma, gpu, ieee)
    return _measured_tile(pass_, problem, dtype, gpu, candidates, by_stem=True)


@lru_cache(maxsize=4096)
def stem_wgrad_tile(problem: ConvProblem, dtype: torch.dtype, gpu: Gpu, ieee: bool) -> Tile:
    """The measured tile of `conv_stem_wgrad`, else the first of `stem_wgrad_tiles`."""
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
    """The measured tile where the tables have one that fits what else the kernel does, else the first of `dgrad_tiles`
    or `wgrad_tiles` (more: their last argument)."""
    tiles = dgrad_tiles if pass_ == "dgrad" else wgrad_tiles
    candidates = tiles(problem, dtype.itemsize, tma, gpu, ieee, operands, more)
    return _measured_tile(pass_, problem, dtype, gpu, candidates)


def _measured_tile(
    pass_: Pass, problem: ConvProblem, dtype: torch.dtype, gpu: Gpu, candidates: list[Tile], by_stem: bool = False
) -> Tile:
    """The measured tile if it fits: of this very problem as it was measured; of the nearest batch the first candidate
    like it, whose box, splits and stages are this problem's own. Else the first candidate. by_stem: whose tile it is,
    for the kernels over packed images have some in common with the others.

    It has no splits where no candidate has any; nor for inference where none were measured, because they lost or were
    never tried.
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
    """Whether two tiles need the same registers and shared memory."""
    return replace(a, box=None, splits=1) == replace(b, box=None, splits=1) and (a.box is None) == (b.box is None)


@lru_cache(maxsize=4096)
def measured(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, gpu: Gpu) -> Found | None:
    """The measurement of this problem, else of the one nearest in batch size, by ratio (of two equal ones the larger).
    Of either kind the GPU's own come before those that another lends. None if there is neither."""
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
    """The GPU's own entries, if any, then those that another GPU lends for the rest. Raises ValueError for a broken
    table of its own."""
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
    """Without what a stopped run of bench/tune.py was measuring."""
    return {key: found for key, found in table.items() if found.note != UNFINISHED}


def _lender(gpu: Gpu) -> tuple[str, Table]:
    """Of the other GPUs with the same compute capability and number of multiprocessors, the one with the largest table:
    its name and that table, the user's entries before the package's. A broken file costs a warning."""
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
    """Where the table of the GPU of that name (`torch.cuda.get_device_name`) lies in `folder`; by default in the user's
    own, which wins over what the package ships: `cache_folder`'s."""
    return (folder or _users_folder()) / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def _users_folder() -> Path:
    return cache_folder() / "tables"


def write_table(table: Mapping[Key, Measurement], path: Path, gpu: Gpu) -> None:
    """Writes the file of a table measured on `gpu`, one line per problem. A running process sees it after
    `forget_tables`."""
    lines = [json.dumps(_row(*key, found)) for key, found in table.items()]
    head = f'{{\n"gpu": {json.dumps(gpu._asdict())},\n"problems": [\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")  # a run that is stopped never leaves half a table
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
    """The table in a file, empty where there is no file. Raises ValueError for a file that holds none."""
    return read_table_of(path)[1] if path.exists() else {}


def read_table_of(path: Path) -> tuple[Gpu, Table]:
    """The GPU and the table in a file. Raises ValueError for a file that holds none."""
    try:
        content = json.loads(path.read_text())
        gpu = Gpu(**{**content["gpu"], "capability": tuple(content["gpu"]["capability"])})
        return gpu, dict(map(_entry, content["problems"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of tiles ({error!r}); remove it and write it again with bench/tune.py"
        ) from error


def _entry(row: Mapping[str, Any]) -> tuple[Key, Measurement]:
    tile = row["tile"]
    if tile is not None:
        tile = Tile(**{**tile, "box": tile["box"] and tuple(tile["box"])})
    key = (row["pass"], ConvProblem(**row["problem"]), getattr(torch, row["dtype"]))
    return key, Measurement(row["winner"], tile, row["on_load"], row.get("note", ""))


def forget_tables() -> None:
    """Tables are read once per process; after this, once more."""
    for cached in (serving, measured, fprop_tile, stem_tile, stem_wgrad_tile, backward_tile):
        cached.cache_clear()
    launcher.forget()
