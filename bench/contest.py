"""Measure the rows (backends) of one case in turns, one timed window each, so that other load on the machine affects
them all alike.

On a GPU each row runs in its own process (bench/worker.py), so that a row that hangs, dies or loses its CUDA context
affects no other row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import measure
import torch
from backends import BACKENDS, Case
from record import now
from worker import LocalWorker, Worker

Start = Callable[[str], "Worker | LocalWorker"]
HandOver = Callable[[measure.Data], "measure.Data | Path"]

WINDOW_S = 60  # seconds to wait for a window, beyond those that all windows of its row should take together


@dataclass
class Contender:
    """A backend's row while it is measured.

    place: the worker that runs it. fields: the row's fields so far. windows: seconds per call in each window so far.
    """

    name: str
    place: Worker | LocalWorker
    fields: dict[str, Any]
    windows: list[float] = field(default_factory=list)


@dataclass
class Contest:
    """The measurement of all rows of a case.

    data: the argument of every row's `prepare`: the case's data, or a file of it for rows in other processes.
    multiply_adds: of one image, forward only.
    patience: seconds to wait for a row to get ready, finish or be inspected.
    tell: called with a row's name and fields (bench/records/README.md) whenever they change. The last call for a row
        has its final status.
    seconds: timed seconds per row, over all of its windows.
    """

    case: Case
    data: measure.Data | Path
    multiply_adds: int
    patience: float
    tell: Callable[[str, dict[str, Any]], None]
    seconds: float = 0.0

    def measure(self, names: Sequence[str], start: Start) -> None:
        """Measure the backends called `names`. `start` returns a worker for the backend with a given name.

        As many rows as fit into the GPU's memory take turns, and the others follow. A row that runs out of memory while
        others are loaded gets a second try on its own.
        """
        waiting, alone = list(names), set[str]()
        while waiting:
            with ExitStack() as life:
                together: list[Contender] = []
                while waiting and (not together or self._has_room(together, waiting[0], alone)):
                    name = waiting.pop(0)
                    self.tell(name, {"status": "unfinished", "reason": "the run ended before its first window"})
                    row = Contender(name, life.enter_context(start(name)), {})
                    try:
                        row.fields = row.place.ask("prepare", self.data, seconds=self.patience)
                        together.append(row)
                    except Exception as error:
                        row.place.close()
                        waiting += self._failed(row, error, alone, beside=bool(together))
                waiting += self._take_turns(together, alone)
                for row in together:  # they exit at the same time, while the context waits
                    row.place.leave()

    def _has_room(self, together: list[Contender], name: str, alone: set[str]) -> bool:
        """Return whether the backend `name` may be loaded in addition to the rows of `together`.

        Backends in `alone` run with no other. For the rest, a GPU must have free memory for a fifth more than the
        largest row of `together` needs.
        """
        if name in alone or together[0].name in alone:
            return False
        if self.case.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.case.device)
        return free > 1.2 * 2**20 * max(row.fields["peak_reserved_mib"] for row in together)

    def _take_turns(self, rows: list[Contender], alone: set[str]) -> list[str]:
        """Measure the rows, which are prepared, in turns. Return the names of those to try again, each on its own."""
        began, again, running = now("milliseconds"), list[str](), [*rows]

        def asked(row: Contender, method: str, seconds: float) -> Any:
            try:
                return row.place.ask(method, seconds=seconds)
            except Exception as error:
                again.extend(self._failed(row, error, alone, beside=len(rows) > 1))
                running.remove(row)
                if isinstance(row.place, Worker):  # the others may need its memory
                    row.place.close()
                return None

        for i in range(measure.WINDOWS):
            # Alternate the order, so that no row always follows the same row.
            for row in running[:: 1 if i % 2 else -1]:
                if (seconds := asked(row, "window", WINDOW_S + self.seconds)) is not None:
                    row.windows.append(seconds)
                    row.fields |= measure.rates(self.case, self.multiply_adds, row.windows) | {"began": began}
            for row in running:
                reason = f"the run ended after {i + 1} of {measure.WINDOWS} windows"
                self.tell(row.name, row.fields | {"status": "unfinished", "reason": reason})
        for row in [*running]:
            if (rest := asked(row, "finish", self.patience)) is not None:
                row.fields |= rest
                try:
                    row.fields |= row.place.ask("inspect", seconds=self.patience)
                except Exception as error:
                    row.fields |= measure.uninspected(error)
                self.tell(row.name, measure.settled(row.fields))
        return again

    def _failed(self, row: Contender, error: Exception, alone: set[str], beside: bool) -> list[str]:
        """Return [the row's name] if it ran out of memory while others were loaded (`beside`), so that it is tried
        again. Otherwise report its failure and return []."""
        found = measure.failure(error)
        if found["status"] == "out of memory" and beside:
            alone.add(row.name)
            return [row.name]
        self.tell(row.name, row.fields | found)
        return []


def make_row(name: str, case: Case, seconds: float) -> measure.Row:
    """Make the row in the process that runs it."""
    return measure.Row(BACKENDS[name], case, seconds)


@contextmanager
def in_process(case: Case, seconds: float) -> Iterator[tuple[Start, HandOver]]:
    """Run the rows in this process. Yields (the function that starts a row, the function that passes it the case's
    data)."""
    try:
        yield lambda name: LocalWorker(make_row, name, case, seconds), lambda data: data
    finally:
        torch.compiler.reset()


@contextmanager
def in_workers(names: Sequence[str], case: Case, seconds: float, patience: float) -> Iterator[tuple[Start, HandOver]]:
    """Run each row in its own process; yields the same as `in_process`. All processes start now, so that their imports
    delay no measurement."""
    with TemporaryDirectory(prefix="fastres-bench-", ignore_cleanup_errors=True) as folder, ExitStack() as life:
        # Temporary files of killed processes are removed with the folder.
        with mock.patch.dict(os.environ, TMPDIR=folder):
            begun = {name: life.enter_context(Worker(make_row, name, case, seconds)) for name in names}

        def hand_over(data: measure.Data) -> Path:
            torch.save(data, file := Path(folder, "data.pt"))
            for place in begun.values():
                with suppress(Exception):  # `prepare` will raise the error again
                    place.ask("ready", seconds=patience)
            return file

        yield lambda name: begun.pop(name, None) or Worker(make_row, name, case, seconds), hand_over
