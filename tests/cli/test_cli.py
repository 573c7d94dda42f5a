"""`python -m fastres`: what it prints, and how it refuses."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fastres
from fastres.cli.main import COMMANDS, EXIT_STATUSES, main, module, parsers
from fastres.models.families import FAMILIES


def rows(text: str) -> dict[str, list[str]]:
    """The table's lines by their first word, split where two blanks or more stand."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}


def test_table_1_of_resnet_34(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "--depth", "34"]) == 0
    printed, said = capsys.readouterr()
    assert not said
    table = rows(printed)
    assert table["conv1"] == ["112x112", "7x7, 64, stride 2", "118,013,952", "9,536"]
    assert "3x3 max pool, stride 2" in table
    assert table["conv2_x"][:2] == ["56x56", "[3x3, 64; 3x3, 64] x 3"]
    assert table["conv3_x"][:2] == ["28x28", "[3x3, 128; 3x3, 128] x 4"]
    assert table["conv4_x"][:2] == ["14x14", "[3x3, 256; 3x3, 256] x 6"]
    assert table["conv5_x"][:2] == ["7x7", "[3x3, 512; 3x3, 512] x 3"]
    assert table["1x1"] == ["average pool, 1000-d fc", "512,000", "513,000"]
    assert table["total"][0] == "3,644,493,824"
    assert "FLOPs (multiply-adds): 3.644e9, paper 3.6e9, +1.2%" in printed
    assert "top-1 25.03%, top-5 7.76%" in printed


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    depth = FAMILIES[family].depths[1]
    assert main(["summary", "--family", family, "--depth", str(depth)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{depth} layers, family {family}" in lines[0]
    table = lines[2 : [*lines, ""].index("", 2)]
    shares = [line.split() for line in table[2:-2] if "max pool" not in line]
    assert len({len(line) for line in table if "max pool" not in line}) == 1  # aligned to the last column's end
    for column in (-1, -2):
        numbers = [int(cells[column].replace(",", "")) for cells in [*shares, table[-1].split()]]
        assert sum(numbers[:-1]) == numbers[-1]


def test_options_reach_the_net(capsys: pytest.CaptureFixture[str]) -> None:
    main(["summary", "--depth", "50", "--shortcut", "C", "--size", "65"])
    text = capsys.readouterr().out
    assert "50 layers, family paper, shortcut C, images 65x65" in text
    assert rows(text)["conv5_x"][0] == "3x3"
    assert rows(text)["conv2_x"][1] == "[1x1, 64; 3x3, 64; 1x1, 256] x 3"
    assert "paper 3.8e9" not in text


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


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastres {fastres.__version__}\n"


def test_console_script() -> None:
    """Read as text: Python 3.10 has no tomllib."""
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
    """By the real parsers. Placeholders are what they stand for."""
    program, found = parsers(list(COMMANDS))
    epilogs = [program.epilog or "", *(parser.epilog or "" for parser in found.values())]
    examples = [line.strip() for epilog in epilogs for line in epilog.splitlines() if "-m fastres " in line]
    assert len(examples) > 10
    for example in examples:
        words = shlex.split(example.partition("-m fastres ")[2].partition("   ")[0])
        if words[0] != "COMMAND":
            assert program.parse_args(words).command == words[0]


def test_a_command_s_arguments_cost_others_nothing() -> None:
    """They take imports, which `--help` alone and other commands do without."""
    found = parsers(["summary"])[1]
    assert found.keys() == COMMANDS.keys()
    assert [name for name, parser in found.items() if len(parser._actions) > 1] == ["summary"]


# exit statuses; 143 is in test_train.py, 3 in test_experiments.py


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (PermissionError(13, "Permission denied", "x.csv"), 1, "[Errno 13] Permission denied: 'x.csv'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_exit_statuses(
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
def test_output_that_can_t_be_written() -> None:
    """Processes of their own: Python writes what is left when it ends, and must not complain then."""
    command = [sys.executable, "-m", "fastres", "summary", "--depth", "18"]
    read, closed = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, os.fdopen(closed, "w") as nobody:
        started = [subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True) for file in (full, nobody)]
        said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [1, 141]
    assert said == ["python -m fastres summary: [Errno 28] No space left on device\n", ""]


def test_a_failure_is_said_where_stdout_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise PermissionError(13, "Permission denied", "x.csv")

    monkeypatch.setattr(module("status"), "run", run)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "python -m fastres status: [Errno 13] Permission denied: 'x.csv'\n"


# bench


def test_bench_takes_the_process_s_place(tmp_path: Path) -> None:
    """With all arguments as they are, and its own exit status."""
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


def test_bench_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execv", lambda *given: pytest.fail("nothing is there to run"))
    monkeypatch.setattr(fastres, "__file__", str(tmp_path / "fastres" / "__init__.py"))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()  # somebody else's, beside the installed package
    assert main(["bench", "--depth", "18"]) == 2
    printed, said = capsys.readouterr()
    assert not printed
    assert said.count("\n") == 1
    assert "clone fastres's repository and run python bench/run.py" in said


def test_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fastres, "status", lambda: ValueError("as text"), raising=False)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "as text\n"
