"""`python -m fastres experiment`: turn the arguments into a `fastres.experiments.Plan`, run it and write its files."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import torch

from fastres import experiments
from fastres.cli.training_options import add_device, add_images, add_whole
from fastres.experiments import EXPERIMENTS, PLAIN, Net, Plan, degradation, responses, shortcuts
from fastres.models import families
from fastres.models.paper import SHORTCUTS
from fastres.train.checkpoint import write_atomically
from fastres.train.loop import FAILURES
from fastres.train.recipe import QUICK, RECIPES, STUDIES, STUDY_RECIPES, lasting

EXAMPLES = """\
examples:
  python -m fastres experiment degradation --quick      a short version, on digits
  python -m fastres experiment shortcuts --data imagenet --root DIR

Trainings that are already finished in --out are not repeated, and interrupted ones are resumed. Exit status 3 means
that `degradation` didn't confirm the paper's claim (deeper plain nets train worse, deeper residual nets don't)."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `experiment`. The default is None if it depends on the experiment."""
    parser.epilog = EXAMPLES
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in EXPERIMENTS.items())
    parser.add_argument("experiment", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help=kinds)
    parser.add_argument(
        "--quick", action="store_true", help="train for a short time on digits, on the CPU unless --device is given"
    )
    nets = parser.add_argument_group("nets and their training")
    nets.add_argument("--depths", type=int, nargs="+", metavar="N", help="layers of the nets (default: the paper's)")
    add_whole(
        nets,
        "--seeds",
        1,
        "number of trainings of each net, with seeds 0, 1, ... (default: 1 or 3, depending on experiment and data)",
    )
    add_whole(
        nets,
        "--iterations",
        1,
        "length of each training; the recipe's milestones scale with it (default: the recipe's)",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data",
        choices=list(STUDY_RECIPES),
        metavar="NAME",
        help=f"data to train on: {', '.join(STUDY_RECIPES)} (default: digits)",
    )
    add_images(images)
    add_whole(images, "--workers", 0, "processes that decode photographs (default: 0)", default=0)
    how = parser.add_argument_group("how it runs")
    how.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: out/experiment/<data>, or out/experiment/<data>-quick with --quick)",
    )
    add_device(how)
    how.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="capture forward and backward in a CUDA graph (default: on a GPU)",
    )
    how.add_argument("--no-plot", action="store_true", help="write tables only, no picture (pictures need matplotlib)")
    how.add_argument(
        "--redraw", action="store_true", help="don't train; draw the picture again from the table in --out"
    )


def plan(args: argparse.Namespace) -> Plan:
    """Return the plan that the arguments describe. Raises ValueError for arguments that can't be used."""
    fixed = ("data", "depths", "seeds", "iterations")
    if args.quick and (excluded := [f"--{name}" for name in fixed if getattr(args, name) is not None]):
        raise ValueError(f"--quick fixes these settings: leave out {', '.join(excluded)}")
    images = args.data or "digits"
    recipe = RECIPES[STUDY_RECIPES[images]]
    family = "paper" if args.experiment == "shortcuts" else recipe.family
    study = QUICK[args.experiment] if args.quick else STUDIES[args.experiment, family]
    depths = tuple(dict.fromkeys(args.depths or study.depths))
    length = args.iterations or study.iterations
    study = replace(study, depths=depths, seeds=args.seeds or study.seeds, iterations=length)
    if length is not None:
        recipe = lasting(recipe, length)
    if args.experiment == "shortcuts":
        nets = [Net(family, depth, shortcut) for depth in depths for shortcut in SHORTCUTS]
    else:
        option = "A" if family == "paper" else None
        nets = [Net(PLAIN[family], depth) for depth in depths] + [Net(family, depth, option) for depth in depths]
    for net in nets:
        with torch.device("meta"):
            families.build(net.family, net.depth, net.shortcut)
    device = args.device or ("cpu" if args.quick else None)
    names = ("root", "download", "holdout", "workers", "cache", "dtype")
    options = {name: getattr(args, name) for name in names} | {"device": device}
    graph = {None: "auto", True: "on", False: "off"}[args.cuda_graph]
    out = args.out or Path("out/experiment", images + "-quick" * args.quick)
    return Plan(args.experiment, images, recipe, tuple(nets), study, out, options | {"cuda_graph": graph})


def run(args: argparse.Namespace) -> int:
    """Train the nets that aren't trained yet, write the files and print the report.

    Returns 3 if the experiment tests a claim of the paper and didn't confirm it, else 0. Raises ValueError for
    arguments that can't be used, SystemExit if a training fails or after a signal, and OSError for files that can't be
    written.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("experiments run in one process only; use `train` to train one net in several")
    if not args.no_plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install matplotlib, or use --no-plot")
    if args.redraw and args.no_plot:
        raise ValueError("--redraw and --no-plot exclude each other: give one of them")
    wanted = plan(args)
    if args.redraw:
        print(f"wrote {experiments.redraw(wanted.name, wanted.out)}")
        return 0
    threads = torch.get_num_threads()
    if args.quick:
        torch.set_num_threads(1)  # 8x8 images gain little from more, and one thread rounds the same everywhere
    try:
        trained = experiments.trainings(wanted)
        conclude = {"degradation": degradation, "shortcuts": shortcuts, "responses": responses}[wanted.name]
        finding = conclude(wanted, trained)
        text = experiments.report(wanted, finding, sum(training.seconds for training in trained))
        files = {f"{wanted.name}.csv": experiments.table(finding.rows).encode(), f"{wanted.name}.md": text.encode()}
        shown = finding.rows
        if wanted.name != "responses":
            shown = experiments.curves(trained)
            files[experiments.drawn_from(wanted.name)] = experiments.table(shown).encode()
        if not args.no_plot:
            files[f"{wanted.name}.svg"] = experiments.draw(wanted.name, shown)
        for name, content in files.items():
            write_atomically(wanted.out / name, content)
    except FAILURES as error:
        raise SystemExit(f"python -m fastres experiment: {error}") from error
    finally:
        torch.set_num_threads(threads)
    print(text)
    print(f"{wanted.out} holds {', '.join(files)} and runs/")
    return 3 if finding.seen is False else 0
