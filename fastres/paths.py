"""Where files lie that no option names: the one place that reads FASTRES_CACHE_DIR and XDG_CACHE_HOME."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The folder for measured tables of kernels, built extensions and mean images, which may not exist yet.

    It is `FASTRES_CACHE_DIR`, else fastres/ in `XDG_CACHE_HOME` or in ~/.cache. A `~` in front is the home folder:
    where it was quoted, or set by no shell, nobody has expanded it. A relative XDG_CACHE_HOME counts as none, as its
    specification demands.
    """
    if chosen := os.environ.get("FASTRES_CACHE_DIR"):
        return Path(os.path.expanduser(chosen)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # a user without a home: nothing can be kept, and whoever tries hears so
        base = os.devnull
    return Path(base) / "fastres"
