"""Tests of bench/ragged.py: it compares first with later calls, shows memory, and refuses what it can't measure."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastres.ops import dispatch

BENCH = Path(__file__).resolve().parents[2] / "bench"
needs_onednn = pytest.mark.skipif(dispatch.why_no_onednn(torch.float32) is not None, reason="oneDNN doesn't serve here")


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("ragged")


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_onednn
def test_each_row_compares_the_first_call_with_later_ones(ragged: ModuleType, capsys: pytest.CaptureFixture) -> None:
    chosen = ["--depth", "18", "--dtype", "fp32", "--size", "32", "--shapes", "2"]
    assert ragged.main([*chosen, "--batch", "1", "--batch", "3"]) == 0
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert head == ragged.COLUMNS
    assert [row.split()[:4] for row in rows] == [["ResNet-18", "fp32", batch, "32"] for batch in "13"]
    for row in rows:
        later, least, median, eager, once = map(float, row.split()[4:])
        assert 0 < least <= median
        assert min(later, eager, once) > 0


@needs_onednn
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_memory_is_shown_four_times(ragged: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert ragged.main(["--depth", "18", "--dtype", "fp32", "--size", "32", "--memory", "8"]) == 0
    said = capsys.readouterr().out
    assert [f"after {n} shapes" in said for n in (2, 4, 6, 8)] == [True] * 4


@needs_onednn
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--size", "16"], "--size must be at least 32: got 16"),
        (["--batch", "0"], "--batch must be at least 1: got 0"),
        (["--shapes", "0"], "--shapes must be at least 1: got 0"),
        (["--memory", "3"], "--memory must be at least 4: got 3"),
    ],
)
def test_bad_numbers_are_refused(
    ragged: ModuleType, given: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        ragged.main(given)
    assert said in capsys.readouterr().err
