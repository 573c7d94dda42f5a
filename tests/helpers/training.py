"""Helpers for tests of training: short runs on the digits data set, in this process or in child processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import preload_children
from torch import Tensor

from fastres.train import checkpoint
from fastres.train.loop import Run, Trainer, train
from fastres.train.process import Place, Signals
from fastres.train.recipe import RECIPES, Ema, Recipe

CPU = torch.device("cpu")


SHORT = dataclasses.replace(RECIPES["digits"], epochs=None, iterations=8, bn_batch=32, ema=Ema(0.9, every=2))


def short(out: Path, recipe: Recipe = SHORT, **options: Any) -> Run:
    defaults = {"depth": 8, "eval_every": 4, "save_every": 3, "log_every": 3, "device": "cpu"}
    return Run("digits", recipe, out, **{**defaults, **options})


def trainer(out: Path, recipe: Recipe = SHORT, **options: Any) -> Trainer:
    made = Trainer(short(out, recipe, **options), Place(0, 1, CPU), Signals())
    made.model.train()
    return made


def steps(training: Trainer, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> None:
    for _ in range(count):
        training.step(batches)


def weights(out: Path, name: str = checkpoint.LAST) -> dict[str, Tensor]:
    return torch.load(out / name, weights_only=True)["model"]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def _child(target: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str], outcome: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        target(*args)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except Exception as error:
        Path(outcome).write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def start(target: Callable[..., None], *args: Any, **environment: str) -> tuple[Any, Path]:
    preload_children()
    outcome = Path(tempfile.mkstemp()[1])
    process = multiprocessing.get_context("forkserver").Process(
        target=_child, args=(target, args, environment, str(outcome))
    )
    process.start()
    return process, outcome


def ends(target: Callable[..., None], *args: Any) -> int:
    """Run `target(*args)` in a child process and return its exit code; fail if it raised an exception."""
    process, outcome = start(target, *args)
    process.join(120)
    error = outcome.read_text()
    outcome.unlink()
    assert not error, error
    assert process.exitcode is not None
    return process.exitcode


def ranks(target: Callable[..., None], *args: Any) -> list[tuple[int | None, str]]:
    """Run `target(*args)` in two processes of one gloo group; return the exit code and error message of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [start(target, *args, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    ended = []
    for process, outcome in started:
        process.join(120)
        ended.append((process.exitcode, outcome.read_text()))
        outcome.unlink()
    return ended


def signalled(out: Path, number: int, iteration: int, validating: bool) -> None:
    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == iteration and not validating:
            os.kill(os.getpid(), number)
        whole(self, batches)

    def validation(self: Trainer) -> Any:
        if self.iteration == iteration and validating:
            os.kill(os.getpid(), number)
        return images(self)

    whole, images = Trainer.step, Trainer._validation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        patch.setattr(Trainer, "_validation", validation)
        train(short(out, resume=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run of `SHORT`."""
    out = tmp_path_factory.mktemp("undisturbed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(short(out))
    torch.set_num_threads(threads)
    return out
