"""`ConvProblem`: the sizes that it derives, and the errors that it raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastres.kernels.problem import ConvProblem


@pytest.mark.parametrize("geometry", [{}, {"pad": 1}, {"stride": 2, "pad": 3, "dilation": 2}, {"groups": 2, "pad": 1}])
def test_sizes_are_those_of_the_convolution(geometry: dict[str, int]) -> None:
    x, w = torch.zeros(2, 9, 8, 6), torch.zeros(4, 3, 2, 6 // geometry.get("groups", 1))
    problem = ConvProblem.of(x.shape, w.shape, **geometry)
    torchs = {"padding" if name == "pad" else name: size for name, size in geometry.items()}
    z = F.conv2d(x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), **torchs).permute(0, 2, 3, 1)  # type: ignore[arg-type]
    assert (problem.x_shape, problem.w_shape, problem.y_shape) == (x.shape, w.shape, z.shape)
    assert problem.pixels == z[..., 0].numel()


def test_geometry_is_given_in_order_or_by_name() -> None:
    in_order = ConvProblem.of((2, 9, 8, 6), (4, 3, 3, 3), 2, 1, 1, 2)
    assert in_order == ConvProblem.of((2, 9, 8, 6), (4, 3, 3, 3), stride=2, pad=1, groups=2)
    assert in_order == ConvProblem(2, 9, 8, 6, 4, 3, 3, stride=2, pad=1, groups=2)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"x must be \[N, H, W, C\] and w \[K, R, S, C/groups\], got \[7, 6, 32\]", {"x_shape": (7, 6, 32)}),
        (r"x must be .*, got .* and \[24, 3, 32\]", {"w_shape": (24, 3, 32)}),
        ("with groups=2 requires x with 64 channels, got 32", {"groups": 2}),
        ("requires x with 16 channels, got 32", {"w_shape": (24, 3, 3, 16)}),
        ("the 3x3 filter is larger than the padded input", {"x_shape": (2, 1, 6, 32)}),
        ("stride must be >= 1, got 0", {"stride": 0}),
        ("pad must be >= 0, got -1", {"pad": -1}),
    ],
)
def test_impossible_sizes_are_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        ConvProblem.of(**{"x_shape": (2, 7, 6, 32), "w_shape": (24, 3, 3, 32), **changes})
