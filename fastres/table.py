"""Tables as CSV files that are whole, or say by their name that they aren't."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastres.terminal import utf8

__all__ = ["Table"]


class Table:
    """Rows go to PATH.part, each as it comes; when there are no more, that becomes PATH.

    So a run that is cut short leaves what it had, and PATH is what it was. Only what is no file of its own, a link or a
    device, is written in place. Text that UTF-8 can't hold is written as `utf8` has it. Raises OSError, which names the
    file and how many rows it holds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        beside = self.path.with_name(f"{self.path.name}.part")
        self.part = beside if in_place_of(self.path) else self.path
        self.rows = 0
        with self._named():
            self._file = open(self.part, "w", newline="", encoding="utf-8", buffering=1)  # noqa: SIM115 - see __exit__
        self._writer = csv.writer(self._file)

    def row(self, *values: Any) -> None:
        with self._named():
            self._writer.writerow([utf8(value) if isinstance(value, (str, Path)) else value for value in values])
        self.rows += 1

    def __enter__(self) -> Table:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            with suppress(OSError):  # the one that is under way says more
                self._file.close()
            return
        with self._named():
            self._file.close()
            if self.part != self.path:
                os.replace(self.part, self.path)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"{self.part} can't be written: {error.strerror}; it holds {self.rows} rows that are whole"
            raise OSError(said) from error


def in_place_of(path: Path) -> bool:
    """Whether `path` is a file, or nothing yet, so that another file can take its place."""
    return not path.is_symlink() and (path.is_file() or not path.exists())
