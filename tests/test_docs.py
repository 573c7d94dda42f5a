"""README and docs are correct: Python code and cheap commands run, all other commands parse, and links resolve."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from fastres.cli.main import main, module

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MAKEFILE = (ROOT / "Makefile").read_text()
SHELL = {"cd", "cp", "git", "source", "tar"}  # other programs that a page may call
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# A program that parses the arguments of several commands, JSON [[script, argument, ...], ...], with the parsers of the
# scripts, which exit if they refuse an argument. The scripts do no work.
PARSE = """
import argparse, contextlib, json, os, runpy, sys
parse = argparse.ArgumentParser.parse_args
def stop(self, *given):
    parse(self, *given)
    raise SystemExit(0)
argparse.ArgumentParser.parse_args = stop
for command in json.loads(sys.argv[1]):
    sys.argv[:], sys.path[0] = command, os.path.dirname(command[0])
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"refused: {' '.join(command)}")
    else:
        sys.exit(f"parses no arguments: {command[0]}")
"""


@dataclass(frozen=True)
class Page:
    """A Markdown page, with its code blocks, commands, links and anchors."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """(language, body) of every fenced code block."""
        return re.findall(r"^ *```(\w*)\n(.*?)^ *```", self.text, re.MULTILINE | re.DOTALL)

    @cached_property
    def code(self) -> str:
        return "\n".join(body for language, body in self.blocks if language == "python")

    @cached_property
    def commands(self) -> list[list[str]]:
        """The words of every command in a bash block and of every `python -m fastres ...` in the text, without leading
        assignments to environment variables."""
        prose = re.sub(r"^ *```.*?^ *```", "", self.text, flags=re.MULTILINE | re.DOTALL)
        lines = [" ".join(span.split()) for span in re.findall(r"`(python -m fastres \w+ [^`]+)`", prose)]
        lines = [line for line in lines if "..." not in line]
        for language, body in self.blocks:
            if language == "bash":
                lines += body.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines]
        return [words for line in found if (words := _without_assignments(line))]

    @cached_property
    def links(self) -> list[str]:
        prose = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", self.text, flags=re.MULTILINE | re.DOTALL)
        return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|srcset|href)="([^"]+)"', prose)

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors that GitHub makes from the page's headings."""
        headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", self.text, flags=re.M | re.S), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_assignments(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def _pages() -> Iterator[Page]:
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "bench/*.md", "bench/records/*.md"):
        yield from map(Page, sorted(ROOT.glob(pattern)))


PAGES = list(_pages())
COMMANDS = [(page, words) for page in PAGES for words in page.commands]


def python(words: list[str]) -> list[str] | None:
    """Return what a command passes to Python: ["-m", module, ...] or [script, ...]; None for another program."""
    program, *rest = words
    if program == "torchrun":
        return rest[rest.index("-m") :]
    return rest if Path(program).name in ("python", "python3") else None


def of_fastres(words: list[str]) -> list[str] | None:
    """Return the arguments of `python -m fastres`, or None for another command."""
    given = python(words)
    return given[2:] if given and given[:2] == ["-m", "fastres"] else None


def runs_here(words: list[str]) -> bool:
    """Return whether a fastres command is cheap and downloads nothing. A training must set --iterations."""
    arguments = of_fastres(words)
    if not arguments or words[0] == "torchrun" or any(re.fullmatch(r"[A-Z_]{3,}.*", word) for word in arguments):
        return False
    if arguments[0] == "train":
        return "--iterations" in arguments and not {"imagenet", "cifar10", "cifar100"} & set(arguments)
    return arguments[0] in ("status", "summary", "eval", "predict")


def _readme_first(pages: list[Page]) -> list[Any]:
    """Return the pages as parameters of a slow test: `make test` runs only README's, because the others are marked
    `extra`."""
    marks = {page: () if page.path == README else pytest.mark.extra for page in pages}
    return [pytest.param(page, id=str(page), marks=marks[page]) for page in pages]


WITH_CODE = [page for page in PAGES if page.code]
WITH_RUNS = [page for page in PAGES if any(runs_here(words) for words in page.commands)]


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/README.md", "docs/inference.md", "examples/README.md"} <= set(
        map(str, PAGES)
    )
    assert README in {page.path for page in WITH_CODE} & {page.path for page in WITH_RUNS}
    assert len(COMMANDS) > 50


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 100


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", _readme_first(WITH_CODE))
def test_the_code_of_a_page_runs(page: Page, tmp_path: Path) -> None:
    """All Python blocks of a page run as one script in an empty folder."""
    script = tmp_path / "page.py"
    script.write_text(page.code)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", _readme_first(WITH_RUNS))
def test_commands_run(page: Page, tmp_path: Path) -> None:
    """The commands of a page run in its order, in one folder."""
    for words in filter(runs_here, page.commands):
        given = [sys.executable, "-m", "fastres", *(of_fastres(words) or [])]
        done = subprocess.run(given, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
        assert done.stdout.strip(), words


OF_FASTRES = sorted({tuple(arguments) for _, words in COMMANDS if (arguments := of_fastres(words))})


@pytest.mark.parametrize("arguments", OF_FASTRES, ids=" ".join)
def test_options_of_a_command_exist(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser accepts the options; the command itself is not run."""
    monkeypatch.setattr(module(arguments[0]), "run", lambda args: 0)
    assert main(arguments) == 0


SCRIPTS: dict[str, list[list[str]]] = {}
for _, words in COMMANDS:
    if (given := python(words)) and given[0] != "-m" and given not in SCRIPTS.setdefault(given[0], []):
        SCRIPTS[given[0]].append(given)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_options_of_a_script_exist(script: str) -> None:
    calls = [[str(ROOT / script), *arguments] for _, *arguments in SCRIPTS[script]]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(calls)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_other_program_is_called() -> None:
    """Every other program would be a command that no test in this file checks."""
    for page, words in COMMANDS:
        given = python(words)
        modules = given is not None and given[0] == "-m" and given[1] in ("fastres", "pip", "pytest", "venv")
        script = given is not None and (ROOT / given[0]).is_file()
        assert modules or script or words[0] in SHELL | {"make"}, f"{page}: {' '.join(words)}"


def test_tests_that_are_named_exist() -> None:
    files = [word for _, words in COMMANDS if "pytest" in words for word in words if word.endswith(".py")]
    assert files
    for name in files:
        assert (ROOT / name).is_file(), name


def test_extras_that_are_named_exist() -> None:
    offered = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = {extra for page in PAGES for extra in re.findall(r"(?:fastres|\.)\[(\w+)\]", page.text)}
    assert "test" in named
    assert named <= offered


def test_make_targets_and_their_variables_exist() -> None:
    called = [words[1:] for _, words in COMMANDS if words[0] == "make"]
    assert {"bench", "test", "gpu"} <= {target for target, *_ in called}
    for target, *variables in called:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
        for variable in variables:
            assert f"$({variable.partition('=')[0]})" in MAKEFILE, variable


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    assert re.findall(r"^  make ([a-z-]+) +\w", listed, re.MULTILINE) == targets
    assert {"help", "test", "format"} <= set(targets)


def test_plain_lines_are_what_make_runs() -> None:
    """The commands that the docs list as alternatives to `make` are in the Makefile."""
    recipes = MAKEFILE.replace("$(VENV)", ".venv").replace("$(DEPTH)", "50")
    shell = "\n".join(body for page in PAGES for language, body in page.blocks if language == "bash")
    by_hand = {line.split("#")[0].strip() for line in shell.splitlines() if ".venv/bin/python" in line}
    assert len(by_hand) >= 4
    for command in by_hand:
        assert command in recipes, command


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Page) -> None:
    """Links to files, folders and headings of this repository resolve. External addresses are not requested."""
    for link in page.links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), f"{page} links to {link}"
        assert ROOT in [target, *target.parents], f"{page} links out of the repository: {link}"
        if anchor:
            assert anchor in Page(target).anchors, f"{page} links to {link}"


def test_the_map_names_what_exists() -> None:
    folders = re.findall(r"\[`(\w+(?:/\w+)*)/`\]", README.read_text().partition("## Map")[2])
    assert {"kernels", "csrc", "bench", "tests", "docs", "examples"} <= set(folders)
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder
