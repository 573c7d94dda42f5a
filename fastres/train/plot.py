"""Training curves like the paper's Fig. 4 and Fig. 6: training error thin, validation error bold."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastres.train.checkpoint import write_atomically


def curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bool:
    """Draws each run's history (rows with "iteration" and "train_error" or "val_error") into a PNG.

    Returns False, having done nothing, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, (label, history) in enumerate(runs.items()):
        for column, width, name in (("train_error", 0.7, None), ("val_error", 2.2, label)):
            points = [(row["iteration"], 100 * row[column]) for row in history if column in row]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=width, label=name)
    axes.set(xlabel="iteration", ylabel="error (%)", title="thin: training, bold: validation")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())
    return True
