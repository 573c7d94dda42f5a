"""Compare the time of each step of `fastres.optimize` on a CPU with ONNX Runtime's profile of the same net.

    python bench/layers_cpu.py --depth 50 --batch 1
    python bench/layers_cpu.py --depth 50 --batch 1 --dtype int8 --csv out/layers.csv

Steps are timed one by one, so their sum is a little more than the time of a whole call. The same holds for ONNX
Runtime's profile. Operations other than convolutions are summed by kind. ONNX Runtime may run an addition separately
that is part of the previous step here.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import backends
import measure
import photos
import run
import runtimes
import torch
from torch import Tensor

from fastres.inference.plan import INPUT, Conv

ROWS = {"fp32": ("fastres-optimize", "onnxruntime"), "int8": ("fastres-optimize-int8", "onnxruntime-int8")}
CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv"}
ROUNDS, CALLS = 7, 4
COLUMNS = ["layer", "ours us", "ONNX Runtime us", "difference us", "ratio"]


class Place(NamedTuple):
    """Channels and height before and after a convolution, which identify it on both sides."""

    channels: int
    height: int
    filters: int
    out_height: int


class Timed(NamedTuple):
    """A step or node. place: None if it is not a convolution. order: its rank among those of the same place."""

    name: str
    place: Place | None
    order: int
    microseconds: float


def steps(net: Any, images: Tensor, calls: int) -> dict[str, list[float]]:
    """Return the microseconds of each step of an optimized `net` in `calls` calls on `images`, by the name of its
    result."""
    program = program_of(net)
    taken = defaultdict(list)
    for _ in range(calls):
        values: dict[str, Any] = {INPUT: net._nhwc(images)}
        for bound in program.bound:
            inputs = [values[name] for name in bound.step.reads]
            start = time.perf_counter()
            results = bound.call(*inputs)
            taken[bound.step.writes[0]].append(1e6 * (time.perf_counter() - start))
            values.update(zip(bound.step.writes, results, strict=True))
            for name in bound.dies:
                del values[name]
    return taken


def program_of(net: Any) -> Any:
    """Return the program that the net used last."""
    return [*net._programs.values()][-1]


def ours(net: Any, images: Tensor, taken: dict[str, list[float]]) -> list[Timed]:
    """Return our steps in the order in which they run. Convolutions of the same place are ranked in the order of the
    net's modules."""
    order = {name: i for i, (name, _) in enumerate(net.named_modules())}
    shapes, found = {INPUT: tuple(images.shape)}, []
    for bound in program_of(net).bound:
        step, shapes[bound.step.writes[0]] = bound.step, bound.shape
        place = None
        if isinstance(step, Conv):
            (_, channels, height, _), (_, filters, out_height, _) = shapes[step.x], bound.shape
            place = Place(channels, height, filters, out_height)
        name = step.name if place else step.name or type(step).__name__
        found.append(Timed(name, place, order.get(step.name, 0), statistics.median(taken[step.writes[0]])))
    return found


def nodes(profile: Path) -> list[Timed]:
    """Read ONNX Runtime's profile. The first call is left out.

    Convolutions of the same place are ranked by the numbers that the exporter gave their results, which follow the
    order of the traced net.
    """
    taken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["name"]].append(event)
    found = []
    for name, events in taken.items():
        operation = events[0]["args"]["op_name"]
        median = statistics.median(event["dur"] for event in events[1:])
        place, number = None, re.search(r"_(\d+)", name)
        if operation in CONVOLUTIONS:
            before, after = (
                next(iter(events[0]["args"][which][0].values())) for which in ("input_type_shape", "output_type_shape")
            )
            # int8 runs in NHWC
            channels, height = (before[3], before[1]) if operation == "QLinearConv" else before[1:3]
            filters, out_height = (after[3], after[1]) if operation == "QLinearConv" else after[1:3]
            place = Place(channels, height, filters, out_height)
        found.append(Timed(name if place else operation, place, int(number.group(1)) if number else 0, median))
    return found


def matched(mine: Sequence[Timed], theirs: Sequence[Timed]) -> list[tuple[str, float | None, float | None]]:
    """Return lines (layer, our microseconds, theirs).

    There is a line for each convolution in our order, then one for each other kind of operation on either side. Raises
    ValueError if the two sides have different convolutions.
    """
    places: list[dict[Place, list[Timed]]] = [defaultdict(list), defaultdict(list)]
    for side, found in zip((mine, theirs), places, strict=True):
        for timed in sorted((t for t in side if t.place), key=lambda t: t.order):
            found[timed.place].append(timed)  # type: ignore[index]
    ours, others = places
    if {place: len(some) for place, some in ours.items()} != {place: len(some) for place, some in others.items()}:
        raise ValueError("the convolutions of ONNX Runtime's net are not those of the plan")
    lines: list[tuple[str, float | None, float | None]] = []
    for timed in (t for t in mine if t.place):
        twin = others[timed.place][ours[timed.place].index(timed)]  # type: ignore[index]
        lines.append((timed.name, timed.microseconds, twin.microseconds))
    for side, whose in enumerate(("ours", "ONNX Runtime")):
        sums: dict[str, float] = defaultdict(float)
        for timed in (t for t in (mine, theirs)[side] if not t.place):
            sums[timed.name] += timed.microseconds
        lines += [(f"{whose}: {name}", *((us, None) if side == 0 else (None, us))) for name, us in sums.items()]
    return lines


def table(lines: Sequence[tuple[str, float | None, float | None]]) -> list[list[str]]:
    """Return the `COLUMNS` of every line, with the sums at the end."""
    total = ("all", *(sum(line[side] or 0 for line in lines) for side in (1, 2)))
    cells = []
    for name, mine, theirs in (*lines, total):
        both = mine is not None and theirs is not None
        compared = [f"{mine - theirs:.0f}", f"{mine / theirs:.2f}"] if both else ["", ""]  # type: ignore[operator]
        cells.append([name, *("" if us is None else f"{us:.0f}" for us in (mine, theirs)), *compared])
    return cells


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=backends.DEPTHS, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images; default: 224")
    parser.add_argument("--dtype", choices=ROWS, default="fp32")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args(arguments)
    if options.batch < 1 or options.size < 32:
        parser.error("--batch must be at least 1 and --size at least 32")
    case = backends.Case(
        f"resnet{options.depth}", "infer", options.batch, torch.float32, options.size, torch.device("cpu")
    )
    rows = [backends.BACKENDS[name] for name in ROWS[options.dtype]]
    for name, backend in zip(ROWS[options.dtype], rows, strict=True):
        if reason := backend.why_not(case):
            parser.error(f"{name} can't run here: {reason}")

    inputs = photos.batches(measure.INPUTS, case.batch, case.size, run.SEED)
    data = measure.Data(run.weights(case.net, case.size), inputs, [])
    with TemporaryDirectory(prefix="fastres-profile-") as folder:
        freeze = {"fp32": runtimes.onnxruntime, "int8": runtimes.onnxruntime_int8}[options.dtype]
        peer = replace(rows[1], freeze=partial(freeze, profile=Path(folder, "profile")))
        mine, theirs = measure.Infer(rows[0], case, data), measure.Infer(peer, case, data)
        taken: dict[str, list[float]] = defaultdict(list)
        mine(0)
        with torch.inference_mode():
            for _ in range(ROUNDS):  # in turns, each after an untimed call
                steps(mine.call, mine.inputs[0], 1)
                for name, times in steps(mine.call, mine.inputs[0], CALLS).items():
                    taken[name] += times
                for _ in range(CALLS + 1):
                    theirs(0)
        profile = Path(theirs.call.session.end_profiling())  # type: ignore[attr-defined]
        lines = matched(ours(mine.call, mine.inputs[0], taken), nodes(profile))
    cells = [COLUMNS, *table(lines)]
    print(f"{case.net}, batch {case.batch}, {options.dtype}, {case.size}x{case.size}: median microseconds")
    print(run.columns(cells, left={0}))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows(cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
