"""Count the memory per image that a training step saves for its backward pass: eager PyTorch, fastres, and fastres with
recomputation.

    python bench/memory.py
    python bench/memory.py --depth 50 --size 176
    python bench/memory.py --frozen                           # running statistics, as in detectors and fine-tuning
    python bench/memory.py --csv bench/records/memory.csv     # what bench/readme.py shows and draws
    python bench/memory.py --frozen --csv bench/records/memory-frozen.csv

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
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres.ops import dispatch

DEPTHS = (18, 34, 50, 101, 152)
COLUMNS = ("depth", "size", "pytorch", "fastres", "recompute")
FROZEN_COLUMNS = ("depth", "size", "norms", "pytorch", "fastres")
BATCHES = (128, 256)
NORMS = {  # what is trained, and how BatchNorm normalises
    "batch": "BatchNorm2d with batch statistics",
    "eval": "BatchNorm2d in eval mode",
    "frozen": "FrozenBatchNorm2d",
    "detector": "FrozenBatchNorm2d, stem and layer1 not trained",
}


def kept(models: Any, depth: int, batch: int, size: int, norms: str) -> int:
    """Return the bytes of all tensors that the forward of `models`' ResNet saves. Each storage counts once, and
    parameters and buffers don't count. norms: a key of `NORMS`."""
    kind = FrozenBatchNorm2d if norms in ("frozen", "detector") else nn.BatchNorm2d
    with launch_trace.META:
        net = getattr(models, f"resnet{depth}")(norm_layer=kind).to(memory_format=torch.channels_last)
    net.train(norms != "eval")
    if norms == "detector":
        for layer in (net.conv1, net.layer1):
            layer.requires_grad_(False)
    storages: dict[torch.UntypedStorage, Tensor] = {}  # the saved tensors keep their storages alive
    note = partial(_note, storages)
    with launch_trace.recorded(torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer = net(launch_trace.images(batch, size, torch.bfloat16))
    del answer
    of_net = {tensor.untyped_storage() for tensor in (*net.parameters(), *net.buffers())}
    return sum(storage.nbytes() for storage in storages.keys() - of_net)


def _note(storages: dict[torch.UntypedStorage, Tensor], tensor: Tensor) -> Tensor:
    storages.setdefault(tensor.untyped_storage(), tensor)
    return tensor


def per_image(models: Any, depth: int, size: int, norms: str = "batch") -> int:
    """Return the saved bytes that each additional image costs. norms: a key of `NORMS`."""
    few, many = (kept(models, depth, batch, size, norms) for batch in BATCHES)
    return (many - few) // (BATCHES[1] - BATCHES[0])


def row(depth: int, size: int) -> dict[str, int]:
    """Return a row of the table, in bytes per image."""
    with dispatch.fusions(recompute=True):
        recompute = per_image(fastres, depth, size)
    figures = per_image(torchvision.models, depth, size), per_image(fastres, depth, size), recompute
    return dict(zip(COLUMNS, (depth, size, *figures), strict=True))


def frozen_row(depth: int, size: int, norms: str) -> dict[str, Any]:
    """Return a row of the table with running statistics, in bytes per image. norms: a key of `NORMS`."""
    figures = (per_image(models, depth, size, norms) for models in (torchvision.models, fastres))
    return dict(zip(FROZEN_COLUMNS, (depth, size, norms, *figures), strict=True))


def line(row: dict[str, Any]) -> str:
    """Return a row as text, in MiB."""

    def part(name: str) -> str:
        return f"{row[name] / 2**20:6.1f} MiB, {row[name] / row['pytorch']:.2f} x eager"

    start = f"ResNet-{row['depth']:<3}  eager PyTorch {row['pytorch'] / 2**20:6.1f} MiB   fastres {part('fastres')}   "
    return start + (NORMS[row["norms"]] if "norms" in row else f"recomputing {part('recompute')}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=DEPTHS, help="default: all of them")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: %(default)s)")
    parser.add_argument("--frozen", action="store_true", help="count nets whose BatchNorms use running statistics")
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
        for norms in ("eval", "frozen", "detector") if options.frozen else ("batch",):
            rows.append(frozen_row(depth, options.size, norms) if options.frozen else row(depth, options.size))
            print(line(rows[-1]), flush=True)
    if options.csv:
        layers.write_csv(options.csv, FROZEN_COLUMNS if options.frozen else COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
