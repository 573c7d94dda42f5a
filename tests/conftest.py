"""What every test has: fixed seeds, a fixed thread count, a skip for `@pytest.mark.gpu`, and poisoned memory on request."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what has to be fixed
    torch.manual_seed(0)


def poison(tensor: Tensor) -> Tensor:
    """Overwrites a tensor with what no computation yields by chance: NaN, or the dtype's largest integer."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory allocated from Python is poisoned: an output element nobody wrote shows as NaN."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    sources: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    sources += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    for owner, name in sources:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
