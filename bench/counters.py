"""What the GPU's counters say of every kernel of one step, beside what the model of bench/predict.py says of it.

    python bench/counters.py --mode train --depth 50 --batch 256 --csv out/counters-train.csv
    python bench/counters.py --mode infer --csv out/counters-infer.csv
    python bench/counters.py --mode train --read out/counters-train.ncu.csv    # the same table again, without a GPU

A step runs under Nsight Compute (`ncu`) in a process of its own: backend "fastres" for training, "fastres-optimize" for
inference, whose graph ncu takes apart. Several steps warm up unwatched, one is counted. What ncu wrote is kept beside
the CSV, for --read.

Pass and layer come from the same step on tensors without memory (bench/launch_trace.py). Our kernels are matched one by
one in order, by name and grid; where one differs, no row gets a layer, nor anything of the model, and the first
difference is told. Of the library's kernels, those between two of ours belong to the operators recorded there: all of
them where these are of one pass and layer, sharing what the model says by their times; else those that multiply, where
there are as many as operators that do. The others, and PyTorch's own beside a convolution, belong to none, and all
their time counts as lost.

ncu runs kernels apart, at the clocks and with the caches they meet: times are of a kernel alone, without the power
limit that a whole step may run into ("mhz" is the clock they had). Where it needs several passes a kernel, it saves and
restores memory between them, which takes time, and memory like the step's own; L2 is then not as the step leaves it.
"l2_mb" is all that L2 was asked for, by its other half as well. "dram_pct" is of the bandwidth that the model reckons
with, other percentages are of cycles with work. Copies by the driver are no kernels and missing.
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

# Few, that they fit into few passes.
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
UNITS = {  # to microseconds and MB; newer versions of ncu abbreviate
    **{"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6, "ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6},
    **{"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3, "%": 1.0, "cycle": 1.0, "": 1.0},
}
NCU = ["ncu", "--clock-control", "none", "--cache-control", "none", "--target-processes", "all"]
NCU += ["--profile-from-start", "off", "--csv", "--page", "raw", "--print-units", "base"]
BACKEND = {"train": "fastres", "infer": "fastres-optimize"}
TOP = 25


class Counted(NamedTuple):
    """One launch that ncu saw; values by the names of `METRICS`, without what it couldn't count."""

    name: str
    grid: tuple[int, ...]
    values: dict[str, float]

    @property
    def kernel(self) -> str:
        return timeline.short(self.name)


def parse(text: str) -> list[Counted]:
    """The launches in what ncu writes with --csv --page raw, in order. Raises ValueError where it isn't that."""
    rows = csv.reader(line for line in text.splitlines() if line.startswith('"'))  # others are ncu's own words
    header = next((row for row in rows if row[0] == "ID"), None)
    units = next(rows, None)
    if header is None or units is None or TIME not in header:
        raise ValueError("\n".join([f"no kernel's {TIME}", *text.splitlines()[-5:]]))
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
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # "n/a", and what else stands for it


@dataclass
class Labelled:
    """A launch and the recorded ones that it stands for, of which it is `share`: one of ours, or the operators of the
    library to which it belongs; none where that isn't known."""

    counted: Counted
    launches: Sequence[Launch] = ()
    share: float = 1.0
    model: list[predict.Time] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Pass, layer, kernel and tile."""
        one = self.launches[0] if self.launches else None
        name = self.counted.kernel
        return (one.pass_, one.layer, name, predict.tile_name(one) if one.ours else "") if one else ("", "", name, "")


@cache
def our_names() -> frozenset[str]:
    """Of the kernels of this package, and of the functions that they call."""
    values = (value for module in launch_trace.launching() for value in vars(module).values())
    return frozenset(launch_trace.name_of(value) for value in values if isinstance(value, KernelInterface))


def split(found: Iterable[Any], ours: Callable[[Any], bool]) -> tuple[list[Any], list[list[Any]]]:
    """What is ours; and the rest before, between and behind it."""
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
    return (*grid, 1, 1)[:3]


def label(counted: Sequence[Counted], launches: Sequence[Launch], device: Device, gpu: Gpu) -> list[Labelled]:
    """Every launch that was counted with those recorded ones that it is, in order. Raises ValueError where ours are
    not the same, one by one."""
    names = our_names() | {one.kernel for one in launches if one.ours}
    own, others = split(counted, lambda one: one.kernel in names)
    recorded, operators = split(launches, lambda one: one.ours)
    for i, (one, launch) in enumerate(zip(own, recorded, strict=False)):
        if (one.kernel, padded(one.grid)) != (launch.kernel, padded(launch.grid)):
            raise ValueError(
                f"our launch {i} was {one.kernel} {padded(one.grid)}; recorded is {launch.kernel} "
                f"{padded(launch.grid)} for {launch.pass_} {launch.layer}"
            )
    if len(own) != len(recorded):
        raise ValueError(f"{len(own)} launches of ours were counted; recorded are {len(recorded)}")
    found = [*library(others[0], operators[0])]
    for one, launch, behind, calling in zip(own, recorded, others[1:], operators[1:], strict=True):
        found += [Labelled(one, (launch,)), *library(behind, calling)]
    for row in found:
        row.model = [predict.time(launch, device, gpu) for launch in row.launches]
    return found


# Copies by the driver, and a view. By name: what convolves or multiplies matrices; what runs beside it; PyTorch's own,
# which might come from an operator that isn't recorded, of no layer.
COPIES = ("copy_", "clone", "as_strided_")
MULTIPLIES = re.compile(r"gemm|xmma|cutlass|nvjet|fprop|dgrad|wgrad|conv2d", re.IGNORECASE)
BESIDE = re.compile(r"reduc|offsets|workspace|nchwTo|nhwcTo", re.IGNORECASE)
ATEN = re.compile(r"\bat::")


def library(counted: Sequence[Counted], operators: Sequence[Launch]) -> Iterator[Labelled]:
    """The library's kernels between two of ours, with the operators recorded there."""
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
    """Whether the kernel's name tells of another pass than the operator's."""
    told = {word for word in ("fprop", "dgrad", "wgrad") if word in counted.name.lower()}
    pass_ = "fprop" if operator.pass_ == "infer" else operator.pass_
    return bool(told) and operator.layer != "" and pass_ not in told


def cells(rows: Sequence[Labelled], device: Device | None) -> dict[str, Any]:
    """The numbers of launches together; None where one of them has none. Percentages are weighted by time."""
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
    """A line for the launches that are the same in `by`, those that lose most to their floors first; what has no
    floor as if it lost all."""
    groups: dict[tuple[str, ...], list[Labelled]] = defaultdict(list)
    for row in rows:
        labels = dict(zip(LABELS, row.key, strict=True))
        groups[tuple(labels[name] for name in by)].append(row)
    lines = [{**dict(zip(by, key, strict=True)), **cells(same, device)} for key, same in groups.items()]
    lines.sort(key=lambda line: -line["lost_us"])
    return [{name: shown(value) for name, value in line.items()} for line in lines]


def shown(value: Any) -> Any:
    return "" if value is None else round(value, 2) if isinstance(value, float) else value


def printed(lines: Sequence[dict[str, Any]]) -> str:
    return predict.table([{**line, "kernel": line["kernel"][:48]} for line in lines])


def known(metrics: Iterable[str]) -> list[str]:
    """Those that ncu has here: one that it hasn't would cost all of them. All where it doesn't list any."""
    listed = subprocess.run([NCU[0], "--query-metrics"], capture_output=True, text=True, check=False).stdout
    names = set(re.findall(r"\w+__\w+", listed))
    return [one for one in metrics if TIME.split(".")[0] not in names or one.split(".")[0] in names]


def count(log: Path, replay: str, step: Sequence[str]) -> None:
    """Run one step under ncu, which writes to `log`."""
    metrics = known(METRICS.values())
    if missing := set(METRICS.values()) - set(metrics):
        print(f"this GPU has no {', '.join(sorted(missing))}")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    options = ["--replay-mode", replay, "--log-file", str(log), "--metrics", ",".join(metrics)]
    status = subprocess.run([*NCU, *options, sys.executable, __file__, "--step", *step], check=False).returncode
    if status:
        said = log.read_text().splitlines()[-5:] if log.exists() else []
        sys.exit("\n".join([f"ncu ended with {status}; it wrote {log}", *said]))


def one_step(depth: int, batch: int, mode: str, dtype: str) -> None:
    """What ncu runs."""
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
    parser.add_argument("--csv", type=Path, default=Path("out/counters.csv"), help="write the rows here")
    parser.add_argument("--read", type=Path, metavar="FILE", help="what ncu wrote of such a step, instead of a GPU")
    parser.add_argument(
        "--gpu", choices=predict.GPUS, default=problem.H200.name, help="on which that was; without --read it is seen"
    )
    parser.add_argument("--replay-mode", choices=("kernel", "application"), default="kernel", help="ncu's, see there")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    case = (options.depth, options.batch, options.mode, options.dtype)
    if options.step:
        one_step(*case)
        return 0
    log = options.read or options.csv.with_suffix(".ncu.csv")
    if not options.read:
        if not torch.cuda.is_available():
            parser.error("no CUDA GPU, whose counters this reads")
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
            raise ValueError(f"there is no model of {gpu}, but of {', '.join(predict.GPUS)}")
        dtype = layers.DTYPES[options.dtype]
        launches = predict.step(options.depth, options.batch, options.mode, dtype, "fastres")
        rows = label(counted, launches, *predict.GPUS[gpu])
    except ValueError as error:
        print(f"rows have no layers and nothing of the model: {error}")
        rows = [Labelled(one) for one in counted]
    lines = grouped(rows, device)
    layers.write_csv(options.csv, [*lines[0]], lines)
    passes = max(map(int, re.findall(r"- (\d+) pass", text)), default=0)
    us = sum(one.values["us"] for one in counted)
    print(f"ResNet-{options.depth}, {options.mode}, batch {options.batch}, {options.dtype}, by Nsight Compute:")
    print(f"{len(rows)} kernels, {us:,.0f} us, at most {passes or '?'} passes of ncu a kernel")
    print(f"{sum(not row.launches for row in rows)} kernels belong to no known layer")
    print(f"what is lost to the floor, the largest first:\n{printed(lines[:TOP])}\n")
    print(f"by kernel:\n{printed(grouped(rows, device, by=('kernel',)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
