"""The rows of one case, measured side by side: they take turns, window by window, so that whatever else happens on the
machine happens to all of them.

On a GPU each row has a process of its own (bench/apart.py): one that hangs, dies or loses its CUDA context costs only
itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch
from apart import Apart, Here
from backends import BACKENDS, Case
from record import now

Start = Callable[[str], "Apart | Here"]


@dataclass
class Row:
    """A backend's row in the making. windows: seconds a call."""

    name: str
    place: Apart | Here
    fields: dict[str, Any]
    windows: list[float] = field(default_factory=list)


@dataclass
class Contest:
    """What the rows of a case share. tell: gets a row's name and fields (bench/records/README.md) whenever there are
    new ones; the last time its status is final. patience: seconds of silence after which a row's process is killed."""

    case: Case
    multiply_adds: int
    patience: float
    tell: Callable[[str, dict[str, Any]], None]

    def measure(self, names: Sequence[str], start: Start) -> None:
        """Measure the backends called `names`, which `start` starts. As many as the GPU's memory holds take turns, the
        others follow; what ran out of memory beside others has another try alone."""
        waiting, alone = list(names), set[str]()
        while waiting:
            with ExitStack() as life:
                together: list[Row] = []
                while waiting and (not together or self._has_room(together, waiting[0], alone)):
                    name = waiting.pop(0)
                    self.tell(name, {"status": "unfinished", "reason": "the run ended before its first window"})
                    place = life.enter_context(start(name))
                    try:
                        together.append(Row(name, place, place.ask("prepare", seconds=self.patience)))
                    except Exception as error:
                        place.close()
                        waiting += self._failed(name, error, alone, beside=bool(together))
                waiting += self._take_turns(together, alone)

    def _has_room(self, together: list[Row], name: str, alone: set[str]) -> bool:
        """Whether another row, probably like the largest so far, leaves each of them what it needs while it runs."""
        if name in alone or together[0].name in alone:
            return False
        if self.case.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.case.device)
        return free > 2.2 * 2**20 * max(row.fields["peak_reserved_mib"] for row in together)

    def _take_turns(self, rows: list[Row], alone: set[str]) -> list[str]:
        """Measure rows that are ready; the names of those that want another try."""
        began, again = now(), list[str]()

        def asked(row: Row, method: str) -> Any:
            try:
                return row.place.ask(method, seconds=self.patience)
            except Exception as error:
                again.extend(self._failed(row.name, error, alone, beside=len(rows) > 1))
                rows.remove(row)
                return None

        for i in range(measure.WINDOWS):
            for row in [*rows]:
                if (seconds := asked(row, "window")) is not None:
                    row.windows.append(seconds)
                    row.fields |= measure.rates(self.case, self.multiply_adds, row.windows) | {"began": began}
            for row in rows:
                reason = f"the run ended after {i + 1} of {measure.WINDOWS} windows"
                self.tell(row.name, row.fields | {"status": "unfinished", "reason": reason})
        for row in [*rows]:
            if (rest := asked(row, "finish")) is not None:
                row.fields |= rest
                self.tell(row.name, measure.settled(row.fields))
        return again

    def _failed(self, name: str, error: Exception, alone: set[str], beside: bool) -> list[str]:
        """[name] if it wants another try, else it has failed."""
        found = measure.failure(error)
        if found["status"] == "out of memory" and beside:
            alone.add(name)
            return [name]
        self.tell(name, found)
        return []


def in_process(name: str, case: Case, data: measure.Data, seconds: float) -> measure.Row:
    return measure.Row(BACKENDS[name], case, data, seconds)


def from_file(name: str, case: Case, file: Path, seconds: float) -> measure.Row:
    """`in_process`, with data that another process has written."""
    return in_process(name, case, torch.load(file, mmap=True, weights_only=False), seconds)


@contextmanager
def here(case: Case, data: measure.Data, seconds: float) -> Iterator[Start]:
    """Rows that share this process."""
    try:
        yield lambda name: Here(in_process, name, case, data, seconds)
    finally:
        torch.compiler.reset()


@contextmanager
def apart(names: Sequence[str], case: Case, data: measure.Data, seconds: float, patience: float) -> Iterator[Start]:
    """Rows in processes of their own, which all begin now: what they import delays no measurement."""
    with ExitStack() as life:
        file = Path(life.enter_context(tempfile.TemporaryDirectory(prefix="fastres-bench-")), "data.pt")
        torch.save(data, file)

        def begin(name: str) -> Apart:
            return life.enter_context(Apart(from_file, name, case, file, seconds))

        begun = {name: begin(name) for name in names}
        for place in begun.values():
            with suppress(Exception):  # `prepare` will say it again
                place.ask("ready", seconds=patience)
        yield lambda name: begun.pop(name, None) or begin(name)
