"""What tests share: above all, one way to hold a result against a reference."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from tolerances import TOLERANCES, TWICE
from torch import Tensor

PIECE = 2**24  # elements that are looked at in float64 at a time, however many a tensor has


def pieces(length: int, row: int) -> list[slice]:
    """`length` rows of `row` elements each, in parts of at most `PIECE` elements, or of one row."""
    step = max(1, PIECE // max(1, row))
    return [slice(start, start + step) for start in range(0, length, step)]


def relative_error(actual: Tensor, ref64: Tensor) -> float:
    """max |actual - ref64| / max |ref64|; NaN where actual has one that ref64 hasn't."""
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
    """Holds `actual` against `ref64`, the same computation in float64.

    Allowed is `factor` x the error that `baseline`, PyTorch's result in actual's dtype, has itself, plus the dtype's
    entry in `TOLERANCES` plus `lost`. Without a baseline only these: for results meant to be exact to rounding.
    """
    assert actual.shape == ref64.shape, f"{what}: shape {tuple(actual.shape)}, reference {tuple(ref64.shape)}"
    allowed = TOLERANCES[actual.dtype] + lost
    if baseline is not None:
        assert actual.dtype == baseline.dtype, f"{what}: {actual.dtype}, baseline {baseline.dtype}"
        allowed += factor * relative_error(baseline, ref64)
    error = relative_error(actual, ref64)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"  # a NaN fails too


def check_statistics(partials: Tensor, y: Tensor) -> None:
    """Partials against the float64 moments of y as stored. Allowed is what fp32 sums of so many terms round: a few of
    its epsilon of the terms' sizes."""
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
    # A tile's own mean is rounded, too, and with it every distance from it. A thread adds up a fourth of a tile's
    # squares one after the other, each time rounding a sum that only grows by up to eps / 2; behind a ReLU one tile may
    # hold nearly all of a channel, and then no other tile's errors meet its own.
    slack = eps * values.abs().mean(0) * distances.abs().sum(0)
    rounded = max(8.0, (float(count.max()) / 4 + 4) / 2) * eps if y.is_cuda else 8 * eps
    assert ((merged - (distances**2).sum(0)).abs() <= rounded * (distances**2).sum(0) + slack).all()


def check_sums(partials: Tensor, dx: Tensor, z: Tensor, mean: Tensor) -> None:
    """Partials [tiles, 2, C] against the float64 sums of dx and dx (z - mean), dx as stored. What is allowed grows with
    the terms, not with their sum."""
    assert partials.dtype == torch.float32
    for channels in pieces(dx.shape[-1], dx.shape[:-1].numel()):
        terms = terms_of(dx[..., channels], z[..., channels], mean[channels])
        error = (partials[..., channels].double().sum(0) - terms.sum((1, 2, 3))).abs()
        allowed = 4 * torch.finfo(torch.float32).eps * terms.abs().sum((1, 2, 3))
        assert (error <= allowed).all(), f"partial sums: error {error.tolist()}, allowed {allowed.tolist()}"


def terms_of(dx: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    """[2, N, H, W, C], float64: what the partial sums of a BatchNorm are sums of."""
    return torch.stack((dx.double(), dx.double() * (z.double() - mean.double())))


class Broken:
    """A kernel launched with some of its arguments replaced."""

    def __init__(self, kernel: Any, **wrong: Any) -> None:
        self.kernel, self.wrong = kernel, wrong
        self.params = getattr(kernel, "params", None)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: self.kernel[grid](**{**arguments, **self.wrong})


def preload_children() -> None:
    """Processes of multiprocessing's start method "forkserver" begin with what takes long to import: the first one
    says it for all."""
    slow = ["torch._dynamo", "torchvision", "fastres.train.loop", "sklearn.datasets", "matplotlib.backends.backend_agg"]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*slow, "pytest"])


FALLBACKS: Counter[str] = Counter()  # what cuDNN had no engine for -> how often


def by_library(convolve: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """convolve(*args, **kwargs), by PyTorch's own loops where cuDNN has no engine for it (float64 with groups, a
    padding wider than the filter, ...). That is counted: the summary of a run tells how often and for what."""
    try:
        return convolve(*args, **kwargs)
    except RuntimeError as error:
        refusals = ("unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED")
        refusal = next((said for said in refusals if said in str(error)), None)
        if refusal is None:
            raise
    dtypes = {str(arg.dtype).removeprefix("torch.") for arg in args if isinstance(arg, Tensor)}
    FALLBACKS[f"{convolve.__name__} of {', '.join(sorted(dtypes)) or 'a test'}: {refusal}"] += 1
    with torch.backends.cudnn.flags(enabled=False):
        return convolve(*args, **kwargs)
