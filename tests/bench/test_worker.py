"""Tests of bench/worker.py: an object that hangs, dies or loses its CUDA context in its own process harms no other."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
LONG = 120  # seconds that a process may need to start on a busy machine


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("worker")


class Delicate:
    """Answers, raises, hangs, dies, or loses the CUDA context."""

    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, n: int) -> tuple[int, int]:
        self.value += n
        return self.value, os.getpid()

    def refuse(self) -> None:
        raise ValueError("not this one")

    def refuse_strangely(self) -> None:
        class StrangeError(Exception):
            pass

        raise StrangeError("known only there")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def ignore_everything(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(1)

    def die(self) -> None:
        os._exit(7)

    def lose_the_context(self) -> None:
        sys.modules["worker"].lost_context = lambda: "an illegal memory access was encountered"
        raise RuntimeError("CUDA error: launch failure")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_answers_and_keeps_its_state(worker: ModuleType) -> None:
    with worker.Worker(Delicate, 40) as there:
        assert there.ask("add", 1, seconds=LONG)[0] == 41
        with pytest.raises(ValueError, match="not this one"):
            there.ask("refuse", seconds=LONG)
        with pytest.raises(RuntimeError, match="StrangeError: known only there"):
            there.ask("refuse_strangely", seconds=LONG)
        value, pid = there.ask("add", 1, seconds=LONG)
        assert (value, pid != os.getpid(), alive(pid)) == (42, True, True)
    assert not alive(pid)


@pytest.mark.parametrize(
    ("method", "arguments", "verdict", "said"),
    [
        ("sleep", (1000,), "hung", "no answer within 1 s, so its process was killed"),
        ("ignore_everything", (), "hung", "no answer within 1 s"),
        ("die", (), "died", r"its process ended \(exit status 7\)"),
        ("lose_the_context", (), "lost the CUDA context", "lost the CUDA context.*launch failure"),
    ],
)
def test_a_lost_worker_affects_no_other(
    worker: ModuleType, method: str, arguments: Any, verdict: str, said: str
) -> None:
    with worker.Worker(Delicate, 0) as there, worker.Worker(Delicate, 0) as other:
        pids = [process.ask("add", 1, seconds=LONG)[1] for process in (there, other)]
        with pytest.raises(worker.WorkerLost, match=said) as gone:
            there.ask(method, *arguments, seconds=1 if verdict == "hung" else LONG)
        assert gone.value.verdict == verdict
        assert [alive(pid) for pid in pids] == [False, True]
        assert other.ask("add", 1, seconds=LONG)[0] == 2
        with pytest.raises(worker.WorkerLost, match=said):  # later calls raise the same error
            there.ask("add", 1, seconds=LONG)


def test_an_error_in_making_the_object_is_raised_by_every_call(worker: ModuleType) -> None:
    with worker.Worker(Delicate) as there:
        for _ in range(2):
            with pytest.raises(TypeError, match="start"):
                there.ask("add", 1, seconds=LONG)


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems it ends when it next reads its connection")
def test_a_worker_does_not_outlive_its_parent(worker: ModuleType) -> None:
    """A process that hangs ends when its parent, which hangs as well, is killed."""
    with worker.Worker(Asking) as middle:
        pid = middle.ask("start", seconds=LONG)
        assert alive(pid)
        with pytest.raises(worker.WorkerLost):
            middle.ask("hang", seconds=1)
        for _ in range(100):
            if not alive(pid) or "State:\tZ" in Path("/proc", str(pid), "status").read_text():
                return
            time.sleep(0.1)
    pytest.fail("a process is still running after its parent was killed")


class Asking:
    """Starts a worker that hangs."""

    def start(self) -> int:
        self.there = sys.modules["worker"].Worker(Delicate, 0)
        return self.there.ask("add", 1, seconds=LONG)[1]

    def hang(self) -> None:
        self.there.ask("ignore_everything", seconds=LONG)
