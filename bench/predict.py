"""Predict the time of a step, kernel by kernel, by a model. No GPU is needed.

    python bench/predict.py --depth 50 --batch 256 --mode train
    python bench/predict.py --goal 9000              # where a training step must save time to reach 9,000 img/s
    python bench/predict.py --backend inductor       # a peer by the same model
    python bench/predict.py --untried                # with tiles that bench/tune.py hasn't measured, where they win
    python bench/predict.py --fusions keep_activation=1
    python bench/predict.py --measured bench/records/nvidia-h200-kernels-50.csv

The step runs on meta tensors (bench/launch_trace.py), with the engines and tiles that the GPU's table chooses. There is
a line for each pass, layer and kernel: how often a step runs it, its tile, programs and waves, the lower bounds by
bytes (every tensor moved once) and by FLOPs, the predicted time and what bounds it. Nothing is measured here.
Measurements are read from bench/records and printed next to the step's prediction. With --measured, a prediction is
also printed for every convolution on its own, for the same work as bench/kernels.py timed, next to the measured time.

A kernel takes GAP plus the longest of these times:

    bytes     bytes / (EFFICIENCY bandwidth)
    waves     number of waves x the longer of the work of all programs that a multiprocessor holds, and LATENCY + the
              work of one program
    start     LATENCY for a kernel of ours, SHORTEST for another

Work is the longer of tensor-core time and the time to fetch operands from L2, plus the instructions that compute an
operand. LATENCY is the time that a program waits for its first load, its last sums and its last store. A 1x1
convolution with few input channels has only one or two reduction steps, so that its programs do little else: it is
bound by waves, not bytes. A persistent program (`kernels.persistent`) waits once, because its loads run ahead after
that; the model charges nothing for the sums and stores of its other tiles, so the prediction is optimistic. The tiles
of other kernels aren't known: they count as one wave at the full rate. No kernels overlap.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import backends
import launch_trace
import layers
import torch
from launch_trace import Launch
from layers import PASSES, Role

import fastres
from fastres.kernels import problem, tables
from fastres.kernels.problem import ConvProblem, Device
from fastres.kernels.tiles import AFFINE, COMPUTED, H200, ISSUE, MMA, STEM_WINDOW, WGMMA, Gpu, Tile, buffered
from fastres.ops import dispatch

# One set of constants for all kernels. Bandwidth and FLOP/s are in `kernels.problem.Device`, instruction counts in
# `kernels.tiles`. From bench/records: bytes/s from L2 by TMA, and the clock during that (nvidia-h200-hopper.md); the
# time of the shortest kernels (nvidia-h200-timeline-train.csv); the time per kernel that a step in a CUDA graph takes
# in addition to its kernels (nvidia-h200-first-table-*.json compared with the timelines). Times are in microseconds.
L2, CLOCK, SHORTEST, GAP = 9.85e12, 1.91e9, 1.3, 0.5
# Fitted to our kernels in every second row of nvidia-h200-kernels-50.csv: the smallest median of |log(predicted /
# measured)|. The stem's rows are left out, because its kernels gather, for which the model has no term.
# tests/bench/test_predict.py repeats the fit and checks it on the other rows.
EFFICIENCY, LATENCY = 0.79, 5.0

GPUS: dict[str, tuple[Device, Gpu]] = {problem.H200.name: (problem.H200, H200)}
BACKENDS = ("fastres", "eager", "inductor")
DTYPES = {name: dtype for name, dtype in layers.DTYPES.items() if dtype.itemsize == 2}
SIZE = 224
RECORDS = Path(__file__).resolve().parent / "records"


@dataclass(frozen=True)
class Time:
    """Microseconds of one launch: its lower bounds by bytes and FLOPs, and the prediction.

    bound: what the prediction is bound by: "bytes", "FLOPs", "L2", "latency" or "start". waves: 0 if the tile isn't
    known.
    """

    by_bytes: float
    by_flops: float
    predicted: float
    bound: str
    waves: float = 0.0

    @property
    def floor(self) -> float:
        """The lower bound: the longer of those by bytes and FLOPs."""
        return max(self.by_bytes, self.by_flops)


def time(launch: Launch, device: Device, gpu: Gpu) -> Time:
    """Predict one launch. A kernel that multiplies but whose tile is unknown is predicted from its FLOPs, in one
    wave."""
    by_bytes, by_flops = 1e6 * launch.bytes / device.bandwidth, 1e6 * launch.flops / device.flops_16bit
    waves = rounds = work = 0.0
    cut, compute, fetch, issue = tile_of(launch), by_flops, 0.0, 0.0
    if cut.BM:
        flops = max(launch.flops, executed(launch))
        steps = flops / (2 * cut.BM * cut.BN * cut.BK * cut.taps)  # of all programs together
        compute = 1e6 * flops / device.flops_16bit * (WGMMA / MMA if cut.BM < 64 else 1.0)
        fetch = 1e6 * steps * cut.BK * cut.fetched * 2 / L2
        issue = 1e6 * steps * cut.BK * cut.instructions / (ISSUE * gpu.sms * CLOCK)
        held = math.ceil(launch.programs / gpu.sms)
        held = held if cut.stays else min(held, resident(launch, cut, gpu))
        waves = launch.programs / (gpu.sms * held)
        busy = (max(compute, fetch) + issue) / waves  # time per wave: of the `held` programs of a multiprocessor
        waves = waves if waves > 8 else math.ceil(waves)  # after many waves, multiprocessors are out of step
        work, rounds = waves * busy, waves * max(busy, busy / held + LATENCY)
    elif launch.flops:
        work, rounds = compute, compute + LATENCY
    bounds = {"bytes": by_bytes / EFFICIENCY, "rounds": rounds, "start": LATENCY if launch.ours else SHORTEST}
    bound = max(bounds, key=bounds.__getitem__)
    predicted = bounds[bound] + GAP
    if bound == "rounds":
        waits = rounds > work and waves * LATENCY > rounds / 2
        bound = "latency" if waits else "FLOPs" if compute >= fetch else "L2"
    return Time(by_bytes, by_flops, predicted, bound, waves)


@dataclass(frozen=True)
class Cut:
    """How a multiplying kernel's work is divided, according to its arguments. BM is 0 if they don't show it.

    BM, BN, BK, steps, taps: a program accumulates `taps` matrices of BM x BN, in `steps` steps of BK.
    fetched: rows of BK values that a step fetches.
    held: rows of BK values that a stage of its pipeline buffers.
    instructions: per step and per value of BK, to compute operands on load.
    stays: whether the programs are persistent: all run at the same time and loop over the tiles. `steps` then counts
        the steps of all tiles of a program.
    """

    BM: int = 0
    BN: int = 0
    BK: int = 0
    steps: int = 0
    taps: int = 1
    fetched: int = 0
    held: float = 0.0
    instructions: int = 0
    stays: bool = False


def tile_of(launch: Launch) -> Cut:
    """Return how a launch's work is divided, from the names that kernels give their arguments."""
    arguments = launch.arguments
    BM, BN, BK = (arguments.get(side, 0) for side in ("BM", "BN", "BK"))
    BN = BN or arguments.get("TN", 0) * arguments.get("TH", 0) * arguments.get("TW", 0)
    if not (launch.flops and BM and BN and BK):
        return Cut()
    steps = arguments.get("steps_per_split") or arguments.get("steps") or 0
    # The stem divides the values under its filter: in wgrad, BN of them to a product, in fprop, BK of them to a step.
    if "packed" in arguments:
        values = arguments["R"] * STEM_WINDOW
        products, steps = (math.ceil(values / BN), steps) if "dw" in arguments else (1, math.ceil(values / BK))
        return Cut(BM, BN, BK, steps, products, BM + BN * products, BM + BN * products)
    # Number of tensors from which one operand is computed.
    operands = 1 + any(arguments.get(name) is not None for name in ("z", "shortcut"))
    stages = arguments.get("num_stages", 1)
    buffers = buffered(stages, operands) / stages
    if "dw" in arguments:  # wgrad: BM filters of dz, BN channels of a; an operand that is computed serves all taps
        taps, normed = arguments.get("TAPS", 1), arguments.get("scale") is not None
        of_dz, of_a = (taps, 1) if normed and operands == 1 else (1, taps)
        fetched, held = BM * operands * of_dz + BN * of_a, BM * buffers * of_dz + BN * of_a
        return Cut(BM, BN, BK, steps, taps, fetched, held, COMPUTED * (BM * (operands > 1) + BN * normed))
    if "STEPS" in arguments:  # persistent programs, which also keep the filters
        backward = "dx" in arguments
        tiles = arguments["tiles"] * math.ceil(arguments["C" if backward else "K"] / BM)
        steps = math.ceil(tiles / launch.programs) * arguments["STEPS"]
        computed = operands > 1 if backward else arguments.get("prologue_scale") is not None
        instructions = (COMPUTED if backward else AFFINE * operands) * BN * computed
        return Cut(BM, BN, BK, steps, 1, BN * operands, BN * operands, instructions, stays=True)
    if "TAPS_R" in arguments:  # dgrad
        steps = launch_trace.taps(arguments) * math.ceil(arguments["K_GROUP"] / BK)
        instructions = COMPUTED * BN if operands > 1 else 0
    else:
        instructions = AFFINE * operands * BN if arguments.get("prologue_scale") is not None else 0
    return Cut(BM, BN, BK, steps, 1, BM + BN * operands, BM + BN * buffers, instructions)


def tile_name(launch: Launch) -> str:
    """Return the tile's name as in a table, or an empty string if it isn't known."""
    cut = tile_of(launch)
    return f"{cut.BM}x{cut.BN}x{cut.BK} w{launch.arguments.get('num_warps', 0)}" if cut.BM else ""


def executed(launch: Launch) -> int:
    """Return the FLOPs of all tiles, including those for pixels and channels beyond the tensors' edges. 0 if the tile
    isn't known."""
    cut = tile_of(launch)
    return 2 * launch.programs * cut.BM * cut.BN * cut.BK * cut.steps * cut.taps


def resident(launch: Launch, cut: Cut, gpu: Gpu) -> int:
    """Return how many programs fit on one multiprocessor, by registers as `tiles` estimates them and by shared memory,
    of which CUDA reserves 1 KiB for each."""
    warps, stages = launch.arguments.get("num_warps", 4), launch.arguments.get("num_stages", 1)
    shared = 2 * max(stages * cut.held * cut.BK, cut.BM * cut.BN) + 1024
    registers = cut.BM * cut.BN * cut.taps + 64 * 32 * warps
    return max(1, min(int((gpu.shared + 1024) // shared), 65536 // registers))


def step(depth: int, batch: int, mode: str, dtype: torch.dtype, backend: str) -> list[Launch]:
    """Return the kernels of one step of torchvision's ResNet of that depth, in order. `backend` is one of
    `BACKENDS`."""
    ours = backend == "fastres"
    with launch_trace.META:
        net = backends.BACKENDS["fastres" if ours else "eager"].net(f"resnet{depth}")
    if mode == "infer" and ours:
        return launch_trace.infer_optimized(net, batch, SIZE, dtype)
    launches = (launch_trace.train if mode == "train" else launch_trace.infer)(net, batch, SIZE, dtype)
    return launch_trace.as_inductor(launches) if backend == "inductor" else launches


Key = tuple[str, str]  # pass and layer, as in `Launch`


@contextmanager
def tiles(wanted: Mapping[Key, Tile], untried: dict[Key, list[Tile]]) -> Iterator[None]:
    """Within the context, run each convolution with its tile in `wanted` if that is one of its candidates, else with
    its usual tile.

    `untried` is filled with each convolution's candidates that are newer than the tables: persistent programs, and
    splits of the forward pass.
    """
    usual = tables._measured_tile

    def tile(
        pass_: Any, problem: ConvProblem, dtype: torch.dtype, gpu: Gpu, found: list[Tile], by_stem: bool = False
    ) -> Tile:
        key = (pass_, layers.name(problem))
        fresh = [one for one in found if one.persistent or (one.splits > 1 and pass_ != "wgrad")]
        known = untried.setdefault(key, [])
        known += [one for one in fresh if one not in known]
        return wanted[key] if wanted.get(key) in found else usual(pass_, problem, dtype, gpu, found, by_stem)

    tables.forget_tables()
    try:
        with patch.object(tables, "_measured_tile", tile):
            yield
    finally:
        tables.forget_tables()


def by_untried(record: Callable[[], list[Launch]], device: Device, gpu: Gpu) -> list[Launch]:
    """Return the launches of a step, with the tile that the model prefers for each of our convolutions: its usual one,
    or one that is untried.

    `record` returns the launches with the tiles that are in force. Convolutions that run on the library stay there.
    """

    def cost(launches: Iterable[Launch]) -> dict[Key, float]:
        us: dict[Key, float] = defaultdict(float)
        for one in launches:
            us[one.pass_, one.layer] += time(one, device, gpu).predicted
        return us

    untried: dict[Key, list[Tile]] = {}
    with tiles({}, untried):
        least = cost(record())
    best: dict[Key, Tile] = {}
    for i in range(max(map(len, untried.values()), default=0)):
        tried = {key: found[i] for key, found in untried.items() if i < len(found)}
        with tiles(tried, {}):
            us = cost(record())
        for key, tile in tried.items():
            if us[key] < least[key]:
                least[key], best[key] = us[key], tile
    with tiles(best, {}):
        return record()


def of_layer(
    p: ConvProblem, role: Role, pass_: str, dtype: torch.dtype, engine: str
) -> tuple[list[Launch], Launch | None]:
    """Return the launches whose time bench/kernels.py reports as "us" (engine "triton") or "cudnn_us" ("cudnn").

    The second result is the launch that stores dz for dgrad and wgrad, if the library needs it and our kernels don't,
    else None. The caller adds half of its time to each of the two passes.
    """
    stores = {}
    for name in dict.fromkeys(("triton", engine)):
        with fastres.backend(name), launch_trace.recorded(dtype) as recorder:
            one = layers.pair(p, dtype, launch_trace.META)
            operands = layers.Operands.random(p, dtype, launch_trace.META)
            work = layers.call(one, pass_, operands, role)
            stores[name] = layers.stores_dz(one, role, operands)
            recorder.noted.clear()
            work()
            launches = recorder.launches()
            recorder.noted.clear()
            one.passes.backward_apply(operands.dz, *operands.bn)
            (stored,) = recorder.launches()
    owes = pass_ in ("dgrad", "wgrad") and stores[engine] and not stores["triton"]
    return launches, stored if owes else None


@dataclass
class Row:
    """The launches of one kernel with one tile for one pass of one layer in a step.

    Microseconds are sums over these launches; `programs` and `waves` are their maximum. `bounds` has the predicted
    microseconds of the launches with each bound.
    """

    pass_: str
    layer: str
    kernel: str
    tile: str
    count: int = 0
    programs: int = 0
    waves: float = 0.0
    bytes_us: float = 0.0
    flops_us: float = 0.0
    predicted_us: float = 0.0
    floor_us: float = 0.0
    bounds: Counter[str] = field(default_factory=Counter)

    @property
    def bound(self) -> str:
        return self.bounds.most_common(1)[0][0]

    @property
    def lost_us(self) -> float:
        return self.predicted_us - self.floor_us

    def add(self, launch: Launch, time: Time) -> None:
        self.count += 1
        self.programs, self.waves = max(self.programs, launch.programs), max(self.waves, time.waves)
        self.bytes_us += time.by_bytes
        self.flops_us += time.by_flops
        self.predicted_us += time.predicted
        self.floor_us += time.floor
        self.bounds[time.bound] += time.predicted  # type: ignore[assignment]


def rows(launches: Iterable[Launch], device: Device, gpu: Gpu) -> list[Row]:
    """Group the launches into rows, in the order in which a step first runs them."""
    found: dict[tuple[str, ...], Row] = {}
    for launch in launches:
        key = (launch.pass_, launch.layer, launch.kernel, tile_name(launch))
        found.setdefault(key, Row(*key)).add(launch, time(launch, device, gpu))
    return [*found.values()]


COLUMNS = (
    "pass",
    "layer",
    "kernel",
    "count",
    "tile",
    "programs",
    "waves",
    "bytes_us",
    "flops_us",
    "predicted_us",
    "bound",
)


def cells(row: Row) -> dict[str, Any]:
    """Return a dict of the row's `COLUMNS`, rounded to tenths."""
    numbers = {name: round(float(getattr(row, name)), 1) for name in ("waves", "bytes_us", "flops_us", "predicted_us")}
    same = {name: getattr(row, name) for name in ("layer", "kernel", "count", "tile", "programs", "bound")}
    every = {"pass": row.pass_, **same, **numbers}
    return {name: every[name] for name in COLUMNS}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Format the lines as columns, with words left-aligned and numbers right-aligned."""
    text = [[*lines[0]], *[[f"{v:,.1f}" if isinstance(v, float) else str(v) for v in line.values()] for line in lines]]
    words = [isinstance(value, str) for value in lines[0].values()]
    widths = [max(len(line[i]) for line in text) for i in range(len(words))]
    return "\n".join(
        "  ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in zip(line, widths, words, strict=True)).rstrip()
        for line in text
    )


def by_kernel(found: Iterable[Row]) -> list[dict[str, Any]]:
    """Return sums over all layers for each kernel, the longest first."""
    sums: dict[str, Row] = {}
    for row in found:
        total = sums.setdefault(row.kernel, Row("", "", row.kernel, ""))
        for name in ("count", "bytes_us", "flops_us", "predicted_us"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
        total.bounds.update(row.bounds)
    keys = ("kernel", "count", "bytes_us", "flops_us", "predicted_us", "bound")
    ordered = sorted(sums.values(), key=lambda row: -row.predicted_us)
    return [{key: cells(row)[key] for key in keys} for row in ordered]


def on_record(gpu: str, depth: int, batch: int, mode: str, dtype: str, backend: str) -> tuple[str, float] | None:
    """Return (name in bench/backends.py, img/s) of such a step in the GPU's record, or None. For fastres it is the
    fastest row that is ok."""
    file = RECORDS / tables.table_file(gpu).name
    if not file.exists():
        return None
    wanted = {"fastres": None, "eager": "eager-channels-last", "inductor": "inductor"}[backend]
    case = {"net": f"resnet{depth}", "mode": mode, "batch": batch, "dtype": dtype, "size": SIZE, "status": "ok"}
    found = [
        (row["backend"], row["img_s"])
        for row in json.loads(file.read_text())["rows"]
        if all(row[key] == value for key, value in case.items())
        and (row["ours"] if wanted is None else row["backend"] == wanted)
    ]
    return max(found, key=lambda pair: pair[1], default=None)


SUMMED = ("bytes_us", "flops_us", "floor_us")


def summary(found: Sequence[Row], launches: Sequence[Launch], batch: int, measured: tuple[str, float] | None) -> str:
    """Summarize the whole step: the prediction, its time by bytes or FLOPs alone, and the measurement (`on_record`) if
    there is one."""
    us, moved = sum(row.predicted_us for row in found), sum(launch.bytes for launch in launches)
    by_bytes, by_flops, floor = (sum(getattr(row, name) for row in found) / 1e3 for name in SUMMED)
    lines = [
        f"predicted: {us / 1e3:.2f} ms, {1e6 * batch / us:,.0f} img/s, {len(launches)} kernels",
        f"bytes alone: {moved / batch / 1e6:.0f} MB per image, {by_bytes / EFFICIENCY:.2f} ms at {EFFICIENCY:.0%} of "
        f"the bandwidth; FLOPs alone: {by_flops:.2f} ms; every kernel at its lower bound: {floor:.2f} ms",
    ]
    if measured is not None:
        name, rate = measured
        lines.append(
            f"measured ({name}): {1e3 * batch / rate:.2f} ms, {rate:,.0f} img/s; predicted / measured time: "
            f"{us / 1e6 * rate / batch:.2f}"
        )
    return "\n".join(lines)


def towards(goal: float, found: Sequence[Row], batch: int, measured: tuple[str, float] | None) -> str:
    """List the rows that lose most to their lower bounds, until these losses cover the time that the step must save for
    `goal` img/s.

    The step's time is measured if there is a measurement; the part of it that the model doesn't explain is printed but
    not assigned to rows.
    """
    wanted, us = 1e6 * batch / goal, sum(row.predicted_us for row in found)
    start = us if measured is None else 1e6 * batch / measured[1]
    gap = start - wanted
    start_is = "predicted" if measured is None else "measured"
    text = [f"goal: {goal:,.0f} img/s, {wanted / 1e3:.1f} ms; {start_is}: {start / 1e3:.1f} ms"]
    if measured is not None:
        text.append(f"{start - us:,.0f} us of the measured step are not explained by the model")
    if gap <= 0:
        return "\n".join([*text, "the goal is reached"])
    text.append(f"{gap:,.0f} us must be saved; the rows that lose most to their lower bounds:")
    lines, covered = [], 0.0
    for row in sorted(found, key=lambda row: -row.lost_us):
        if covered >= gap or row.lost_us <= 0:
            break
        covered += row.lost_us
        lines.append(
            {
                "lost_us": row.lost_us,
                "of": row.predicted_us,
                "count": row.count,
                "bound": row.bound,
                "pass": row.pass_,
                "layer": row.layer,
                "kernel": row.kernel,
            }
        )
    text += [table(lines)] if lines else []
    if covered < gap:
        text.append(f"{gap - covered:,.0f} us remain with every kernel at its lower bound; bytes or FLOPs must go")
    return "\n".join(text)


ACCEPTED = "accepted is a table that bench/kernels.py --csv wrote for this depth and batch"


def beside(file: Path, depth: int, batch: int, dtype: torch.dtype, device: Device, gpu: Gpu) -> list[dict[str, Any]]:
    """Return predicted and measured times for each row of a table of bench/kernels.py, for our kernels and the
    library's. Raises ValueError if the file is not such a table, lacks one of the layers or has another batch size."""
    with file.open(newline="") as source:
        measured = {(row.get("pass"), row.get("layer")): row for row in csv.DictReader(source)}
    lines = []
    for p, (count, role) in layers.problems([depth], batch, SIZE).items():
        for pass_ in (pass_ for pass_ in PASSES if layers.applicable(p, pass_)):
            row = measured.get((pass_, layers.name(p)), {})
            try:
                numbers = {name: float(row[name]) for name in ("us", "cudnn_us", "tflops")}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file} has no row for {pass_} {layers.name(p)}; {ACCEPTED}") from error
            if not math.isclose(numbers["tflops"] * numbers["us"], 2e-6 * p.multiply_adds, rel_tol=1e-3):
                raise ValueError(f"{file} has {pass_} {layers.name(p)} for another batch size; {ACCEPTED}")
            for engine, us in (("triton", numbers["us"]), ("cudnn", numbers["cudnn_us"])):
                launches, half = of_layer(p, role, pass_, dtype, engine)
                times = [time(launch, device, gpu) for launch in launches]
                predicted = sum(t.predicted for t in times)
                predicted += time(half, device, gpu).predicted / 2 if half is not None else 0.0
                lines.append(
                    {
                        **{"pass": pass_, "layer": layers.name(p), "role": role.place, "by": engine, "count": count},
                        **{"bytes_us": sum(t.by_bytes for t in times), "flops_us": sum(t.by_flops for t in times)},
                        **{"predicted_us": predicted, "measured_us": us, "ratio": f"{predicted / us:.2f}"},
                        "bound": max(times, key=lambda t: t.predicted).bound,
                    }
                )
    return lines


def spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, 10th and 90th percentile."""
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return statistics.median(ratios), tenths[0], tenths[8]


def spreads(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line with the spread of predicted / measured for each engine and pass, and for all passes."""
    found = []
    for engine in ("triton", "cudnn"):
        for pass_ in (*PASSES, "all"):
            ratios = [
                line["predicted_us"] / line["measured_us"]
                for line in lines
                if line["by"] == engine and pass_ in (line["pass"], "all")
            ]
            median, p10, p90 = (f"{value:.2f}" for value in spread(ratios))
            found.append({"by": engine, "pass": pass_, "rows": len(ratios), "median": median, "p10": p10, "p90": p90})
    return found


def positive(kind: type) -> Callable[[str], Any]:
    """Return an argparse type that accepts positive finite numbers."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # the name in argparse's error message
    return parse


def switch(text: str) -> tuple[str, bool]:
    """Parse a fusion switch, NAME=0 or NAME=1."""
    name, _, value = text.partition("=")
    if value not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a switch; accepted: NAME=0 and NAME=1")
    try:
        with dispatch.fusions(**{name: value == "1"}):
            return name, value == "1"
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=backends.DEPTHS, default=50)
    parser.add_argument("--batch", type=positive(int), default=256)
    parser.add_argument("--mode", choices=backends.MODES, default="train")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backend", choices=BACKENDS, default="fastres")
    parser.add_argument("--gpu", choices=GPUS, default=problem.H200.name)
    parser.add_argument(
        "--goal", type=positive(float), metavar="IMG_PER_S", help="list where a step must save time for this rate"
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="compare with a table that bench/kernels.py wrote for this net and batch",
    )
    parser.add_argument(
        "--untried", action="store_true", help="use tiles that no GPU has run where the model prefers them"
    )
    parser.add_argument(
        "--fusions",
        type=switch,
        nargs="+",
        default=[],
        metavar="NAME=0|1",
        help="switch fusions of `fastres.ops.dispatch.fusions` on or off",
    )
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    device, gpu = GPUS[options.gpu]
    dtype = DTYPES[options.dtype]
    if options.backend != "fastres" and (options.untried or options.fusions):
        parser.error(f"--untried and --fusions need --backend fastres: got {options.backend}")
    if options.measured is not None:
        try:
            lines = beside(options.measured, options.depth, options.batch, dtype, device, gpu)
        except (OSError, ValueError, csv.Error) as error:
            parser.error(f"--measured: {error}")
        print(f"convolutions on their own, predictions compared with {options.measured}\n{table(lines)}\n")
        print(f"predicted / measured\n{table(spreads(lines))}\n")

    def record() -> list[Launch]:
        with dispatch.fusions(**dict(options.fusions)):
            return step(options.depth, options.batch, options.mode, dtype, options.backend)

    launches = by_untried(record, device, gpu) if options.untried else record()
    found = rows(launches, device, gpu)
    case = (options.depth, options.batch, options.mode, options.dtype, options.backend)
    measured = on_record(options.gpu, *case)
    title = f"ResNet-{options.depth}, {options.mode}, batch {options.batch}, {options.dtype}, {options.backend}"
    title += "".join(f", {name}={value:d}" for name, value in options.fusions)
    title += ", with tiles that no GPU has run" if options.untried else ""
    print(f"{title}, {options.gpu}: predicted microseconds, summed over the launches of a line")
    print(f"{table([cells(row) for row in found])}\n\n{table(by_kernel(found))}\n")
    print(summary(found, launches, options.batch, measured))
    if options.goal is not None:
        print(f"\n{towards(options.goal, found, options.batch, measured)}")
    if options.csv:
        layers.write_csv(options.csv, COLUMNS, map(cells, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
