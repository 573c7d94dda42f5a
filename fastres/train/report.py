"""What a training shows and writes about itself.

Images per second are those trained on by the time spent training, without evaluations and checkpoints: in log.csv since
the row before, in the progress bar and the line of an evaluation since the evaluation before.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastres.terminal import duration, rate, shows_bars
from fastres.train import plot
from fastres.train.checkpoint import write_atomically
from fastres.train.process import Clock

History = Sequence[Mapping[str, float]]
COLUMNS = (
    "iteration",
    "epoch",
    "lr",
    "train_loss",
    "train_error",
    "val_loss",
    "val_error",
    "val_error_top5",
    "images_per_second",
    "seconds",
)
LOG, CURVES, TENSORBOARD = "log.csv", "curves.png", "tensorboard"
DRAW_EVERY = 30.0  # seconds between two drawings of the curves, each of which takes a fraction of one


class _Bar(tqdm):
    """tqdm's, whose format may name {pace}, text that is asked for whenever the bar is drawn."""

    def __init__(self, pace: Callable[[], str], **options: Any) -> None:
        self.pace = pace
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "pace": self.pace()}


class Report:
    """What the main process shows and writes while it trains: on stderr a line per evaluation and, on a terminal, a
    progress bar; log.csv, curves.png, TensorBoard.

    The curves are drawn with an evaluation if `DRAW_EVERY` has passed since the last time, and in the end, however the
    training ends.
    """

    def __init__(
        self,
        out: Path,
        title: str,
        batch: int,
        start: int,
        total: int,
        epochs: float,
        history: History,
        clock: Clock,
        *,
        tensorboard: bool,
    ) -> None:
        """start, total: iterations. epochs: that all of them are. history: the training's own list; log.csv begins with
        what is in it already."""
        self.out, self.title, self.batch, self.history = out, title, batch, history
        self.iteration, self.total, self.epochs, self.clock = start, total, epochs, clock
        self.first: tuple[int, float] | None = None  # this process's first iteration, slow to start, and when it ended
        self.due = time.monotonic()
        self.images, self.since = 0, clock.training()  # trained on since the last evaluation, which ended then
        self.speed = "- images/s"  # until then
        self.bar = _Bar(
            lambda: f"{self._left()} left, {self._speed()}",
            total=total,
            initial=start,
            desc="training",
            disable=not shows_bars(),
            leave=False,
            bar_format="{desc:10} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {pace}{postfix}",
            dynamic_ncols=True,
        )
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, COLUMNS, restval="")
        rows.writeheader()
        rows.writerows(history)
        write_atomically(self.out / LOG, text.getvalue().encode())
        self.writer = summary_writer(out / TENSORBOARD, start) if tensorboard else None

    def advance(self) -> None:
        self.iteration += 1
        self.images += self.batch
        self.first = self.first or (self.iteration, time.monotonic())
        self.bar.update()

    def row(self, row: Mapping[str, float]) -> None:
        """Adds a row of `COLUMNS` to log.csv and TensorBoard."""
        with (self.out / LOG).open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(row)
        if self.writer is not None:
            for name in row.keys() - {"iteration", "epoch", "seconds"}:
                self.writer.add_scalar(name, row[name], int(row["iteration"]))
        if "train_loss" in row:
            self.bar.set_postfix_str(f"loss {row['train_loss']:.3f}", refresh=False)

    def evaluating(self) -> None:
        self.bar.set_description_str("validating")

    def evaluated(self, loss: float | None) -> None:
        """The history's last row is an evaluation. loss: the mean training loss since the one before, None if
        unknown."""
        row = self.history[-1]
        self.row(row)
        if time.monotonic() >= self.due:
            self._draw()
        whole, epochs = len(str(self.total)), f"{self.epochs:.1f}"
        cells = (
            f"iteration {int(row['iteration']):{whole}}/{self.total}",
            f"epoch {row['epoch']:{len(epochs)}.1f}/{epochs}",
            f"loss {'-' if loss is None else f'{loss:.3f}':>6}",
            f"validation error {row['val_error']:6.2%}"
            + (f", top-5 {row['val_error_top5']:6.2%}" if "val_error_top5" in row else ""),
            f"{self._speed():>15}",
            duration(row["seconds"]),
        )
        self.bar.write("  ".join(cells), file=sys.stderr)
        self.images, self.since, self.speed = 0, self.clock.training(), self._speed()
        self.bar.set_description_str("training")

    def _left(self) -> str:
        """By all that this process has done since its first iteration, evaluations and checkpoints included."""
        if self.first is None or self.iteration == self.first[0]:
            return "?"
        each = (time.monotonic() - self.first[1]) / (self.iteration - self.first[0])
        return duration(each * (self.total - self.iteration))

    def _speed(self) -> str:
        """Since the last evaluation, or until it where no image came after it."""
        if not self.images:
            return self.speed
        return f"{rate(self.images / (self.clock.training() - self.since))} images/s"

    def _draw(self) -> None:
        try:
            plot.curves(self.out / CURVES, {self.title: self.history})
        except OSError as error:  # what ends the training, if anything, is to be heard of
            self.bar.write(f"{CURVES} can't be written: {error}", file=sys.stderr)
        self.due = time.monotonic() + DRAW_EVERY

    def close(self) -> None:
        if self.history:
            self._draw()
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def require_tensorboard() -> None:
    """Raises ValueError where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error


def summary_writer(folder: Path, iteration: int) -> Any:
    """A SummaryWriter that drops what was written after `iteration`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=iteration + 1)
