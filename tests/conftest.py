"""Fixed seeds and thread count for every test, skips for what can't run here, poisoned memory on request.

Triton decides when a kernel is defined whether it is interpreted or compiled, so one process does one of the two and
`make test` runs pytest twice:

    pytest                                everything but the interpreter's tests; kernels are compiled, ahead of time
    TRITON_INTERPRET=1 pytest -m interpret    the tests that run kernels, on CPU tensors

On a GPU the first run has both. Tests that run kernels carry `@pytest.mark.interpret`, tests that compile them without
running them `@pytest.mark.compiles`.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import triton
from torch import Tensor


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_report_header() -> str:
    """Where and on what the tests run, as `bench/proof.py` reads it from a log."""
    where = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": "CPU"}
    if torch.cuda.is_available():  # nvidia-smi knows the name without starting CUDA in xdist's own process
        said = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition("\n")[0]
        where["device"], _, where["driver"] = said.partition(", ")
    where |= {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    where |= {"torchvision": torchvision.__version__, "triton": triton.__version__}
    where["cuDNN"] = str(torch.backends.cudnn.version())
    where["commit"] = os.environ.get("FASTRES_COMMIT") or _said("git", "rev-parse", "HEAD")
    return f"tested on: {json.dumps(where)}"


def _said(*command: str) -> str:
    try:
        here = Path(__file__).parent
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreting = triton.knobs.runtime.interpret
    reasons = {}
    if interpreting:
        reasons["compiles"] = "interpreted kernels cannot be compiled"
        reasons["gpu"] = "kernels are interpreted"
        if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            reasons["interpret"] = f"Triton {triton.__version__}'s interpreter fails under numpy {np.__version__}"
    elif not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA GPU"
        reasons["interpret"] = "needs a CUDA GPU or TRITON_INTERPRET=1"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("interpret"):
            item.add_marker(
                pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
            )


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A kernel that broke the CUDA context fails its own test, not the hundreds after it: the process ends here, and
    under pytest-xdist another one takes its place."""
    try:
        _wait_for_gpu()
    except Exception as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the CUDA context is lost since {nodeid}: {error}", returncode=1)


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """What a test's kernels do wrong shows in that test, not in the next one that looks at the GPU; and its memory is
    there for the other processes' tests."""
    yield
    _wait_for_gpu()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what has to be fixed
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    """A test's first call of a launcher decides everything itself, by what the test has put in place."""
    from fastres.kernels import replay

    replay.forget()


@pytest.fixture(autouse=True)
def _same_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in float32 mean it; those of TF32 ask for it. What a training has set for itself ends with its test."""
    for switch in ("allow_tf32", "benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, switch, False)


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

    with torch.device("meta"):  # which functions heed this is looked up once: by what they are before they are replaced
        torch.empty(0)
    sources: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    sources += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    for owner, name in sources:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
