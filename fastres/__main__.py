"""`python -m fastres <command>`: one row of `COMMANDS` each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What a command is for, the arguments it adds to its parser, and what it does with them.

    `run` gives text to print, or, having printed itself, the exit code. It raises ValueError for arguments that can't
    be served; that ends the program with code 2 and the message.
    """

    purpose: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str | int]


def _status(args: argparse.Namespace) -> str:
    import fastres

    return str(fastres.status())


def _summary_arguments(parser: argparse.ArgumentParser) -> None:
    from fastres.models.families import FAMILIES
    from fastres.models.paper import SHORTCUTS

    families = "; ".join(f"{name}: {f.meaning}, {', '.join(map(str, f.depths))}" for name, f in FAMILIES.items())
    shortcuts = "; ".join(f"{name}: {meaning}" for name, meaning in SHORTCUTS.items())
    parser.add_argument("--depth", type=int, required=True, help="layers, one of the family's depths")
    parser.add_argument("--family", choices=list(FAMILIES), default="paper", help=f"{families} (default: paper)")
    parser.add_argument("--shortcut", choices=list(SHORTCUTS), help=f"{shortcuts} (default: as in the paper)")
    parser.add_argument("--size", type=int, help="side of the images (default: 224, CIFAR nets 32)")


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


COMMANDS = {
    "summary": Command("the paper's Table 1 for one net, with its cost", _summary_arguments, _summary),
    "train": Command("train a net by one of the recipes", _train_arguments, _train),
    "eval": Command("test trained nets: a centre crop, 10 crops or several scales", _eval_arguments, _eval),
    "predict": Command("the likeliest classes of images", _predict_arguments, _predict),
    "experiment": Command("the paper's Fig. 6, Table 3 and Fig. 7 anew", _experiment_arguments, _experiment),
    "status": Command("what would run on this machine, and why", lambda parser: None, _status),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastres", description="fastres: ResNets on fused kernels.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=command.purpose, description=command.purpose)
        command.arguments(parsers[name])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parsers[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        outcome = COMMANDS[args.command].run(args)
    except ValueError as error:
        parsers[args.command].error(str(error))
    if isinstance(outcome, int):
        return outcome
    print(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
