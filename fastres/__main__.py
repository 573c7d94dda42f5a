"""`python -m fastres <command>`: one row of `COMMANDS` each. `EXIT_STATUSES` are those of all commands."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fastres
from fastres.terminal import printable

PROGRAM = "python -m fastres"

EXIT_STATUSES = {
    0: "done",
    1: "failed while it ran, or an image could not be read; stderr names what",
    2: "refused: wrong arguments, or something missing that they need; nothing was done",
    3: "`experiment degradation` did not see the paper's claim, or `eval --expect published` not that accuracy",
    130: "stopped by Ctrl-C; `train` and `experiment` save a checkpoint first",
    141: "whatever read the output is gone",
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


@dataclass(frozen=True)
class Command:
    """What a command is for, its arguments in one line, those it adds to its parser, and what it does with them.

    `run` gives text to print, or, having printed itself, a key of `EXIT_STATUSES`. It raises ValueError for arguments
    that can't be served (status 2 and the message), OSError for what the system refuses while it runs (status 1).
    """

    purpose: str
    usage: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str | int]


def _status(args: argparse.Namespace) -> str:
    return str(fastres.status())


def _summary_arguments(parser: argparse.ArgumentParser) -> None:
    from fastres.models.families import FAMILIES
    from fastres.models.paper import SHORTCUTS
    from fastres.terminal import listing

    families = {name: f"{f.meaning}: {', '.join(map(str, f.depths))}" for name, f in FAMILIES.items()}
    parser.epilog = f"""\
{listing("families and their depths", families)}

examples:
  {PROGRAM} summary --depth 50
  {PROGRAM} summary --family cifar --depth 110"""
    shortcuts = "; ".join(f"{name}: {meaning}" for name, meaning in SHORTCUTS.items())
    parser.add_argument("--depth", type=int, required=True, metavar="N", help="layers, one of the family's depths")
    parser.add_argument(
        "--family", choices=list(FAMILIES), default="paper", metavar="NAME", help="one of those below (default: paper)"
    )
    parser.add_argument("--shortcut", choices=list(SHORTCUTS), help=f"{shortcuts} (default: as in the paper)")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the images (default: 224; 32 for CIFAR nets)"
    )


def _summary(args: argparse.Namespace) -> str:
    import torch

    from fastres.models import families, flops, paper, summary

    with torch.device("meta"):
        model = families.build(args.family, args.depth, args.shortcut)
    family = families.FAMILIES[args.family]
    size = family.size if args.size is None else args.size
    shortcut = args.shortcut or (paper.default_shortcut(args.depth) if family.shortcuts else None)
    cost = flops.count(model, size)
    title = f"{args.depth} layers, family {args.family}" + (f", shortcut {shortcut}" if shortcut else "")
    parts = [f"{title}, images {size}x{size}", summary.table(model, cost)]
    if size == family.size and (note := summary.beside_the_paper(args.family, args.depth, shortcut, cost)):
        parts.append(note)
    return "\n\n".join(parts)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from fastres.train import command

    command.arguments(parser)


def _train(args: argparse.Namespace) -> int:
    from fastres.train import command

    return command.run(args)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    from fastres import commands

    commands.eval_arguments(parser)


def _eval(args: argparse.Namespace) -> int:
    from fastres import commands

    return commands.run_eval(args)


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    from fastres import commands

    commands.predict_arguments(parser)


def _predict(args: argparse.Namespace) -> int:
    from fastres import commands

    return commands.run_predict(args)


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    from fastres import experiments

    experiments.arguments(parser)


def _experiment(args: argparse.Namespace) -> int:
    from fastres import experiments

    return experiments.run(args)


def _bench(args: argparse.Namespace) -> int:
    """bench/run.py takes this process's place, so that its exit status and its signals are its own."""
    root = Path(fastres.__file__).resolve().parent.parent
    script = root / "bench" / "run.py"
    if not (script.is_file() and (root / "pyproject.toml").is_file()):
        said = "the bench is not installed with the package; clone fastres's repository and run python bench/run.py"
        print(f"{PROGRAM} bench: {said}", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, str(script), *args.arguments])


def _none(parser: argparse.ArgumentParser) -> None:
    pass


OPTIONS = "[options]"
COMMANDS = {
    "status": Command("say what this machine runs fused, and why", "", _none, _status),
    "train": Command("train a net by one of the recipes", OPTIONS, _train_arguments, _train),
    "eval": Command(
        "test trained nets with one centre crop, 10 crops or several scales",
        f"--checkpoint FILE [FILE ...] {OPTIONS}",
        _eval_arguments,
        _eval,
    ),
    "predict": Command(
        "name the likeliest classes of images",
        f"IMAGE_OR_FOLDER [...] --weights FILE [FILE ...] {OPTIONS}",
        _predict_arguments,
        _predict,
    ),
    "summary": Command(
        "print the paper's Table 1 for one net, with its cost", f"--depth N {OPTIONS}", _summary_arguments, _summary
    ),
    "experiment": Command(
        "repeat the paper's Fig. 6, Table 3 or Fig. 7",
        f"degradation|shortcuts|responses {OPTIONS}",
        _experiment_arguments,
        _experiment,
    ),
    "bench": Command(
        "measure this machine against PyTorch (bench/run.py of a checkout, which gets all arguments)",
        OPTIONS,
        _none,
        _bench,
    ),
}


def parsers(wanted: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The program's parser and those of all commands. Only those of `wanted` have their arguments, whose defaults and
    choices take imports."""
    raw = argparse.RawDescriptionHelpFormatter
    program = argparse.ArgumentParser(
        prog=PROGRAM, description="fastres: ResNets on fused kernels.", epilog=EPILOG, formatter_class=raw
    )
    program.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    commands = program.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    found = {}
    for name, command in COMMANDS.items():
        usage = f"{PROGRAM} {name} {command.usage}".rstrip()
        purpose = command.purpose
        found[name] = commands.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", usage=usage, formatter_class=raw
        )
        if name in wanted:
            command.arguments(found[name])
    return program, found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status, a key of `EXIT_STATUSES`, or raises SystemExit with it."""
    given = sys.argv[1:] if argv is None else list(argv)
    program, of_command = parsers(given)
    unknown: list[str] = []
    if given[:1] == ["bench"]:  # whose own parser is the one to read the rest
        args = argparse.Namespace(command="bench", arguments=given[1:])
    else:
        args, unknown = program.parse_known_args(given)
    parser = of_command.get(args.command, program)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:
        program.print_help(sys.stderr)
        return 2
    name = f"{PROGRAM} {args.command}"
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be in ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        outcome = COMMANDS[args.command].run(args)
        if isinstance(outcome, str):
            print(outcome)
            outcome = 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return outcome
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
    """Forgets what stdout holds and can't write: Python would try, and complain, once more at its end."""
    if sys.stdout is None:  # closed before Python began
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
