"""Fixed seeds and thread count for every test, poisoned memory on request; what can't run here is left out and counted.

Triton decides when a kernel is defined whether it is interpreted or compiled, so one process does one of the two and
`make test` runs pytest twice:

    pytest                       everything but the interpreter's tests; kernels are compiled, ahead of time
    TRITON_INTERPRET=1 pytest    the tests that run kernels, on CPU tensors

On a GPU the first run has both. Tests that run kernels carry `@pytest.mark.interpret`, tests that compile them without
running them `@pytest.mark.compiles`. Neither run has the tests marked `extra` or `slow`, unless -m says so.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import triton
from cases import FALLBACKS
from torch import Tensor


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_report_header() -> str:
    """Where and on what the tests run, as `bench/pytest_logs.py` reads it from a log."""
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


LEFT_OUT = pytest.StashKey[dict[str, int]]()  # why -> how many tests
IN_FILES = pytest.StashKey[Counter[str]]()  # file -> how many tests it holds, run or not


def impossible(markers: set[str]) -> str | None:
    """Why no test with these markers can run in this process, in the words of the summary."""
    interpreting, gpu = triton.knobs.runtime.interpret, torch.cuda.is_available()
    if "gpu" in markers and not gpu:
        return "for want of a CUDA GPU (make gpu)"
    if interpreting and ("gpu" in markers or "interpret" not in markers):
        return "that aren't for the interpreter (pytest without TRITON_INTERPRET)"
    if interpreting and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"because Triton {triton.__version__}'s interpreter fails under numpy {np.__version__}"
    if "interpret" in markers and not (interpreting or gpu):
        return "that run kernels in the interpreter (TRITON_INTERPRET=1)"
    return None


def postponed(markers: set[str]) -> str | None:
    """Why `make test` leaves out a test with these markers."""
    if "slow" in markers:
        return "of the full sweeps (make test-slow)"
    return "beyond the covering choice (make test-all)" if "extra" in markers else None


def markers_of(item: pytest.Item) -> set[str]:
    return {marker.name for marker in item.iter_markers()}


def pytest_itemcollected(item: pytest.Item) -> None:
    item.config.stash.setdefault(IN_FILES, Counter())[item.nodeid.partition("::")[0]] += 1


@pytest.hookimpl(trylast=True)  # behind -k and -m: counted is what was asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if left_out := [item for item in items if impossible(markers_of(item))]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not impossible(markers_of(item))]
    for item in items:
        if item.get_closest_marker("interpret"):
            item.add_marker(
                pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
            )


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Counts what is left out here. A -k, or a -m that leaves out tests which `make test` has, is the caller's own
    choice and needs no explanation."""
    reasons = [impossible(markers) or postponed(markers) for markers in map(markers_of, items)]
    if None not in reasons:
        config = items[0].config
        left_out = config.stash.setdefault(LEFT_OUT, {})
        for reason in reasons:
            left_out[reason] = left_out.get(reason, 0) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers of pytest-xdist collect the same tests, so one report is enough; fallbacks are added up."""
    said = getattr(node, "workeroutput", {})
    for key, name in ((LEFT_OUT, "left_out"), (IN_FILES, "in_files")):
        if name in said:
            node.config.stash[key] = said[name]
    FALLBACKS.update(said.get("fallbacks", {}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where all that was asked for can't run here, nothing has failed: the summary says why."""
    config = session.config
    left_out = config.stash.get(LEFT_OUT, {})
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and left_out:
        session.exitstatus = pytest.ExitCode.OK
    if hasattr(config, "workeroutput"):
        in_files = dict(config.stash.get(IN_FILES, {}))
        config.workeroutput |= {"left_out": left_out, "in_files": in_files, "fallbacks": dict(FALLBACKS)}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, {})
    if left_out:
        terminalreporter.section("not run")
    for reason, count in sorted(left_out.items(), key=lambda pair: -pair[1]):
        terminalreporter.write_line(f"{count:7,} {reason}")
    if FALLBACKS:
        terminalreporter.section("references without cuDNN")
    for reason, count in FALLBACKS.most_common():
        terminalreporter.write_line(f"{count:7,} {reason}")
    if config.get_verbosity() > 0:  # for bench/pytest_logs.py
        terminalreporter.write_line(f"tests in files: {json.dumps(config.stash.get(IN_FILES, {}))}")


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
    if torch.cuda.is_initialized() and torch.cuda.is_available():  # unless a test pretends that there is no GPU
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For nets and images so small that threads only wait for each other; and runs that are compared have the same
    number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiled_afresh(one_thread: None) -> None:
    """What Dynamo has compiled before this test is forgotten."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    """A test's first call of a launcher decides everything itself, by what the test has put in place."""
    from fastres.kernels import launcher

    launcher.forget()


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
