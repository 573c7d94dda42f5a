"""Helpers that many tests share, such as the comparison of a result with a float64 reference."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from tolerances import TOLERANCES, TWICE
from torch import Tensor

PIECE = 2**24  # the most elements that are compared in float64 at a time, to limit memory


def pieces(length: int, row: int) -> list[slice]:
    """Return slices that split `length` rows of `row` elements into parts of at most `PIECE` elements.

    A part has at least one row.
    """
    step = max(1, PIECE // max(1, row))
    return [slice(start, start + step) for start in range(0, length, step)]


def relative_error(actual: Tensor, ref64: Tensor) -> float:
    """Return max |actual - ref64| / max |ref64|, or max |actual - ref64| if ref64 is zero. NaN if either has a NaN."""
    if actual.numel() == 0:
        return 0.0
    differences, scales = [], []
    actual, ref64 = actual.detach().flatten(), ref64.detach().flatten()
    for part in pieces(len(actual), 1):
        reference = ref64[part].to(actual.device, torch.float64)
        differences.append((actual[part].double() - reference).abs().max())
        scales.append(reference.abs().max())
    difference, scale = torch.stack(differences).max(), torch.stack(scales).max()
    return float(difference / scale) if scale else float(difference)


def assert_close_to_reference(
    actual: Tensor,
    ref64: Tensor,
    baseline: Tensor | None = None,
    factor: float = TWICE,
    what: str = "result",
    lost: float = 0.0,
) -> None:
    """Assert that `actual` is close to `ref64`, the same computation in float64.

    The relative error may be at most factor * (the error of baseline) + TOLERANCES[dtype] + lost. baseline: PyTorch's
    result in actual's dtype; without it the first term is 0, for results that should be exact up to rounding. what: the
    name that the error message gives. lost: see `tolerances.lost_in_sums`.
    """
    assert actual.shape == ref64.shape, f"{what}: shape {tuple(actual.shape)}, reference {tuple(ref64.shape)}"
    allowed = TOLERANCES[actual.dtype] + lost
    if baseline is not None:
        assert actual.dtype == baseline.dtype, f"{what}: {actual.dtype}, baseline {baseline.dtype}"
        allowed += factor * relative_error(baseline, ref64)
    error = relative_error(actual, ref64)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"  # a NaN fails too


def check_statistics(partials: Tensor, y: Tensor) -> None:
    """Assert that the partials [tiles, 3, K] match the float64 moments of y [N, P, Q, K] as stored.

    The three partials of a tile and channel are the count, the mean, and the sum of squared distances from it (M2). The
    tolerance is the rounding error of float32 sums with that many terms: a few epsilons of the terms' sizes.
    """
    for channels in pieces(y.shape[-1], y.shape[:-1].numel()):
        _check_statistics(partials[..., channels], y[..., channels])


def _check_statistics(partials: Tensor, y: Tensor) -> None:
    count, mean, m2 = partials.double().unbind(1)
    values = y.double().flatten(0, 2)
    assert torch.equal(count.sum(0), torch.full_like(count[0], len(values)))
    total = (count * mean).sum(0) / len(values)
    merged = (m2 + count * (mean - total) ** 2).sum(0)
    eps, distances = torch.finfo(torch.float32).eps, values - values.mean(0)
    assert ((total - values.mean(0)).abs() <= 4 * eps * values.abs().mean(0)).all()
    # The mean of a tile is rounded, and so is every distance from it. A thread adds a quarter of a tile's squares one
    # after the other, and each addition rounds the growing sum by up to eps / 2. After a ReLU, one tile may have nearly
    # all of a channel's sum, so its errors are not averaged with those of other tiles.
    slack = eps * values.abs().mean(0) * distances.abs().sum(0)
    rounded = max(8.0, (float(count.max()) / 4 + 4) / 2) * eps if y.is_cuda else 8 * eps
    assert ((merged - (distances**2).sum(0)).abs() <= rounded * (distances**2).sum(0) + slack).all()


def check_sums(partials: Tensor, dx: Tensor, z: Tensor, mean: Tensor) -> None:
    """Assert that the partials [tiles, 2, C] match the float64 sums of dx and dx (z - mean), with dx as stored.

    dx, z: [N, H, W, C], the gradient at a BatchNorm's output and the BatchNorm's input. mean: of z, [C]. The tolerance
    is proportional to the sum of the terms' absolute values.
    """
    assert partials.dtype == torch.float32
    for channels in pieces(dx.shape[-1], dx.shape[:-1].numel()):
        terms = terms_of(dx[..., channels], z[..., channels], mean[channels])
        error = (partials[..., channels].double().sum(0) - terms.sum((1, 2, 3))).abs()
        allowed = 4 * torch.finfo(torch.float32).eps * terms.abs().sum((1, 2, 3))
        assert (error <= allowed).all(), f"partial sums: error {error.tolist()}, allowed {allowed.tolist()}"


def terms_of(dx: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    """Return the terms of a BatchNorm's two partial sums, dx and dx (z - mean), as float64 [2, N, H, W, C]."""
    return torch.stack((dx.double(), dx.double() * (z.double() - mean.double())))


class Broken:
    """A kernel that replaces some of its arguments by wrong ones in every launch: tests must notice it."""

    def __init__(self, kernel: Any, **wrong: Any) -> None:
        self.kernel, self.wrong = kernel, wrong
        self.params = getattr(kernel, "params", None)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: self.kernel[grid](**{**arguments, **self.wrong})


def preload_children() -> None:
    """Preload slow imports into processes of multiprocessing's start method "forkserver".

    The list can't change after the test process has started its first child, so all tests use this one.
    """
    slow = ["torch._dynamo", "torchvision", "fastres.train.loop", "sklearn.datasets", "matplotlib.backends.backend_agg"]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*slow, "pytest"])


FALLBACKS: Counter[str] = Counter()  # how often cuDNN had no engine, by function, dtypes and error


def by_library(convolve: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return convolve(*args, **kwargs); fall back to PyTorch's own loops if cuDNN has no engine for it.

    It has none for float64 with groups, for example, or for a padding wider than the filter. Fallbacks are counted in
    `FALLBACKS`, and the summary of a test run lists them.
    """
    try:
        return convolve(*args, **kwargs)
    except RuntimeError as error:
        refusals = ("unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED")
        refusal = next((text for text in refusals if text in str(error)), None)
        if refusal is None:
            raise
    dtypes = {str(arg.dtype).removeprefix("torch.") for arg in args if isinstance(arg, Tensor)}
    FALLBACKS[f"{convolve.__name__} of {', '.join(sorted(dtypes)) or 'a test'}: {refusal}"] += 1
    with torch.backends.cudnn.flags(enabled=False):
        return convolve(*args, **kwargs)
