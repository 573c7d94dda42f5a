"""Draw training curves like the paper's Fig. 4 and Fig. 6: training error thin, validation error bold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastres import picture
from fastres.train.checkpoint import write_atomically


def curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bool:
    """Draw the histories of some runs into a PNG file; return False and do nothing if matplotlib isn't installed.

    runs: label -> history, whose rows have "iteration" and "train_error" or "val_error" (in [0, 1]). Raises OSError if
    the file can't be written.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    with picture.style():
        figure = picture.figure(6, 4)
        axes = figure.subplots()
        for number, (label, history) in enumerate(runs.items()):
            colour, _ = picture.series(number)
            for column, width, name in (("train_error", 0.7, None), ("val_error", 2.2, label)):
                points = [(row["iteration"], 100 * row[column]) for row in history if column in row]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=name)
        axes.set(xlabel="iteration", ylabel="error, %", title="thin: training, bold: validation")
        axes.set_ylim(bottom=0)
        axes.grid()
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        write_atomically(path, picture.encode(figure, "png"))
    return True
