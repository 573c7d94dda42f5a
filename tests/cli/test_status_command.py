"""`python -m fastres status`: it prints `fastres.status()`."""

from __future__ import annotations

import pytest

import fastres
from fastres.cli.main import main


def test_status_is_that_of_fastres(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fastres, "status", lambda: ValueError("as text"), raising=False)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "as text\n"
