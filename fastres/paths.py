"""Location of the cache folder. Only this module reads FASTRES_CACHE_DIR and XDG_CACHE_HOME."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder for tuned kernel tables, built extensions and mean images. It may not exist yet.

    The folder is `FASTRES_CACHE_DIR` if that is set, else fastres/ in `XDG_CACHE_HOME`, else ~/.cache/fastres. A
    leading `~` in FASTRES_CACHE_DIR is expanded here, because a shell does not expand a quoted one. A relative
    XDG_CACHE_HOME is ignored, as the XDG specification requires.
    """
    if chosen := os.environ.get("FASTRES_CACHE_DIR"):
        return Path(os.path.expanduser(chosen)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # the user has no home folder: every attempt to write to the cache must fail
        base = os.devnull
    return Path(base) / "fastres"
