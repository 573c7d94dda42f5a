"""Everything that needs a GPU, in parts with limits, and in plans of ten minutes.

    python bench/gpu.py --list
    python bench/gpu.py --plan 1 --jobs 14 --archive gpu-1.tar.gz
    python bench/gpu.py --jobs 14 status tests-kernels tune-50
    python bench/gpu.py --plan 1 --rehearse

Each part writes OUT/<part>.log as it goes and OUT/<part>.json when it ends: command, exit status, seconds, last lines.
A part that fails, dies or hangs costs only itself: at its limit it is killed with all that it started. Only where a
proof fails, the parts behind it are not begun, since what they measure would be worth nothing (--keep-going runs them).

OUT/tests.md is the record of all parts that are tests (bench/pytest_logs.py), OUT/record.json that of the `bench-*`
parts; rows that can't be compared with those before go to OUT/record-2.json. Plan 1 keeps its numbers in
OUT/first.json.

Tables of tiles and built extensions lie in the cache folder, which outlives an emptied OUT. After every part, however
it ended, its tables are copied to OUT/tables; `python bench/tune.py --merge FILE` puts one into kernels/tables. Tables
of an earlier machine are found in OUT/tables, out/tables of the checkout, and the folder named by --tables.

--plan: its parts, then its spare parts while time is left. --jobs: processes that share the tests of a part
(with pytest-xdist) and compile; measurements always run alone. --minutes: the time for all parts together; a part that
meets its end is stopped, one that would get less than half of its limit isn't begun. --archive: OUT as one file,
rewritten after every part.

--rehearse: run the same parts without a GPU, as far as possible.
Tests that need no GPU run; the bench measures a few small images on the CPU; tuning launches its kernels on a stub
driver that runs nothing; of other parts only the command line is checked. Everything goes to a folder `rehearsal` in
OUT, and nothing in it is a measurement.

The exit status is the number of parts that failed or were not begun. The environment is the running interpreter's;
nothing is downloaded. Where fastres can't be installed, the parts find the checkout by PYTHONPATH.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest_logs
from gpu_parts import PARTS, PLAN_S, PLANS, PYTEST, Part, rehearsed
from worker import PR_SET_PDEATHSIG

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 30
NEEDED = ("torchvision", "triton", "numpy", "tqdm", "pytest", "sklearn", "matplotlib")  # without them parts fail late
REHEARSAL = "rehearsal: no GPU, nothing measured"
# On a machine that others use, too, threads would mostly wait for each other.
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Run:
    """Where the parts write, and what they share."""

    out: Path
    cache: Path
    archive: Path | None
    jobs: int
    rehearsal: bool
    environment: dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; default: all, for hours")
    parser.add_argument("--plan", type=int, choices=PLANS, help="the parts of a plan, and its time")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of logs and summaries")
    parser.add_argument("--cache", type=Path, help="default: $FASTRES_CACHE_DIR, else out/cache of the checkout")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="tables of tiles from an earlier machine")
    jobs = min(14, len(os.sched_getaffinity(0)))
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes for tests and compilation; default: {jobs}")
    parser.add_argument("--minutes", type=float, help="for all parts together; default: no end, of a plan 9.75")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="OUT as one .tar.gz, after every part")
    parser.add_argument("--keep-going", action="store_true", help="run what follows a proof that failed, too")
    parser.add_argument("--rehearse", action="store_true", help="what of the parts a machine without a GPU can run")
    parser.add_argument("--list", action="store_true", help="print the parts and plans with their limits and stop")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    if options.plan and options.parts:
        parser.error(f"--plan {options.plan} has parts of its own; accepted: either of the two")
    if options.minutes is None:
        options.minutes = PLAN_S / 60 if options.plan else math.inf
    if options.jobs < 1 or not options.minutes > 0:
        parser.error(f"--jobs {options.jobs} --minutes {options.minutes}; accepted: jobs from 1, minutes above 0")
    if options.tables and not options.tables.is_dir():
        parser.error(f"--tables {options.tables}: there is no such folder")
    if options.list:
        print(listing(options.plan))
        return 0
    if not (options.rehearse or sees_gpu()):
        parser.error("torch sees no CUDA GPU here; --rehearse runs these parts without one, as far as possible")
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"{', '.join(lacking)} not installed: pip install -e '.[test]'")
    if importlib.util.find_spec("pytest_timeout") is None:
        print("== pytest-timeout is not installed: a test that hangs takes its whole part with it", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `finally` runs
    out = options.out
    cache = options.cache or Path(os.environ.get("FASTRES_CACHE_DIR") or ROOT / "out" / "cache").expanduser()
    if options.rehearse:
        out, cache = out / "rehearsal", out / "rehearsal" / "cache"
    run = Run(
        out.resolve(),
        cache.resolve(),
        options.archive and options.archive.resolve(),
        options.jobs,
        options.rehearse,
        find_fastres(cache.resolve()) | (WITHOUT_GPU if options.rehearse else {}),
    )
    run.out.mkdir(parents=True, exist_ok=True)
    folders = [run.out / "tables", *([options.tables] if options.tables else [])]
    bring_tables([*folders, *([] if run.rehearsal else [ROOT / "out" / "tables"])], run.cache / "tables")
    plan = PLANS.get(options.plan)
    parts, spare = (plan.parts, plan.spare) if plan else (options.parts or PARTS, ())
    failed = run_parts(run, parts, spare, begun + 60 * options.minutes, options.keep_going)
    if run.rehearsal:
        print(f"== {REHEARSAL}")
    print(f"== failed: {', '.join(failed) or 'nothing'}", flush=True)
    return len(failed)


def listing(number: int | None) -> str:
    """The plan of that number, or all parts and plans, with limits."""
    lines = []
    shown = PLANS if number is None else {number: PLANS[number]}
    for n, plan in shown.items():
        seconds = sum(PARTS[name].seconds for name in plan.parts)
        lines.append(f"--plan {n}: {plan.says}; {seconds:.0f} of {PLAN_S} s")
        lines += [f"  {name:24} {PARTS[name].seconds:4.0f} s{PARTS[name].proof * '  a proof'}" for name in plan.parts]
        lines.append(f"  if time is left: {', '.join(plan.spare)}")
    named = PARTS if number is None else [*PLANS[number].parts, *PLANS[number].spare]
    lines.append("")
    for name in named:
        command = shlex.join([*PARTS[name].watch, "python", *PARTS[name].command])
        lines.append(f"{name:24} {PARTS[name].seconds:4.0f} s  {command}")
    return "\n".join(lines)


def sees_gpu() -> bool:
    """Whether torch does; asked in a process of its own, since this one stays to the end."""
    question = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def find_fastres(cache: Path) -> dict[str, str]:
    """What the parts' environment needs to import fastres: nothing where it is or can be installed, editable, without
    index or build isolation, since GPU machines often reach no package index; else a tree of links."""
    if importlib.util.find_spec("fastres") is not None:
        return {}
    command = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    pip = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if pip.returncode == 0:
        return {}
    said = (pip.stderr or pip.stdout).strip().splitlines()
    if sys.version_info < (3, 11):
        sys.exit("\n".join(["fastres isn't installed, and pip can't:", *said]))
    tree = link_tree(cache / "tree")
    print(f"== pip can't install fastres here ({said[-1] if said else 'no word'}): the parts find it in {tree}")
    # Safe: else the folder where a part runs comes first, and the checkout's fastres/ lacks two of the packages.
    paths = [tree, ROOT / "bench", ROOT / "tests" / "helpers", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}


def link_tree(tree: Path) -> Path:
    """A folder for PYTHONPATH that holds fastres as an install would, of links to the checkout, entry points
    included."""
    import tomllib  # since Python 3.11, as PYTHONSAFEPATH

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name, version = (project["project"][field] for field in ("name", "version"))
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / name
    package.mkdir(parents=True)
    for entry in (ROOT / name).iterdir():
        (package / entry.name).symlink_to(entry)
    for dotted, folder in project["tool"]["setuptools"]["package-dir"].items():
        tree.joinpath(*dotted.split(".")).symlink_to(ROOT / folder)
    information = tree / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = [
        f"[{group}]\n" + "".join(f"{point} = {target}\n" for point, target in of_group.items())
        for group, of_group in project["project"]["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(points))
    return tree


def bring_tables(folders: Iterable[Path], there: Path) -> None:
    """Copy to `there` the tables of tiles it lacks. Files that aren't tables would stop every part: they stay."""
    for file in (file for folder in folders for file in sorted(folder.glob("*.json"))):
        if (there / file.name).exists():
            continue
        if why := why_no_table(file):
            print(f"== {file} was not copied: {why}", flush=True)
        else:
            copy(file, there / file.name)
            print(f"== {file} brought to {there}", flush=True)


def why_no_table(file: Path) -> str | None:
    """Why a file isn't a GPU's table of tiles; None where it is one."""
    try:
        content = json.loads(file.read_text())
        gpu, problems = content["gpu"]["name"], content["problems"]
        fields = {"pass", "dtype", "problem", "winner", "tile", "on_load"}
        if not (content["gpu"].keys() >= {"sms", "capability"} and all(row.keys() >= fields for row in problems)):
            return "it lacks fields of a table of tiles"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is no table of tiles ({error!r})"
    if gpu == "rehearsal":
        return "it comes from a rehearsal"
    return None if problems else "it is empty"


def copy(file: Path, to: Path) -> None:
    """In one step: whoever is stopped leaves no half a file."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fresh = to.with_name(f".{to.name}.new")
    shutil.copyfile(file, fresh)
    fresh.replace(to)


def run_parts(run: Run, parts: Iterable[str], spare: Sequence[str], end: float, keep_going: bool) -> list[str]:
    """What failed or was not begun, in words. A spare part that doesn't fit is no failure."""
    failed, unproved = [], None
    for name in (*parts, *spare):
        part, left = PARTS[name], end - time.monotonic()
        if unproved and not keep_going:
            why = f"not begun: {unproved} did not pass"
        elif left < part.seconds / 2:
            why = f"not begun: {max(0, left):.0f} s are left, its limit is {part.seconds:.0f} s"
            if name in spare:
                print(f"== {name} ({why})", flush=True)
                continue
        elif part.watch and shutil.which(part.watch[0]) is None:
            why = f"{part.watch[0]} is not installed"
        elif status := run_part(name, part, run, min(part.seconds, left)):
            why = in_words(status)
        else:
            continue
        failed.append(f"{name} ({why})")
        if part.proof and not unproved:
            unproved = name
    return failed


def command(part: Part, run: Run, limit: float) -> list[str]:
    """The arguments to Python. The last fifteen seconds are for a tuning run to end by itself."""
    values = {"{jobs}": str(run.jobs), "{seconds}": f"{max(0.0, limit - 15):.0f}"}
    given = rehearsed(part.command) if run.rehearsal else part.command
    arguments = [values.get(argument, argument.replace("{out}", str(run.out))) for argument in given]
    if arguments[: len(PYTEST)] != PYTEST:
        return arguments
    if run.jobs > 1 and importlib.util.find_spec("xdist"):  # a kernel that breaks its process takes one worker with it
        arguments += ["-n", str(run.jobs), "--dist", "worksteal", "--max-worker-restart", "100"]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel may hang; the thread ends the process, a signal can't
        arguments += ["--timeout", "120", "--timeout-method", "thread"]
    return arguments


def run_part(name: str, part: Part, run: Run, limit: float) -> int:
    """Run one part and keep what it left; returns its exit status, 124 when it ran out of time."""
    arguments = command(part, run, limit)
    print(f"== {name}: {shlex.join([*part.watch, 'python', *arguments])}", flush=True)
    if run.rehearsal and arguments[-1] == "--help":
        print(f"== {name} needs CUDA; only its command line is read", flush=True)
    start, status = time.monotonic(), 143  # that of a part which ends with this process
    try:
        status = execute(arguments, part.watch, run, run.out / f"{name}.log", limit)
    finally:
        keep(name, [*part.watch, "python", *arguments], status, time.monotonic() - start, limit, run)
    return status


def execute(arguments: list[str], watch: Sequence[str], run: Run, log: Path, limit: float) -> int:
    """The exit status of Python with these arguments, which writes to `log`."""
    environment = {"PYTHONUNBUFFERED": "1"}
    if "-n" in arguments:  # else each of Inductor's users among the tests has processes for every CPU
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if watch:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    # What a part leaves in its temporary folder when it is killed, such as images of a batch, goes with the folder.
    with TemporaryDirectory(prefix="fastres-part-", ignore_cleanup_errors=True) as scratch, log.open("w") as sink:
        process = subprocess.Popen(
            [*watch, sys.executable, *arguments],
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment | os.environ | run.environment | {"FASTRES_CACHE_DIR": str(run.cache), "TMPDIR": scratch},
            preexec_fn=tie,
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            stop(process)


def tie() -> None:
    """In the part's process: its workers are stopped with it, and if this process is killed, so is the part."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: subprocess.Popen) -> None:
    """End what is left of the process and of those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver that hangs holds even a killed process
        process.wait(timeout=10)


def in_words(status: int) -> str:
    if status < 0:
        return f"killed by signal {-status}"
    return "out of time" if status == 124 else f"exit {status}"


def keep(name: str, command: list[str], status: int, seconds: float, limit: float, run: Run) -> None:
    """Save the tables first: they took longest. Then write and print the part's summary, the record of tests and the
    archive. An error here is printed and affects no other part."""
    try:
        for file in sorted((run.cache / "tables").glob("*.json")):
            copy(file, run.out / "tables" / file.name)
        tail = (run.out / f"{name}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:]
        summary = {"part": name, "command": command, "status": status, "seconds": round(seconds, 1)}
        summary |= {"limit": round(limit), "tail": tail} | ({"rehearsal": REHEARSAL} if run.rehearsal else {})
        if PARTS[name].watch:
            summary["reported"] = reported((run.out / f"{name}.log").read_text(errors="replace"))
            tail.append(f"== reported, lines by kernel: {json.dumps(summary['reported'])}")
        (run.out / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
        title = f"{name} ({REHEARSAL})" if run.rehearsal else name
        print("\n".join(tail), f"\n== {title}: {in_words(status)} after {seconds:.1f} s", flush=True)
        if name.startswith("tests-"):
            write_proof(run.out)
        if run.archive:
            pack(run.out, run.cache, run.archive)
    except Exception as error:
        print(f"== not all of {name} is kept: {error!r}", flush=True)


def reported(log: str) -> dict[str, int]:
    """How many lines of a sanitizer's name each kernel."""
    return dict(Counter(re.findall(r"^=========.*?(\w+_kernel)\b", log, re.MULTILINE)).most_common())


def write_proof(out: Path) -> None:
    """OUT/tests.md, of the logs that hold results."""
    logs = []
    for log in sorted(out.glob("tests-*.log")):
        with suppress(ValueError):
            pytest_logs.read(log)
            logs.append(str(log))
    if logs:
        try:
            pytest_logs.main([*logs, "--record", str(out / "tests.md")])
        except SystemExit:  # it has said why
            print("== no new tests.md: the logs don't make one record", flush=True)


def pack(out: Path, cache: Path, file: Path) -> None:
    """OUT as one compressed file, without what was built or rehearsed there."""
    fresh = file.with_name(f".{file.name}.new")
    left_out = {cache, file, fresh, out / "rehearsal"}

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if out.parent / member.name in left_out else member

    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fresh, "w:gz") as packed:
        packed.add(out, arcname=out.name, filter=wanted)
    fresh.replace(file)


if __name__ == "__main__":
    sys.exit(main())
