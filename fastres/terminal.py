"""What a terminal is shown that a file or a pipe is not."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping


def shows_bars() -> bool:
    """True where stderr is a terminal that can go back to the start of a line, as a progress bar does."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """h:mm:ss; "-" for nan."""
    if math.isnan(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def rate(per_second: float) -> str:
    """At least three digits, and all before the point."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:#.3g}"


def listing(title: str, meanings: Mapping[str, str]) -> str:
    """For the end of a --help: a line for each name."""
    width = max(map(len, meanings))
    return "\n".join([f"{title}:", *(f"  {name:{width}}  {meaning}" for name, meaning in meanings.items())])
