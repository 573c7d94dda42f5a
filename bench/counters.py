"""Read the GPU's hardware counters for every kernel of one step, and compare them with the model of bench/predict.py.

    python bench/counters.py --mode train --depth 50 --batch 256 --csv out/counters-train.csv
    python bench/counters.py --mode infer --csv out/counters-infer.csv
    python bench/counters.py --mode train --read out/counters-train.ncu.csv    # the same table again, without a GPU

A step runs under Nsight Compute (`ncu`) in a separate process, with backend "fastres" for training and
"fastres-optimize" for inference, whose CUDA graph ncu profiles node by node. A few steps warm up unprofiled, and one is
counted. ncu's output is saved next to the CSV, for --read.

Pass and layer of each kernel come from the same step on meta tensors (bench/launch_trace.py). Our kernels are matched
one by one in order, by name and grid. If one differs, no row gets a layer or a prediction, and the first difference is
printed. The library's kernels between two of ours are matched with the operators recorded at the same place. If all
these operators belong to one pass and layer, all these kernels do, and share the prediction by their times. Otherwise
only kernels that multiply are matched, and only if there are as many as operators that do. All other kernels, and
PyTorch's own next to a convolution, belong to no layer, and all of their time counts as lost.

ncu runs kernels one at a time, without changing clocks or caches. Times are therefore those of a kernel alone, without
the power limit that a whole step may reach ("mhz" is the clock at that time). If ncu needs several passes for a kernel,
it saves and restores memory between them. That takes time, and as much memory as the step itself, and L2 is then not in
the state in which the step leaves it. "l2_mb" is all traffic of L2, including requests from its other half. "dram_pct"
is relative to the bandwidth in the model; other percentages are relative to cycles with work. Copies by the driver are
not kernels and are missing.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import backends
import launch_trace
import layers
import predict
import timeline
import torch
from launch_trace import Launch
from triton.runtime.jit import KernelInterface

from fastres.kernels import problem
from fastres.kernels.problem import Device
from fastres.kernels.tiles import Gpu

# Only a few metrics, so that ncu needs few passes.
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_read_mb": "dram__bytes_read.sum",
    "dram_write_mb": "dram__bytes_write.sum",
    "l2_mb": "lts__t_bytes.sum",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_pct": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "warps_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "mhz": "gpc__cycles_elapsed.max",
}
TIME = METRICS["us"]
UNITS = {  # factors to microseconds and MB; newer versions of ncu abbreviate units
    **{"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6, "ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6},
    **{"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3, "%": 1.0, "cycle": 1.0, "": 1.0},
}
NCU = ["ncu", "--clock-control", "none", "--cache-control", "none", "--target-processes", "all"]
NCU += ["--profile-from-start", "off", "--csv", "--page", "raw", "--print-units", "base"]
BACKEND = {"train": "fastres", "infer": "fastres-optimize"}
TOP = 25


class Counted(NamedTuple):
    """One launch that ncu profiled.

    values: by the names of `METRICS`, without those that ncu couldn't count; in microseconds, MB and percent. "mhz"
    holds the number of cycles, which `cells` divides by the time.
    """

    name: str
    grid: tuple[int, ...]
    values: dict[str, float]

    @property
    def kernel(self) -> str:
        return timeline.short(self.name)


def parse(text: str) -> list[Counted]:
    """Return the launches in the output of ncu --csv --page raw, in order. Raises ValueError if the text is not such
    output, has no launch, or has one without a time."""
    rows = csv.reader(line for line in text.splitlines() if line.startswith('"'))  # other lines are messages of ncu
    header = next((row for row in rows if row[0] == "ID"), None)
    units = next(rows, None)
    if header is None or units is None or TIME not in header:
        raise ValueError("\n".join([f"the output has no {TIME}", *text.splitlines()[-5:]]))
    kernel, grid = header.index("Kernel Name"), header.index("Grid Size")
    columns = {name: header.index(metric) for name, metric in METRICS.items() if metric in header}
    found = []
    for row in rows:
        values = {}
        for name, i in columns.items():
            if (value := number(row[i])) is not None:
                if units[i] not in UNITS:
                    raise ValueError(f"{header[i]} is in an unknown unit: {units[i]!r}")
                values[name] = value * UNITS[units[i]]
        if "us" not in values:
            raise ValueError(f"launch {row[0]} ({row[kernel]}) has no time: {row[columns['us']]!r}")
        found.append(Counted(row[kernel], tuple(map(int, re.findall(r"\d+", row[grid]))), values))
    if not found:
        raise ValueError("no kernel was counted")
    return found


def number(text: str) -> float | None:
    """Return the text as a number, or None if it isn't one."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # "n/a" or similar


@dataclass
class Labelled:
    """A profiled launch with the recorded launches that it is matched with.

    launches: one of ours, or one or more operators of the library; empty if there is no match.
    share: the part of the time of these operators that this launch takes.
    model: the predictions for `launches`.
    """

    counted: Counted
    launches: Sequence[Launch] = ()
    share: float = 1.0
    model: list[predict.Time] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(pass, layer, kernel, tile). Without a match all but the kernel are empty."""
        one = self.launches[0] if self.launches else None
        name = self.counted.kernel
        return (one.pass_, one.layer, name, predict.tile_name(one) if one.ours else "") if one else ("", "", name, "")


@cache
def our_names() -> frozenset[str]:
    """Return the names of this package's kernels and of the functions that they call."""
    values = (value for module in launch_trace.launching() for value in vars(module).values())
    return frozenset(launch_trace.name_of(value) for value in values if isinstance(value, KernelInterface))


def split(found: Iterable[Any], ours: Callable[[Any], bool]) -> tuple[list[Any], list[list[Any]]]:
    """Return (the items that are ours, lists of the other items before, between and after them)."""
    own: list[Any] = []
    rest: list[list[Any]] = [[]]
    for one in found:
        if ours(one):
            own.append(one)
            rest.append([])
        else:
            rest[-1].append(one)
    return own, rest


def padded(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the grid with three dimensions."""
    return (*grid, 1, 1)[:3]


def label(counted: Sequence[Counted], launches: Sequence[Launch], device: Device, gpu: Gpu) -> list[Labelled]:
    """Match the profiled launches with the recorded ones, in order, and predict the matched ones. Raises ValueError if
    our launches, one by one, differ in name or grid."""
    names = our_names() | {one.kernel for one in launches if one.ours}
    own, others = split(counted, lambda one: one.kernel in names)
    recorded, operators = split(launches, lambda one: one.ours)
    for i, (one, launch) in enumerate(zip(own, recorded, strict=False)):
        if (one.kernel, padded(one.grid)) != (launch.kernel, padded(launch.grid)):
            raise ValueError(
                f"our launch {i} was {one.kernel} {padded(one.grid)}, but {launch.kernel} "
                f"{padded(launch.grid)} was recorded, for {launch.pass_} {launch.layer}"
            )
    if len(own) != len(recorded):
        raise ValueError(f"{len(own)} launches of ours were counted, but {len(recorded)} were recorded")
    found = [*library(others[0], operators[0])]
    for one, launch, after, calling in zip(own, recorded, others[1:], operators[1:], strict=True):
        found += [Labelled(one, (launch,)), *library(after, calling)]
    for row in found:
        row.model = [predict.time(launch, device, gpu) for launch in row.launches]
    return found


# Operators that launch no kernel (driver copies and a view). Then patterns of kernel names: kernels that convolve or
# multiply matrices; their helpers; and PyTorch's own, which may come from an operator without a layer that isn't
# recorded.
COPIES = ("copy_", "clone", "as_strided_")
MULTIPLIES = re.compile(r"gemm|xmma|cutlass|nvjet|fprop|dgrad|wgrad|conv2d", re.IGNORECASE)
BESIDE = re.compile(r"reduc|offsets|workspace|nchwTo|nhwcTo", re.IGNORECASE)
ATEN = re.compile(r"\bat::")


def library(counted: Sequence[Counted], operators: Sequence[Launch]) -> Iterator[Labelled]:
    """Match the library's kernels between two of ours with the operators recorded there, by the rules in the module's
    docstring."""
    called = [one for one in operators if one.kernel not in COPIES]
    multiplying = [one for one in called if one.flops]
    of: dict[int, Labelled] = {}
    if len({(one.pass_, one.layer) for one in called}) == 1:
        same = [one for one in counted if not (called[0].layer and multiplying and ATEN.search(one.name))]
        us = sum(one.values["us"] for one in same)
        of = {id(one): Labelled(one, called, one.values["us"] / us) for one in same}
    else:
        main = [one for one in counted if MULTIPLIES.search(one.name) and not BESIDE.search(one.name)]
        agree = len(main) == len(multiplying) and not any(map(contradicts, main, multiplying))
        of = {id(one): Labelled(one, (by,)) for one, by in zip(main, multiplying, strict=True)} if agree else {}
    yield from (of.get(id(one), Labelled(one)) for one in counted)


def contradicts(counted: Counted, operator: Launch) -> bool:
    """Return whether the kernel's name contains a pass, but not the operator's. False for operators without a layer."""
    named = {word for word in ("fprop", "dgrad", "wgrad") if word in counted.name.lower()}
    pass_ = "fprop" if operator.pass_ == "infer" else operator.pass_
    return bool(named) and operator.layer != "" and pass_ not in named


def cells(rows: Sequence[Labelled], device: Device | None) -> dict[str, Any]:
    """Return the numbers of several launches together: sums, and means of percentages weighted by time.

    A number that one of them lacks is None, except that "lost_us" is the whole time if one has no lower bound. Without
    `device`, "dram_pct" is None.
    """
    us = sum(row.counted.values["us"] for row in rows)

    def total(name: str) -> float | None:
        values = [row.counted.values.get(name) for row in rows]
        return None if None in values else sum(values)  # type: ignore[arg-type]

    def mean(name: str) -> float | None:
        values = [(row.counted.values.get(name), row.counted.values["us"]) for row in rows]
        return None if any(v is None for v, _ in values) else sum(v * t for v, t in values) / us  # type: ignore[operator]

    def modelled(number: Callable[[Labelled], float]) -> float | None:
        return sum(row.share * number(row) for row in rows) if all(row.launches for row in rows) else None

    read, written, cycles = total("dram_read_mb"), total("dram_write_mb"), total("mhz")
    floor = modelled(lambda row: sum(time.floor for time in row.model))
    return {
        "count": len(rows),
        "us": us,
        "predicted_us": modelled(lambda row: sum(time.predicted for time in row.model)),
        "floor_us": floor,
        "lost_us": us - (floor or 0.0),
        "expected_mb": modelled(lambda row: sum(launch.bytes for launch in row.launches) / 1e6),
        "dram_read_mb": read,
        "dram_write_mb": written,
        "l2_mb": total("l2_mb"),
        "dram_pct": None if None in (read, written, device) else 1e14 * (read + written) / us / device.bandwidth,
        **{name: mean(name) for name in ("tensor_pct", "issue_pct", "warps_pct")},
        "mhz": None if cycles is None else cycles / us,
    }


LABELS = ("pass", "layer", "kernel", "tile")


def grouped(rows: Sequence[Labelled], device: Device | None, by: Sequence[str] = LABELS) -> list[dict[str, Any]]:
    """Return a line for each group of launches that agree in `by`, the largest loss against the lower bound first. A
    group in which a launch has no lower bound counts as entirely lost."""
    groups: dict[tuple[str, ...], list[Labelled]] = defaultdict(list)
    for row in rows:
        labels = dict(zip(LABELS, row.key, strict=True))
        groups[tuple(labels[name] for name in by)].append(row)
    lines = [{**dict(zip(by, key, strict=True)), **cells(same, device)} for key, same in groups.items()]
    lines.sort(key=lambda line: -line["lost_us"])
    return [{name: shown(value) for name, value in line.items()} for line in lines]


def shown(value: Any) -> Any:
    """Return a cell's value as the table shows it."""
    return "" if value is None else round(value, 2) if isinstance(value, float) else value


def printed(lines: Sequence[dict[str, Any]]) -> str:
    """Format the lines as text."""
    return predict.table([{**line, "kernel": line["kernel"][:48]} for line in lines])


def known(metrics: Iterable[str]) -> list[str]:
    """Return those metrics that ncu has on this machine, since a single unknown one would make it fail. If ncu doesn't
    even list the time, its list is ignored and all are returned."""
    listed = subprocess.run([NCU[0], "--query-metrics"], capture_output=True, text=True, check=False).stdout
    names = set(re.findall(r"\w+__\w+", listed))
    return [one for one in metrics if TIME.split(".")[0] not in names or one.split(".")[0] in names]


def count(log: Path, replay: str, step: Sequence[str]) -> None:
    """Run one step under ncu, which writes to `log`. Exits if ncu fails.

    replay: ncu's --replay-mode. step: the options of this script that describe the step.
    """
    metrics = known(METRICS.values())
    if missing := set(METRICS.values()) - set(metrics):
        print(f"this GPU has no {', '.join(sorted(missing))}")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    options = ["--replay-mode", replay, "--log-file", str(log), "--metrics", ",".join(metrics)]
    status = subprocess.run([*NCU, *options, sys.executable, __file__, "--step", *step], check=False).returncode
    if status:
        tail = log.read_text().splitlines()[-5:] if log.exists() else []
        sys.exit("\n".join([f"ncu failed with status {status}; its output is in {log}", *tail]))


def one_step(depth: int, batch: int, mode: str, dtype: str) -> None:
    """Run warm-up steps, and the step that ncu profiles."""
    device = torch.device("cuda", torch.cuda.current_device())
    case = backends.Case(f"resnet{depth}", mode, batch, layers.DTYPES[dtype], predict.SIZE, device)
    with timeline.running(backends.BACKENDS[BACKEND[mode]], case) as step:
        for i in range(timeline.STEPS):
            step(i)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=backends.DEPTHS, default=50)
    parser.add_argument("--mode", choices=backends.MODES, default="train")
    parser.add_argument("--batch", type=predict.positive(int), default=256)
    parser.add_argument("--dtype", choices=predict.DTYPES, default="bf16")
    parser.add_argument(
        "--csv", type=Path, default=Path("out/counters.csv"), help="write the rows to this file; default: %(default)s"
    )
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="read ncu's output for such a step from FILE instead of running it"
    )
    parser.add_argument(
        "--gpu",
        choices=predict.GPUS,
        default=problem.H200.name,
        help="the GPU of --read's output; otherwise it is detected",
    )
    parser.add_argument(
        "--replay-mode", choices=("kernel", "application"), default="kernel", help="ncu's option of that name"
    )
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    case = (options.depth, options.batch, options.mode, options.dtype)
    if options.step:
        one_step(*case)
        return 0
    log = options.read or options.csv.with_suffix(".ncu.csv")
    if not options.read:
        if not torch.cuda.is_available():
            parser.error("no CUDA GPU: this script reads its counters")
        if shutil.which(NCU[0]) is None:
            parser.error("no ncu (Nsight Compute) on the PATH")
        names = ("--depth", "--batch", "--mode", "--dtype")
        count(log, options.replay_mode, [word for pair in zip(names, map(str, case), strict=True) for word in pair])
    try:
        text = log.read_text()
        counted = parse(text)
    except (OSError, ValueError) as error:
        sys.exit(f"{log}: {error}")
    gpu = options.gpu if options.read else torch.cuda.get_device_name()
    device = predict.GPUS[gpu][0] if gpu in predict.GPUS else None
    try:
        if device is None:
            raise ValueError(f"there is no model of {gpu}, only of {', '.join(predict.GPUS)}")
        dtype = layers.DTYPES[options.dtype]
        launches = predict.step(options.depth, options.batch, options.mode, dtype, "fastres")
        rows = label(counted, launches, *predict.GPUS[gpu])
    except ValueError as error:
        print(f"rows have neither layers nor predictions: {error}")
        rows = [Labelled(one) for one in counted]
    lines = grouped(rows, device)
    layers.write_csv(options.csv, [*lines[0]], lines)
    passes = max(map(int, re.findall(r"- (\d+) pass", text)), default=0)
    us = sum(one.values["us"] for one in counted)
    print(f"ResNet-{options.depth}, {options.mode}, batch {options.batch}, {options.dtype}, by Nsight Compute:")
    print(f"{len(rows)} kernels, {us:,.0f} us, at most {passes or '?'} passes of ncu per kernel")
    print(f"{sum(not row.launches for row in rows)} kernels belong to no known layer")
    print(f"time lost to the lower bound, the largest first:\n{printed(lines[:TOP])}\n")
    print(f"by kernel:\n{printed(grouped(rows, device, by=('kernel',)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
