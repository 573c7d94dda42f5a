"""`python -m fastres COMMAND`: parse the command line and run the command. Each command is a module in this folder."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import fastres
from fastres.terminal import printable

PROGRAM = "python -m fastres"

EXIT_STATUSES = {
    0: "done",
    1: "failed while running, or an image could not be read; stderr says what went wrong",
    2: "refused before any work: wrong arguments, or a file or package that they need is missing",
    3: "`experiment degradation` did not confirm the paper's claim, or `eval --expect published` that accuracy",
    130: "stopped by Ctrl-C; `train` and `experiment` save a checkpoint first",
    141: "the program that reads the output has ended",
    143: "stopped by SIGTERM; `train` and `experiment` save a checkpoint first",
}

EPILOG = f"""\
examples:
  {PROGRAM} status                            what this machine runs fused, and why
  {PROGRAM} train                             train ResNet-20 on handwritten digits
  {PROGRAM} eval --checkpoint out/digits/best.pt
  {PROGRAM} COMMAND --help                    the options of a command, with their defaults

exit statuses:
""" + "\n".join(f"  {status:<4} {meaning}" for status, meaning in EXIT_STATUSES.items())


class Command(NamedTuple):
    """A command's purpose, and its arguments as shown in the usage line."""

    purpose: str
    usage: str


OPTIONS = "[options]"
COMMANDS = {
    "status": Command("show what this machine runs fused, and why", ""),
    "train": Command("train a net with one of the recipes", OPTIONS),
    "eval": Command(
        "test trained nets with one centre crop, 10 crops or several scales", f"--checkpoint FILE [FILE ...] {OPTIONS}"
    ),
    "predict": Command(
        "print the most likely classes of images", f"IMAGE_OR_FOLDER [...] --weights FILE [FILE ...] {OPTIONS}"
    ),
    "summary": Command("print the paper's Table 1 for one net, with FLOPs and parameters", f"--depth N {OPTIONS}"),
    "experiment": Command("repeat the paper's Fig. 6, Table 3 or Fig. 7", f"degradation|shortcuts|responses {OPTIONS}"),
    "bench": Command(
        "compare speed with PyTorch on this machine (runs bench/run.py of a checkout with all arguments)", OPTIONS
    ),
}


def module(name: str) -> Any:
    """Import and return the module of a command, which has two functions.

    `arguments(parser)` adds the command's options. `run(args)` does the work, prints, and returns a key of
    `EXIT_STATUSES`. It raises ValueError for arguments that can't be used, which `main` turns into status 2, and
    OSError for system errors while running, which `main` turns into status 1.
    """
    return import_module(f"fastres.cli.{name}")


def parsers(wanted: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the program's parser and those of all commands.

    Only the parsers of the commands in `wanted` get their options, because defaults and choices require imports.
    """
    raw = argparse.RawDescriptionHelpFormatter
    program = argparse.ArgumentParser(
        prog=PROGRAM, description="fastres: ResNets on fused kernels.", epilog=EPILOG, formatter_class=raw
    )
    program.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    commands = program.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    of_command = {}
    for name, (purpose, arguments) in COMMANDS.items():
        usage = f"{PROGRAM} {name} {arguments}".rstrip()
        of_command[name] = commands.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", usage=usage, formatter_class=raw
        )
        if name in wanted:
            module(name).arguments(of_command[name])
    return program, of_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status, a key of `EXIT_STATUSES`, or raises SystemExit with it."""
    words = sys.argv[1:] if argv is None else list(argv)
    program, of_command = parsers(words)
    unknown: list[str] = []
    if words[:1] == ["bench"]:  # bench/run.py parses the rest
        args = argparse.Namespace(command="bench", arguments=words[1:])
    else:
        args, unknown = program.parse_known_args(words)
    parser = of_command.get(args.command, program)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:
        program.print_help(sys.stderr)
        return 2
    name = f"{PROGRAM} {args.command}"
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may be ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = module(args.command).run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except ValueError as error:
        parser.error(printable(error))
    except KeyboardInterrupt:
        from tqdm import tqdm

        tqdm.write(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        print(f"{name}: {printable(error)}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """Discard output that stdout can't write; otherwise Python would try again at exit and print an error."""
    if sys.stdout is None:  # closed before Python began
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
