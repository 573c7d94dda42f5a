"""A step's time as a model predicts it, kernel by kernel, without a GPU.

    python bench/predict.py --depth 50 --batch 256 --mode train
    python bench/predict.py --goal 9000              # what separates a training step from so many img/s
    python bench/predict.py --backend inductor       # a peer by the same model
    python bench/predict.py --untried                # with tiles that wait for bench/tune.py, where they win
    python bench/predict.py --fusions keep_activation=1
    python bench/predict.py --measured bench/records/nvidia-h200-kernels-50.csv

The step runs on tensors without memory (bench/launch_trace.py), by the engines and tiles that the GPU's table chooses.
A line for each pass, layer and kernel: how often a step has it, its tile, programs and waves, the floor by bytes (every
tensor moved once) and by FLOPs, what the model predicts and what bounds it there. Nothing is measured here. What a GPU
measured is read from bench/records and stands beside the step, or with --measured beside every convolution on its own,
as bench/kernels.py timed it; the prediction there is for the same work.

A kernel takes the longest of

    bytes     bytes / (EFFICIENCY bandwidth)
    rounds    waves x the longer of the work of all programs that a multiprocessor holds, and LATENCY + the work of one
    start     LATENCY for a kernel of ours, SHORTEST for another

and GAP on top. Work is the longer of tensor-core time and of fetching operands from L2, plus the instructions that
compute an operand. LATENCY is what a program waits for: its first load, its last sums, its last store. A 1x1
convolution of few input channels reduces in a step or two, so that its programs do little else: waves, not bytes, bound
it. A program that stays (`kernels.persistent`) waits once, as its loads then run ahead; sums and stores of other tiles
cost it nothing here, so that its time is the least to hope for. Of kernels that aren't ours no tile is known: they are
one wave at full rate. Nothing overlaps.
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

# The one set of constants; none belongs to a kernel. Bandwidth and FLOP/s are `kernels.problem.Device`'s, instructions
# `kernels.tiles`'s. From bench/records: bytes/s from L2 by TMA, and the clock then (nvidia-h200-hopper.md); the
# shortest kernels (nvidia-h200-timeline-train.csv); what a step in a CUDA graph takes beyond its kernels, for each of
# them (nvidia-h200-first-table-*.json beside the timelines). Times in microseconds.
L2, CLOCK, SHORTEST, GAP = 9.85e12, 1.91e9, 1.3, 0.5
# Fitted to our kernels in every second row of nvidia-h200-kernels-50.csv: the least median of
# |log(predicted / measured)|. The stem's rows are left out: its kernels gather, for which there is no term.
# tests/bench/test_predict.py fits again and holds the result against the other rows.
EFFICIENCY, LATENCY = 0.79, 5.0

GPUS: dict[str, tuple[Device, Gpu]] = {problem.H200.name: (problem.H200, H200)}
BACKENDS = ("fastres", "eager", "inductor")
DTYPES = {name: dtype for name, dtype in layers.DTYPES.items() if dtype.itemsize == 2}
SIZE = 224
RECORDS = Path(__file__).resolve().parent / "records"


@dataclass(frozen=True)
class Time:
    """Microseconds of one launch: its floors, and what the model says; what bounds it; how its programs run."""

    by_bytes: float
    by_flops: float
    predicted: float
    bound: str
    waves: float = 0.0

    @property
    def floor(self) -> float:
        return max(self.by_bytes, self.by_flops)


def time(launch: Launch, device: Device, gpu: Gpu) -> Time:
    """What the model says of one launch. Of a kernel that multiplies and has no tile by name, FLOPs and one wave."""
    by_bytes, by_flops = 1e6 * launch.bytes / device.bandwidth, 1e6 * launch.flops / device.flops_16bit
    waves = rounds = work = 0.0
    cut, compute, fetch, issue = tile_of(launch), by_flops, 0.0, 0.0
    if cut.BM:
        flops = max(launch.flops, executed(launch))
        steps = flops / (2 * cut.BM * cut.BN * cut.BK * cut.taps)  # of all programs
        compute = 1e6 * flops / device.flops_16bit * (WGMMA / MMA if cut.BM < 64 else 1.0)
        fetch = 1e6 * steps * cut.BK * cut.fetched * 2 / L2
        issue = 1e6 * steps * cut.BK * cut.instructions / (ISSUE * gpu.sms * CLOCK)
        held = math.ceil(launch.programs / gpu.sms)
        held = held if cut.stays else min(held, resident(launch, cut, gpu))
        waves = launch.programs / (gpu.sms * held)
        busy = (max(compute, fetch) + issue) / waves  # of `held` programs together
        waves = waves if waves > 8 else math.ceil(waves)  # many waves don't end together
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
    """A multiplying kernel's tile as its arguments tell it, BM 0 where they don't: `taps` sums of BM x BN, in `steps`
    steps of BK. Rows of BK values: those that a step fetches, and those that a stage of its pipeline holds.
    instructions: of a step, for each of BK, to compute what it doesn't fetch. stays: all programs run at once and go
    through the tiles; `steps` are those of all tiles of one."""

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
    """By the names that kernels give their arguments."""
    given = launch.arguments
    BM, BN, BK = (given.get(side, 0) for side in ("BM", "BN", "BK"))
    BN = BN or given.get("TN", 0) * given.get("TH", 0) * given.get("TW", 0)
    if not (launch.flops and BM and BN and BK):
        return Cut()
    steps = given.get("steps_per_split") or given.get("steps") or 0
    if "packed" in given:  # the stem's: of the values under its filter BN a product, or BK a step
        values = given["R"] * STEM_WINDOW
        products, steps = (math.ceil(values / BN), steps) if "dw" in given else (1, math.ceil(values / BK))
        return Cut(BM, BN, BK, steps, products, BM + BN * products, BM + BN * products)
    operands = 1 + any(given.get(name) is not None for name in ("z", "shortcut"))  # what one operand is computed from
    stages = given.get("num_stages", 1)
    buffers = buffered(stages, operands) / stages
    if "dw" in given:  # wgrad: BM filters of dz, BN channels of a; the side that is computed serves all taps
        taps, normed = given.get("TAPS", 1), given.get("scale") is not None
        of_dz, of_a = (taps, 1) if normed and operands == 1 else (1, taps)
        fetched, held = BM * operands * of_dz + BN * of_a, BM * buffers * of_dz + BN * of_a
        return Cut(BM, BN, BK, steps, taps, fetched, held, COMPUTED * (BM * (operands > 1) + BN * normed))
    if "STEPS" in given:  # by programs that stay, and the filters with them
        backward = "dx" in given
        tiles = given["tiles"] * math.ceil(given["C" if backward else "K"] / BM)
        steps = math.ceil(tiles / launch.programs) * given["STEPS"]
        computed = operands > 1 if backward else given.get("prologue_scale") is not None
        instructions = (COMPUTED if backward else AFFINE * operands) * BN * computed
        return Cut(BM, BN, BK, steps, 1, BN * operands, BN * operands, instructions, stays=True)
    if "TAPS_R" in given:  # dgrad
        steps = launch_trace.taps(given) * math.ceil(given["K_GROUP"] / BK)
        instructions = COMPUTED * BN if operands > 1 else 0
    else:
        instructions = AFFINE * operands * BN if given.get("prologue_scale") is not None else 0
    return Cut(BM, BN, BK, steps, 1, BM + BN * operands, BM + BN * buffers, instructions)


def tile_name(launch: Launch) -> str:
    """As a table has it; empty where the arguments don't tell."""
    cut = tile_of(launch)
    return f"{cut.BM}x{cut.BN}x{cut.BK} w{launch.arguments.get('num_warps', 0)}" if cut.BM else ""


def executed(launch: Launch) -> int:
    """FLOPs of all tiles, those of pixels and channels beyond the edge included; 0 where the arguments don't tell."""
    cut = tile_of(launch)
    return 2 * launch.programs * cut.BM * cut.BN * cut.BK * cut.steps * cut.taps


def resident(launch: Launch, cut: Cut, gpu: Gpu) -> int:
    """Programs that one multiprocessor holds, by registers as `tiles` reckons them and by shared memory, of which CUDA
    takes a KiB for each."""
    warps, stages = launch.arguments.get("num_warps", 4), launch.arguments.get("num_stages", 1)
    shared = 2 * max(stages * cut.held * cut.BK, cut.BM * cut.BN) + 1024
    registers = cut.BM * cut.BN * cut.taps + 64 * 32 * warps
    return max(1, min(int((gpu.shared + 1024) // shared), 65536 // registers))


def step(depth: int, batch: int, mode: str, dtype: torch.dtype, backend: str) -> list[Launch]:
    """The kernels of one step of a ResNet, in order."""
    ours = backend == "fastres"
    with launch_trace.META:
        net = backends.BACKENDS["fastres" if ours else "eager"].net(f"resnet{depth}")
    if mode == "infer" and ours:
        return launch_trace.infer_optimized(net, batch, SIZE, dtype)
    launches = (launch_trace.train if mode == "train" else launch_trace.infer)(net, batch, SIZE, dtype)
    return launch_trace.as_inductor(launches) if backend == "inductor" else launches


Key = tuple[str, str]  # pass and layer, as launches name them


@contextmanager
def tiles(wanted: Mapping[Key, Tile], untried: dict[Key, list[Tile]]) -> Iterator[None]:
    """Within, a convolution runs by its tile in `wanted`, where that is one of its candidates. `untried` gets those of
    them that came after the tables: persistent programs, and splits of fprop."""
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
    """The step that `record` gives, each convolution of ours by the tile that the model prefers: the one it has, or one
    that is untried. What the library computes stays there."""

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
    """What bench/kernels.py times as one layer's "us" (engine "triton") or "cudnn_us" ("cudnn"): the kernels, and the
    pass that stores dz where the library's way needs one that ours doesn't, of which half is added to the time."""
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
    """Launches of one kernel for one pass of one layer, in a step; microseconds of all of them together."""

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
    """In the order in which a step first comes to them."""
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
    numbers = {name: round(float(getattr(row, name)), 1) for name in ("waves", "bytes_us", "flops_us", "predicted_us")}
    same = {name: getattr(row, name) for name in ("layer", "kernel", "count", "tile", "programs", "bound")}
    every = {"pass": row.pass_, **same, **numbers}
    return {name: every[name] for name in COLUMNS}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as columns, words to the left and numbers to the right."""
    text = [[*lines[0]], *[[f"{v:,.1f}" if isinstance(v, float) else str(v) for v in line.values()] for line in lines]]
    words = [isinstance(value, str) for value in lines[0].values()]
    widths = [max(len(line[i]) for line in text) for i in range(len(words))]
    return "\n".join(
        "  ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in zip(line, widths, words, strict=True)).rstrip()
        for line in text
    )


def by_kernel(found: Iterable[Row]) -> list[dict[str, Any]]:
    """Sums over all layers, the longest first."""
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
    """What bench/records holds of such a step, as (row, img/s); of ours the fastest."""
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
    """The step in all, and what it would take if bytes or FLOPs were all."""
    us, moved = sum(row.predicted_us for row in found), sum(launch.bytes for launch in launches)
    by_bytes, by_flops, floor = (sum(getattr(row, name) for row in found) / 1e3 for name in SUMMED)
    said = [
        f"predicted: {us / 1e3:.2f} ms, {1e6 * batch / us:,.0f} img/s, {len(launches)} kernels",
        f"bytes alone: {moved / batch / 1e6:.0f} MB an image, {by_bytes / EFFICIENCY:.2f} ms at {EFFICIENCY:.0%} of "
        f"the bandwidth; FLOPs alone: {by_flops:.2f} ms; each kernel at its own floor: {floor:.2f} ms",
    ]
    if measured is not None:
        name, rate = measured
        said.append(
            f"measured ({name}): {1e3 * batch / rate:.2f} ms, {rate:,.0f} img/s; predicted / measured time: "
            f"{us / 1e6 * rate / batch:.2f}"
        )
    return "\n".join(said)


def towards(goal: float, found: Sequence[Row], batch: int, measured: tuple[str, float] | None) -> str:
    """The rows that lose most to their floors, until they cover what separates the step from `goal` img/s. The step is
    the measured one, where there is one: what the model doesn't explain of it is said, not shared out."""
    wanted, us = 1e6 * batch / goal, sum(row.predicted_us for row in found)
    start = us if measured is None else 1e6 * batch / measured[1]
    gap = start - wanted
    start_is = "predicted" if measured is None else "measured"
    said = [f"goal: {goal:,.0f} img/s, {wanted / 1e3:.1f} ms; {start_is}: {start / 1e3:.1f} ms"]
    if measured is not None:
        said.append(f"{start - us:,.0f} us of the measured step are not in the model")
    if gap <= 0:
        return "\n".join([*said, "nothing separates them"])
    said.append(f"{gap:,.0f} us separate them; what is lost to the floor, the largest first:")
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
    said += [table(lines)] if lines else []
    if covered < gap:
        said.append(f"{gap - covered:,.0f} us are left: every kernel at its floor is too slow, bytes or FLOPs must go")
    return "\n".join(said)


ACCEPTED = "accepted is what bench/kernels.py --csv wrote of this depth and batch"


def beside(file: Path, depth: int, batch: int, dtype: torch.dtype, device: Device, gpu: Gpu) -> list[dict[str, Any]]:
    """A line for each row of a table that bench/kernels.py wrote, ours and the library's: predicted beside measured.
    Raises ValueError for another file, and for one of other layers."""
    with file.open(newline="") as source:
        measured = {(row.get("pass"), row.get("layer")): row for row in csv.DictReader(source)}
    lines = []
    for p, (count, role) in layers.problems([depth], batch, SIZE).items():
        for pass_ in (pass_ for pass_ in PASSES if layers.applicable(p, pass_)):
            row = measured.get((pass_, layers.name(p)), {})
            try:
                numbers = {name: float(row[name]) for name in ("us", "cudnn_us", "tflops")}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file} doesn't tell of {pass_} {layers.name(p)}; {ACCEPTED}") from error
            if not math.isclose(numbers["tflops"] * numbers["us"], 2e-6 * p.multiply_adds, rel_tol=1e-3):
                raise ValueError(f"{file} holds {pass_} {layers.name(p)} of another batch size; {ACCEPTED}")
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
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return statistics.median(ratios), tenths[0], tenths[8]


def spreads(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predicted / measured by engine and pass."""
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
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return parse


def switch(text: str) -> tuple[str, bool]:
    name, _, value = text.partition("=")
    if value not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: NAME=0 and NAME=1")
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
    parser.add_argument("--goal", type=positive(float), metavar="IMG_PER_S", help="say what separates the step from it")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="what bench/kernels.py wrote, of this net and batch"
    )
    parser.add_argument(
        "--untried", action="store_true", help="take tiles that no GPU has run where the model prefers them"
    )
    parser.add_argument(
        "--fusions",
        type=switch,
        nargs="+",
        default=[],
        metavar="NAME=0|1",
        help="of `fastres.ops.dispatch.fusions`, on or off",
    )
    parser.add_argument("--csv", type=Path, help="write the rows here as well")
    options = parser.parse_args(arguments)
    device, gpu = GPUS[options.gpu]
    dtype = DTYPES[options.dtype]
    if options.backend != "fastres" and (options.untried or options.fusions):
        parser.error(f"--untried and --fusions are of --backend fastres; got {options.backend}")
    if options.measured is not None:
        try:
            lines = beside(options.measured, options.depth, options.batch, dtype, device, gpu)
        except (OSError, ValueError, csv.Error) as error:
            parser.error(f"--measured: {error}")
        print(f"convolutions on their own, predicted beside {options.measured}\n{table(lines)}\n")
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
    print(f"{title}, {options.gpu}: microseconds as predicted, of all launches in a line")
    print(f"{table([cells(row) for row in found])}\n\n{table(by_kernel(found))}\n")
    print(summary(found, launches, options.batch, measured))
    if options.goal is not None:
        print(f"\n{towards(options.goal, found, options.batch, measured)}")
    if options.csv:
        layers.write_csv(options.csv, COLUMNS, map(cells, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
