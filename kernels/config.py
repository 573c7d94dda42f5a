"""Which tile a kernel runs with: a frozen dataclass, a small analytical heuristic, measured tables per GPU.

A table (`tables/<gpu>.json`, written by `bench/tune.py`) wins over the heuristic. Nothing here times anything:
autotuning inside a CUDA-graph capture would kill the capture.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .problem import ConvProblem, Pass


@dataclass(frozen=True)
class Tile:
    """One specialisation of a conv kernel.

    BM: channels per tile, BN: pixels per tile, BK: reduction step, all in elements; `warps` per program, `stages` of
    the software pipeline; box: how BN pixels are cut out of [N, P, Q] as (TN, TH, TW), or None for the gather kernel,
    which takes BN consecutive pixels.

    wgrad: BM filters, BN channels of one filter tap, BK pixels per step and in a box; splits: parts the pixels are cut
    into, each summed by programs of its own; taps: neighbouring filter taps per program.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    box: tuple[int, int, int] | None = None
    splits: int = 1
    taps: int = 1


class Gpu(NamedTuple):
    """What a heuristic knows of a GPU: its name, multiprocessors, bytes of shared memory one program may take."""

    name: str
    sms: int
    shared: int


H200 = Gpu("NVIDIA H200", 132, 232448)

# Per multiprocessor and cycle, on Hopper: 16-bit multiply-adds of wgmma, of the older mma (tiles of less than 64
# channels), of fp32 FMA; bytes from L2; bytes from and to memory. Per program: cycles of waiting for its first load and
# last store, and of work that other programs can't hide.
WGMMA, MMA, FMA, L2, MEMORY, LATENCY, OVERHEAD = 2048, 1024, 128, 48, 18, 2000, 200


def fprop_tiles(problem: ConvProblem, itemsize: int, tma: bool, gpu: Gpu = H200, ieee: bool = False) -> list[Tile]:
    """Tiles for `conv_fprop`, the most promising first: BM output channels, BN output pixels.

    Ordered by a model: programs run in waves, a wave takes the longest of tensor-core, L2 and memory time. ieee: fp32
    products on the FMA units, which hold their operands in registers and so want small tiles.
    """
    channels, outputs = problem.C // problem.groups, problem.K // problem.groups
    if tma:
        BK = 128 // itemsize  # one swizzle span
        while problem.C % BK and not problem.pointwise:
            BK //= 2
    else:
        BK = max(32 if itemsize == 1 else 16, min(64, _power_of_2(problem.S * row_channels(problem) or channels)))
    if ieee:
        BK = 16
        shapes = [(64, 64), (32, 64)]
    else:
        shapes = [(64, 128), (64, 64), (128, 128), (128, 64)]
        shapes += [(64, 256), (256, 128), (128, 256)] if tma else []  # addresses of pixels take registers
        shapes += [(BM, BN) for BM in (16, 32) for BN in (128, 64) if outputs <= BM]

    timed = []
    for BM, BN in shapes:
        warps = 8 if BM * BN >= 128 * 128 and BM >= 128 else 4
        box = best_box(problem, BN) if tma else None
        steps = reduction_steps(problem, Tile(BM, BN, BK, warps, 1, box))
        step_bytes = (BM + BN) * BK * itemsize
        stages = min(
            3, max(1 if tma else 2, steps), gpu.shared // step_bytes
        )  # copies by pointer are asynchronous from 2 on
        if stages < min(3, steps) and BM * BN > 64 * 64:  # too few to hide a load
            continue
        programs = math.ceil(outputs / BM) * problem.groups * pixel_tiles(problem, BN, box)
        resident = max(1, min(gpu.shared // (stages * step_bytes), 65536 // (BM * BN + 64 * 32 * warps)))
        rate = (FMA if ieee else WGMMA if BM >= 64 else MMA) * 2 / itemsize
        memory = itemsize * (BM * BN + BN * channels * BM / outputs)
        busy = max(steps * BM * BN * BK / rate, steps * step_bytes / L2, memory / MEMORY)
        waves = programs / (gpu.sms * resident)
        waves = waves if waves > 8 else math.ceil(waves)
        timed.append((waves * max(resident * (busy + OVERHEAD), busy + LATENCY), Tile(BM, BN, BK, warps, stages, box)))
    return [tile for _, tile in sorted(timed, key=lambda pair: pair[0])]


@lru_cache(maxsize=4096)
def fprop_tile(problem: ConvProblem, dtype: torch.dtype, tma: bool, gpu: Gpu = H200, ieee: bool = False) -> Tile:
    """The measured tile where the tables have one that can run, else the first of `fprop_tiles`."""
    found = measured("fprop", problem, dtype, gpu.name)
    if found is not None and found.tile is not None and (tma or found.tile.box is None) and not ieee:
        return found.tile
    return fprop_tiles(problem, dtype.itemsize, tma, gpu, ieee)[0]


def row_channels(problem: ConvProblem) -> int:
    """C/groups where they are so few that a row of the filter makes a better reduction step than one tap; else 0."""
    channels = problem.C // problem.groups
    return channels if problem.S > 1 and channels < 16 else 0


def reduction_steps(problem: ConvProblem, tile: Tile) -> int:
    """Steps of BK that `conv_fprop` sums over."""
    if tile.box is None and row_channels(problem):
        return problem.R * math.ceil(problem.S * row_channels(problem) / tile.BK)
    return problem.R * problem.S * math.ceil(problem.C // problem.groups / tile.BK)


@lru_cache(maxsize=4096)
def best_box(problem: ConvProblem, pixels: int) -> tuple[int, int, int]:
    """(TN, TH, TW), powers of two with product `pixels`, that cover [N, P, Q] with the least waste; among equals one
    with few images and a square of at most 8 x 8 pixels, because neighbours' windows overlap."""
    if problem.pointwise:  # the pixels stand in one row
        return (1, 1, pixels)
    sides = [2**i for i in range(pixels.bit_length())]
    boxes = [(pixels // (h * w), h, w) for h in sides for w in sides if h * w <= pixels]

    def rank(box: tuple[int, int, int]) -> tuple[int, bool, int, int]:
        return pixel_tiles(problem, pixels, box), max(box[1:]) > 8, box[0], abs(box[1] - box[2])

    return min(boxes, key=rank)


def pixel_tiles(problem: ConvProblem, BN: int, box: tuple[int, int, int] | None) -> int:
    """How many tiles of BN output pixels a problem has."""
    if box is None or problem.pointwise:
        return math.ceil(problem.pixels / BN)
    TN, TH, TW = box
    return math.ceil(problem.N / TN) * math.ceil(problem.P / TH) * math.ceil(problem.Q / TW)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def dgrad_tile(problem: ConvProblem, dtype: torch.dtype, tma: bool, gpu: Gpu = H200, ieee: bool = False) -> Tile:
    """Tile of `conv_dgrad`: BM input channels, BN input pixels."""
    return Tile(64, 128, 64, 4, 3)


def wgrad_tile(problem: ConvProblem, dtype: torch.dtype, tma: bool, gpu: Gpu = H200, ieee: bool = False) -> Tile:
    """Tile of `conv_wgrad`."""
    return Tile(64, 64, 64, 4, 3, splits=4)


class Measurement(NamedTuple):
    """What won for one problem, "triton" or "cudnn", and the tile with which Triton ran best."""

    winner: str
    tile: Tile | None


Table = dict[tuple[Pass, ConvProblem, torch.dtype], Measurement]


def measured(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, gpu: str) -> Measurement | None:
    """The measurement on record for the GPU of that name (`torch.cuda.get_device_name`), None where there is none."""
    return _table(gpu).get((pass_, problem, dtype))


def measured_winner(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, gpu: str) -> str | None:
    found = measured(pass_, problem, dtype, gpu)
    return None if found is None else found.winner


def table_file(gpu: str, folder: Path | None = None) -> Path:
    """Where a GPU's table lies in `folder`; by default in the user's own, which wins over what the package ships:
    $FASTRES_CACHE_DIR, else ~/.cache/fastres."""
    if folder is None:
        folder = Path(os.environ.get("FASTRES_CACHE_DIR") or Path.home() / ".cache" / "fastres") / "tables"
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def write_table(table: Mapping[tuple[Pass, ConvProblem, torch.dtype], Measurement], path: Path) -> None:
    """Writes a table file, one line per problem. A running process sees it after `forget_tables`."""
    lines = [
        json.dumps(
            {
                "pass": pass_,
                "dtype": str(dtype).removeprefix("torch."),
                "problem": asdict(problem),
                "winner": found.winner,
                "tile": None if found.tile is None else asdict(found.tile),
            }
        )
        for (pass_, problem, dtype), found in table.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def read_table(path: Path) -> Table:
    """The table in a file, empty where there is no file. Raises ValueError for a file that holds none."""
    if not path.exists():
        return {}
    try:
        return dict(_entries(json.loads(path.read_text())))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tiles ({error!r}); write it anew with bench/tune.py") from error


def _entries(rows: Iterable[dict]) -> Iterator[tuple[tuple[Pass, ConvProblem, torch.dtype], Measurement]]:
    for row in rows:
        tile = row["tile"]
        if tile is not None:
            tile = Tile(**{**tile, "box": tile["box"] and tuple(tile["box"])})
        key = (row["pass"], ConvProblem(**row["problem"]), getattr(torch, row["dtype"]))
        yield key, Measurement(row["winner"], tile)


@lru_cache
def _table(gpu: str) -> Table:
    shipped = read_table(table_file(gpu, Path(__file__).parent / "tables"))
    return shipped | read_table(table_file(gpu))


def forget_tables() -> None:
    """Tables are read once per process; after this, once more."""
    _table.cache_clear()
    fprop_tile.cache_clear()
