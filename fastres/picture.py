"""The common style of all pictures: colours, fonts, and SVG files for both light and dark mode.

    with picture.style():
        figure = picture.figure(8.3, 4)
        figure.subplots().plot(...)
    picture.save(figure, Path("picture.svg"))

If the reader prefers a dark colour scheme, the style sheet of an SVG replaces the colours that are keys of `DARK` by
their values. All other colours are medium tones, which contrast with both backgrounds. PNG and PDF files are always
light and opaque.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".svg", ".pdf")
CARD, INK, FAINT, LINE = "#ffffff", "#1f2933", "#57606a", "#d0d7de"
DARK = {CARD: "#0d1117", INK: "#e6edf3", FAINT: "#9aa4ae", LINE: "#3d444d"}
OURS, PEER = "#d55e00", "#6e8098"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", PEER)  # from Okabe and Ito's colour-blind safe palette
MARKERS = "os^Dv"  # so that lines differ by more than their colour
FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_RC = {
    "svg.fonttype": "none",  # keep text as text instead of paths
    "svg.hashsalt": "fastres",  # the same picture gives the same bytes
    "font.family": "DejaVu Sans",  # ships with matplotlib and is wider than FONTS, so labels fit in those too
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": CARD,
    "axes.facecolor": CARD,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the common style inside the context. Raises ImportError if matplotlib is missing."""
    from matplotlib import rc_context

    with rc_context(_RC):
        yield


def figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure. Sizes are in inches; 8.3 inches are as wide as a page on GitHub."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=144)


def series(number: int) -> tuple[str, str]:
    """Return the colour and the marker of line `number`, counted from 0."""
    return SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]


def encode(figure: Any, kind: str) -> bytes:
    """Return the figure as the bytes of a file. kind: "svg", "png" or "pdf". The same figure gives the same bytes."""
    file = io.BytesIO()
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with style():
        figure.savefig(file, format=kind, metadata=metadata)
    return _switching(file.getvalue().decode()).encode() if kind == "svg" else file.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write the figure to `path`, whose suffix must be one of `SUFFIXES`. A missing folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(figure, path.suffix[1:]))


def _switching(svg: str) -> str:
    """Return matplotlib's SVG with the reader's system fonts, and with the colours of `DARK` in dark mode.

    matplotlib writes colours into style attributes, which a style sheet can override only with `!important`.
    """
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}: {dark} !important}}\n'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    style = f"text{{font-family: {FONTS}}}\n@media (prefers-color-scheme: dark) {{\n{rules}}}\n"
    return svg.replace("</style>", f"\n{style}</style>", 1)
