"""The cases that `make test` leaves out (extra cases, and those that can't run here), and how a run reports them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import conftest
import numpy as np
import pytest
import torch
from covering import chosen, covered, each

ROOT = Path(__file__).resolve().parent.parent


def kept(mark: pytest.MarkDecorator) -> list[str]:
    """Return the names of the cases that aren't marked `extra`."""
    _, cases = mark.args
    return [case.id for case in cases if not case.marks]


def test_every_pair_is_chosen_and_little_else() -> None:
    values = [range(4), range(3), range(2), range(2)]
    cases = list(itertools.product(*values))
    pairs = [set(itertools.combinations(enumerate(case), 2)) for case in cases]
    picked = chosen(pairs)
    assert set().union(*(pairs[i] for i in picked)) == set().union(*pairs)
    assert 4 * 3 <= len(picked) <= 4 * 3 + 2


def test_the_choice_is_the_same_in_every_process() -> None:
    """Ties are broken by order. Sets of strings, whose order depends on the hash seed, are only counted."""
    mark = covered(shape=[(1, 2), (3, 4)], kind={"plain": None, "both": [1, 2]}, dtype=[torch.float32, torch.float16])
    names, cases = mark.args
    assert names == ("shape", "kind", "dtype")
    assert len(cases) == 8
    assert cases[0].values == ((1, 2), None, torch.float32)
    assert kept(mark) == [
        "(1, 2)-plain-torch.float32",
        "(1, 2)-both-torch.float16",
        "(3, 4)-plain-torch.float16",
        "(3, 4)-both-torch.float32",
    ]


def test_features_stand_for_a_case() -> None:
    """Every number appears once, and even and odd ones have either sign."""
    assert kept(covered(by=lambda n, sign: (n % 2, sign), n=[1, 2, 3, 4], sign="+-")) == ["1-+", "2--", "3--", "4-+"]
    assert kept(covered(by=each, n=[1, 2, 3], sign="+-")) == ["1-+", "2--", "3-+"]
    assert kept(covered(n=[1, 2])) == ["1", "2"]


class Item:
    def __init__(self, config: Any, *markers: str) -> None:
        self.config, self.markers = config, markers

    def iter_markers(self) -> Sequence[Any]:
        return [SimpleNamespace(name=marker) for marker in self.markers]

    def get_closest_marker(self, name: str) -> None:
        return None


def session(**others: Any) -> Any:
    """Return a stand-in for pytest.Config with the attributes that conftest.py reads."""
    hook = SimpleNamespace(pytest_deselected=conftest.pytest_deselected)
    return SimpleNamespace(**{"stash": pytest.Stash(), "hook": hook, "get_verbosity": lambda: 0, **others})


def finish(config: Any) -> None:
    conftest.pytest_sessionfinish(SimpleNamespace(config=config), pytest.ExitCode.OK)


def said(config: Any) -> list[str]:
    lines: list[str] = []
    reporter = SimpleNamespace(section=lambda title: lines.append(title), write_line=lines.append)
    conftest.pytest_terminal_summary(reporter, config)
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize(
    ("interpreting", "numpy", "stays", "line"),
    [
        (False, "2.3.0", ["", "compiles"], "2 that run kernels in the interpreter (TRITON_INTERPRET=1)"),
        (True, "2.3.0", ["interpret"] * 2, "2 that don't run in the interpreter (pytest without TRITON_INTERPRET)"),
        (True, "2.4.0", [], "2 because Triton"),
    ],
)
def test_what_cannot_run_here_is_left_out_and_counted(
    interpreting: bool, numpy: str, stays: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreting)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(np, "__version__", numpy)
    config = session()
    items: Any = [Item(config, *marks.split()) for marks in ("", "interpret", "compiles", "gpu interpret", "interpret")]
    conftest.pytest_collection_modifyitems(config, items)
    assert [" ".join(item.markers) for item in items] == stays
    assert any(one.startswith(line) for one in said(config))
    assert "1 that need a CUDA GPU (make gpu)" in said(config)


def test_what_is_postponed_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases that pytest's -m deselects are counted once, although every worker of pytest-xdist reports them. Cases that
    the caller leaves out are not counted."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    worker, main = session(workeroutput={}), session()
    conftest.pytest_deselected([Item(worker, "slow", "extra"), Item(worker, "gpu", "extra"), Item(worker, "extra")])
    conftest.pytest_deselected([Item(worker, "slow"), Item(worker)])
    finish(worker)
    for _ in range(2):
        conftest.pytest_testnodedown(SimpleNamespace(config=main, workeroutput=worker.workeroutput))
    conftest.pytest_testnodedown(SimpleNamespace(config=main))  # of a worker that crashed
    want = [
        "not run",
        "2 beyond the covering selection (make test-all)",
        "1 that belong to the full sweeps (make test-slow)",
    ]
    assert said(main) == want
    assert said(session()) == [], "nothing was left out"


def test_files_and_their_tests_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verbose run prints all collected tests in one line, before any are left out. bench/pytest_logs.py reads it."""
    worker, main = session(workeroutput={}), session(get_verbosity=lambda: 1)
    for test in ("tests/test_a.py::test_one[x::y]", "tests/test_b.py::T::test_two", "tests/test_a.py::test_three"):
        conftest.pytest_itemcollected(SimpleNamespace(config=worker, nodeid=test))
    finish(worker)
    conftest.pytest_testnodedown(SimpleNamespace(config=main, workeroutput=worker.workeroutput))
    assert said(main) == ['tests in files: {"tests/test_a.py": 2, "tests/test_b.py": 1}']


def test_references_that_cudnn_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """References come from PyTorch's native loops and are counted over all workers. If these loops can't compute one
    either, the test fails."""
    counts: Counter[str] = Counter()
    for module in (cases, conftest):
        monkeypatch.setattr(module, "FALLBACKS", counts)
    refusal = "GET was unable to find an engine to execute this computation"

    def convolve(x: torch.Tensor, broken: str = "") -> torch.Tensor:
        if torch.backends.cudnn.enabled:
            raise RuntimeError(refusal)
        if broken:
            raise RuntimeError(broken)
        return x + 1

    x = torch.zeros(3, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(cases.by_library(convolve, x), x + 1)
        assert torch.backends.cudnn.enabled
    with pytest.raises(RuntimeError, match="no loop either"):
        cases.by_library(convolve, x, broken="no loop either")
    worker, main = session(workeroutput={}), session()
    finish(worker)
    counts.clear()
    for _ in range(2):
        conftest.pytest_testnodedown(SimpleNamespace(config=main, workeroutput=worker.workeroutput))
    assert said(main) == ["references without cuDNN", "6 convolve of float64: unable to find an engine"]
    refusal = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        cases.by_library(convolve, x)
    assert counts.total() == 6


def test_what_each_target_runs(pytestconfig: pytest.Config) -> None:
    """`make test-all`, which CI runs, runs everything except `slow`. `make test` leaves out the extra cases, too."""
    recipes = {}
    for target, body in re.findall(r"^(test[\w-]*):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE):
        recipes[target] = [line.partition("-n auto")[2].strip() for line in body.splitlines()]
        assert "TRITON_INTERPRET=1" in body.splitlines()[1]
    everything = ['-m "slow or not slow"', "-m interpret"]
    assert recipes == {"test": [""] * 2, "test-all": ['-m "not slow"'] * 2, "test-slow": everything}
    assert "-m not slow and not extra" in " ".join(pytestconfig.getini("addopts"))
    assert "\nmake test-all\n" in (ROOT / ".ci" / "run").read_text()
