"""`python -m fastres train`: arguments to a `Run`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastres.models.families import FAMILIES
from fastres.models.paper import SHORTCUTS
from fastres.train.recipe import DATA, GRAPHS, LOADERS, RECIPES, Recipe

EPILOG = "Several GPUs or processes: torchrun --nproc-per-node N -m fastres train ... (batch and lr stay the recipe's)."


def whole(least: int) -> Callable[[str], int]:
    """For argparse, which names the option itself: a whole number from `least`."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text}: any whole number from {least} is accepted")

    return number


def positive(text: str) -> float:
    """For argparse: a number above 0."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: any number above 0 is accepted")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `train`. Defaults that a recipe decides are None."""
    parser.epilog = EPILOG
    recipes = "; ".join(f"{name}: {recipe.source}" for name, recipe in RECIPES.items())
    parser.add_argument("--recipe", choices=list(RECIPES), default="digits", help=f"{recipes} (default: digits)")
    parser.add_argument("--out", type=Path, help="folder for checkpoints, log and curves (default: out/<recipe>)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    net = parser.add_argument_group("net (default: the recipe's)")
    net.add_argument("--family", choices=list(FAMILIES))
    net.add_argument("--depth", type=int, help="layers, one of the family's depths")
    net.add_argument("--shortcut", choices=list(SHORTCUTS), help="families paper only")
    data = parser.add_argument_group("images")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in DATA.items())
    data.add_argument("--data", choices=list(DATA), help=f"{meanings} (default: the recipe's)")
    data.add_argument("--root", type=Path, help="where they are")
    data.add_argument("--download", action="store_true", help="fetch CIFAR to --root")
    data.add_argument(
        "--holdout",
        type=whole(0),
        default=0,
        help="training images to validate on instead (the paper's 45k/5k split: 5000)",
    )
    data.add_argument("--workers", type=whole(0), help="processes that read photographs (default: one per CPU)")
    loaders = "; ".join(f"{name}: {meaning}" for name, meaning in LOADERS.items())
    data.add_argument("--loader", choices=list(LOADERS), default="auto", help=f"{loaders} (default: auto)")
    data.add_argument("--cache", type=Path, help="where mean images are kept (default: ~/.cache/fastres)")
    recipe = parser.add_argument_group("instead of the recipe's")
    recipe.add_argument("--batch", type=whole(1), help="images per iteration, of all processes together")
    recipe.add_argument("--lr", type=positive)
    recipe.add_argument("--iterations", type=whole(1))
    recipe.add_argument("--epochs", type=whole(1))
    recipe.add_argument("--micro-batch", type=whole(1), help="images per forward pass, which BN normalises together")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--seed", type=whole(0), default=0)
    how.add_argument("--device", help="cpu, cuda or cuda:<number> (default: a GPU where there is one)")
    how.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, else fp32")
    how.add_argument("--compile", choices=("none", "inductor", "fastres"), default="none", help="default: none")
    graphs = "; ".join(f"{name}: {meaning}" for name, meaning in GRAPHS.items())
    spelt = {"choices": list(GRAPHS), "nargs": "?", "const": "on", "default": "auto"}
    how.add_argument("--cuda-graph", **spelt, help=f"{graphs} (default: auto; alone: on)")  # type: ignore[arg-type]
    how.add_argument("--deterministic", action="store_true", help="only cuDNN algorithms that repeat bit for bit")
    how.add_argument("--log-every", type=whole(1), default=50, help="iterations (default: 50)")
    how.add_argument("--eval-every", type=whole(1), help="iterations (default: an epoch)")
    how.add_argument("--save-every", type=whole(1), help="iterations (default: with every evaluation)")
    how.add_argument("--tensorboard", action="store_true", help="write for TensorBoard too")


def overridden(args: argparse.Namespace) -> Recipe:
    """The recipe with the batch, lr and length that the arguments give. Raises ValueError for values it can't have."""
    recipe = RECIPES[args.recipe]
    if args.iterations is not None and args.epochs is not None:
        raise ValueError("--iterations and --epochs exclude each other")
    changes = {name: getattr(args, name) for name in ("batch", "lr") if getattr(args, name) is not None}
    if args.iterations is not None or args.epochs is not None:
        changes |= {"iterations": args.iterations, "epochs": args.epochs}
    return dataclasses.replace(recipe, **changes)


def run(args: argparse.Namespace) -> int:
    """Trains; the first process prints how it ended. Returns 0.

    Raises ValueError for arguments that can't be served, SystemExit for what fails while training.
    """
    from fastres.train import loop
    from fastres.train.checkpoint import CheckpointError

    names = {field.name for field in dataclasses.fields(loop.Run)} - {"name", "recipe", "out"}
    options = {name: value for name, value in vars(args).items() if name in names}
    out = args.out or Path("out") / args.recipe
    try:
        summary = loop.train(loop.Run(args.recipe, overridden(args), out, **options))
    except (CheckpointError, loop.NonFiniteError, OSError) as error:
        raise SystemExit(f"python -m fastres train: {error}") from error
    if int(os.environ.get("RANK", 0)) == 0:
        print(summary)
    return 0
