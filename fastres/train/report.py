"""Report the progress of a training: lines and a progress bar on stderr, log.csv, curves.png and TensorBoard.

Images per second count training only: the time for evaluations and checkpoints is excluded. A row of log.csv covers the
iterations since the row before. The progress bar and the line of an evaluation cover those since the evaluation before.
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
DRAW_EVERY = 30.0  # least seconds between two drawings of the curves; one takes a fraction of a second


class _Bar(tqdm):
    """A tqdm bar whose format may contain {pace}, a text computed each time the bar is drawn."""

    def __init__(self, pace: Callable[[], str], **options: Any) -> None:
        self.pace = pace
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "pace": self.pace()}


class Report:
    """Shows and writes the progress of a training, in the main process.

    It writes a line per evaluation and, on a terminal, a progress bar to stderr; and log.csv, curves.png and
    TensorBoard files to `out`. The curves are drawn at an evaluation if `DRAW_EVERY` seconds have passed since the last
    drawing, and in `close`.
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
        """Open the report and write log.csv with the rows that `history` already has.

        title: the label of the curves. batch: images per iteration. start, total: the current and the last iteration.
        epochs: the length of the training in epochs. history: the training's own list of rows, to which it keeps
        adding. clock: the training's clock.
        """
        self.out, self.title, self.batch, self.history = out, title, batch, history
        self.iteration, self.total, self.epochs, self.clock = start, total, epochs, clock
        self.first: tuple[int, float] | None = None  # this process's first, slow iteration, and when it ended
        self.due = time.monotonic()
        self.images, self.since = 0, clock.training()  # images since the last evaluation, and when that ended
        self.speed = "- images/s"  # up to the last evaluation
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
        """Count one iteration."""
        self.iteration += 1
        self.images += self.batch
        self.first = self.first or (self.iteration, time.monotonic())
        self.bar.update()

    def row(self, row: Mapping[str, float]) -> None:
        """Add a row, with keys from `COLUMNS`, to log.csv and TensorBoard."""
        with (self.out / LOG).open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(row)
        if self.writer is not None:
            for name in row.keys() - {"iteration", "epoch", "seconds"}:
                self.writer.add_scalar(name, row[name], int(row["iteration"]))
        if "train_loss" in row:
            self.bar.set_postfix_str(f"loss {row['train_loss']:.3f}", refresh=False)

    def evaluating(self) -> None:
        """Show that an evaluation has begun."""
        self.bar.set_description_str("validating")

    def evaluated(self, loss: float | None) -> None:
        """Report an evaluation, which is the last row of the history.

        loss: the mean training loss since the evaluation before, None if unknown.
        """
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
        """Return the remaining time, estimated from this process's mean time per iteration after its first.

        The mean includes evaluations and checkpoints.
        """
        if self.first is None or self.iteration == self.first[0]:
            return "?"
        each = (time.monotonic() - self.first[1]) / (self.iteration - self.first[0])
        return duration(each * (self.total - self.iteration))

    def _speed(self) -> str:
        """Return the images per second since the last evaluation, or that evaluation's if no images followed it."""
        if not self.images:
            return self.speed
        return f"{rate(self.images / (self.clock.training() - self.since))} images/s"

    def _draw(self) -> None:
        try:
            plot.curves(self.out / CURVES, {self.title: self.history})
        except OSError as error:  # not raised: it would hide the error that ended the training
            self.bar.write(f"{CURVES} can't be written: {error}", file=sys.stderr)
        self.due = time.monotonic() + DRAW_EVERY

    def close(self) -> None:
        """Draw the curves and close the progress bar and TensorBoard."""
        if self.history:
            self._draw()
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def require_tensorboard() -> None:
    """Raise ValueError if TensorBoard isn't installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error


def summary_writer(folder: Path, iteration: int) -> Any:
    """Return a SummaryWriter that discards what an earlier run wrote after `iteration`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=iteration + 1)
