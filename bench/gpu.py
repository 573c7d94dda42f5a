"""Everything that needs a GPU, in parts of at most eight minutes that can be run singly.

    python bench/gpu.py --list
    python bench/gpu.py --jobs 14 status tests-kernels tests-nets tune-50
    python bench/gpu.py --minutes 9 --archive gpu.tar.gz bench-infer-50 bench-train-50

`python bench/proof.py OUT/tests-*.log --record FILE` makes one record of the parts that are tests.

Each part writes OUT/<part>.log as it goes and OUT/<part>.json when it ends: command, exit status, seconds, last lines.
Tables of tiles and built extensions lie in OUT/cache, where the parts after `tune-*` find them; to ship a table, copy
it from OUT/cache/tables to kernels/tables. The record of all `bench-*` parts is OUT/record.json.

--jobs: processes that share the tests of a part (with pytest-xdist) and compile; measurements always run alone.
--minutes: the time for all parts together; a part that meets its end is stopped, one that would get less than a minute
isn't begun. --archive: OUT as one file, rewritten after every part.

The exit status is the number of parts that failed or were not begun. The environment is the running interpreter's;
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S, LEAST_S = 480, 60
TAIL_LINES = 30

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "-v", "--tb=short", "--continue-on-collection-errors"]
PYTEST += ["-m", "not slow"]  # the extra cases, too; a later -m takes its place
KERNELS = [f"tests/test_{name}.py" for name in ("conv_fprop", "conv_backward", "pointwise", "bottleneck")]
NETS = [f"tests/test_{name}.py" for name in ("training", "inference", "registered", "compile")]
OTHERS = ["tests", *(f"--ignore={file}" for file in (*KERNELS, *NETS))]
ON_GPU = "(gpu or interpret) and not slow"
BENCH = ["bench/run.py", "--resume", "--json", "{out}/record.json"]  # one record that all parts add to
TIMELINE = ["bench/timeline.py", "--net", "resnet50"]
# Ours and the strongest peers first: a part that is stopped has them. max-autotune compiles for minutes.
INFER = (
    "fastres-optimize,fastres,eager-channels-last,inductor,reduce-overhead,fastres-compile,fastres-inductor,"
    "cudagraphs,timm,timm-inductor,eager,aot-eager"
)
TRAIN = (
    "fastres,fastres-graph,eager-graph,eager-channels-last,inductor,fastres-compile,timm,timm-inductor,reduce-overhead,"
    "cudagraphs,eager"
)
GRAPHS = "fastres-graph,eager-graph,fastres,eager-channels-last,reduce-overhead"
AUTOTUNE = "max-autotune,max-autotune-no-cudagraphs"
PARTS: dict[str, list[str]] = {
    "status": ["-m", "fastres", "status"],
    "tests-tiles-50": [*PYTEST, *KERNELS[:2], "-k", "every_tile and bfloat16 and not resnet18 and not resnext"],
    "tests-kernels": [*PYTEST, *KERNELS, "-k", "not every_tile"],
    "tests-nets": [*PYTEST, *NETS, "-m", ON_GPU],
    "tests-gpu": [*PYTEST, *OTHERS, "-m", ON_GPU],
    "tune-50": ["bench/tune.py", "--depth", "50", "--jobs", "{jobs}", "--seconds", "{seconds}"],
    "bench-infer-50": [*BENCH, "--depth", "50", "--mode", "infer", "--backend", INFER],
    "bench-train-50": [*BENCH, "--depth", "50", "--mode", "train", "--backend", TRAIN],
    "timeline-train-50": [
        *TIMELINE,
        "--mode",
        "train",
        "--backend",
        "fastres-graph",
        "--csv",
        "{out}/timeline-train.csv",
    ],
    "timeline-infer-50": [
        *TIMELINE,
        "--mode",
        "infer",
        "--backend",
        "fastres-optimize",
        "--csv",
        "{out}/timeline-infer.csv",
    ],
    "passes": ["bench/passes.py"],
    "hopper": ["bench/hopper.py", "--markdown", "{out}/hopper.md"],
    "ablate-50": ["bench/ablate.py", "--depth", "50", "--seconds", "5", "--json", "{out}/ablate-50.json"],
    "bench-infer-50-batch-1": [*BENCH, "--depth", "50", "--mode", "infer", "--batch", "1", "--backend", INFER],
    "bench-train-50-batch-32": [*BENCH, "--depth", "50", "--mode", "train", "--batch", "32", "--backend", TRAIN],
    "bench-cifar": [*BENCH, "--net", "cifar-20,cifar-110", "--mode", "train", "--batch", "128", "--backend", GRAPHS],
    "bench-option-a": [*BENCH, "--net", "paper-34-A", "--mode", "train", "--backend", f"{GRAPHS},inductor"],
    "bench-cifar-1202": [*BENCH, "--net", "cifar-1202", "--mode", "train", "--batch", "32", "--backend", GRAPHS],
    "tests-memory": [*PYTEST, *KERNELS, "-k", "features or every_problem or single_pixels"],
    "tests-tiles": [*PYTEST, *KERNELS, "-k", "every_tile"],
    "bench-infer-50-autotune": [*BENCH, "--depth", "50", "--mode", "infer", "--backend", AUTOTUNE],
    "bench-train-50-autotune": [*BENCH, "--depth", "50", "--mode", "train", "--backend", AUTOTUNE],
    "kernels-50": ["bench/kernels.py", "--depth", "50", "--csv", "{out}/kernels-50.csv"],
    "kernels-18": ["bench/kernels.py", "--depth", "18", "--csv", "{out}/kernels-18.csv"],
    "tune-all": ["bench/tune.py", "--depth", "all", "--jobs", "{jobs}", "--seconds", "{seconds}"],
    "bench-infer-all": [*BENCH, "--depth", "all", "--mode", "infer"],
    "bench-train-all": [*BENCH, "--depth", "all", "--mode", "train"],
    "bench-infer-all-batch-32": [*BENCH, "--depth", "all", "--mode", "infer", "--batch", "32"],
    "bench-infer-all-batch-1": [*BENCH, "--depth", "all", "--mode", "infer", "--batch", "1"],
    "bench-train-all-batch-32": [*BENCH, "--depth", "all", "--mode", "train", "--batch", "32"],
    "degradation": ["-m", "fastres", "experiment", "degradation", "--out", "{out}/degradation"],
    "tests-others": [*PYTEST, "tests", "-m", "not gpu and not interpret and not slow"],
    "shortcut": ["-m", "pytest", "-p", "no:cacheprovider", "bench/shortcut.py", "--benchmark-only"],
}


# Every access of every kernel is checked there, and no allocation hides in a larger one.
SANITIZED = {"tests-memory": ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "9"]}


def sees_gpu() -> bool:
    """Whether torch does; asked in a process of its own, since this one stays to the end."""
    question = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def ensure_installed() -> None:
    """An editable install without index or build isolation: GPU machines often reach no package index."""
    if importlib.util.find_spec("fastres") is None:
        command = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
        subprocess.run([sys.executable, *command], check=True)


def command(part: str, out: Path, jobs: int, limit: float) -> list[str]:
    """The arguments to Python. The last fifteen seconds are for a tuning run to end by itself."""
    values = {"{jobs}": str(jobs), "{seconds}": f"{max(0.0, limit - 15):.0f}"}
    arguments = [values.get(argument, argument.replace("{out}", str(out))) for argument in PARTS[part]]
    if arguments[: len(PYTEST)] != PYTEST:
        return arguments
    if jobs > 1 and importlib.util.find_spec("xdist"):  # a kernel that breaks its process takes one worker with it
        arguments += ["-n", str(jobs), "--dist", "worksteal", "--max-worker-restart", "100"]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel may hang; the thread ends the process, a signal can't
        arguments += ["--timeout", "240", "--timeout-method", "thread"]
    return arguments


def run_part(part: str, out: Path, jobs: int, limit: float) -> int:
    """Run one part, streaming to its log; returns its exit status, 124 when it ran out of time."""
    arguments, watch = command(part, out, jobs, limit), SANITIZED.get(part, [])
    log = out / f"{part}.log"
    print(f"== {part}: {' '.join([*watch, 'python', *arguments])}", flush=True)
    start = time.monotonic()
    environment = {"FASTRES_CACHE_DIR": str(out / "cache"), "PYTHONUNBUFFERED": "1"}
    if "-n" in arguments:  # else each of Inductor's users among the tests has processes for every CPU
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if watch:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    environment |= os.environ
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*watch, sys.executable, *arguments],
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=os.setpgrp,  # its workers are stopped with it
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            stop(process)
    tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    summary = {
        "part": part,
        "command": [*watch, "python", *arguments],
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "tail": tail,
    }
    (out / f"{part}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join(tail), f"\n== {part}: exit {status} after {summary['seconds']} s", flush=True)
    return status


def stop(process: subprocess.Popen) -> None:
    """End what is left of the process and of those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def archive(out: Path, file: Path) -> None:
    """OUT as one compressed file, without what was built there."""

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        built = "/cache/" in f"/{member.name}/" and "/cache/tables" not in f"/{member.name}"
        return member if member.isdir() or not built else None

    fresh = file.with_name(f".{file.name}.new")
    with tarfile.open(fresh, "w:gz") as packed:
        packed.add(out, arcname=out.name, filter=wanted)
    fresh.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; default: all, in order")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of logs and summaries")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share tests and compile; default: 1")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all parts together; default: no end")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="OUT as one .tar.gz, after every part")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    if options.jobs < 1 or not options.minutes > 0:
        parser.error(f"--jobs {options.jobs} --minutes {options.minutes}; accepted: jobs from 1, minutes above 0")
    if options.list:
        for name, arguments in PARTS.items():
            print(f"{name:24} {' '.join([*SANITIZED.get(name, []), 'python', *arguments])}")
        return 0
    if not sees_gpu():
        parser.error("torch sees no CUDA GPU here, and nothing of this can be run or confirmed without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `stop`
    end = time.monotonic() + 60 * options.minutes
    ensure_installed()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in options.parts or PARTS:
        left = end - time.monotonic()
        if left < LEAST_S:
            failed.append(f"{part} (not begun)")
            continue
        if part in SANITIZED and shutil.which(SANITIZED[part][0]) is None:
            failed.append(f"{part} ({SANITIZED[part][0]} is not installed)")
            continue
        if status := run_part(part, out, options.jobs, min(LIMIT_S, left)):
            failed.append(f"{part} (exit {status})")
        if options.archive:
            archive(out, options.archive.resolve())
    print(f"== failed: {', '.join(failed) or 'nothing'}", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
