"""Calibration: collect the range of each value of a plan, batch by batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_BINS = 8192  # histogram bins on each side of 0


class Ranges:
    """The range of each named value: its minimum and maximum, or a range that leaves out the outermost elements.

    percentile: at least this percentage of the elements is at or below the upper end, and at least the same percentage
    is at or above the lower end. 100 gives the minimum and maximum. Below 100 the ends come from a histogram and are
    edges of its bins, which are at most 1/4096 of the largest magnitude wide, so a range is too wide by at most that
    much at each end. Raises ValueError if percentile is not above 0 and at most 100.
    """

    def __init__(self, percentile: float) -> None:
        if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
            raise ValueError(f"percentile must be a number above 0 and at most 100, got {percentile!r}")
        self.percentile = float(percentile)
        self._extremes: dict[str, Tensor] = {}  # [2]: minimum and maximum
        self._histograms: dict[str, _Histogram] = {}

    def include(self, name: str, value: Any) -> None:
        """Add one batch of the value `name` to its range. Anything but a non-empty [N, H, W, C] tensor is ignored."""
        if not (isinstance(value, Tensor) and value.dim() == 4 and value.numel()):
            return
        low, high = (end.float() for end in value.aminmax())
        if name in self._extremes:
            low, high = torch.minimum(low, self._extremes[name][0]), torch.maximum(high, self._extremes[name][1])
        self._extremes[name] = torch.stack((low, high))
        if self.percentile < 100 and self._extremes[name].isfinite().all():
            self._histograms.setdefault(name, _Histogram()).add(value.float(), float(self._extremes[name].abs().max()))

    def ends(self) -> dict[str, tuple[float, float]]:
        """Return the range (lower, upper) of each value.

        Raises ValueError if nothing was included, or if a minimum or maximum is not finite.
        """
        if not self._extremes:
            raise ValueError("calibration is empty; pass at least one non-empty input batch")
        extremes: dict[str, tuple[float, float]] = {
            name: (float(ends[0]), float(ends[1])) for name, ends in self._extremes.items()
        }
        if bad := [name for name, ends in extremes.items() if not all(map(math.isfinite, ends))]:
            raise ValueError(f"calibration: the outputs of {', '.join(bad[:5])} are not finite")
        if self.percentile == 100:
            return extremes
        return {
            name: (
                max(low, self._histograms[name].end(self.percentile, -1)),
                min(high, self._histograms[name].end(self.percentile, 1)),
            )
            for name, (low, high) in extremes.items()
        }


class _Histogram:
    """A histogram of 2 `_BINS` bins of equal width, centred on 0. The width doubles when an element does not fit."""

    def __init__(self) -> None:
        self.reach = 0.0  # outer edge of the last bin; a power of two, so that all edges are exact
        self.counts = torch.zeros(2 * _BINS, dtype=torch.float64)

    def add(self, x: Tensor, largest: float) -> None:
        """Count the elements of x (float32). largest: an upper bound on |x| here and in all earlier calls."""
        if largest == 0:  # the bins have no width yet
            self.counts[_BINS] += x.numel()
            return
        if self.reach == 0:
            self.reach = math.ldexp(1.0, math.frexp(largest)[1])
        while self.reach < largest:
            self.reach *= 2
            halved = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat((halved.new_zeros(_BINS // 2), halved, halved.new_zeros(_BINS // 2)))
        self.counts += torch.histc(x, 2 * _BINS, -self.reach, self.reach).double().cpu()

    def end(self, percentile: float, side: int) -> float:
        """Return one end of the range, as a bin edge.

        side: 1 for the upper end, the lowest edge with at least `percentile` % of all elements at or below it; -1 for
        the lower end, the highest edge with at least `percentile` % of all elements at or above it.
        """
        counts = self.counts if side > 0 else self.counts.flip(0)
        inside = counts.cumsum(0)
        bins = int((inside < inside[-1] * (percentile / 100)).sum()) + 1
        return side * self.reach * (bins / _BINS - 1)
