"""Everything that needs a GPU, in parts of at most eight minutes that can be run singly.

    python bench/gpu.py --list
    python bench/gpu.py --out out tests-conv bench-infer-50

Each part writes OUT/<part>.log as it goes and OUT/<part>.json when it ends: command, exit status, seconds, last lines.
The exit status is the number of parts that failed. The environment is the running interpreter's; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 480
TAIL_LINES = 30

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
BENCH = ["bench/run.py", "--resume", "--json", "{out}/record.json"]  # one record that all parts add to
KERNEL_TESTS = ("conv", "pointwise", "compile", "inference", "training", "binary")
PARTS: dict[str, list[str]] = {
    "status": ["-m", "fastres", "status"],
    "tests-nets": [*PYTEST, "tests", *(f"--ignore-glob=*{part}*" for part in KERNEL_TESTS)],
    "tests-fprop": [*PYTEST, "tests/test_conv_fprop.py"],
    "tests-backward": [*PYTEST, "tests/test_conv_backward.py"],
    "tests-pointwise": [*PYTEST, "tests/test_pointwise.py"],
    "tests-inference": [*PYTEST, "tests/test_inference.py"],
    "tests-training": [*PYTEST, "tests/test_training.py"],
    "tests-compile": [*PYTEST, "tests/test_compile.py"],
    "kernels-50": ["bench/kernels.py", "--depth", "50", "--csv", "{out}/kernels-50.csv"],
    "kernels-18": ["bench/kernels.py", "--depth", "18", "--csv", "{out}/kernels-18.csv"],
    "tune-50": ["bench/tune.py", "--depth", "50", "--ship"],
    "tune-all": ["bench/tune.py", "--depth", "all", "--ship"],
    "bench-infer-50": [*BENCH, "--depth", "50", "--mode", "infer"],
    "bench-infer-50-batch-1": [*BENCH, "--depth", "50", "--mode", "infer", "--batch", "1"],
    "bench-train-50": [*BENCH, "--depth", "50", "--mode", "train"],
    "bench-infer-all": [*BENCH, "--depth", "all", "--mode", "infer"],
    "bench-train-all": [*BENCH, "--depth", "all", "--mode", "train"],
    "ablate-50": ["bench/ablate.py", "--depth", "50", "--json", "{out}/ablate-50.json"],
    "degradation": ["-m", "fastres", "experiment", "degradation", "--out", "{out}/degradation"],
    "shortcut": [*PYTEST, "bench/shortcut.py", "--benchmark-only"],
}


def ensure_installed() -> None:
    """An editable install without index or build isolation: GPU machines often reach no package index."""
    if importlib.util.find_spec("fastres") is None:
        command = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
        subprocess.run([sys.executable, *command], check=True)


def run_part(name: str, out: Path) -> int:
    """Run one part, streaming to the log and the terminal; returns its exit status, 124 when it ran out of time."""
    arguments = [argument.replace("{out}", str(out)) for argument in PARTS[name]]
    log = out / f"{name}.log"
    print(f"== {name}: python {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, env=os.environ
        )
        try:
            status = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 124
    tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    summary = {
        "part": name,
        "command": ["python", *arguments],
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "tail": tail,
    }
    (out / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join(tail), f"\n== {name}: exit {status} after {summary['seconds']} s", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; default: all, in order")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of logs and summaries")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    if options.list:
        for name, arguments in PARTS.items():
            print(f"{name:24} python {' '.join(arguments)}")
        return 0
    ensure_installed()
    options.out.mkdir(parents=True, exist_ok=True)
    return sum(run_part(part, options.out.resolve()) != 0 for part in options.parts or PARTS)


if __name__ == "__main__":
    sys.exit(main())
