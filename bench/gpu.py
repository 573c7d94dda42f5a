"""Run everything that needs a GPU, in parts with time limits, or in plans of ten minutes.

    python bench/gpu.py --list
    python bench/gpu.py --plan 1 --jobs 14 --archive gpu-1.tar.gz
    python bench/gpu.py --jobs 14 status tests-kernels tune-50
    python bench/gpu.py --plan 1 --rehearse

Each part writes OUT/<part>.log while it runs and OUT/<part>.json when it ends: command, exit status, seconds, last
lines. A part that fails, dies or hangs does not affect the others: at its limit it is killed with all processes that it
started. The exception is a proof, a part without which later measurements are worthless: if a proof fails, the parts
after it are not started (--keep-going starts them anyway).

OUT/tests.md is the record of all parts that are tests (bench/pytest_logs.py). OUT/record.json is the record of the
`bench-*` parts; rows that can't be compared with the earlier ones go to OUT/record-2.json. Plan 1 writes its rows to
OUT/first.json.

Tables of tiles and built extensions are stored in the cache folder, which is not part of OUT. After every part, even
one that failed, its tables are copied to OUT/tables. `python bench/tune.py --merge FILE` puts a table into
kernels/tables. Tables of an earlier machine are read from OUT/tables, from out/tables of the checkout, and from the
folder given by --tables.

--plan: run the plan's parts, then its spare parts while time is left. --jobs: number of processes that share a part's
tests (with pytest-xdist) and that compile. Measurements always run alone. --minutes: time for all parts together. A
part that is still running when it is over is stopped, and a part that would get less than half of its limit is not
started. --archive: pack OUT into one file, again after every part.

--rehearse: run the same parts without a GPU, as far as that is possible. Tests that need no GPU run. The bench measures
a few small images on the CPU. Tuning launches its kernels on a stub driver that runs nothing. For other parts only the
command line is checked. Everything is written to OUT/rehearsal, and nothing in it is a measurement.

The exit status is the number of parts that failed or were not started. Parts run in the environment of this
interpreter, and nothing is downloaded. If fastres can't be installed, the parts find the checkout through PYTHONPATH.
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
# Packages without which parts would fail late.
NEEDED = ("torchvision", "triton", "numpy", "tqdm", "pytest", "sklearn", "matplotlib")
REHEARSAL = "rehearsal: no GPU, nothing measured"
# A rehearsal may share its machine with other work, and threads would then mostly wait for each other.
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Run:
    """Where the parts write, and the settings they share. environment: variables to add to this process's own."""

    out: Path
    cache: Path
    archive: Path | None
    jobs: int
    rehearsal: bool
    environment: dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and return how many failed or were not started."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; default: all, which takes hours")
    parser.add_argument("--plan", type=int, choices=PLANS, help="run the parts of a plan, within its time")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for logs and summaries")
    parser.add_argument("--cache", type=Path, help="default: $FASTRES_CACHE_DIR, else out/cache of the checkout")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="tables of tiles from an earlier machine")
    jobs = min(14, len(os.sched_getaffinity(0)))
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes for tests and compilation; default: {jobs}")
    parser.add_argument("--minutes", type=float, help="time for all parts; default: no limit, 9.75 for a plan")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="pack OUT into one .tar.gz, after every part")
    parser.add_argument("--keep-going", action="store_true", help="also run the parts after a proof that failed")
    parser.add_argument("--rehearse", action="store_true", help="run what is possible without a GPU")
    parser.add_argument("--list", action="store_true", help="print the parts and plans with their limits, and exit")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    if options.plan and options.parts:
        parser.error(f"give either names of parts or --plan {options.plan}, not both")
    if options.minutes is None:
        options.minutes = PLAN_S / 60 if options.plan else math.inf
    if options.jobs < 1 or not options.minutes > 0:
        parser.error(
            f"--jobs must be at least 1 and --minutes greater than 0: got {options.jobs} and {options.minutes}"
        )
    if options.tables and not options.tables.is_dir():
        parser.error(f"--tables {options.tables}: there is no such folder")
    if options.list:
        print(listing(options.plan))
        return 0
    if not (options.rehearse or sees_gpu()):
        parser.error("torch sees no CUDA GPU; --rehearse runs these parts without one, as far as that is possible")
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"{', '.join(lacking)} not installed: pip install -e '.[test]'")
    if importlib.util.find_spec("pytest_timeout") is None:
        print("== pytest-timeout is not installed: a test that hangs uses up the time of its whole part", flush=True)
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
    """Return the plan with that number, or all parts and plans, with limits."""
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
    """Return whether torch sees a GPU. A child process asks, so that this process, which runs to the end, doesn't start
    CUDA."""
    question = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def find_fastres(cache: Path) -> dict[str, str]:
    """Return the environment variables with which the parts can import fastres.

    There are none if fastres is installed or can be installed now. It is installed in editable mode, without package
    index or build isolation, because GPU machines often reach no index. Otherwise the variables point to a tree of
    links.
    """
    if importlib.util.find_spec("fastres") is not None:
        return {}
    command = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    pip = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if pip.returncode == 0:
        return {}
    messages = (pip.stderr or pip.stdout).strip().splitlines()
    if sys.version_info < (3, 11):
        sys.exit("\n".join(["fastres isn't installed, and pip can't install it:", *messages]))
    tree = link_tree(cache / "tree")
    print(
        f"== pip can't install fastres here ({messages[-1] if messages else 'no message'}): the parts find it in {tree}"
    )
    # PYTHONSAFEPATH: otherwise the folder in which a part runs would come first, and the checkout's fastres/ lacks two
    # of the packages.
    paths = [tree, ROOT / "bench", ROOT / "tests" / "helpers", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}


def link_tree(tree: Path) -> Path:
    """Make a folder for PYTHONPATH that contains fastres as an installation would, entry points included, as links to
    the checkout."""
    import tomllib  # new in Python 3.11, like PYTHONSAFEPATH

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name = project["project"]["name"]
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / name / "__init__.py").read_text(), re.MULTILINE)
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
    """Copy the tables of tiles that are missing in the folder `there` from `folders`, of which earlier ones take
    precedence. Files that aren't tables are skipped, since they would stop every part."""
    for file in (file for folder in folders for file in sorted(folder.glob("*.json"))):
        if (there / file.name).exists():
            continue
        if why := why_no_table(file):
            print(f"== {file} was not copied: {why}", flush=True)
        else:
            copy(file, there / file.name)
            print(f"== {file} copied to {there}", flush=True)


def why_no_table(file: Path) -> str | None:
    """Return why a file isn't a GPU's table of tiles, or None if it is."""
    try:
        content = json.loads(file.read_text())
        gpu, problems = content["gpu"]["name"], content["problems"]
        fields = {"pass", "dtype", "problem", "winner", "tile", "on_load"}
        if not (content["gpu"].keys() >= {"sms", "capability"} and all(row.keys() >= fields for row in problems)):
            return "it lacks fields of a table of tiles"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is not a table of tiles ({error!r})"
    if gpu == "rehearsal":
        return "it comes from a rehearsal"
    return None if problems else "it is empty"


def copy(file: Path, to: Path) -> None:
    """Copy a file atomically, so that an interrupted copy leaves no partial file."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fresh = to.with_name(f".{to.name}.new")
    shutil.copyfile(file, fresh)
    fresh.replace(to)


def run_parts(run: Run, parts: Iterable[str], spare: Sequence[str], end: float, keep_going: bool) -> list[str]:
    """Run the parts and return the names and reasons of those that failed or were not started. A spare part for which
    no time is left is not a failure."""
    failed, unproved = [], None
    for name in (*parts, *spare):
        part, left = PARTS[name], end - time.monotonic()
        if unproved and not keep_going:
            why = f"not started: {unproved} did not pass"
        elif left < part.seconds / 2:
            why = f"not started: {max(0, left):.0f} s are left, its limit is {part.seconds:.0f} s"
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
    """Return the arguments to Python. A tuning run gets 15 seconds less than the limit, so that it can end normally."""
    values = {"{jobs}": str(run.jobs), "{seconds}": f"{max(0.0, limit - 15):.0f}"}
    template = rehearsed(part.command) if run.rehearsal else part.command
    arguments = [values.get(argument, argument.replace("{out}", str(run.out))) for argument in template]
    if arguments[: len(PYTEST)] != PYTEST:
        return arguments
    if run.jobs > 1 and importlib.util.find_spec("xdist"):  # a kernel that breaks its process costs a single worker
        arguments += ["-n", str(run.jobs), "--dist", "worksteal", "--max-worker-restart", "100"]
    # A kernel may hang: only a thread can end the process then, not a signal.
    if importlib.util.find_spec("pytest_timeout"):
        arguments += ["--timeout", "120", "--timeout-method", "thread"]
    return arguments


def run_part(name: str, part: Part, run: Run, limit: float) -> int:
    """Run one part, save its results and return its exit status, 124 if it ran out of time."""
    arguments = command(part, run, limit)
    print(f"== {name}: {shlex.join([*part.watch, 'python', *arguments])}", flush=True)
    if run.rehearsal and arguments[-1] == "--help":
        print(f"== {name} needs CUDA; only its command line is checked", flush=True)
    start, status = time.monotonic(), 143  # the status if this process is terminated
    try:
        status = execute(arguments, part.watch, run, run.out / f"{name}.log", limit)
    finally:
        keep(name, [*part.watch, "python", *arguments], status, time.monotonic() - start, limit, run)
    return status


def execute(arguments: list[str], watch: Sequence[str], run: Run, log: Path, limit: float) -> int:
    """Run Python with these arguments, write its output to `log` and return the exit status, 124 if it ran out of
    time."""
    environment = {"PYTHONUNBUFFERED": "1"}
    if "-n" in arguments:  # otherwise every test that uses Inductor starts a process per CPU
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if watch:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    # Temporary files of a killed part, such as images of a batch, are removed with the folder.
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
    """Prepare the part's process: it leads a process group, so that its children are stopped with it, and it is killed
    if this process dies."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: subprocess.Popen) -> None:
    """Kill the process and all processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a hanging driver can delay even a killed process
        process.wait(timeout=10)


def in_words(status: int) -> str:
    """Describe an exit status."""
    if status < 0:
        return f"killed by signal {-status}"
    return "out of time" if status == 124 else f"exit {status}"


def keep(name: str, command: list[str], status: int, seconds: float, limit: float, run: Run) -> None:
    """Save what a part left: first the tables, which took longest, then its summary, the record of tests and the
    archive.

    Prints the summary. An error here is printed and affects no other part.
    """
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
        print(f"== not all results of {name} could be saved: {error!r}", flush=True)


def reported(log: str) -> dict[str, int]:
    """Count the lines of a sanitizer's log that name each kernel."""
    return dict(Counter(re.findall(r"^=========.*?(\w+_kernel)\b", log, re.MULTILINE)).most_common())


def write_proof(out: Path) -> None:
    """Write OUT/tests.md from the logs that contain results."""
    logs = []
    for log in sorted(out.glob("tests-*.log")):
        with suppress(ValueError):
            pytest_logs.read(log)
            logs.append(str(log))
    if logs:
        try:
            pytest_logs.main([*logs, "--record", str(out / "tests.md")])
        except SystemExit:  # pytest_logs has printed the reason
            print("== tests.md is not updated: the logs can't be combined into one record", flush=True)


def pack(out: Path, cache: Path, file: Path) -> None:
    """Pack OUT into a compressed archive, without the cache folder and the rehearsal."""
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
