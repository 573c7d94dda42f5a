"""`python -m fastres status`: show what this machine runs fused, and why."""

from __future__ import annotations

import argparse

import fastres


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    print(fastres.status())
    return 0
