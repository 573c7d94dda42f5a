"""`python -m fastres bench`: bench/run.py takes this process's place, so that exit status and signals are its own."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import fastres


def arguments(parser: argparse.ArgumentParser) -> None:
    """They are bench/run.py's, which reads them all itself."""


def run(args: argparse.Namespace) -> int:
    root = Path(fastres.__file__).resolve().parent.parent
    script = root / "bench" / "run.py"
    if not (script.is_file() and (root / "pyproject.toml").is_file()):
        why = "the bench is not installed with the package; clone fastres's repository and run python bench/run.py"
        print(f"python -m fastres bench: {why}", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, str(script), *args.arguments])
