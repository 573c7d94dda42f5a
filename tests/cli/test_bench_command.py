"""`python -m fastres bench`: it runs bench/run.py of a checkout, and fails without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastres
from fastres.cli.main import main


def test_bench_takes_the_process_s_place(tmp_path: Path) -> None:
    """bench/run.py runs in the same process ID, gets all arguments unchanged and sets the exit status."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "bench" / "run.py").write_text("import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(7)")
    given = ["--help", "--depth", "all", "--", "-x", "bench", "--version"]
    program = f"""
import fastres, sys
from fastres.cli.main import main
fastres.__file__ = {str(tmp_path / "fastres" / "__init__.py")!r}
main(["bench", *{given}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate()
    assert printed == f"{process.pid} {given}\n"
    assert process.returncode == 7


def test_bench_is_found_in_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: run.append([path, *arguments]))
    main(["bench", "--depth", "18"])
    script = Path(__file__).resolve().parents[2] / "bench" / "run.py"
    assert run == [[sys.executable, sys.executable, str(script), "--depth", "18"]]


def test_without_a_checkout_bench_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execv", lambda *given: pytest.fail("execv called without a checkout"))
    monkeypatch.setattr(fastres, "__file__", str(tmp_path / "fastres" / "__init__.py"))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()  # not fastres's, but in a folder next to the installed package
    assert main(["bench", "--depth", "18"]) == 2
    printed, said = capsys.readouterr()
    assert not printed
    assert said.count("\n") == 1
    assert "clone fastres's repository and run python bench/run.py" in said
