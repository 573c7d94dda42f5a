"""Tests of bench/contest.py: a row that hangs, dies or loses its CUDA context affects no other, and rows share the
GPU's memory."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    yield SimpleNamespace(
        **{name: importlib.import_module(name) for name in ("backends", "contest", "measure", "worker")}
    )
    torch.set_num_threads(threads)


class Delicate:
    """Stands in for `measure.Row`. Its name says which fault occurs and when, for example "hang in window 3"."""

    def __init__(self, name: str) -> None:
        self.trouble, _, self.when = name.partition(" in ")
        self.windows = 0

    def ready(self) -> None:
        pass

    def prepare(self, data: Any) -> dict[str, Any]:
        self._stumble("prepare")
        return {"calls_per_window": 1, "peak_reserved_mib": None}

    def window(self) -> float:
        self.windows += 1
        self._stumble(f"window {self.windows}")
        return 0.01

    def finish(self) -> dict[str, Any]:
        self._stumble("finish")
        return {"status": "ok", "process": os.getpid()}

    def inspect(self) -> dict[str, Any]:
        self._stumble("inspect")
        return {"clocks": None, "notes": []}

    def _stumble(self, when: str) -> None:
        if when != self.when:
            return
        if self.trouble == "hang":
            time.sleep(1000)
        if self.trouble == "death":
            os._exit(9)
        if self.trouble == "lost context":
            sys.modules["worker"].lost_context = lambda: "an illegal memory access was encountered"
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        raise ValueError("an ordinary error")


def contest(
    bench: SimpleNamespace, patience: float, device: str = "cpu"
) -> tuple[Any, dict[str, list[dict[str, Any]]]]:
    """Return (a contest, a dict in which it collects, for each row, the fields of every report)."""
    told: dict[str, list[dict[str, Any]]] = {}
    case = bench.backends.Case("resnet18", "infer", 2, torch.float32, 64, torch.device(device))
    tell = lambda name, row: told.setdefault(name, []).append(row)  # noqa: E731
    return bench.contest.Contest(case, None, 10**9, patience, tell), told


def test_each_trouble_costs_only_its_row(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault affects neither other rows nor the row's earlier measurements. If only `inspect` fails, the row is ok."""
    monkeypatch.setattr(bench.contest, "WINDOW_S", 3)
    trouble = {
        "hang in window 3": "no answer within 5 s, so its process was killed",
        "death in window 2": "its process ended (exit status 9)",
        "lost context in prepare": "lost the CUDA context",
        "lost context in window 7": "an illegal memory access was encountered",
        "error in finish": "ValueError: an ordinary error",
    }
    harmless = ["death in inspect", "error in inspect"]
    names = ["sound", *trouble, *harmless, "sound, too"]
    match, told = contest(bench, patience=10)
    match.seconds = 2
    with ExitStack() as life:
        places = {name: life.enter_context(bench.worker.Worker(Delicate, name)) for name in names}
        for place in places.values():
            place.ask("ready", seconds=100)  # starting is slow on a busy machine
        match.measure(names, places.pop)
    final = {name: rows[-1] for name, rows in told.items()}
    assert {name for name, row in final.items() if row["status"] == "ok"} == {"sound", *harmless, "sound, too"}
    assert final["sound"]["process"] != final["sound, too"]["process"]
    for name, said in trouble.items():
        assert final[name]["status"] == "failed"
        assert said in final[name]["reason"], name
        windows = {"3": 2, "2": 1, "7": 6, "finish": 7}.get(name.split(" ")[-1], 0)
        assert len(final[name].get("window_img_s", ())) == windows
    assert final[harmless[0]]["notes"] == ["not inspected: WorkerLost: its process ended (exit status 9)"]
    assert final[harmless[1]]["notes"] == ["not inspected: ValueError: an ordinary error"]
    assert final["sound"]["began"] == final["sound, too"]["began"]
    assert len(final["sound"]["window_img_s"]) == bench.measure.WINDOWS


def test_what_is_known_is_told_after_every_round(bench: SimpleNamespace) -> None:
    match, told = contest(bench, patience=10)
    match.measure(["a", "b"], lambda name: bench.worker.LocalWorker(Delicate, name))
    for rows in told.values():
        assert [row["status"] for row in rows] == ["unfinished"] * (1 + bench.measure.WINDOWS) + ["ok"]
        assert [len(row.get("window_img_s", ())) for row in rows[:-1]] == [*range(1 + bench.measure.WINDOWS)]
        assert rows[3]["reason"] == "the run ended after 3 of 7 windows"
        assert rows[-1]["img_s"] == pytest.approx(200)


class Large:
    """A row that needs the MiB in its name, on a GPU of 100 MiB, and keeps a tenth of them between calls."""

    held: dict[str, int] = {}  # noqa: RUF012 - shared by all rows
    log: list[str] = []  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name, self.needs = name, int(name.partition(" ")[0])

    def prepare(self, data: Any) -> dict[str, Any]:
        self._take()
        self.held[self.name] = self.needs // 10
        self.log.append(f"{self.name} ready")
        return {"peak_reserved_mib": self.needs}

    def window(self) -> float:
        self._take()
        return 0.01

    def finish(self) -> dict[str, Any]:
        self.log.append(f"{self.name} done")
        return {"status": "ok"}

    def inspect(self) -> dict[str, Any]:
        return {"clocks": None}

    def close(self) -> None:
        self.held.pop(self.name, None)

    def _take(self) -> None:
        if sum(self.held.values()) - self.held.get(self.name, 0) + self.needs > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_rows_that_do_not_fit_together_follow(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    Large.held.clear()
    Large.log.clear()
    free = lambda device: (2**20 * (100 - sum(Large.held.values())), 0)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    match, told = contest(bench, patience=10, device="cuda")
    names = ["30 a", "30 b", "99 c", "30 d", "44 e", "200 f", "30 g"]
    match.measure(names, lambda name: bench.worker.LocalWorker(Large, name))
    final = {name: rows[-1] for name, rows in told.items()}
    assert {name for name, row in final.items() if row["status"] == "ok"} == {*names} - {"200 f"}
    assert (final["200 f"]["status"], final["200 f"]["reason"]) == (
        "out of memory",
        "OutOfMemoryError: CUDA out of memory",
    )
    began = {name: row.get("began") for name, row in final.items()}
    assert Large.log.index("30 b ready") < Large.log.index("30 a done"), "together"
    assert Large.log.index("99 c ready") > Large.log.index("30 a done"), (
        "a row that ran out of memory with others runs alone"
    )
    assert not Large.held
    assert began["200 f"] is None


@pytest.fixture
def tiny(bench: SimpleNamespace) -> tuple[Any, Any]:
    """A case and its data."""
    case = bench.backends.Case("cifar-8", "infer", 2, torch.float32, 32, torch.device("cpu"))
    inputs = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return case, bench.measure.prepare(case, bench.backends.shared_weights(case.net, inputs, 0), inputs, 0)


def measured(bench: SimpleNamespace, tiny: tuple[Any, Any], names: list[str], where: Any) -> dict[str, dict[str, Any]]:
    (case, data), final = tiny, {}
    with where as (start, hand_over):
        bench.contest.Contest(case, hand_over(data), 10**7, 120, final.__setitem__).measure(names, start)
    return final


def test_rows_get_their_data_from_a_file(bench: SimpleNamespace, tiny: tuple[Any, Any]) -> None:
    """A row in its own process reads the case's data from a file and gives the same fields as a row in this process."""
    before = {*Path(tempfile.gettempdir()).glob("fastres-bench-*")}
    there = measured(bench, tiny, ["eager"], bench.contest.in_workers(["eager"], tiny[0], 0.05, 120))["eager"]
    here = measured(bench, tiny, ["eager"], bench.contest.in_process(tiny[0], 0.05))["eager"]
    assert there["status"] in ("ok", "noisy"), there
    assert there.keys() - {"reason"} == here.keys() - {"reason"}
    assert there["error"] == pytest.approx(here["error"], rel=1)
    assert {*Path(tempfile.gettempdir()).glob("fastres-bench-*")} <= before, "nothing is left behind"


def test_compiled_rows_of_one_process_stay_compiled(
    bench: SimpleNamespace, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row compiles again because another row begins, ends or fails."""
    table = bench.backends.BACKENDS
    for name, compiler in (("first", "aot_eager"), ("second", "eager")):
        entry = bench.backends.Backend(table["eager"].net, "", compile={"backend": compiler})
        monkeypatch.setitem(table, name, entry)
    broken = bench.backends.Backend(lambda name: torch.nn.Identity(), "", compile={"backend": "aot_eager"})
    monkeypatch.setitem(table, "broken", broken)
    final = measured(bench, tiny, ["first", "broken", "second"], bench.contest.in_process(tiny[0], 0.05))
    assert final["broken"]["status"] == "failed"
    for name in ("first", "second"):
        assert (final[name]["graphs"], final[name]["recompiles"]) == (1, 0), final[name]
