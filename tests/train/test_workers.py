"""Worker processes that read photographs: they end with the training, however it ends, and one line says why."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.resource_sharer import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.cli.main import main
from fastres.train import checkpoint, data
from fastres.train.data import Folder, ReadError, WorkerError, collate, hearing_workers
from fastres.train.loop import NonFiniteError, Run, Trainer, train
from fastres.train.recipe import RECIPES, Recipe, ScaleCrop

SMALL = dataclasses.replace(
    RECIPES["imagenet-2015"], size=16, val_size=16, resize=18, crop=ScaleCrop(18, 24), batch=4, bn_batch=4, iterations=8
)
CHANNEL = dataclasses.replace(SMALL, normalise="channel")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders train and val with two classes of four photographs each."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(8):
            place = tmp_path / "images" / part / f"class{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(place / f"{i}.jpg")
    return tmp_path / "images"


def run(root: Path, recipe: Recipe = CHANNEL, **options: Any) -> Run:
    out = root.parent
    defaults = {"data": "folder", "family": "cifar", "depth": 8, "device": "cpu", "workers": 2, "eval_every": 4}
    return Run("imagenet-2015", recipe, out / "run", root=root, cache=out / "cache", **{**defaults, **options})


def damage(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-200])
    return file


def _fourth_step(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == 3:
            raise error
        whole(self, batches)

    whole = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)


def _no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trainer._micro
    monkeypatch.setattr(Trainer, "_micro", lambda self, x, y: whole(self, x * float("nan"), y))


def _oom_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(net: Any, batches: Iterator[Any], *args: Any) -> None:
        next(batches)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastres.train.loop.errors", errors)


FAILURES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Any], Recipe, type[BaseException]]] = {
    "validation image": (lambda root, patch: damage(root / "val/class1/1.jpg"), CHANNEL, ReadError),
    "training image": (lambda root, patch: damage(root / "train/class1/1.jpg"), CHANNEL, ReadError),
    "mean image": (lambda root, patch: damage(root / "train/class1/1.jpg"), SMALL, ReadError),
    "large image": (
        lambda root, patch: patch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30 // 2 - 1),
        CHANNEL,
        ReadError,
    ),
    "memory": (
        lambda root, patch: _fourth_step(patch, torch.OutOfMemoryError("no memory")),
        CHANNEL,
        torch.OutOfMemoryError,
    ),
    "bug": (lambda root, patch: _fourth_step(patch, AssertionError("bug")), CHANNEL, AssertionError),
    "Ctrl-C": (lambda root, patch: _fourth_step(patch, KeyboardInterrupt()), CHANNEL, KeyboardInterrupt),
    "memory in validation": (lambda root, patch: _oom_in_validation(patch), CHANNEL, torch.OutOfMemoryError),
    "loss": (lambda root, patch: _no_number(patch), CHANNEL, NonFiniteError),
}


@pytest.mark.parametrize("what", FAILURES)
def test_no_worker_is_left(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker is left, even while the caller keeps the exception and thereby all its frames alive."""
    fail, recipe, kind = FAILURES[what]
    fail(folder, monkeypatch)
    with pytest.raises(kind) as failure:
        train(run(folder, recipe))
    assert failure.tb is not None
    assert multiprocessing.active_children() == []


def test_the_end_leaves_none_either(folder: Path) -> None:
    train(run(folder))
    assert multiprocessing.active_children() == []


def arguments(root: Path, *given: str) -> list[str]:
    options = "--recipe imagenet-modern --data folder --family cifar --depth 8 --device cpu --workers 2 --batch 4"
    options += " --micro-batch 4 --eval-every 2 --log-every 1 --iterations 1000"
    return ["train", *options.split(), "--root", str(root), "--out", str(root.parent / "run"), *given]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int], seconds: float = 10) -> bool:
    """Return whether all processes end within `seconds`; zombies count as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = [Path(f"/proc/{pid}/stat") for pid in pids]
        if all(not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z" for stat in stats):
            return True
        time.sleep(0.05)
    return False


def started(root: Path, *given: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start the command and wait until it trains; return its process and the IDs of its workers.

    With --save-every 1 there is a checkpoint by then: it is saved after the first row of the log, before the second.
    """
    command = [sys.executable, "-m", "fastres", *arguments(root, *given)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = root.parent / "run" / "log.csv"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (log.exists() and "\n2," in log.read_text()):
        time.sleep(0.05)
    return process, children(process.pid)


def test_a_damaged_photograph_ends_the_command(folder: Path) -> None:
    """A damaged validation image, read while the training workers wait, gives status 1 and one line."""
    bad = damage(folder / "val/class1/1.jpg")
    command = [sys.executable, "-m", "fastres", *arguments(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"python -m fastres train: {bad} is not a readable image")
    assert "Traceback" not in done.stderr


def test_workers_end_with_a_process_that_is_killed(folder: Path) -> None:
    process, workers = started(folder, "--eval-every", "1000")
    process.kill()
    process.wait()
    assert len(workers) == 2
    assert gone(workers, 2)


def test_a_killed_worker_is_reported_in_one_line(folder: Path) -> None:
    process, workers = started(folder, "--eval-every", "1000", "--save-every", "1")
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = folder.parent / "run" / checkpoint.LAST
    assert said.splitlines()[-1].startswith("python -m fastres train: a process that reads images has died (")
    assert said.endswith(f"; --resume continues from {last}\n")
    assert "Traceback" not in said
    assert gone(workers)


def test_a_generator_that_is_never_closed_ends_with_the_process(folder: Path) -> None:
    """The workers of a generator that a script never closes end with the script."""
    script = f"""
import multiprocessing, torch
from fastres.train.data import collate, decoded, load
from test_workers import CHANNEL
from pathlib import Path
dataset = load("folder", CHANNEL, Path({str(folder)!r}))
batches = decoded(dataset.train, [[(i % 8, 0)] for i in range(1000)], 2, torch.device("cpu"))
next(batches)
print(*[child.pid for child in multiprocessing.active_children()])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert gone([int(pid) for pid in done.stdout.split()], 0.1)


def test_workers_let_signals_to_the_group_pass(folder: Path) -> None:
    dataset = data.load("folder", CHANNEL, folder)
    assert isinstance(dataset.train, Folder)
    with closing(data.fetched(dataset.train, [[(i % 8, 0)] for i in range(100)], 2, collate)) as batches:
        for _ in range(2):  # one batch of each worker: now both ignore signals
            next(batches)
        for worker in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(worker.pid or 0, number)
        assert len(list(batches)) == 98
    assert multiprocessing.active_children() == []


@pytest.mark.extra  # torch waits five seconds for each worker
def test_a_worker_that_does_not_respond_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Folder.__getitem__

    def item(self: Folder, item: tuple[int, int]) -> Any:
        if item[1]:
            time.sleep(1000)
        return read(self, item)

    monkeypatch.setattr(Folder, "__getitem__", item)
    dataset = data.load("folder", CHANNEL, folder)
    batches = data.fetched(dataset.train, [[(0, 0)], [(0, 1)]], 1, collate)
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()
    assert gone([worker.pid or 0])


def test_lack_of_shared_memory_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the file size simulates the lack of shared memory, which consists of files."""
    read = Folder.__getitem__

    def item(self: Folder, item: tuple[int, int]) -> Any:
        found = read(self, item)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return found

    dataset = data.load("folder", CHANNEL, folder)
    monkeypatch.setattr(Folder, "__getitem__", item)
    with pytest.raises(WorkerError, match=r"lacks shared memory \(.*\): enlarge /dev/shm"):
        next(data.fetched(dataset.train, [[(0, 0)]], 1, collate))


def test_workers_that_can_t_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = data.load("folder", CHANNEL, folder)
    fork, forks = os.fork, iter(range(100))

    def second_fails() -> int:
        if next(forks) == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)  # torch's incomplete iterator raises when it is freed
    with pytest.raises(WorkerError, match=r"2 processes .* can't be started \(Resource temporarily unavailable\)"):
        next(data.fetched(dataset.train, [[(0, 0)]], 2, collate))
    assert all(gone([child.pid or 0]) for child in multiprocessing.active_children())


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_other_commands_report_a_killed_worker(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    train(run(folder, dataclasses.replace(CHANNEL, iterations=1), workers=0, eval_every=1))
    weights = str(folder.parent / "run" / checkpoint.BEST)
    monkeypatch.setattr("fastres.cli.batches.read_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    given = {"eval": ["--checkpoint", weights, "--data", str(folder)], "predict": [str(folder), "--weights", weights]}
    assert main([command, *given[command], "--device", "cpu", "--workers", "1"]) == 1
    assert f"python -m fastres {command}: a process that reads images has died (" in capsys.readouterr().err


@pytest.mark.parametrize("dies", [True, False])
def test_a_connection_that_breaks(dies: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies while it sends a batch closes the connection before it counts as dead."""

    def detach(self: DupFd) -> int:
        if dies:
            (worker,) = multiprocessing.active_children()
            threading.Timer(0.1, worker.kill).start()
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(DupFd, "detach", detach)
    dataset = data.load("folder", CHANNEL, folder)
    kind, message = (WorkerError, "has died") if dies else (ConnectionResetError, "reset by peer")
    with pytest.raises(kind, match=message), hearing_workers():
        next(data.fetched(dataset.train, [[(0, 0)]], 1, collate))
    assert multiprocessing.active_children() == []


def test_another_error_stays_itself() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), hearing_workers():
        raise RuntimeError("shapes")
