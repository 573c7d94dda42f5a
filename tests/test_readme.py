"""The README's commands and code do what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastres import __main__ as entry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = "\n".join(body for language, body in BLOCKS if language == "python")
COMMANDS = [
    line.split("#")[0].strip()
    for language, body in BLOCKS
    if language == "bash"
    for line in body.splitlines()
    if line.strip()
]
# Run as it stands; the others install, build and test, which CI does itself, or have tests of their own.
INLINE = [" ".join(span.split()) for span in re.findall(r"`(python -m fastres [^`]+)`", README)]
OURS = sorted({c for c in [*COMMANDS, *INLINE] if c.startswith("python -m fastres ")})
RUN = [c for c in COMMANDS if c.startswith("python -m fastres status")]


def test_code() -> None:
    assert PYTHON.count("\n") >= 10
    exec(compile(PYTHON, "README.md", "exec"), {})


@pytest.mark.parametrize("command", RUN)
def test_command(command: str) -> None:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", OURS)
def test_command_has_the_options_it_needs_and_no_other(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real parser, which ends the program where it refuses; nothing is run."""
    _, _, _, name, *arguments = shlex.split(command)
    monkeypatch.setitem(entry.COMMANDS, name, replace(entry.COMMANDS[name], run=lambda args: 0))
    assert entry.main([name, *arguments]) == 0


def test_make_targets_exist() -> None:
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text()
    assert {"bench", "test", "gpu"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_plain_lines_are_what_make_runs() -> None:
    """The commands by hand beside `make` are the Makefile's own."""
    recipes = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv").replace("$(DEPTH)", "50")
    by_hand = [c for c in COMMANDS if ".venv/bin/python" in c]
    assert len(by_hand) >= 4
    for command in by_hand:
        assert command in recipes, command


def test_map_names_what_exists() -> None:
    folders = re.findall(
        r"^(\w+(?:/\w+)*)/  ", next(body for language, body in BLOCKS if "csrc/" in body), re.MULTILINE
    )
    assert {"kernels", "csrc", "bench", "tests"} <= set(folders)
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder
