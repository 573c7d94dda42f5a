"""`python -m fastres summary`: print the paper's Table 1 for one net, with its FLOPs and parameters."""

from __future__ import annotations

import argparse

import torch

from fastres.models import families, flops, paper, summary
from fastres.models.families import FAMILIES
from fastres.models.paper import SHORTCUTS
from fastres.terminal import listing


def arguments(parser: argparse.ArgumentParser) -> None:
    known = {name: f"{f.meaning}: {', '.join(map(str, f.depths))}" for name, f in FAMILIES.items()}
    parser.epilog = f"""\
{listing("families and their depths", known)}

examples:
  python -m fastres summary --depth 50
  python -m fastres summary --family cifar --depth 110"""
    shortcuts = "; ".join(f"{name}: {meaning}" for name, meaning in SHORTCUTS.items())
    parser.add_argument(
        "--depth", type=int, required=True, metavar="N", help="number of layers, one of the family's depths"
    )
    parser.add_argument(
        "--family",
        choices=list(FAMILIES),
        default="paper",
        metavar="NAME",
        help="family of nets, listed below (default: paper)",
    )
    parser.add_argument("--shortcut", choices=list(SHORTCUTS), help=f"{shortcuts} (default: as in the paper)")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the images (default: 224; 32 for CIFAR nets)"
    )


def run(args: argparse.Namespace) -> int:
    with torch.device("meta"):
        model = families.build(args.family, args.depth, args.shortcut)
    family = FAMILIES[args.family]
    size = family.size if args.size is None else args.size
    shortcut = args.shortcut or (paper.default_shortcut(args.depth) if family.shortcuts else None)
    cost = flops.count(model, size)
    title = f"{args.depth} layers, family {args.family}" + (f", shortcut {shortcut}" if shortcut else "")
    parts = [f"{title}, images {size}x{size}", summary.table(model, cost)]
    if size == family.size and (note := summary.beside_the_paper(args.family, args.depth, shortcut, cost)):
        parts.append(note)
    print("\n\n".join(parts))
    return 0
