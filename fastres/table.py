"""CSV files that are either complete or named PATH.part."""

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
    """A context manager that writes the CSV file PATH.

    Each row is written to PATH.part immediately, and at the end PATH.part replaces PATH. An interrupted run leaves its
    rows in PATH.part and does not touch PATH. Links and devices are written in place. Text that UTF-8 can't encode is
    escaped by `terminal.utf8`. Raises OSError, which names the file and the number of complete rows in it.
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
            with suppress(OSError):  # the exception that is being raised says more
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
            message = f"{self.part} can't be written: {error.strerror}; it holds {self.rows} complete rows"
            raise OSError(message) from error


def in_place_of(path: Path) -> bool:
    """Return whether another file may replace `path`: it is a regular file or doesn't exist, and is not a link."""
    return not path.is_symlink() and (path.is_file() or not path.exists())
