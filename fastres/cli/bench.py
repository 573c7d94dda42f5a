"""`python -m fastres bench`: replace this process by bench/run.py, which then gets all signals and sets the status."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import fastres


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: bench/run.py parses all arguments itself."""


def run(args: argparse.Namespace) -> int:
    """Run bench/run.py with all arguments. Returns 2, with a message on stderr, if this isn't a checkout."""
    root = Path(fastres.__file__).resolve().parent.parent
    script = root / "bench" / "run.py"
    if not (script.is_file() and (root / "pyproject.toml").is_file()):
        why = "the bench is not part of the installed package; clone fastres's repository and run python bench/run.py"
        print(f"python -m fastres bench: {why}", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, str(script), *args.arguments])
