"""`python -m fastres`: help, rejected arguments and exit statuses."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_cases
import pytest
from cli_cases import SMALL, net, saved
from torch import Tensor

import fastres
from fastres.cli.main import COMMANDS, EXIT_STATUSES, main, module, parsers
from fastres.evaluate import Predictor

photos = cli_cases.photos


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "summary"),
        (["summary"], "--depth"),
        (["summary", "--depth", "20"], "18, 34, 50, 101, 152"),
        (["summary", "--depth", "20", "--family", "torchvision"], "18, 34, 50, 101, 152"),
        (["summary", "--depth", "50", "--family", "plain"], "18, 34"),
        (["summary", "--depth", "21", "--family", "cifar"], "20, 32, 44, 56, 110, 1202"),
        (["summary", "--depth", "18", "--family", "vgg"], "choose from"),
        (["summary", "--depth", "18", "--shortcut", "D"], "choose from"),
        (["summary", "--depth", "18", "--family", "plain", "--shortcut", "A"], "only paper has"),
        (["summary", "--depth", "18", "--size", "0"], "positive"),
        (["summary", "--depth", "18", "--sise", "32"], "--sise"),
    ],
)
def test_what_is_unknown_is_refused_with_what_exists(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["summary --depth 18", "train", "eval --data x --checkpoint y", "experiment responses"]
)
def test_what_a_command_doesn_t_know_is_refused_with_its_usage(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--sise", "32"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: python -m fastres {command.split()[0]} ")
    assert "unrecognized arguments: --sise 32" in said


def test_no_command_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([]) == 2
    printed, said = capsys.readouterr()
    assert not printed
    assert said.startswith("usage: python -m fastres [-h]")
    for name, command in COMMANDS.items():
        assert re.search(rf"^    {name}\s+{command.purpose[:20]}", said, re.MULTILINE)
    for status, meaning in EXIT_STATUSES.items():
        assert re.search(rf"^  {status}\s+{re.escape(meaning)}$", said, re.MULTILINE)
    assert re.search(r"^examples:\n  python -m fastres status ", said, re.MULTILINE)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastres {fastres.__version__}\n"


def test_the_console_script_is_main() -> None:
    """The file is read as text, because Python 3.10 has no tomllib."""
    written = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nfastres = "fastres.cli.main:main"\n' in written


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_help_names_every_default(name: str) -> None:
    parser = parsers([name])[1][name]
    options = [action for action in parser._actions if action.option_strings]
    assert len(options) > (1 if name != "status" else 0)
    for action in options:
        said = action.help or ""
        assert said, action.option_strings
        assert action.nargs == 0 or action.required or "default" in said, action.option_strings
        if action.nargs != 0 and action.default not in (None, argparse.SUPPRESS):
            assert re.search(rf"default: {re.escape(str(action.default))}\b", said), action.option_strings
    assert name == "status" or f"python -m fastres {name} " in (parser.epilog or "")


def test_examples_in_the_help_parse() -> None:
    """Each example parses with the real parsers; placeholders such as FILE and DIR are passed as they are."""
    program, found = parsers(list(COMMANDS))
    epilogs = [program.epilog or "", *(parser.epilog or "" for parser in found.values())]
    examples = [line.strip() for epilog in epilogs for line in epilog.splitlines() if "-m fastres " in line]
    assert len(examples) > 10
    for example in examples:
        words = shlex.split(example.partition("-m fastres ")[2].partition("   ")[0])
        if words[0] != "COMMAND":
            assert program.parse_args(words).command == words[0]


def test_a_command_s_arguments_cost_others_nothing() -> None:
    """A command's options are only added when it is called: they need imports that other commands don't."""
    found = parsers(["summary"])[1]
    assert found.keys() == COMMANDS.keys()
    assert [name for name, parser in found.items() if len(parser._actions) > 1] == ["summary"]


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (PermissionError(13, "Permission denied", "x.csv"), 1, "[Errno 13] Permission denied: 'x.csv'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_a_command_raises_is_an_exit_status(
    raised: BaseException | None,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> int:
        if raised is not None:
            raise raised
        return 0

    monkeypatch.setattr(module("status"), "run", run)
    assert main(["status"]) == status
    assert status in EXIT_STATUSES
    assert capsys.readouterr().err == (f"python -m fastres status: {said}" if said else "")


def test_refused_values_end_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ValueError("--x 5 is too many")

    monkeypatch.setattr(module("summary"), "run", run)
    with pytest.raises(SystemExit) as stopped:
        main(["summary", "--depth", "18"])
    assert stopped.value.code == 2
    said = "usage: python -m fastres summary --depth N [options]\npython -m fastres summary: error: --x 5 is too many\n"
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_output_that_can_t_be_written_has_a_status() -> None:
    """Run in subprocesses, because Python flushes stdout when it exits; that must not print another error."""
    command = [sys.executable, "-m", "fastres", "summary", "--depth", "18"]
    read, closed = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, os.fdopen(closed, "w") as nobody:
        started = [subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True) for file in (full, nobody)]
        said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [1, 141]
    assert said == ["python -m fastres summary: [Errno 28] No space left on device\n", ""]


def test_a_failure_is_reported_if_stdout_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise PermissionError(13, "Permission denied", "x.csv")

    monkeypatch.setattr(module("status"), "run", run)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "python -m fastres status: [Errno 13] Permission denied: 'x.csv'\n"


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_ctrl_c_ends_with_130_and_one_line(
    command: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")

    def interrupted(self: Predictor, images: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    file = saved(tmp_path / "net.pt", net().state_dict())
    given = {
        "eval": ["--data", str(photos), "--checkpoint", file, *SMALL],
        "predict": [str(photos), "--weights", file, *SMALL],
    }
    assert main([command, *given[command]]) == 130
    assert capsys.readouterr().err == f"python -m fastres {command}: interrupted\n"
