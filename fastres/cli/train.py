"""`python -m fastres train`: turn the arguments into a `fastres.train.loop.Run` and run it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from fastres.cli.training_options import add_device, add_images, add_whole, positive
from fastres.models.families import FAMILIES
from fastres.models.paper import SHORTCUTS
from fastres.terminal import listing
from fastres.train.recipe import DATA, GRAPHS, LOADERS, RECIPES, Recipe

EXAMPLES = """\
examples:
  python -m fastres train                                  ResNet-20 on handwritten digits
  python -m fastres train --resume                         continue after Ctrl-C
  python -m fastres train --recipe cifar-2015 --depth 56 --root DIR --download
  torchrun --nproc-per-node 8 -m fastres train --recipe imagenet-2015 --root DIR

Several processes share the batch; batch size and learning rate stay as in the recipe."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`. The default is None if it depends on the recipe."""
    lists = {
        "recipes": {name: recipe.source for name, recipe in RECIPES.items()},
        "families": {name: family.meaning for name, family in FAMILIES.items()},
        "data": DATA,
    }
    parser.epilog = "\n\n".join([*(listing(title, names) for title, names in lists.items()), EXAMPLES])
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="digits",
        metavar="NAME",
        help="recipe, listed below (default: digits)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for checkpoints, log and curves (default: out/<recipe>)"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    net = parser.add_argument_group("net")
    net.add_argument(
        "--family", choices=list(FAMILIES), metavar="NAME", help="family of nets, listed below (default: the recipe's)"
    )
    net.add_argument(
        "--depth", type=int, metavar="N", help="number of layers, one of the family's depths (default: the recipe's)"
    )
    net.add_argument(
        "--shortcut",
        choices=list(SHORTCUTS),
        help="kind of shortcut, for the family paper only (default: as in the paper)",
    )
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data", choices=list(DATA), metavar="NAME", help="data set, listed below (default: the recipe's)"
    )
    add_images(data)
    add_whole(data, "--workers", 0, "processes that read photographs (default: one per CPU)")
    loaders = "; ".join(f"{name}: {meaning}" for name, meaning in LOADERS.items())
    data.add_argument("--loader", choices=list(LOADERS), default="auto", help=f"{loaders} (default: auto)")
    recipe = parser.add_argument_group("settings that replace the recipe's")
    add_whole(recipe, "--batch", 1, "images per iteration, of all processes together (default: the recipe's)")
    recipe.add_argument("--lr", type=positive, metavar="X", help="learning rate (default: the recipe's)")
    add_whole(recipe, "--iterations", 1, "length of the training (default: the recipe's)")
    add_whole(recipe, "--epochs", 1, "length of the training, instead of --iterations (default: the recipe's)")
    add_whole(
        recipe,
        "--micro-batch",
        1,
        "images per forward pass, which BatchNorm normalises together (default: the recipe's)",
    )
    how = parser.add_argument_group("how it runs")
    add_whole(how, "--seed", 0, "seed of the weights and of the images' order and crops (default: 0)", default=0)
    add_device(how)
    how.add_argument(
        "--compile",
        choices=("none", "inductor", "fastres"),
        default="none",
        help="backend of torch.compile to use (default: none)",
    )
    graphs = "; ".join(f"{name}: {meaning}" for name, meaning in GRAPHS.items())
    spelt = {"choices": list(GRAPHS), "nargs": "?", "const": "on", "default": "auto"}
    how.add_argument("--cuda-graph", **spelt, help=f"{graphs} (default: auto; --cuda-graph without a value: on)")  # type: ignore[arg-type]
    how.add_argument(
        "--deterministic", action="store_true", help="use only cuDNN algorithms that give the same bits each time"
    )
    add_whole(how, "--log-every", 1, "iterations between rows of log.csv (default: 50)", default=50)
    add_whole(how, "--eval-every", 1, "iterations between evaluations (default: one epoch)")
    add_whole(how, "--save-every", 1, "iterations between checkpoints (default: those of --eval-every)")
    how.add_argument("--tensorboard", action="store_true", help="also write the log for TensorBoard")


def overridden(args: argparse.Namespace) -> Recipe:
    """Return the recipe with the arguments' batch, lr and length. Raises ValueError for values out of range."""
    recipe = RECIPES[args.recipe]
    if args.iterations is not None and args.epochs is not None:
        raise ValueError("--iterations and --epochs exclude each other")
    changes = {name: getattr(args, name) for name in ("batch", "lr") if getattr(args, name) is not None}
    if args.iterations is not None or args.epochs is not None:
        changes |= {"iterations": args.iterations, "epochs": args.epochs}
    return dataclasses.replace(recipe, **changes)


def run(args: argparse.Namespace) -> int:
    """Train a net and print the summary in rank 0. Returns 0.

    Raises ValueError for arguments that can't be used, SystemExit if the training fails or after a signal, and OSError
    for files that can't be read or written and for workers that died.
    """
    from fastres.train import loop

    names = {field.name for field in dataclasses.fields(loop.Run)} - {"name", "recipe", "out"}
    options = {name: value for name, value in vars(args).items() if name in names}
    try:
        summary = loop.train(loop.Run(args.recipe, overridden(args), args.out or Path("out", args.recipe), **options))
    except loop.FAILURES as error:
        raise SystemExit(f"python -m fastres train: {error}") from error
    if int(os.environ.get("RANK", 0)) == 0:
        print(summary)
    return 0
