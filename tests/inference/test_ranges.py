"""Test `Ranges`: calibration by minimum and maximum or by a percentile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import relative_error
from nets import answers, images, tiny
from test_int8 import int8

import fastres
from fastres import optimize
from fastres.inference.plan import Conv
from fastres.inference.ranges import Ranges


def test_ranges_are_minimum_and_maximum() -> None:
    ranges = Ranges(100)
    a, b = torch.randn(2, 3, 4, 5), torch.randn(1, 3, 4, 5) * 3
    for value in (a, torch.zeros(0, 3, 4, 5), b):
        ranges.include("x", value)
    ranges.include("number", 7)
    ranges.include("flat", torch.randn(4))
    both = torch.cat((a, b))
    assert ranges.ends() == {"x": (float(both.min()), float(both.max()))}


@pytest.mark.parametrize("percentile", [99.9, 99, 60])
def test_a_percentile_leaves_out_the_outermost_elements(percentile: float) -> None:
    ranges = Ranges(percentile)
    batches = [torch.zeros(1, 8, 8, 1), *(torch.randn(4, 16, 16, 8) * scale for scale in (1e-3, 1.0, 7.0, 0.1))]
    for batch in batches:
        ranges.include("x", batch)
        ranges.include("zeros", torch.zeros(1, 2, 2, 1))
    x = torch.cat([batch.flatten() for batch in batches]).double()
    found = ranges.ends()
    assert found["zeros"] == (0.0, 0.0)
    low, high = found["x"]
    off = float(x.abs().max()) / 4096
    assert 0 <= high - float(x.quantile(percentile / 100, interpolation="higher")) <= off
    assert 0 <= float(x.quantile(1 - percentile / 100, interpolation="lower")) - low <= off
    assert float((x <= high).double().mean()) >= percentile / 100
    assert float((x >= low).double().mean()) >= percentile / 100


def test_a_percentile_sets_the_scales() -> None:
    """With an outlier, minimum and maximum waste precision on it, while a percentile clamps it and has less error."""
    model, x = tiny(), images(8)
    spoilt = x.clone()
    spoilt[0, :, 0, 0] = 60.0
    with fastres.backend("reference"):
        (expected,) = answers(copy.deepcopy(model).double(), x.double())
        extremes, cut = (relative_error(int8(model, spoilt, percentile=p)(x), expected) for p in (100.0, 99.8))
        assert cut < 0.5 * extremes
        assert torch.equal(int8(model, spoilt)(x), int8(model, spoilt, percentile=100)(x))
        wide = optimize(model, dtype=torch.float8_e4m3fn, calibration=[spoilt], percentile=99.8)
        scales = [
            [s.quantised.x.scale for s in net._steps if isinstance(s, Conv) and s.quantised is not None]
            for net in (wide, optimize(model, dtype=torch.float8_e4m3fn, calibration=[spoilt]))
        ]
        assert all(less < more for less, more in zip(*scales, strict=True))


@pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan"), "99", True])
def test_invalid_percentiles_are_refused(percentile: Any) -> None:
    with pytest.raises(ValueError, match=r"percentile must be a number above 0 and at most 100, got"):
        optimize(tiny(), dtype=torch.int8, calibration=[], percentile=percentile)
