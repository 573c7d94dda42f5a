"""Calibration: between which ends the numbers of each value lie, gathered batch by batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_BINS = 8192  # of a histogram, on either side of 0


class Ranges:
    """The ends between which each named value's numbers lie: the extremes, or all but the outermost.

    percentile: that share of the numbers, in percent, is not above the upper end, and as many not below the lower one.
    Below 100 the numbers are counted in bins: an end is off by at most a 4096th of the largest magnitude, outwards.
    Raises ValueError if it isn't above 0 and up to 100.
    """

    def __init__(self, percentile: float) -> None:
        if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile!r}: a number above 0 and up to 100 is accepted")
        self.percentile = float(percentile)
        self._extremes: dict[str, Tensor] = {}  # [2]
        self._histograms: dict[str, _Histogram] = {}

    def include(self, name: str, value: Any) -> None:
        """Take a batch's numbers of the value `name` into account, if it is an image [N, H, W, C]."""
        if not (isinstance(value, Tensor) and value.dim() == 4 and value.numel()):
            return
        low, high = (end.float() for end in value.aminmax())
        if name in self._extremes:
            low, high = torch.minimum(low, self._extremes[name][0]), torch.maximum(high, self._extremes[name][1])
        self._extremes[name] = torch.stack((low, high))
        if self.percentile < 100 and self._extremes[name].isfinite().all():
            self._histograms.setdefault(name, _Histogram()).add(value.float(), float(self._extremes[name].abs().max()))

    def ends(self) -> dict[str, tuple[float, float]]:
        """(lower, upper) end of each value. Raises ValueError if nothing was included or an extreme isn't finite."""
        if not self._extremes:
            raise ValueError("calibration is empty; give at least one non-empty input batch")
        extremes: dict[str, tuple[float, float]] = {
            name: (float(ends[0]), float(ends[1])) for name, ends in self._extremes.items()
        }
        if bad := [name for name, ends in extremes.items() if not all(map(math.isfinite, ends))]:
            raise ValueError(f"calibration: the values written by {', '.join(bad[:5])} aren't finite")
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
    """Counts of numbers in 2 `_BINS` bins of equal width about 0, which double their width where numbers lie beyond."""

    def __init__(self) -> None:
        self.reach = 0.0  # the outer edge of the last bin; a power of two, so that edges are exact
        self.counts = torch.zeros(2 * _BINS, dtype=torch.float64)

    def add(self, x: Tensor, largest: float) -> None:
        """x in float32; largest: a bound of its magnitudes and of those before."""
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
        """The edge of a bin that `percentile` % of the numbers lie within; side: 1 the upper end, -1 the lower."""
        counts = self.counts if side > 0 else self.counts.flip(0)
        inside = counts.cumsum(0)
        bins = int((inside < inside[-1] * (percentile / 100)).sum()) + 1
        return side * self.reach * (bins / _BINS - 1)
