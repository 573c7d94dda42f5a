"""What a training shows and writes about itself."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastres.train import plot
from fastres.train.checkpoint import write_atomically

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
)
LOG, CURVES, TENSORBOARD = "log.csv", "curves.png", "tensorboard"
DRAW_EVERY = 30.0  # seconds between two drawings of the curves, each of which takes a fraction of one


class Report:
    """What the main process shows and writes while it trains: a progress bar, log.csv, curves.png, TensorBoard.

    The curves are drawn with an evaluation if `DRAW_EVERY` has passed since the last time, and in the end, however the
    training ends.
    """

    def __init__(
        self, out: Path, title: str, batch: int, start: int, total: int, history: History, *, tensorboard: bool
    ) -> None:
        """start, total: iterations. history: the training's own list; log.csv begins with what is in it already."""
        self.out, self.title, self.batch, self.history = out, title, batch, history
        self.due = time.monotonic()
        self.bar = tqdm(
            total=total * batch, initial=start * batch, unit="img", unit_scale=True, desc=title, disable=None
        )
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, COLUMNS, restval="")
        rows.writeheader()
        rows.writerows(history)
        write_atomically(self.out / LOG, text.getvalue().encode())
        self.writer = summary_writer(out / TENSORBOARD, start) if tensorboard else None

    def advance(self) -> None:
        self.bar.update(self.batch)

    def row(self, row: Mapping[str, float]) -> None:
        """Adds a row of `COLUMNS` to log.csv and TensorBoard."""
        with (self.out / LOG).open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(row)
        if self.writer is not None:
            for name in row.keys() - {"iteration", "epoch"}:
                self.writer.add_scalar(name, row[name], int(row["iteration"]))
        if "train_loss" in row:
            self.bar.set_postfix(
                {"loss": f"{row['train_loss']:.3f}", "error": f"{row['train_error']:.1%}", "lr": f"{row['lr']:g}"}
            )

    def evaluated(self, top1: float, top5: float) -> None:
        """The history's last row is an evaluation."""
        self.row(self.history[-1])
        if time.monotonic() >= self.due:
            self._draw()
        self.bar.write(
            f"iteration {int(self.history[-1]['iteration'])}: validation error {top1:.2%}, top-5 {top5:.2%}",
            file=sys.stderr,
        )

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
