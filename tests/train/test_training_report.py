"""The report of a training: lines, progress bar, log.csv, curves and TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
import errno
import fcntl
import io
import os
import re
import signal
import struct
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tolerances import AVERAGES, ROUNDING
from training import SHORT, short, signalled, trainer

from fastres.train import checkpoint, loop, report
from fastres.train.data import Resident
from fastres.train.loop import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def on_terminal(out: Path, monkeypatch: pytest.MonkeyPatch, columns: int = 100, **options: Any) -> str:
    """Return what a training writes to stderr if that is a terminal with `columns` columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    read: list[bytes] = []

    def reads() -> None:
        with suppress(OSError):  # raised when the other end is closed
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
    assert re.search(r"\r +\r$", said)  # the bar is erased at the end

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
    """Replace the clock: an iteration takes 1 second, an evaluation 100 and a checkpoint 10."""
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
    """Rates in log.csv and in the lines exclude evaluations, checkpoints and images of the process before a resumption.

    The elapsed time includes the time of all of them.
    """
    ticking(monkeypatch)
    with pytest.raises(SystemExit):
        signalled(tmp_path, signal.SIGTERM, 4, False)
    train(short(tmp_path, resume=True))
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert {float(row["images_per_second"]) for row in rows if row["images_per_second"]} == {64.0}
    lines = [match[0] for match in LINE.finditer(capsys.readouterr().err)]
    assert all("  64.0 images/s  " in line for line in lines)
    # 248 = 8 iterations + 2 evaluations + 4 checkpoints: of the first evaluation and of iterations 3, 5 and 6.
    assert [row["seconds"] for row in rows if row["val_error"]] == ["114.0", "248.0"]
    assert [line.split()[-1] for line in lines] == ["0:01:54", "0:04:08"]


def test_the_time_left_leaves_out_what_was_done_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate ignores iterations of an earlier process and the first of this one, which may compile kernels."""
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
    for now in (160.0, 163.0, 166.0):  # noqa: B007 - read by the replaced clock
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
    assert shown == pytest.approx([*expected, *expected], rel=AVERAGES)

    def step(self: Trainer, batches: Any) -> None:
        self.signals.received = signal.SIGTERM * (self.iteration == 2)
        stepped(self, batches)

    stepped = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(SystemExit):
        train(short(tmp_path / "stopped", log_every=1))
    train(short(tmp_path / "stopped", log_every=1, resume=True))
    assert shown[4:] == pytest.approx(expected, rel=AVERAGES)


def test_few_classes_have_no_top_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With three classes, lines, summary and log have no top-5 error."""
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


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(short(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard has the values of log.csv, also for a resumed run: those after the last checkpoint are discarded."""
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
        found = [(event.step, pytest.approx(event.value, rel=ROUNDING)) for event in events.Scalars(name)]
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
