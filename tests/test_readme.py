"""The README's commands and code do what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = "\n".join(body for language, body in BLOCKS if language == "python")
COMMANDS = [
    line.split("#")[0].strip()
    for language, body in BLOCKS
    if language == "bash"
    for line in body.splitlines()
    if line.strip()
]
# Run as they stand; the others install, build and test, which CI does by running them itself.
RUN = [c for c in COMMANDS if c.startswith(("python -m fastres status", "python -m fastres summary"))]


def test_code() -> None:
    assert PYTHON.count("\n") >= 10
    exec(compile(PYTHON, "README.md", "exec"), {})


@pytest.mark.parametrize("command", RUN)
def test_command(command: str) -> None:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_options_of_the_other_commands_exist() -> None:
    for command in COMMANDS:
        if command.startswith("python -m fastres") and command not in RUN:
            *_, name = re.findall(r"fastres (\w+)", command)
            helped = subprocess.run(
                [sys.executable, "-m", "fastres", name, "--help"], cwd=ROOT, capture_output=True, text=True
            )
            assert helped.returncode == 0, command
            for option in re.findall(r"--[\w-]+", command):
                assert option in helped.stdout, f"{command}: {option}"


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
