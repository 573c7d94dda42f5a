"""Fixed seeds and thread count for every test, poisoned memory on request, and counts of the tests that are left out.

Triton decides when a kernel is defined whether it is interpreted or compiled. A process can do only one of the two, so
`make test` runs pytest twice:

    pytest                       all tests except the interpreter's; kernels are compiled ahead of time
    TRITON_INTERPRET=1 pytest    the tests that run kernels, on CPU tensors

On a GPU the first run includes both. Tests that run kernels have the marker `interpret`, tests that compile kernels
without running them the marker `compiles`. Neither run includes the tests marked `extra` or `slow`, unless -m selects
them.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
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
from nets import PATHS
from torch import Tensor

import fastres


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_report_header() -> str:
    """Return a header line with the date, hardware, versions and commit; `bench/pytest_logs.py` reads it from logs."""
    where = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": "CPU"}
    if torch.cuda.is_available():  # not torch, which would start CUDA in xdist's main process
        line = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition("\n")[0]
        where["device"], _, where["driver"] = line.partition(", ")
    where |= {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    where |= {"torchvision": torchvision.__version__, "triton": triton.__version__}
    where["cuDNN"] = str(torch.backends.cudnn.version())
    where["commit"] = os.environ.get("FASTRES_COMMIT") or _output("git", "rev-parse", "HEAD")
    return f"tested on: {json.dumps(where)}"


def _output(*command: str) -> str:
    """Return what a command prints, or "unknown" if it fails."""
    try:
        here = Path(__file__).parent
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


LEFT_OUT = pytest.StashKey[dict[str, int]]()  # number of deselected tests by reason
IN_FILES = pytest.StashKey[Counter[str]]()  # number of collected tests by file, whether they run or not


def impossible(markers: set[str]) -> str | None:
    """Return the reason why tests with these markers can't run in this process, as the summary prints it; else None."""
    interpreting, gpu = triton.knobs.runtime.interpret, torch.cuda.is_available()
    if "gpu" in markers and not gpu:
        return "that need a CUDA GPU (make gpu)"
    if interpreting and ("gpu" in markers or "interpret" not in markers):
        return "that don't run in the interpreter (pytest without TRITON_INTERPRET)"
    if interpreting and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"because Triton {triton.__version__}'s interpreter fails under numpy {np.__version__}"
    if "interpret" in markers and not (interpreting or gpu):
        return "that run kernels in the interpreter (TRITON_INTERPRET=1)"
    return None


def postponed(markers: set[str]) -> str | None:
    """Return the reason why `make test` leaves out tests with these markers; None if it runs them."""
    if "slow" in markers:
        return "that belong to the full sweeps (make test-slow)"
    return "beyond the covering selection (make test-all)" if "extra" in markers else None


def markers_of(item: pytest.Item) -> set[str]:
    return {marker.name for marker in item.iter_markers()}


def pytest_itemcollected(item: pytest.Item) -> None:
    item.config.stash.setdefault(IN_FILES, Counter())[item.nodeid.partition("::")[0]] += 1


@pytest.hookimpl(trylast=True)  # after -k and -m, so that only selected tests are counted
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
    """Count the tests that are left out, by reason.

    If a test among them has no such reason, the caller's own -k or -m deselected them, and none of them is counted.
    """
    reasons = [impossible(markers) or postponed(markers) for markers in map(markers_of, items)]
    if None not in reasons:
        config = items[0].config
        left_out = config.stash.setdefault(LEFT_OUT, {})
        for reason in reasons:
            left_out[reason] = left_out.get(reason, 0) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the counts from a worker of pytest-xdist.

    All workers collect the same tests, so those counts are taken from any of them. Fallbacks are summed.
    """
    output = getattr(node, "workeroutput", {})
    for key, name in ((LEFT_OUT, "left_out"), (IN_FILES, "in_files")):
        if name in output:
            node.config.stash[key] = output[name]
    FALLBACKS.update(output.get("fallbacks", {}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Succeed if all selected tests were left out: the summary gives the reasons.

    A worker of pytest-xdist sends its counts to the main process.
    """
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
    """End the process if a test's kernel broke the CUDA context, so that later tests don't fail because of it.

    Under pytest-xdist another process takes its place.
    """
    try:
        _wait_for_gpu()
    except Exception as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{nodeid} broke the CUDA context: {error}", returncode=1)


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_available():  # a test may simulate a machine without a GPU
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """Wait for the GPU after every test, and free its cached memory.

    So an error in a kernel appears in the test that launched it, and other processes can use the memory.
    """
    yield
    _wait_for_gpu()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - code under test may use the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in every test, and in the processes that it starts.

    The shell's background jobs ignore Ctrl-C, and so do their children. An earlier test may have set a handler, too.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the path that dispatch chooses, and with all supported calls on the fused entry points."""
    with fastres.backend(request.param):
        yield request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run with one thread: faster for tiny nets and images, and the same number for all runs that are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiled_afresh(one_thread: None) -> None:
    """Clear Dynamo's cache before the test, so that it compiles everything itself, with one thread."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    """Clear the launchers' caches, so that a test's patches apply to its first call."""
    from fastres.kernels import launcher

    launcher.forget()


@pytest.fixture(autouse=True)
def _same_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off TF32, benchmarking and deterministic mode of cuDNN, and undo a test's changes to these switches."""
    for switch in ("allow_tf32", "benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, switch, False)


def poison(tensor: Tensor) -> Tensor:
    """Fill a tensor with a value that results rarely have: NaN, the dtype's largest integer, or True for bool."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison memory that Python code allocates uninitialised, so that elements which are never written show as NaN."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    with torch.device("meta"):  # torch caches which functions a device context affects: do it before they are replaced
        torch.empty(0)
    sources: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    sources += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    for owner, name in sources:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
