"""The loop: equal to a plain one, resumed bit for bit wherever it is killed, stopped cleanly; checkpoints' faults."""

from __future__ import annotations

import csv
import dataclasses
import errno
import fcntl
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import signal
import socket
import struct
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import preload_children
from pretence import Pretence
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres.cli.main import main
from fastres.models import families
from fastres.train import checkpoint, loop, report
from fastres.train.checkpoint import CheckpointError
from fastres.train.data import Folder, Resident
from fastres.train.loop import Errors, NonFiniteError, Run, Summary, Trainer, errors, graph_choice, train
from fastres.train.process import Place, Signals, average, place
from fastres.train.recipe import RECIPES, Ema, Recipe, Warmup

CPU = torch.device("cpu")
SHORT = dataclasses.replace(RECIPES["digits"], epochs=None, iterations=8, bn_batch=32, ema=Ema(0.9, every=2))


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `SHORT` that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(short(out))
    torch.set_num_threads(threads)
    return out


# children: processes that may be killed


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
    """The exit code of `target(*args)` in a process of its own."""
    process, outcome = start(target, *args)
    process.join(120)
    said = outcome.read_text()
    outcome.unlink()
    assert not said, said
    assert process.exitcode is not None
    return process.exitcode


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_in_a_step(out: Path, iteration: int) -> None:
    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == iteration:
            _kill()
        whole(self, batches)

    whole = Trainer.step
    Trainer.step = step  # type: ignore[method-assign]
    train(short(out, resume=True))


def _killed_while_saving(out: Path, moment: str, which: str, count: int) -> None:
    """At the count-th time that file `which` is half written, or written and not yet named."""

    def write(path: Path, content: bytes) -> None:
        nonlocal count
        count -= path.name == which
        if path.name == which and count == 0:
            if moment == "half":
                os.write(tempfile.mkstemp(prefix=".writing-", dir=path.parent)[0], content[: len(content) // 2])
                _kill()
            os.replace = lambda *names: _kill()  # type: ignore[assignment]
        whole(path, content)

    whole = checkpoint.write_atomically
    checkpoint.write_atomically = write
    train(short(out, resume=True))


def test_killed_anywhere_it_ends_as_if_never_killed(tmp_path: Path, undisturbed: Path) -> None:
    """One run, killed over and over: before its first checkpoint, in steps, in the midst of each file."""
    assert ends(_killed_in_a_step, tmp_path, 2) == -signal.SIGKILL
    assert not (tmp_path / checkpoint.LAST).exists()
    assert ends(_killed_while_saving, tmp_path, "half", checkpoint.LAST, 1) == -signal.SIGKILL
    assert ends(_killed_while_saving, tmp_path, "unnamed", checkpoint.LAST, 2) == -signal.SIGKILL
    assert torch.load(tmp_path / checkpoint.LAST, weights_only=True)["iteration"] == 3
    assert torch.load(tmp_path / checkpoint.BEST, weights_only=True)["iteration"] == 4
    assert list(tmp_path.glob(".writing-*"))
    assert ends(_killed_in_a_step, tmp_path, 5) == -signal.SIGKILL
    assert ends(_killed_while_saving, tmp_path, "half", checkpoint.WEIGHTS, 1) == -signal.SIGKILL
    assert torch.load(tmp_path / checkpoint.LAST, weights_only=True)["iteration"] == 6
    train(short(tmp_path, resume=True))
    ours, theirs = (torch.load(out / checkpoint.LAST, weights_only=True) for out in (tmp_path, undisturbed))
    for name in ("model", "ema"):
        assert_same(ours[name], theirs[name])
    momenta = [[entry["momentum_buffer"] for entry in run["optimizer"]["state"].values()] for run in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert ours["schedule"] == theirs["schedule"]
    assert torch.equal(ours["rng"][0]["torch"], theirs["rng"][0]["torch"])
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in run["history"]] for run in (ours, theirs)
    ]
    assert timeless[0] == timeless[1]
    assert_same(weights(tmp_path, checkpoint.BEST), weights(undisturbed, checkpoint.BEST))
    assert not list(tmp_path.glob(".writing-*"))


def _signalled(out: Path, number: int, iteration: int, validating: bool) -> None:
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


def test_sigterm_and_ctrl_c_save_first(tmp_path: Path, undisturbed: Path) -> None:
    for number, iteration, validating, code in (
        (signal.SIGTERM, 1, False, 143),
        (signal.SIGINT, 4, True, 130),
        (signal.SIGINT, 6, False, 130),
    ):
        assert ends(_signalled, tmp_path, number, iteration, validating) == code
        saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
        assert saved["iteration"] == iteration + (not validating)
    train(short(tmp_path, resume=True))
    assert_same(weights(tmp_path), weights(undisturbed))


@pytest.mark.parametrize(("resume", "how"), [(False, "--resume"), (True, "the same command")])
def test_what_is_stopped_says_how_to_go_on(
    resume: bool, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = trainer(tmp_path, resume=resume)
    checkpoint.prepare(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        training._leave(signal.SIGINT)
    assert f"saved {tmp_path / checkpoint.LAST}; {how} goes on from it" in capsys.readouterr().err


# what is shown while it trains


def on_terminal(out: Path, monkeypatch: pytest.MonkeyPatch, columns: int = 100, **options: Any) -> str:
    """What a training writes to stderr where that is a terminal of so many columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    read: list[bytes] = []

    def reads() -> None:
        with suppress(OSError):  # once the other end is closed
            while chunk := os.read(ours, 65536):
                read.append(chunk)

    reader = threading.Thread(target=reads)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train(short(out, **options))
    monkeypatch.undo()
    reader.join()
    os.close(ours)
    return b"".join(read).decode()


LINE = re.compile(
    r"iteration (\d)/8  epoch 0\.[24]/0\.4  loss  \d\.\d{3}  "
    r"validation error \d\d\.\d\d%, top-5 \d\d\.\d\d%  +[\d.,]+ images/s  0:\d\d:\d\d"
)
INTRODUCTION = [
    "training cifar-8, 75,002 parameters, on digits: 1,438 images, 359 to validate on; recipe digits",
    "8 iterations of 64 images, 0.4 epochs, in fp32 on the CPU; files in {}",
]


def test_a_file_gets_a_line_per_evaluation_and_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(short(tmp_path))
    printed, said = capsys.readouterr()
    assert not printed
    first, second, *lines = said.splitlines()
    assert [first, second] == [line.format(tmp_path) for line in INTRODUCTION]
    assert [match and match[1] for match in map(LINE.fullmatch, lines)] == ["4", "8"]
    assert len({len(line) for line in lines}) == 1
    assert "\r" not in said


def test_a_terminal_gets_a_bar_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(report._Bar, "monitor_interval", 0)
    said = on_terminal(tmp_path / "wide", monkeypatch)
    drawn = [part.strip() for part in re.split(r"[\r\n]", said)]
    assert [match[1] for part in drawn if (match := LINE.fullmatch(part))] == ["4", "8"]
    bars = [part for part in drawn if "%|" in part]
    assert bars[0].startswith("training     0%|")
    assert re.search(r"\| 0/8, \? left, - images/s$", bars[0])
    assert any(re.match(r"validating  50%\|.*\| 4/8, 0:\d\d:\d\d left, [\d.,]+ images/s, loss \d", bar) for bar in bars)
    assert drawn[:2] == [INTRODUCTION[0], ""]
    assert re.search(r"\r +\r$", said)  # nothing of it is left in the end

    monkeypatch.setenv("TERM", "xterm")
    narrow = re.split(r"[\r\n]", on_terminal(tmp_path / "narrow", monkeypatch, columns=40))
    bars = [part for part in narrow if "%|" in part]
    assert "left" in bars[-1]
    assert max(map(len, bars)) <= 40


def test_a_dumb_terminal_gets_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    said = on_terminal(tmp_path, monkeypatch)
    assert "%|" not in said
    assert len(said.splitlines()) == 4


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that an iteration moves on by a second, an evaluation by 100, a checkpoint by 10."""
    now = 0.0

    def slow(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return method(*args, **options)

        return timed

    for name, seconds in (("step", 1.0), ("evaluate", 100.0), ("save", 10.0)):
        monkeypatch.setattr(Trainer, name, slow(getattr(Trainer, name), seconds))
    monkeypatch.setattr("fastres.train.process.time", SimpleNamespace(perf_counter=lambda: now))


def test_images_per_second_are_of_the_time_spent_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In log.csv and in the lines, without evaluations, checkpoints and, resumed, the images of the process before.
    The time so far has all of them."""
    ticking(monkeypatch)
    with pytest.raises(SystemExit):
        _signalled(tmp_path, signal.SIGTERM, 4, False)
    train(short(tmp_path, resume=True))
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert {float(row["images_per_second"]) for row in rows if row["images_per_second"]} == {64.0}
    lines = [match[0] for match in LINE.finditer(capsys.readouterr().err)]
    assert all("  64.0 images/s  " in line for line in lines)
    # Before the second evaluation ends: 8 steps, an evaluation, its checkpoint, those of iterations 3, 5 and 6.
    assert [row["seconds"] for row in rows if row["val_error"]] == ["114.0", "248.0"]
    assert [line.split()[-1] for line in lines] == ["0:01:54", "0:04:08"]


def test_the_time_left_leaves_out_what_was_done_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an earlier process, and the first iteration of this one, whose kernels may have to be compiled."""
    monkeypatch.setattr(report, "shows_bars", lambda: True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = 100.0
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now))
    resumed = trainer(tmp_path, dataclasses.replace(SHORT, iterations=16))
    resumed.iteration = 8
    checkpoint.prepare(tmp_path)
    shown = resumed.report()
    resumed.clock.start()
    drawn = []
    for now in (160.0, 163.0, 166.0):  # noqa: B007 - the clock that `shown` asks
        shown.advance()
        drawn.append(str(shown.bar))
    shown.close()
    assert re.search(r"\| 9/16, \? left, ", drawn[0])
    assert "| 11/16, 0:00:15 left, " in drawn[2]


def test_the_line_s_loss_is_of_the_images_since_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float | None] = []
    whole = report.Report.evaluated

    def evaluated(self: report.Report, loss: float | None) -> None:
        shown.append(loss)
        whole(self, loss)

    monkeypatch.setattr(report.Report, "evaluated", evaluated)
    train(short(tmp_path / "together"))
    train(short(tmp_path / "each", log_every=1))
    rows = [row for row in checkpoint.load(tmp_path / "each" / checkpoint.LAST)["history"] if "train_loss" in row]
    losses = [row["train_loss"] for row in rows]
    expected = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    assert shown == pytest.approx([*expected, *expected], rel=1e-9)

    def step(self: Trainer, batches: Any) -> None:
        self.signals.received = signal.SIGTERM * (self.iteration == 2)
        stepped(self, batches)

    stepped = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(SystemExit):
        train(short(tmp_path / "stopped", log_every=1))
    train(short(tmp_path / "stopped", log_every=1, resume=True))
    assert shown[4:] == pytest.approx(expected, rel=1e-9)


def test_the_command_to_run_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    done = train(short(tmp_path, dataclasses.replace(SHORT, iterations=2), eval_every=1))
    assert str(done).splitlines()[-1] == f"next: {done.then}"
    words = shlex.split(done.then)
    assert words[:3] == ["python", "-m", "fastres"]
    capsys.readouterr()
    assert main([*words[3:], "--device", "cpu"]) == 0
    assert f"error {done.best:.2%}; top-5" in capsys.readouterr().out


def test_the_command_to_run_next_names_the_images(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.run = dataclasses.replace(ours.run, root=Path("my images"))
    assert ours._then().endswith("best.pt --root 'my images'")
    ours.loader.train = object.__new__(Folder)
    assert ours._then().endswith("best.pt --data 'my images'")


# several processes


def _ranked(out: Path, recipe: Recipe) -> None:
    train(short(out, recipe, eval_every=2))


def _one_rank_signalled(out: Path) -> None:
    if os.environ["RANK"] == "1":
        _signalled(out, signal.SIGTERM, 4, False)
    train(short(out))


def ranks(target: Callable[..., None], *args: Any) -> list[tuple[int | None, str]]:
    """Exit code and last words of two processes of one gloo group."""
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


def test_a_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    assert ranks(_one_rank_signalled, tmp_path) == [(143, ""), (143, "")]
    assert torch.load(tmp_path / checkpoint.LAST, weights_only=True)["iteration"] == 5


def _one_rank_failing(out: Path) -> None:
    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == 3 and not self.main:
            raise torch.OutOfMemoryError("no memory")
        whole(self, batches)

    whole = Trainer.step
    Trainer.step = step  # type: ignore[method-assign]
    train(short(out))


def test_a_process_that_fails_ends_all(tmp_path: Path) -> None:
    (first, said), (second, why) = ranks(_one_rank_failing, tmp_path)
    assert (first, second) == (1, 1)
    assert said.startswith("PeerError: another process has ended, whose last words say why (")
    assert why.startswith(f"OutOfMemoryError: no memory; --resume goes on from {tmp_path / checkpoint.LAST}; a smaller")


def test_two_processes_are_one_that_accumulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo. Parameters to rounding; running statistics are rank 0's; validation covers each image once."""
    recipe = dataclasses.replace(SHORT, iterations=2, ema=None)
    assert ranks(_ranked, tmp_path / "two", recipe) == [(0, ""), (0, "")]

    calls = 0

    def micro(self: Trainer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        before = [buffer.clone() for buffer in self.model.buffers()]
        result = whole(self, x, y)
        if calls % 2:  # rank 1's
            torch._foreach_copy_(list(self.model.buffers()), before)
        calls += 1
        return result

    whole = Trainer._micro
    monkeypatch.setattr(Trainer, "_micro", micro)
    train(short(tmp_path / "one", recipe, eval_every=2))
    one, two = (torch.load(tmp_path / name / checkpoint.LAST, weights_only=True) for name in ("one", "two"))
    assert calls == 4
    for name, value in one["model"].items():  # fp32 sums of the same terms in another order, over two steps
        torch.testing.assert_close(two["model"][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert one["history"][-1]["val_loss"] == pytest.approx(two["history"][-1]["val_loss"], rel=1e-3)
    assert two["latest"]["count"] == 359
    assert len(two["rng"]) == 2


# forward and backward in a CUDA graph


@pytest.mark.parametrize(
    ("asked", "device", "world", "compile", "graphs", "why"),
    [
        ("auto", "cpu", 1, "none", False, "there is none on cpu"),
        ("off", "cpu", 2, "none", False, "--cuda-graph off"),
        ("off", "cuda", 1, "none", False, "--cuda-graph off"),
        ("auto", "cuda", 1, "none", True, "one process on a GPU"),
        ("on", "cuda", 1, "inductor", True, "--cuda-graph on"),
        ("auto", "cuda", 1, "inductor", False, "--compile inductor launches kernels its own way"),
        ("auto", "cuda", 2, "none", False, "DistributedDataParallel exchanges gradients during the backward pass"),
        ("on", "cuda", 2, "none", True, "--cuda-graph on; gradients are averaged behind it"),
    ],
)
def test_where_graphs_serve(
    asked: str, device: str, world: int, compile: str, graphs: bool, why: str, tmp_path: Path
) -> None:
    run = short(tmp_path, cuda_graph=asked, compile=compile)
    chosen, reason = graph_choice(run, Place(0, world, torch.device(device)))
    assert chosen == graphs
    assert reason.startswith(why)


@pytest.mark.parametrize(
    ("given", "asked"), [("", "auto"), ("--cuda-graph", "on"), ("--cuda-graph off", "off"), ("--cuda-graph on", "on")]
)
def test_spellings_of_cuda_graph(
    given: str, asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastres.train.loop.train", lambda run: run.cuda_graph)
    assert main(["train", *given.split()]) == 0
    assert capsys.readouterr().out == f"{asked}\n"


def test_a_graphed_training_is_the_same(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By graphs' stand-in, bit for bit: two micro-batches per update, validation, checkpoints and EMA in between."""
    pretence = Pretence(monkeypatch)
    monkeypatch.setattr("fastres.train.loop.graph_choice", lambda run, place: (True, ""))
    train(short(tmp_path))
    assert len(pretence.modes) == 2  # the first micro-batch finds no gradients, the second adds to them
    ours, theirs = (torch.load(out / checkpoint.LAST, weights_only=True) for out in (tmp_path, undisturbed))
    for name in ("model", "ema"):
        assert_same(ours[name], theirs[name])
    for row, other in zip(ours["history"], theirs["history"], strict=True):
        assert {k: v for k, v in row.items() if "second" not in k} == pytest.approx(
            {k: v for k, v in other.items() if "second" not in k}, rel=0, abs=0, nan_ok=True
        )


def test_a_bad_loss_in_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a replay has touched is put back as well."""
    pretence = Pretence(monkeypatch)
    monkeypatch.setattr("fastres.train.loop.graph_choice", lambda run, place: (True, ""))
    checkpoint.prepare(tmp_path)
    ours = trainer(tmp_path)
    batches = list(ours.loader.training(0, 8))
    steps(ours, iter(batches), 6)
    assert len(pretence.modes) == 2
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    x, y = batches[12]
    with pytest.raises(NonFiniteError, match="iteration 6"):
        ours.step(iter([(x * float("nan"), y), batches[13]]))
    assert_same(ours.model.state_dict(), before)


def _graphed_rank(out: Path, recipe: Recipe, graphs: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if graphs:
            Pretence(patch)
            patch.setattr("fastres.train.loop.graph_choice", lambda run, place: (True, ""))
        train(short(out, recipe, eval_every=recipe.iterations))


def test_processes_with_graphs_train_as_with_ddp(tmp_path: Path) -> None:
    """gloo and graphs' stand-in: gradients averaged behind the replay are those of DistributedDataParallel, bit for
    bit, as two processes leave no choice of order."""
    recipe = dataclasses.replace(SHORT, iterations=6, ema=None)
    for graphs in (True, False):
        assert ranks(_graphed_rank, tmp_path / str(graphs), recipe, graphs) == [(0, ""), (0, "")]
    ours, theirs = (torch.load(tmp_path / str(g) / checkpoint.LAST, weights_only=True) for g in (True, False))
    assert_same(ours["model"], theirs["model"])


def _averaged(rank: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shares = [torch.randn(2, 3, 5, 5) for _ in range(2)]
    gradients = [torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for x in shares]
    for p, gradient in zip(net.parameters(), gradients[rank], strict=True):
        p.grad = gradient.clone()
    average(net.parameters())
    for p, pair in zip(net.parameters(), zip(*gradients, strict=True), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, pair[0] / 2 + pair[1] / 2)
    net[0].bias.grad = None
    with pytest.raises(RuntimeError, match="1 of 2 parameters have no gradient"):
        average(net.parameters())
    wrapped = DistributedDataParallel(net)
    for model in (wrapped, nn.Sequential(wrapped), net):
        with pytest.raises(ValueError, match=r"takes no DistributedDataParallel.*average the gradients"):
            fastres.graphed(lambda x: wrapped(x).sum(), model)


def _averaging() -> None:
    """Of each rank: `average` against the mean, and what it and `graphed` refuse."""
    with place("cpu") as here:
        _averaged(here.rank)


def test_averages_of_gradients() -> None:
    assert ranks(_averaging) == [(0, ""), (0, "")]


# the loop against a plain one


def test_a_plain_loop_gives_the_same_weights(tmp_path: Path) -> None:
    """Two micro-batches per iteration, torch's unfused SGD, the EMA written out."""
    ours = trainer(tmp_path)
    batches = list(ours.loader.training(0, 4))
    torch.manual_seed(0)
    net = families.build("cifar", 8, in_channels=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 1.0, momentum=0.9, weight_decay=5e-4)
    averaged: list[Tensor] = []
    moving = ours.loader.training(0, 4)
    for i in range(4):
        ours.step(moving)
        optimizer.param_groups[0]["lr"] = ours.lr(i)
        optimizer.zero_grad()
        for x, y in batches[2 * i : 2 * i + 2]:
            (F.cross_entropy(net(x), y) / 2).backward()
        optimizer.step()
        if i % 2 == 0:
            values = [p.detach().clone() for p in net.parameters()]
            averaged = [0.9 * a + 0.1 * v for a, v in zip(averaged, values, strict=True)] if averaged else values
    for name, value in net.state_dict().items():  # fp32 by another order of operations
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert ours.ema is not None
    for p, value in zip(ours.ema.module.parameters(), averaged, strict=True):
        torch.testing.assert_close(p, value, rtol=1e-5, atol=1e-6)


def test_the_average_copies_while_it_warms(tmp_path: Path) -> None:
    ours = trainer(tmp_path, dataclasses.replace(SHORT, ema=Ema(0.9, every=2, warm=1)))
    moving = ours.loader.training(0, 3)
    steps(ours, moving, 3)
    assert ours.ema is not None
    assert_same(ours.ema.module.state_dict(), ours.model.state_dict())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision(tmp_path: Path, dtype: str) -> None:
    done = train(short(tmp_path, dataclasses.replace(SHORT, iterations=2), dtype=dtype))
    assert math.isfinite(done.error)
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert all(value.dtype == torch.float32 for value in saved["model"].values() if value.is_floating_point())
    assert bool(saved["scaler"]) == (dtype == "fp16")


def test_warmup_ends_by_the_training_error(tmp_path: Path) -> None:
    rule = Warmup(lr=0.05, error=0.88, from_depth=8, window=2)
    recipe = dataclasses.replace(SHORT, warmup=rule, lr=0.2, iterations=12)
    train(short(tmp_path, recipe, log_every=4))
    rows = [row for row in torch.load(tmp_path / checkpoint.LAST, weights_only=True)["history"] if "train_error" in row]
    below = [row["train_error"] < 0.88 for row in rows]
    end = int(rows[below.index(True)]["iteration"])
    assert 2 <= end < 12
    assert [int(row["iteration"]) for row in rows if row["iteration"] <= end] == list(range(2, end + 1, 2))
    assert all((row["lr"] == 0.05) == (row["iteration"] <= end) for row in rows)


def test_errors_are_counted() -> None:
    scores = torch.randn(50, 7)
    labels = torch.randint(7, (50,))
    found = errors(lambda x: x, [(scores[:32], labels[:32]), (scores[32:], labels[32:])], CPU, 7)
    ranks = [int((row > row[label]).sum()) for row, label in zip(scores, labels, strict=True)]
    loss = F.cross_entropy(scores, labels).item()
    expected = Errors(loss, sum(r >= 1 for r in ranks) / 50, sum(r >= 5 for r in ranks) / 50, 50)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-5)
    assert errors(lambda x: x, [(scores[:, :4], labels.clamp(max=3))], CPU, 4).top5 is None


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_at_the_last_good_step(tmp_path: Path, lag: int, what: str) -> None:
    ours = trainer(tmp_path)
    ours.lag = lag  # 1 as on a GPU, where the host learns of it an iteration later
    checkpoint.prepare(tmp_path)

    def poisoned() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(ours.loader.training(0, 8)):
            yield (x * float("nan") if what == "loss" and i == 2 * 3 + 1 else x), y

    def explode(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if ours.iteration == 3 else gradient

    if what == "gradient":
        next(ours.model.parameters()).register_hook(explode)
    batches = poisoned()
    with pytest.raises(NonFiniteError, match=rf"iteration 3 is not finite .*{tmp_path / checkpoint.LAST}") as stopped:
        steps(ours, batches, 8)
    assert str(stopped.value).endswith("A lower lr may help, which is another run: begin it in another --out")
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    good = trainer(tmp_path / "good")
    clean = good.loader.training(0, 3)
    steps(good, clean, 3)
    assert saved["iteration"] == 3
    assert_same(saved["model"], good.model.state_dict())
    for state, expected in zip(saved["optimizer"]["state"].values(), good.optimizer.state.values(), strict=True):
        assert torch.equal(state["momentum_buffer"], expected["momentum_buffer"])
    assert torch.equal(saved["meter"], good.meter)


# checkpoints


def test_what_is_in_the_files(undisturbed: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    best = torch.load(undisturbed / checkpoint.BEST, weights_only=True)
    with safe_open(undisturbed / checkpoint.WEIGHTS, "pt") as file:
        meta = json.loads(file.metadata()["fastres"])
    assert meta == best["meta"]
    assert (meta["classes"], meta["family"], meta["depth"], meta["data"]) == (list("0123456789"), "cifar", 8, "digits")
    assert_same(load_file(undisturbed / checkpoint.WEIGHTS), best["ema"])
    net = families.build(
        meta["family"], meta["depth"], num_classes=meta["num_classes"], in_channels=meta["in_channels"]
    )
    net.load_state_dict(load_file(undisturbed / checkpoint.WEIGHTS))
    rows = list(csv.DictReader((undisturbed / "log.csv").open()))
    assert [(row["iteration"], bool(row["train_loss"])) for row in rows] == [
        ("3", True),
        ("4", False),
        ("6", True),
        ("8", True),
        ("8", False),
    ]
    assert min(float(row["val_error"]) for row in rows if row["val_error"]) == meta["best"]
    assert (undisturbed / "curves.png").read_bytes()[:4] == b"\x89PNG"


def _run_files(out: Path, undisturbed: Path) -> Path:
    out.mkdir()
    for name in (checkpoint.LAST, checkpoint.BEST):
        (out / name).write_bytes((undisturbed / name).read_bytes())
    return out


def test_damaged_checkpoints(tmp_path: Path, undisturbed: Path) -> None:
    out = _run_files(tmp_path / "run", undisturbed)
    last = out / checkpoint.LAST
    whole = last.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", b"no zip"):
        last.write_bytes(content)
        with pytest.raises(
            CheckpointError,
            match=rf"{last} is truncated, damaged or no.*{out / checkpoint.BEST} is there to .*: copy it to {last}$",
        ):
            train(short(out, resume=True))
        assert last.read_bytes() == content
    torch.save({"state": 1}, last)
    with pytest.raises(CheckpointError, match="lacks meta, model and ema"):
        train(short(out, resume=True))
    torch.save({"meta": _kill}, last)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(short(out, resume=True))
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "none.pt")


def test_checkpoints_of_other_runs(tmp_path: Path, undisturbed: Path) -> None:
    out = _run_files(tmp_path / "run", undisturbed)
    before = (out / checkpoint.LAST).read_bytes()
    others: list[tuple[dict[str, Any], str]] = [
        ({"depth": 14}, "depth: 8 there, 14 here"),
        ({"family": "cifar-plain"}, "family: 'cifar' there, 'cifar-plain' here"),
        (
            {"seed": 1, "holdout": 100},
            "training images: 1438 there, 1338 here; holdout: 0 there, 100 here; seed: 0 there",
        ),
        ({"recipe": dataclasses.replace(SHORT, lr=0.3)}, "recipe.lr: 0.1 there, 0.3 here"),
        ({"micro_batch": 16}, "micro-batches: 2 there, 4 here"),
    ]
    for options, message in others:
        with pytest.raises(ValueError, match=message):
            train(short(out, **options, resume=True))
    with pytest.raises(ValueError, match=r"last\.pt is there already: --resume"):
        train(short(out))
    assert (out / checkpoint.LAST).read_bytes() == before


def test_another_runs_checkpoint_is_a_wrong_argument(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, with `--resume` and without it."""
    out = _run_files(tmp_path / "run", undisturbed)
    for given, said in ((["--resume"], "of another run: "), ([], "is there already")):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--out", str(out), "--device", "cpu", "--lr", "0.3", *given])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_a_resumed_run_says_where_it_begins(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(short(tmp_path / "none", dataclasses.replace(SHORT, iterations=1)))
    assert "starts from the beginning" not in capsys.readouterr().err
    train(short(tmp_path / "new", dataclasses.replace(SHORT, iterations=1), resume=True))
    assert f"no checkpoint in {tmp_path / 'new'}: starts from the beginning\n" in capsys.readouterr().err
    out = _run_files(tmp_path / "run", undisturbed)
    train(short(out, resume=True))
    assert f"{out / checkpoint.LAST}: goes on from iteration 8 of 8\n" in capsys.readouterr().err


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    """A real limit on the size of files, far below a checkpoint's."""
    out = _run_files(tmp_path / "run", undisturbed)
    before = (out / checkpoint.LAST).read_bytes()
    state = checkpoint.load(out / checkpoint.LAST)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"last\.pt can't be written \(\d+ bytes\): File too large.*intact, make room and go on from",
        ):
            checkpoint.save(out, state, best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / checkpoint.LAST).read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == [checkpoint.BEST, checkpoint.LAST]


def test_a_disk_full_at_first_claims_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        if path.suffix == ".pt":
            raise OSError(errno.ENOSPC, "x")
        whole(path, content)

    whole = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", write)
    with pytest.raises(CheckpointError, match=r"full; there is no earlier checkpoint, make room and start again$"):
        train(short(tmp_path))


def test_best_takes_the_place_of_a_damaged_last(tmp_path: Path, undisturbed: Path) -> None:
    """As the message says."""
    out = _run_files(tmp_path / "run", undisturbed)
    (out / checkpoint.LAST).write_bytes((out / checkpoint.BEST).read_bytes())
    train(short(out, resume=True))
    assert_same(weights(out), weights(undisturbed))


def test_few_classes_have_no_top_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in the lines, nor in the summary and the log."""
    whole = loop.load

    def three(*args: Any, **options: Any) -> Any:
        dataset = whole(*args, **options)
        parts = [Resident(part.images, part.labels % 3) for part in (dataset.train, dataset.val)]
        return dataclasses.replace(dataset, classes=tuple("abc"), train=parts[0], val=parts[1])

    monkeypatch.setattr(loop, "load", three)
    done = train(short(tmp_path))
    assert "top-5" not in f"{capsys.readouterr().err}{done}"
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert any(row["val_error"] for row in rows)
    assert not any(row["val_error_top5"] for row in rows)


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "system is read-only")])
def test_what_the_system_refuses_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, "x")

    monkeypatch.setattr(checkpoint.tempfile, "mkstemp", refuse)
    with pytest.raises(SystemExit, match=f"{tmp_path}.* can't hold checkpoints: .*{said}; choose another --out"):
        main(["train", "--out", str(tmp_path / "run"), "--device", "cpu"])


def test_a_folder_that_can_t_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run can't hold checkpoints"):
        train(short(tmp_path / "file" / "run"))


def test_generators_come_back() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())  # noqa: NPY002

    torch.save(checkpoint.rng_state(), buffer := io.BytesIO())
    first = draw()
    buffer.seek(0)
    checkpoint.set_rng_state(torch.load(buffer, weights_only=True))
    assert draw() == first


# the command


@pytest.mark.extra  # 440 steps; other tests take eight
def test_resnet_20_reads_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default command: at least 97 % of the digits held out."""
    assert main(["train", "--out", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "440 iterations, validation error" in said
    assert f"; {tmp_path} holds log.csv, curves.png, last.pt, best.pt, weights.safetensors\n" in said
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert saved["latest"]["count"] == 359
    assert saved["latest"]["top1"] <= 0.03


@pytest.mark.parametrize(("rank", "said"), [("0", "as trained\n"), ("1", "")])
def test_one_process_speaks(
    rank: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("fastres.train.loop.train", lambda run: "as trained")
    assert main(["train", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == said


def test_synthetic_images_from_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    arguments = "--recipe cifar-2015 --data synthetic --depth 8 --batch 16 --iterations 2 --deterministic --device cpu"
    assert main(["train", "--out", str(tmp_path), *arguments.split()]) == 0
    assert "2 iterations, validation error" in capsys.readouterr().out
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert (saved["meta"]["data"], saved["latest"]["count"], saved["iteration"]) == ("synthetic", 256, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe alexnet", "invalid choice: 'alexnet'"),
        ("--depth 21", "depth 21 is not 6n+2"),
        ("--family vgg", "invalid choice: 'vgg'"),
        ("--family torchvision --depth 18", "reads images of 3 channels, not 1"),
        ("--shortcut C", "family cifar has no choice of shortcut"),
        ("--data mnist", "invalid choice: 'mnist'"),
        ("--batch 0", "--batch: 0: any whole number from 1"),
        ("--batch 60 --micro-batch 7", "batch 60 can't be dealt out as micro-batches of 7"),
        ("--batch many", "--batch: many: any whole number from 1"),
        ("--lr -1", "--lr: -1: any number above 0"),
        ("--lr nan", "--lr: nan: any number above 0"),
        ("--iterations 0", "--iterations: 0: any whole number from 1"),
        ("--epochs 0", "--epochs: 0: any whole number from 1"),
        ("--iterations 5 --epochs 5", "exclude each other"),
        ("--seed -1", "--seed: -1: any whole number from 0"),
        (f"--seed {2**70}", f"seed {2**70}: any whole number from 0 to 2**63 - 1 is accepted"),
        (f"--seed {2**63}", "any whole number from 0 to 2**63 - 1 is accepted"),
        ("--micro-batch 0", "--micro-batch: 0: any whole number from 1"),
        ("--log-every 0", "--log-every: 0: any whole number from 1"),
        ("--eval-every 0", "--eval-every: 0: any whole number from 1"),
        ("--save-every 0", "--save-every: 0: any whole number from 1"),
        ("--workers -1", "--workers: -1: any whole number from 0"),
        ("--holdout -1", "--holdout: -1: any whole number from 0"),
        ("--holdout 1438", "--holdout 1438 of 1438"),
        ("--device tpu", "device"),
        ("--cuda-graph", "--cuda-graph on needs a GPU, this training is on cpu"),
        ("--cuda-graph never", "invalid choice: 'never'"),
        ("--recipe cifar-2015", "data cifar10 needs --root"),
        ("--recipe imagenet-2015 --root /nowhere", "image-net.org"),
    ],
)
def test_bad_arguments(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", "--out", str(tmp_path / "run"), *arguments.split()]
    with pytest.raises(SystemExit) as end:
        main([*given, *([] if "--device" in arguments else ["--device", "cpu"])])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_backend_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: ["inductor"])
    with pytest.raises(ValueError, match="no backend 'fastres' here; it has inductor"):
        trainer(tmp_path, compile="fastres")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "fastres"])
def test_a_compiled_net_trains_alike(tmp_path: Path, backend: str) -> None:
    """And its checkpoint is one of the plain net, which goes on uncompiled."""
    recipe = dataclasses.replace(SHORT, iterations=3, ema=None)
    train(short(tmp_path / "plain", recipe))
    train(short(tmp_path / "compiled", recipe, compile=backend))
    ours, theirs = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # fp32 by another order of operations
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    train(short(tmp_path / "compiled", recipe, resume=True))


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(short(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run that was cut short: what it had written behind its last checkpoint is dropped when it goes on."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == 6 and not self.run.resume:
            raise KeyboardInterrupt
        whole(self, batches)

    whole = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(short(tmp_path, tensorboard=True, save_every=4, log_every=1))
    train(short(tmp_path, tensorboard=True, save_every=4, log_every=1, resume=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    names = set(rows[0]) - {"iteration", "epoch", "seconds"}
    assert set(events.Tags()["scalars"]) == names
    for name in names - {"images_per_second"}:  # measured again
        found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert [(int(row["iteration"]), float(row[name])) for row in rows if row[name]] == found
        assert len(found) >= 2


def test_curves_are_drawn_now_and_then_and_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(report.plot, "curves", lambda path, runs: drawn.extend(len(rows) for rows in runs.values()))
    often = {"eval_every": 1, "log_every": 1}
    train(short(tmp_path / "rarely", **often))
    assert drawn == [2, 16]
    drawn.clear()
    monkeypatch.setattr(report, "DRAW_EVERY", 0.0)
    train(short(tmp_path / "often", **often))
    assert drawn == [2, 4, 6, 8, 10, 12, 14, 16, 16]
    drawn.clear()
    monkeypatch.setattr(report, "DRAW_EVERY", 1e9)
    monkeypatch.setattr(Trainer, "evaluate", lambda self: self._leave(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        train(short(tmp_path / "stopped", log_every=1))
    assert drawn == [4]


def test_a_picture_that_can_t_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(report.plot, "curves", refuse)
    done = train(short(tmp_path, dataclasses.replace(SHORT, iterations=1)))
    assert done.iterations == 1
    assert "curves.png can't be written: [Errno 28] no room" in capsys.readouterr().err


def test_matplotlib_and_safetensors_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    done = train(short(tmp_path, dataclasses.replace(SHORT, iterations=1)))
    assert isinstance(done, Summary)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.BEST, checkpoint.LAST, "log.csv"]
    assert f"; {tmp_path} holds log.csv, last.pt, best.pt\n" in str(done)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["off", "on"])
def test_on_a_gpu(tmp_path: Path, graph: str) -> None:
    """The same weights to rounding as on the CPU, and with the step in a CUDA graph."""
    recipe = dataclasses.replace(SHORT, iterations=4)  # two micro-batches each, of which the second adds gradients
    train(short(tmp_path / "gpu", recipe, device="cuda", dtype="fp32", cuda_graph=graph))
    train(short(tmp_path / "cpu", recipe))
    ours, theirs = weights(tmp_path / "gpu"), weights(tmp_path / "cpu")
    for name, value in theirs.items():
        # Four steps amplify what sums in another order round: weights moved by an epsilon end up to 5e-6 apart.
        torch.testing.assert_close(ours[name].cpu(), value, rtol=1e-2, atol=1e-3)
    done = train(short(tmp_path / "bf16", recipe, device="cuda", cuda_graph=graph))
    assert math.isfinite(done.error)


@pytest.mark.gpu
def test_a_bad_loss_on_a_gpu(tmp_path: Path) -> None:
    checkpoint.prepare(tmp_path)
    ours = Trainer(short(tmp_path, device="cuda"), Place(0, 1, torch.device("cuda", 0)), Signals())
    ours.model.train()
    poisoned = ((x * float("nan") if i == 7 else x, y) for i, (x, y) in enumerate(ours.loader.training(0, 8)))
    with pytest.raises(NonFiniteError, match="iteration 3"):
        steps(ours, poisoned, 8)
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())
