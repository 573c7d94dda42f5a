"""Measure the throughput of ResNets in fastres and in other backends (the peers), and count their FLOPs.

    python bench/run.py --depth 50
    python bench/run.py --net cifar-110,paper-34-A --mode train
    python bench/run.py --depth all --mode train --json out/train.json --plot out/train.svg --resume

Prints the FLOPs table next to the paper's figures, a line as each backend finishes, and a table for each case (net,
mode, batch, dtype and image size) with the ratio of each row to the best peer. A row is one backend on one case. The
rows of a case take turns, one timed window each. A row whose windows differ too much is "noisy" and is not ranked. On a
GPU each row runs in its own process, so that a row that hangs or loses its CUDA context affects no other row. `--json`
saves the measurements. With `--resume`, a run that was stopped, or that is split by --depth, --net, --mode or
--backend, fills a single file.
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
    """The validated command line.

    rows: (case, name of the backend) for each row to measure.
    seconds: timed seconds per row, over all of its windows.
    dtype: the name of the cases' dtype.
    json, plot: the files for the record and its picture, or None.
    isolated: whether each row runs in its own process.
    patience: seconds to wait for a row to get ready, finish or be inspected before its process is killed.
    """

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
    """Run the bench and return its exit status.

    The status is 1 if a row of fastres is wrong or failed or if no row is ok or noisy, 130 after Ctrl-C and 143 after
    SIGTERM during the measurements, and 0 otherwise.
    """
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
        kept = f"; {plan.json} holds what was measured; continue it with --resume" if begun else ""
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
    """Parse and validate the command line. An unknown or impossible value exits with status 2 and a message that says
    what is accepted."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="backends:\n" + "\n".join(f"  {name:27} {backend.says}" for name, backend in BACKENDS.items()),
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--depth", default="50", choices=[*map(str, DEPTHS), "all"], help="depth of torchvision's ResNet; default: 50"
    )
    which.add_argument(
        "--net",
        help="other nets, separated by commas: cifar-20, paper-34-A, plain-18, wide_resnet50_2, ...; "
        "peers run them in plain PyTorch; default: the nets of --depth",
    )
    parser.add_argument("--mode", default="both", choices=[*MODES, "both"], help="default: both")
    parser.add_argument(
        "--backend",
        help="names from the list below, separated by commas, or all; default: depends on device, net and mode",
    )
    parser.add_argument("--batch", help="batch sizes, separated by commas; default: 256 on a GPU, 4 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU; training uses autocast")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if there is a GPU")
    parser.add_argument(
        "--size", type=int, help="height and width of the images; default: the net's usual size, 224 or 32"
    )
    parser.add_argument("--seconds", type=float, help="timed seconds per row; default: 3")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the record to FILE after every round of windows; default: no record",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the record to FILE (.png, .svg, .pdf); default: no picture"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of --json FILE and measure the rest; if rows can't be compared, write to FILE-2",
    )
    parser.add_argument("--isolate", action="store_true", help="run each row in its own process; always on for a GPU")
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        help="seconds for a row to get ready, finish or be inspected before its process is killed; default: 300",
    )
    options = parser.parse_args(arguments)

    try:
        device = pick_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    defaults = DEFAULTS[device.type]
    sizes, dtype, seconds = (
        defaults[name] if getattr(options, name) is None else getattr(options, name)
        for name in ("batch", "dtype", "seconds")
    )
    try:
        batches = [int(batch) for batch in str(sizes).split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        parser.error(f"--batch must be whole numbers of at least 1, separated by commas: got {sizes}")
    if options.size is not None and options.size < 32:
        parser.error(f"--size must be at least 32: got {options.size}")
    for option, value in (("--seconds", seconds), ("--patience", options.patience)):
        if not value > 0:
            parser.error(f"{option} must be greater than 0: got {value}")
    if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        parser.error(f"{torch.cuda.get_device_name(device)} does not support bf16; use --dtype fp16 or fp32")
    if options.resume and not options.json:
        parser.error("--resume continues a record: name it with --json FILE")
    if options.json and options.json.exists() and not options.resume:
        parser.error(f"{options.json} exists: continue it with --resume, or name another --json FILE")
    for option, package in (("--plot", "matplotlib"), ("photographs", "sklearn")):
        if (option != "--plot" or options.plot) and importlib.util.find_spec(package) is None:
            parser.error(f"{option}: {package} is not installed: pip install 'fastres[bench]'")
    if options.plot and options.json and options.plot.resolve() == options.json.resolve():
        parser.error(f"--json and --plot must name different files: both name {options.json}")
    if options.plot and options.plot.suffix not in picture.SUFFIXES:
        parser.error(f"--plot must be a name that ends in {', '.join(picture.SUFFIXES)}: got {options.plot}")

    named = None if options.backend in (None, "all") else options.backend.split(",")
    for name in named or ():
        if name not in BACKENDS:
            parser.error(f"unknown backend {name!r}; accepted: {', '.join(BACKENDS)}, all")
        if reason := BACKENDS[name].why_not_here(device):
            parser.error(f"backend {name!r} can't run here: {reason}")
    nets = (
        options.net.split(",")
        if options.net
        else [net for net, d in TORCHVISION.items() if options.depth in (str(d), "all")]
    )
    rows = []
    for net in nets:
        try:
            size = options.size or families.usual_size(net)
            layers = cost(net, size).layers
        except ValueError as error:
            parser.error(str(error))
        for mode in MODES if options.mode == "both" else [options.mode]:
            if (
                mode == "train"
                and 1 in batches
                and any(row.output[2:] == (1, 1) for row in layers if "Norm" in row.kind)
            ):
                parser.error(
                    f"training {net} with batch 1 at size {size} leaves BatchNorm a single value per channel; "
                    "increase --batch or --size"
                )
            default = BACKENDS if options.backend == "all" else backends.by_default(device, net, mode)
            for batch in dict.fromkeys(batches):
                case = Case(net, mode, batch, DTYPES[dtype], size, device)
                rows += [(case, name) for name in named or default]
    isolated = options.isolate or device.type == "cuda"
    return Plan(rows, device, seconds, dtype, options.json, options.plot, options.resume, isolated, options.patience)


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, and make it the current device if it is a GPU. None picks a GPU if there is one.

    The device has its index if it is a GPU. Raises ValueError if there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DEFAULTS:
        raise ValueError(f"--device must be cpu, cuda or cuda:N: got {name}")
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
    """Return the record to continue and its file.

    The file is `path` if its rows can be compared with new ones. Otherwise it is the first of path-2, path-3, ... whose
    rows can be compared or that does not exist yet.
    """
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
    """Return the lines that describe the machine and the settings and, on a CPU, what would differ on a GPU."""
    environment = record["environment"]
    cases = [case for case, _ in plan.rows]
    sizes = ", ".join(dict.fromkeys(f"{case.size}x{case.size}" for case in cases))
    batches = ", ".join(dict.fromkeys(str(case.batch) for case in cases))
    versions = environment["versions"]
    lines = [
        f"{environment['name']}, {environment['threads']} CPU threads, torch {versions['torch']}; "
        f"batch {batches}, {plan.dtype}, photographs of {sizes}"
    ]
    if plan.device.type == "cpu":
        gpu = DEFAULTS["cuda"]
        lines.append(
            f"On a GPU the defaults would be batch {gpu['batch']}, {gpu['dtype']} and, for ResNet-50, most backends "
            "(CUDA graphs and max-autotune among them). fastres would run its fused kernels, and peak memory would be "
            "measured. On a CPU, fastres.optimize runs oneDNN's fused convolutions in fp32, bf16 or int8. Training and "
            "inference without fastres.optimize run PyTorch's own operations."
        )
    return "\n".join(lines)


def run(plan: Plan, record: dict[str, Any]) -> None:
    """Measure every row of the plan that the record lacks or has with a status that isn't in `record.DONE`. Write the
    record after each new result."""
    known = {records.key(row): row["status"] for row in record["rows"]}
    asked = [(case, name, known.get((*records_case(case), name))) for case, name in plan.rows]
    asked = [one for one in asked if one[2] not in records.DONE]
    harmless = (None, "noisy", *(("failed", "unfinished") if plan.isolated else ()))
    missing = [(case, name) for case, name, status in asked if status in harmless]
    broken = [(case, name) for case, name, status in asked if status not in harmless]
    with tqdm(total=len(missing) + len(broken), unit="row", disable=None, leave=False) as bar:
        for case in dict.fromkeys(case for case, _ in missing):
            measure_rows(plan, record, case, [name for other, name in missing if other == case], bar)
        # Without isolation, rows that may have crashed an earlier run come last, one at a time, so that they cost no
        # other row.
        for case, name in broken:
            measure_rows(plan, record, case, [name], bar)


def measure_rows(plan: Plan, record: dict[str, Any], case: Case, names: Sequence[str], bar: tqdm) -> None:
    """Measure rows of one case in turns. Peers are prepared first, so that faults of fastres cannot affect this."""

    def tell(name: str, fields: dict[str, Any]) -> None:
        row = dict(zip(records.CASE, records_case(case), strict=True))
        finished = None if fields["status"] == "unfinished" else records.now()
        row |= {"backend": name, "ours": BACKENDS[name].ours, "arithmetic": BACKENDS[name].arithmetic(case)}
        row |= {"finished": finished} | fields
        noisy = any(records.key(old) == records.key(row) and old["status"] == "noisy" for old in record["rows"])
        if not (noisy and fields["status"] in ("unfinished", "failed")):  # a noisy measurement is better than none
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
                reason = f"eager PyTorch, the reference, runs out of memory: {measure.first_line(error)}"
                tell(name, {"status": "out of memory", "reason": reason})
            return
        multiply_adds = cost(case.net, case.size).multiply_adds
        contest.Contest(case, hand_over(data), multiply_adds, plan.patience, tell, plan.seconds).measure(able, start)


def records_case(case: Case) -> tuple[Any, ...]:
    """Return the case's fields as a record stores them, in the order of `record.CASE`."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    return case.net, case.mode, case.batch, dtype, case.size


@cache
def inputs(batch: int, size: int) -> list[torch.Tensor]:
    """Return the input batches that all rows of a case share."""
    return photos.batches(measure.INPUTS, batch, size, SEED)


@cache
def weights(net: str, size: int) -> dict[str, torch.Tensor]:
    """Return the state dict that all backends load for `net`."""
    return backends.shared_weights(net, photos.batches(2, 4, size, SEED + 1), SEED)


@cache
def cost(net: str, size: int) -> flops.Cost:
    """Count the multiply-adds of one image, by layer. Raises ValueError for a net that `families.named` doesn't
    know."""
    with torch.device("meta"):
        model = families.named(net)
    return flops.count(model, size)


def flops_table(nets: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of the FLOPs table.

    The last rows are our counts of `nets`. If the paper prints a figure for the family and depth of one of `nets`, the
    paper's table comes first, with our count of the paper's variant next to each figure, and our counts include all
    five of torchvision's ResNets. bench/records/README.md documents the fields.
    """
    paper_rows = {net: paper_row(net) for net in nets}
    table = []
    if any(paper_rows.values()):
        paper_rows = {net: paper_row(net) for net in TORCHVISION} | paper_rows
        for row in flops.PAPER_TABLE:
            if row.gflops is None or not (row.family == "paper" or row.name == "VGG-19" or row in paper_rows.values()):
                continue
            form = "the baseline" if row.family == "vgg" else "the paper's"
            form += f", shortcut {row.shortcut}" if row.shortcut else ""
            ours = row.cost().multiply_adds / 1e9
            table.append({"net": paper_name(row), "variant": form, "paper": row.gflops, "ours": ours, "beside": None})
    for net, row in paper_rows.items():
        size = families.usual_size(net)
        form = f"as measured below, at {size}x{size}"
        if net in TORCHVISION:
            form = "as measured below: v1.5, shortcut B" if TORCHVISION[net] >= 50 else "as measured below: shortcut B"
        ours = cost(net, size).multiply_adds / 1e9
        table.append({"net": net, "variant": form, "paper": None, "ours": ours, "beside": row and paper_name(row)})
    return table


def paper_row(net: str) -> flops.PaperRow | None:
    """Return the row of the paper's FLOPs table with the same family and depth as `net`, or None. Its stride and
    shortcuts may differ from those of `net`."""
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
    title = "Multiply-adds per image (the paper's FLOPs) in 10^9; images are 224x224 unless another size is given"
    return f"{title}\n{columns(lines, left={0, 4})}"


def one_line(row: dict[str, Any]) -> str:
    """Return the line that is printed when a row finishes."""
    start = f"{row['net']} {row['mode']} {row['batch']} {row['backend']}: "
    if row["status"] not in ("ok", "noisy"):
        return f"{start}{row['status']}: {row['reason']}"
    text = f"{start}{row['img_s']:.4g} img/s, {row['latency_ms']:.4g} ms per batch, error {row['error']:.1e}"
    return text if row["status"] == "ok" else f"{text}; noisy: {row['reason']}"


COUNTS = {"graphs": "graphs", "graph_breaks": "breaks", "recompiles": "recompiles", "kernels_per_step": "kernels"}
COLUMNS = ["backend", "dtype", "first call s", "img/s", "min..max", "latency ms", "host ms", "MiB", "GFLOP/s"]
COLUMNS += ["J/img", *COUNTS.values(), "error", "/ best peer", "interval", "x eager"]


def render_rows(rows: list[dict[str, Any]]) -> str:
    """Return one table for each case, the fastest row first and rows that are not ok last, with remarks below.

    If the rows of a case compute in several dtypes, each is compared with the best peer in its own dtype, and all are
    compared with eager PyTorch in the case's dtype.
    """
    ratio, to_eager = records.ratios(rows), records.ratios(rows, to_eager=True)
    blocks = []
    for (net, mode, batch, dtype, size), of_case in records.by_case(rows).items():
        lines, remarks = [COLUMNS], []
        mixed = len({records.arithmetic(row) for row in of_case}) > 1
        for row in sorted(of_case, key=lambda row: (row["status"] != "ok", -row.get("img_s", 0))):
            agrees, images = row.get("agreement"), row.get("agreement_images")
            details = [row.get("path"), row.get("reason"), *row.get("notes", ())]
            if agrees is not None:
                of = "" if images is None else f" {images}"
                details.append(f"{100 * agrees:.1f} % of{of} images get the same class as in eager PyTorch in {dtype}")
            remarks += [f"  {row['backend']}: {remark}" for remark in details if remark]
            named = [row["backend"], records.arithmetic(row) if mixed else ""]
            if "error" not in row:
                lines.append([*named, "", row["status"], *[""] * (len(COLUMNS) - 4)])
                continue
            memory, host, error, joules = (
                row.get(name) for name in ("peak_reserved_mib", "host_ms", "error", "joules_per_image")
            )
            rate, right = ratio.get(records.key(row)), row["status"] != "wrong"
            eager_ratio = to_eager.get(records.key(row))
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
                    f"{eager_ratio.value:.2f}" if eager_ratio else "",
                ]
            )
        title = f"{net}, {mode}, batch {batch}, {dtype}, {size}x{size}"
        errors = {"infer": "scores", "train": "gradients, median over the parameters"}[mode]
        # Rows in another dtype have another limit.
        allowed = (row.get("error_allowed") for row in of_case if records.arithmetic(row) == dtype)
        limit = next((f", at most {error:.1e} accepted" for error in allowed if error is not None), "")
        title += f"; error: relative error of the {errors}, against fp64{limit}"
        shown = [column for column in zip(*lines, strict=True) if set(column[1:]) - {"", "-"}]
        blocks.append("\n".join([title, columns([*map(list, zip(*shown, strict=True))], left={0}), *remarks]))
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
    """Handle SIGTERM like Ctrl-C, so that the processes of the rows and their files are removed."""
    raise KeyboardInterrupt(number)


def status_of(stop: KeyboardInterrupt) -> int:
    """Return the exit status: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:  # before or after the measurements; during them `main` handles it
        sys.exit(status_of(stop))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it exits
        sys.exit(141)
