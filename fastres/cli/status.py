"""`python -m fastres status`: what this machine runs fused, and why."""

from __future__ import annotations

import argparse

import fastres


def arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    print(fastres.status())
    return 0
