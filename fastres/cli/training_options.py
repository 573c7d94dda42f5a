"""Options that `train` and `experiment` share, and the numbers that they take."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from pathlib import Path


def add_whole(group: argparse._ActionsContainer, flag: str, least: int, help: str, default: int | None = None) -> None:
    """An option whose value is a whole number from `least`."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text}: any whole number from {least} is accepted")

    group.add_argument(flag, type=number, default=default, metavar="N", help=help)


def positive(text: str) -> float:
    """For argparse: a number above 0."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: any number above 0 is accepted")


def add_images(group: argparse._ActionsContainer) -> None:
    """Where the training images are, and which of them validate."""
    group.add_argument("--root", type=Path, metavar="DIR", help="where the images are (default: digits need none)")
    group.add_argument("--download", action="store_true", help="fetch CIFAR to --root")
    add_whole(
        group,
        "--holdout",
        0,
        "validate on so many of the training images; the paper's 45k/5k split: 5000 (default: 0, on the test or "
        "validation images)",
        default=0,
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where mean images are kept (default: $FASTRES_CACHE_DIR, else ~/.cache/fastres)",
    )


def add_device(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", help="cpu, cuda or cuda:<number> (default: a GPU where there is one)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, fp32 on a CPU")
