"""Which tile a kernel runs with: a frozen dataclass, a small analytical heuristic, measured tables per GPU.

A table (`tables/<gpu>.json`, written by `bench/tune.py`) wins over the heuristic. Nothing here times anything:
autotuning inside a CUDA-graph capture would kill the capture.
"""

from __future__ import annotations

from dataclasses import dataclass

from .problem import ConvProblem


@dataclass(frozen=True)
class Tile:
    """One specialisation of a conv kernel.

    BM: channels per tile, BN: pixels per tile, BK: reduction step, all in elements; `warps` per program, `stages` of
    the software pipeline; box: how BN pixels are cut out of [N, P, Q] as (TN, TH, TW), or None for the gather kernel,
    which takes BN consecutive pixels.

    wgrad: BM filters, BN channels of one filter tap, BK pixels per step and in a box; splits: parts the pixels are cut
    into, each summed by programs of its own; taps: neighbouring filter taps per program.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    box: tuple[int, int, int] | None = None
    splits: int = 1
    taps: int = 1


def dgrad_tile(problem: ConvProblem, itemsize: int, tma: bool) -> Tile:
    """Tile of `conv_dgrad`: BM input channels, BN input pixels."""
    return Tile(64, 128, 64, 4, 3)


def wgrad_tile(problem: ConvProblem, itemsize: int, tma: bool, sms: int) -> Tile:
    """Tile of `conv_wgrad`."""
    return Tile(64, 64, 64, 4, 3, splits=4)
