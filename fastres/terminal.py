"""Terminal output: when to show progress bars, how to escape text, and how to format numbers."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping

_NO_CHARACTERS = r"\ud800-\udfff"  # surrogates; Python uses some of them for bytes of file names that aren't UTF-8
_CONTROLS = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # except the tab; and bidirectional controls


def shows_bars() -> bool:
    """Return whether stderr is a terminal that can rewrite a line, as a progress bar does."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def utf8(text: object) -> str:
    """Return `text` with everything escaped that UTF-8 can't encode. Undecodable bytes of a file name become \\xNN."""
    return re.sub(f"[{_NO_CHARACTERS}]", _escape, str(text))


def printable(text: object) -> str:
    """Return `text` as one line that is safe to print: like `utf8`, and control characters become \\n, \\x1b, ..."""
    return re.sub(f"[{_NO_CHARACTERS}{_CONTROLS}]", _escape, str(text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    byte = 0xDC80 <= code <= 0xDCFF
    return f"\\x{code - 0xDC00:02x}" if byte else found[0].encode("unicode_escape").decode()


def duration(seconds: float) -> str:
    """Return a duration as h:mm:ss, or "-" for nan."""
    if math.isnan(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def rate(per_second: float) -> str:
    """Return a rate with at least three significant digits and without decimals from 100 on."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:#.3g}"


def listing(title: str, meanings: Mapping[str, str]) -> str:
    """Return a list for the end of a --help text: the title, then a line for each name."""
    width = max(map(len, meanings))
    return "\n".join([f"{title}:", *(f"  {name:{width}}  {meaning}" for name, meaning in meanings.items())])
