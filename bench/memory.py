"""Count the memory per image that a training step saves for its backward pass: eager PyTorch, fastres, and fastres with
recomputation.

    python bench/memory.py
    python bench/memory.py --depth 50 --size 176
    python bench/memory.py --csv bench/records/memory.csv     # what bench/readme.py shows and draws

The forward runs on meta tensors and takes the same path as on an H200 with bf16 autocast (bench/launch_trace.py), so no
GPU is needed. Autograd reports the tensors it saves. The figures are differences between two batch sizes, which removes
weights and everything else that doesn't grow with the batch. A step's other memory is not counted: gradients, optimizer
state, workspaces.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import launch_trace
import layers
import torch
import torchvision
from torch import Tensor

import fastres
from fastres.ops import dispatch

DEPTHS = (18, 34, 50, 101, 152)
COLUMNS = ("depth", "size", "pytorch", "fastres", "recompute")
BATCHES = (128, 256)


def kept(models: Any, depth: int, batch: int, size: int) -> int:
    """Return the bytes of all tensors that the forward of `models`' ResNet saves. Each storage counts once, and
    parameters don't count."""
    with launch_trace.META:
        net = getattr(models, f"resnet{depth}")().to(memory_format=torch.channels_last)
    storages: dict[torch.UntypedStorage, Tensor] = {}  # the saved tensors keep their storages alive
    note = partial(_note, storages)
    with launch_trace.recorded(torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer = net(launch_trace.images(batch, size, torch.bfloat16))
    del answer
    parameters = {parameter.untyped_storage() for parameter in net.parameters()}
    return sum(storage.nbytes() for storage in storages.keys() - parameters)


def _note(storages: dict[torch.UntypedStorage, Tensor], tensor: Tensor) -> Tensor:
    storages.setdefault(tensor.untyped_storage(), tensor)
    return tensor


def per_image(models: Any, depth: int, size: int) -> int:
    """Return the saved bytes that each additional image costs."""
    few, many = (kept(models, depth, batch, size) for batch in BATCHES)
    return (many - few) // (BATCHES[1] - BATCHES[0])


def row(depth: int, size: int) -> dict[str, int]:
    """Return a row of the table, in bytes per image."""
    with dispatch.fusions(recompute=True):
        recompute = per_image(fastres, depth, size)
    figures = per_image(torchvision.models, depth, size), per_image(fastres, depth, size), recompute
    return dict(zip(COLUMNS, (depth, size, *figures), strict=True))


def line(row: dict[str, int]) -> str:
    """Return a row as text, in MiB."""

    def part(name: str) -> str:
        return f"{row[name] / 2**20:6.1f} MiB, {row[name] / row['pytorch']:.2f} x eager"

    return (
        f"ResNet-{row['depth']:<3}  eager PyTorch {row['pytorch'] / 2**20:6.1f} MiB   fastres {part('fastres')}   "
        f"recomputing {part('recompute')}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=DEPTHS, help="default: all of them")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="also write the bytes per image to this file")
    options = parser.parse_args(arguments)
    if options.size < 32:
        parser.error(f"--size must be at least 32: got {options.size}")
    print(
        f"saved for backward per image of {options.size}x{options.size} with bf16 autocast, counted without a GPU:",
        flush=True,
    )
    rows = []
    for depth in [options.depth] if options.depth else DEPTHS:
        rows.append(row(depth, options.size))
        print(line(rows[-1]), flush=True)
    if options.csv:
        layers.write_csv(options.csv, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
