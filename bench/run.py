"""Throughput of ResNets beside the peers, and their FLOPs beside the paper's.

    python bench/run.py --depth 50
    python bench/run.py --net cifar-110,paper-34-A --mode train
    python bench/run.py --depth all --mode train --json out/train.json --plot out/train.svg --resume

Prints the FLOPs table, a line as each backend finishes, and a table with the ratio to the best peer. The rows of a case
take turns, window by window; one whose windows differ too much is "noisy" and not ranked. On a GPU each row has a
process of its own: one that hangs or loses its CUDA context costs only itself. `--json` keeps what is measured; with
`--resume` a run that was stopped, or split by --depth, --net, --mode or --backend, fills one file.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import advice
import backends
import contest
import measure
import photos
import plot
import record as records
import torch
from backends import BACKENDS, DEPTHS, MODES, Case
from tqdm import tqdm

from fastres import picture
from fastres.models import families, flops

DTYPES = {backends.NAMES[dtype]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DEFAULTS = {
    "cuda": {"batch": 256, "dtype": "bf16", "seconds": 3.0},
    "cpu": {"batch": 4, "dtype": "fp32", "seconds": 3.0},
}
SEED = 0
TORCHVISION = {f"resnet{depth}": depth for depth in DEPTHS}


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked."""

    rows: list[tuple[Case, str]]
    device: torch.device
    seconds: float
    dtype: str
    json: Path | None
    plot: Path | None
    resume: bool
    isolated: bool
    patience: float


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a row of ours is wrong or failed, or nothing could be measured; 130 after Ctrl-C, 143 after
    SIGTERM while measuring; else 0."""
    plan = parse(arguments)
    table = flops_table(tuple(dict.fromkeys(case.net for case, _ in plan.rows)))
    print(render_flops(table), flush=True)
    options = {"seconds": plan.seconds, "windows": measure.WINDOWS, "inputs": measure.INPUTS, "seed": SEED}
    record = records.new(plan.device, options, table)
    if plan.resume and plan.json:
        record, path = resumed(plan.json, record)
        plan = replace(plan, json=path)
    print(f"\n{introduction(plan, record)}", flush=True)

    torch.backends.cudnn.benchmark = True
    try:
        run(plan, record)
    except KeyboardInterrupt as stop:
        begun = plan.json is not None and plan.json.exists()
        kept = f"; {plan.json} holds what was measured, --resume goes on with it" if begun else ""
        print(f"\nstopped{kept}", file=sys.stderr)
        return status_of(stop)
    asked = {(*records_case(case), backend) for case, backend in plan.rows}
    rows = [row for row in record["rows"] if records.key(row) in asked]
    print(f"\n{render_rows(rows)}\n\n{advice.advice(rows)}", flush=True)
    if plan.json:
        print(f"record: {plan.json}")
    if plan.plot:
        picture.save(plot.rates(record), plan.plot)
        print(f"picture: {plan.plot}")
    bad = [row for row in rows if row["ours"] and row["status"] in ("wrong", "failed")]
    return int(bool(bad) or not any(row["status"] in ("ok", "noisy") for row in rows))


def parse(arguments: list[str] | None) -> Plan:
    """The command line as a plan. What is unknown or impossible here ends the program with what is accepted."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="backends:\n" + "\n".join(f"  {name:27} {backend.says}" for name, backend in BACKENDS.items()),
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--depth", default="50", choices=[*map(str, DEPTHS), "all"], help="of torchvision's ResNets; default: 50"
    )
    which.add_argument(
        "--net",
        help="any others, with commas: cifar-20, paper-34-A, plain-18, wide_resnet50_2, ...; peers run them plain; "
        "default: those of --depth",
    )
    parser.add_argument("--mode", default="both", choices=[*MODES, "both"], help="default: both")
    parser.add_argument("--backend", help="names from the list below, with commas; or all; default: by device and net")
    parser.add_argument("--batch", help="images a batch, several with commas; default: 256 on a GPU, 4 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU; training: by autocast")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if there is one")
    parser.add_argument("--size", type=int, help="side of the images; default: the net's usual, 224 or 32")
    parser.add_argument("--seconds", type=float, help="timed seconds a row; default: 3")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the record here, after every round; default: nowhere"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the record here (.png, .svg, .pdf); default: nowhere"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of --json FILE and measure the rest; if they could not be compared, write to FILE-2",
    )
    parser.add_argument(
        "--isolate", action="store_true", help="run each row in a process of its own; always so on a GPU"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        help="seconds a row may take to get ready before its process is killed; default: 300",
    )
    given = parser.parse_args(arguments)

    try:
        device = pick_device(given.device)
    except ValueError as error:
        parser.error(str(error))
    defaults = DEFAULTS[device.type]
    sizes, dtype, seconds = (
        defaults[name] if getattr(given, name) is None else getattr(given, name)
        for name in ("batch", "dtype", "seconds")
    )
    try:
        batches = [int(batch) for batch in str(sizes).split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        parser.error(f"--batch {sizes}; accepted: whole numbers from 1, with commas between")
    if given.size is not None and given.size < 32:
        parser.error(f"--size {given.size}; accepted: from 32")
    for option, value in (("--seconds", seconds), ("--patience", given.patience)):
        if not value > 0:
            parser.error(f"{option} {value}; accepted: above 0")
    if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        parser.error(f"{torch.cuda.get_device_name(device)} has no bf16; accepted here: --dtype fp16, fp32")
    if given.resume and not given.json:
        parser.error("--resume goes on with a record: name it with --json FILE")
    if given.json and given.json.exists() and not given.resume:
        parser.error(f"{given.json} exists: go on with it by --resume, or name another --json FILE")
    for option, package in (("--plot", "matplotlib"), ("photographs", "sklearn")):
        if (option != "--plot" or given.plot) and importlib.util.find_spec(package) is None:
            parser.error(f"{option}: {package} is not installed: pip install 'fastres[bench]'")
    if given.plot and given.json and given.plot.resolve() == given.json.resolve():
        parser.error(f"--json and --plot both name {given.json}; accepted: two files")
    if given.plot and given.plot.suffix not in picture.SUFFIXES:
        parser.error(f"--plot {given.plot}: accepted: a name that ends in {', '.join(picture.SUFFIXES)}")

    named = None if given.backend in (None, "all") else given.backend.split(",")
    for name in named or ():
        if name not in BACKENDS:
            parser.error(f"unknown backend {name!r}; accepted: {', '.join(BACKENDS)}, all")
        if reason := BACKENDS[name].why_not_here(device):
            parser.error(f"backend {name!r} can't run here: {reason}")
    nets = (
        given.net.split(",") if given.net else [net for net, d in TORCHVISION.items() if given.depth in (str(d), "all")]
    )
    rows = []
    for net in nets:
        try:
            size = given.size or families.usual_size(net)
            layers = cost(net, size).layers
        except ValueError as error:
            parser.error(str(error))
        for mode in MODES if given.mode == "both" else [given.mode]:
            if (
                mode == "train"
                and 1 in batches
                and any(row.output[2:] == (1, 1) for row in layers if "Norm" in row.kind)
            ):
                parser.error(
                    f"training {net} with batch 1 at size {size} leaves BatchNorm one value a channel; "
                    "accepted: more of either"
                )
            default = BACKENDS if given.backend == "all" else backends.by_default(device, net, mode)
            for batch in dict.fromkeys(batches):
                case = Case(net, mode, batch, DTYPES[dtype], size, device)
                rows += [(case, name) for name in named or default]
    isolated = given.isolate or device.type == "cuda"
    return Plan(rows, device, seconds, dtype, given.json, given.plot, given.resume, isolated, given.patience)


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, with its index. Raises ValueError where there is none."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DEFAULTS:
        raise ValueError(f"--device {name}; accepted: cpu, cuda, cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        device = torch.device("cuda", device.index or 0)
        if device.index >= count:
            raise ValueError(
                f"--device {name}: there {'is' if count == 1 else 'are'} {count or 'no'} CUDA device(s) here"
            )
        torch.cuda.set_device(device)
    return device


def resumed(path: Path, fresh: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The record to go on with and its file: `path`, else the first of path-2, path-3, ... whose rows can stand beside
    new ones, or that doesn't exist yet."""
    file, number = path, 1
    while file.exists():
        try:
            old = records.read(file)
            why = records.differences(old, fresh)
        except ValueError as error:
            why = [str(error)]
        if not why:
            old["flops"] += [row for row in fresh["flops"] if row not in old["flops"]]
            return old, file
        number += 1
        following = path.with_stem(f"{path.stem}-{number}")
        print(
            f"\n--resume: the rows of {file} can't be compared with new ones:\n  "
            + "\n  ".join(why)
            + f"\nNew rows go to {following}."
        )
        file = following
    return fresh, file


def introduction(plan: Plan, record: dict[str, Any]) -> str:
    environment = record["environment"]
    cases = [case for case, _ in plan.rows]
    sizes = ", ".join(dict.fromkeys(f"{case.size}x{case.size}" for case in cases))
    batches = ", ".join(dict.fromkeys(str(case.batch) for case in cases))
    versions = environment["versions"]
    lines = [
        f"{environment['name']}, {environment['threads']} CPU threads, torch {versions['torch']}; "
        f"batch {batches}, {plan.dtype}, {sizes} photographs"
    ]
    if plan.device.type == "cpu":
        gpu = DEFAULTS["cuda"]
        lines.append(
            f"On a GPU the defaults would be batch {gpu['batch']}, {gpu['dtype']}, every backend for ResNet-50 "
            "(CUDA graphs and max-autotune among them), fastres on its fused kernels, and peak memory. "
            "On a CPU fastres.optimize runs oneDNN's fused convolutions, in fp32, bf16 or int8; training, and a net "
            "that is not optimized, run PyTorch's own operations."
        )
    return "\n".join(lines)


def run(plan: Plan, record: dict[str, Any]) -> None:
    """Measure every row the record lacks, writing it whenever something new is known."""
    known = {records.key(row): row["status"] for row in record["rows"]}
    asked = [(case, name, known.get((*records_case(case), name))) for case, name in plan.rows]
    asked = [one for one in asked if one[2] not in records.DONE]
    harmless = (None, "noisy", *(("failed", "unfinished") if plan.isolated else ()))
    missing = [(case, name) for case, name, status in asked if status in harmless]
    broken = [(case, name) for case, name, status in asked if status not in harmless]
    with tqdm(total=len(missing) + len(broken), unit="row", disable=None, leave=False) as bar:
        for case in dict.fromkeys(case for case, _ in missing):
            measure_rows(plan, record, case, [name for other, name in missing if other == case], bar)
        for case, name in broken:  # last, one at a time: a row that has crashed the process must not cost others
            measure_rows(plan, record, case, [name], bar)


def measure_rows(plan: Plan, record: dict[str, Any], case: Case, names: Sequence[str], bar: tqdm) -> None:
    """Measure rows of one case side by side. Peers get ready first, so that a fault of ours can't cost them."""

    def tell(name: str, fields: dict[str, Any]) -> None:
        row = dict(zip(records.CASE, records_case(case), strict=True))
        finished = None if fields["status"] == "unfinished" else records.now()
        row |= {"backend": name, "ours": BACKENDS[name].ours, "arithmetic": BACKENDS[name].arithmetic(case)}
        row |= {"finished": finished} | fields
        noisy = any(records.key(old) == records.key(row) and old["status"] == "noisy" for old in record["rows"])
        if not (noisy and fields["status"] in ("unfinished", "failed")):  # then the old measurement is the better one
            records.put(record, row)
        if plan.json:
            records.write(record, plan.json)
        bar.set_description(f"{case.net} {case.mode} {name}")
        if finished:
            bar.write(one_line(row), file=sys.stdout)
            sys.stdout.flush()
            bar.update()

    able = []
    for name in sorted(names, key=lambda name: BACKENDS[name].ours):
        if reason := BACKENDS[name].why_not(case):
            tell(name, {"status": "not available", "reason": reason})
        else:
            able.append(name)
    if not able:
        return
    if plan.isolated:
        place = contest.in_workers(able, case, plan.seconds, plan.patience)
    else:
        place = contest.in_process(case, plan.seconds)
    with place as (start, hand_over):
        try:
            data = measure.prepare(case, weights(case.net, case.size), inputs(case.batch, case.size), SEED)
        except Exception as error:
            if not measure.is_out_of_memory(error):
                raise
            for name in able:
                reason = f"eager PyTorch's step, the reference, does not fit: {measure.first_line(error)}"
                tell(name, {"status": "out of memory", "reason": reason})
            return
        multiply_adds = cost(case.net, case.size).multiply_adds
        contest.Contest(case, hand_over(data), multiply_adds, plan.patience, tell).measure(able, start)


def records_case(case: Case) -> tuple[Any, ...]:
    """The case's fields as a record holds them, in the order of `record.CASE`."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    return case.net, case.mode, case.batch, dtype, case.size


@cache
def inputs(batch: int, size: int) -> list[torch.Tensor]:
    return photos.batches(measure.INPUTS, batch, size, SEED)


@cache
def weights(net: str, size: int) -> dict[str, torch.Tensor]:
    return backends.shared_weights(net, photos.batches(2, 4, size, SEED + 1), SEED)


@cache
def cost(net: str, size: int) -> flops.Cost:
    """Of one image. Raises ValueError for a net that `families.named` doesn't know."""
    with torch.device("meta"):
        model = families.named(net)
    return flops.count(model, size)


def flops_table(nets: tuple[str, ...]) -> list[dict[str, Any]]:
    """The nets that the bench runs; where the paper prints figures for any of their kind, its table first, beside our
    counts of the paper's variants, and all five of torchvision's."""
    beside = {net: paper_row(net) for net in nets}
    table = []
    if any(beside.values()):
        beside = {net: paper_row(net) for net in TORCHVISION} | beside
        for row in flops.PAPER_TABLE:
            if row.gflops is None or not (row.family == "paper" or row.name == "VGG-19" or row in beside.values()):
                continue
            form = "the baseline" if row.family == "vgg" else "the paper's"
            form += f", shortcut {row.shortcut}" if row.shortcut else ""
            ours = row.cost().multiply_adds / 1e9
            table.append({"net": paper_name(row), "variant": form, "paper": row.gflops, "ours": ours, "beside": None})
    for net, row in beside.items():
        size = families.usual_size(net)
        form = f"as measured below, at {size}x{size}"
        if net in TORCHVISION:
            form = "as measured below: v1.5, shortcut B" if TORCHVISION[net] >= 50 else "as measured below: shortcut B"
        ours = cost(net, size).multiply_adds / 1e9
        table.append({"net": net, "variant": form, "paper": None, "ours": ours, "beside": row and paper_name(row)})
    return table


def paper_row(net: str) -> flops.PaperRow | None:
    """The net of the paper's FLOPs table that `net` is, up to its stride and shortcuts; None if it prints none."""
    if net in families.BUILDERS:
        family, depth = "paper", TORCHVISION.get(net)
    else:
        family, depth, _ = families.split(net)
        family = "paper" if family == "torchvision" else family
    rows = (row for row in flops.PAPER_TABLE if row.gflops is not None)
    return next((row for row in rows if (row.family, row.depth) == (family, depth)), None)


def paper_name(row: flops.PaperRow) -> str:
    return row.name.split(" ")[0]


def render_flops(table: list[dict[str, Any]]) -> str:
    lines = [["net", "paper", "ours", "difference", "variant"]]
    for row in table:
        paper, ours = row["paper"], row["ours"]
        difference = "" if paper is None else f"{100 * (ours / paper - 1):+.1f} %"
        lines.append([row["net"], "" if paper is None else f"{paper:.1f}", f"{ours:.3f}", difference, row["variant"]])
    title = "Multiply-adds of one image, 224x224 unless said otherwise, 10^9 (the paper's FLOPs)"
    return f"{title}\n{columns(lines, left={0, 4})}"


def one_line(row: dict[str, Any]) -> str:
    start = f"{row['net']} {row['mode']} {row['batch']} {row['backend']}: "
    if row["status"] not in ("ok", "noisy"):
        return f"{start}{row['status']}: {row['reason']}"
    said = f"{start}{row['img_s']:.4g} img/s, {row['latency_ms']:.4g} ms a batch, error {row['error']:.1e}"
    return said if row["status"] == "ok" else f"{said}; noisy: {row['reason']}"


COUNTS = {"graphs": "graphs", "graph_breaks": "breaks", "recompiles": "recompiles", "kernels_per_step": "kernels"}
COLUMNS = ["backend", "dtype", "first call s", "img/s", "min..max", "latency ms", "host ms", "MiB", "GFLOP/s"]
COLUMNS += ["J/img", *COUNTS.values(), "error", "/ best peer", "interval", "x eager"]


def render_rows(rows: list[dict[str, Any]]) -> str:
    """One table a case: fastest first, then what is wrong or missing, with remarks below. Rows of several dtypes are
    compared with the best peer of their own and, all of them, with eager PyTorch in the case's."""
    ratio, to_eager = records.ratios(rows), records.ratios(rows, to_eager=True)
    blocks = []
    for (net, mode, batch, dtype, size), mine in records.by_case(rows).items():
        lines, remarks = [COLUMNS], []
        mixed = len({records.arithmetic(row) for row in mine}) > 1
        for row in sorted(mine, key=lambda row: (row["status"] != "ok", -row.get("img_s", 0))):
            agrees, images = row.get("agreement"), row.get("agreement_images")
            said = [row.get("path"), row.get("reason"), *row.get("notes", ())]
            if agrees is not None:
                of = "" if images is None else f" {images}"
                said.append(f"{100 * agrees:.1f} % of{of} images get the class of eager PyTorch in {dtype}")
            remarks += [f"  {row['backend']}: {remark}" for remark in said if remark]
            named = [row["backend"], records.arithmetic(row) if mixed else ""]
            if "error" not in row:
                lines.append([*named, "", row["status"], *[""] * (len(COLUMNS) - 4)])
                continue
            memory, host, error, joules = (
                row.get(name) for name in ("peak_reserved_mib", "host_ms", "error", "joules_per_image")
            )
            rate, right = ratio.get(records.key(row)), row["status"] != "wrong"
            beside = to_eager.get(records.key(row))
            lines.append(
                [
                    *named,
                    f"{row['first_call_s']:.1f}",
                    f"{row['img_s']:.4g}" + (" noisy" if row["status"] == "noisy" else "") if right else "WRONG",
                    f"{row['img_s_min']:.4g}..{row['img_s_max']:.4g}" if right else "",
                    f"{row['latency_ms']:.4g}",
                    "-" if host is None else f"{host:.4g}",
                    "-" if memory is None else f"{memory:.0f}",
                    f"{row['gflop_s']:.4g}" if right else "",
                    "-" if joules is None else f"{joules:.3g}",
                    *("-" if row[name] is None else str(row[name]) for name in COUNTS),
                    "NaN" if error is None else f"{error:.1e}",
                    f"{rate.value:.2f}" if rate else "",
                    f"{rate.low:.2f}..{rate.high:.2f}" if rate and rate.value != 1 else "",
                    f"{beside.value:.2f}" if beside else "",
                ]
            )
        title = f"{net}, {mode}, batch {batch}, {dtype}, {size}x{size}"
        errors = {"infer": "scores", "train": "gradients, median over the parameters"}[mode]
        allowed = (
            row.get("error_allowed") for row in mine if records.arithmetic(row) == dtype
        )  # others have their own
        limit = next((f"; right up to {error:.1e}" for error in allowed if error is not None), "")
        title += f"; error: of the {errors}, relative to fp64{limit}"
        told = [column for column in zip(*lines, strict=True) if set(column[1:]) - {"", "-"}]
        blocks.append("\n".join([title, columns([*map(list, zip(*told, strict=True))], left={0}), *remarks]))
    return "\n\n".join(blocks)


def columns(lines: list[list[str]], left: set[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [lines[0], rule, *lines[1:]]
    )


def terminated(number: int, frame: object) -> None:
    """SIGTERM ends a run as Ctrl-C does: rows' processes and their files go."""
    raise KeyboardInterrupt(number)


def status_of(stop: KeyboardInterrupt) -> int:
    """130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:  # before or after the measuring, in which `main` sees to it
        sys.exit(status_of(stop))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python would write to at its end
        sys.exit(141)
