"""One look for all pictures: colours, type, and files that can be read in light and in dark mode.

    with picture.style():
        figure = picture.figure(8.3, 4)
        figure.subplots().plot(...)
    picture.save(figure, Path("picture.svg"))

An SVG has a light and a dark form: its style sheet switches the colours of `DARK` by `prefers-color-scheme`. All other
colours are middle tones that stand out from both backgrounds. PNG and PDF are always light and opaque.
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
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", PEER)  # Okabe and Ito's colour-blind safe ones
MARKERS = "os^Dv"  # lines differ by more than colour
FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_RC = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastres",  # the same picture gives the same bytes
    "font.family": "DejaVu Sans",  # comes with matplotlib, and is wider than those of FONTS: labels have room
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
    """The look of what is drawn within. Raises ImportError where matplotlib is missing."""
    from matplotlib import rc_context

    with rc_context(_RC):
        yield


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches; 8.3 of them are as wide as a page of a repository."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=144)


def series(number: int) -> tuple[str, str]:
    """Colour and marker of the line of that number."""
    return SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]


def encode(figure: Any, kind: str) -> bytes:
    """The bytes of a file; `kind`: "svg", "png" or "pdf". The same figure gives the same bytes."""
    file = io.BytesIO()
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with style():
        figure.savefig(file, format=kind, metadata=metadata)
    return _switching(file.getvalue().decode()).encode() if kind == "svg" else file.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write the figure to `path`, whose suffix is one of `SUFFIXES`; makes the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(figure, path.suffix[1:]))


def _switching(svg: str) -> str:
    """matplotlib's SVG with the reader's fonts, and the colours of `DARK` where they are preferred. Its colours stand
    in style attributes, which only `!important` overrules."""
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}: {dark} !important}}\n'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    style = f"text{{font-family: {FONTS}}}\n@media (prefers-color-scheme: dark) {{\n{rules}}}\n"
    return svg.replace("</style>", f"\n{style}</style>", 1)
