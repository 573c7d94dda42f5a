"""The options that `train` and `experiment` share, and types for numeric options."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from pathlib import Path


def add_whole(group: argparse._ActionsContainer, flag: str, least: int, help: str, default: int | None = None) -> None:
    """Add an option whose value is a whole number of at least `least`."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}: got {text}")

    group.add_argument(flag, type=number, default=default, metavar="N", help=help)


def positive(text: str) -> float:
    """Convert an argument to a finite number above 0, as a `type` of argparse."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite number above 0: got {text}")


def add_images(group: argparse._ActionsContainer) -> None:
    """Add the options for where the images are and which of them are used for validation."""
    group.add_argument(
        "--root", type=Path, metavar="DIR", help="folder of the images (default: none; digits and synthetic need none)"
    )
    group.add_argument("--download", action="store_true", help="download CIFAR to --root")
    add_whole(
        group,
        "--holdout",
        0,
        "validate on this many of the training images; 5000 is the paper's 45k/5k split of CIFAR-10 (default: 0, which "
        "validates on the test or validation images)",
        default=0,
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder where mean images are cached (default: $FASTRES_CACHE_DIR, else ~/.cache/fastres)",
    )


def add_device(group: argparse._ActionsContainer) -> None:
    """Add --device and --dtype."""
    group.add_argument("--device", help="cpu, cuda or cuda:<number> (default: a GPU if there is one)")
    group.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="fp32, or autocast to bf16 or fp16 (default: bf16 on a GPU, fp32 on a CPU)",
    )
