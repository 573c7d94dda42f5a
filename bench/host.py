"""Measure the time that the host (Python) needs for a residual block, without a GPU: microseconds per forward, backward
and eval-mode forward.

    python bench/host.py
    python bench/host.py --rounds 1000 --json out/host.json
    python bench/host.py --forgetful                         # with launchers that remember no launch

Kernels are compiled for an H200 and launched against a stub driver that runs nothing (tests/helpers/stub_cuda.py), on
tensors in CPU memory. All convolutions and the passes between them run as kernels, in bf16. Each launch is remembered
before anything is timed, so the figures are the host's part of every later step. A call of the driver costs next to
nothing here, and a PyTorch operator costs what it costs on the CPU; the images are few and small.

To compare two states of the sources, measure them in turns on one machine and compare the minima. If their `launches`
differ, they don't do the same work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

import fastres
from fastres.kernels import checks, fprop, launcher, stem
from fastres.ops import dispatch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import stub_cuda

WARM_UPS = 5
PASSES = {True: ("forward", "backward"), False: ("eval forward",)}  # the key says whether the call trains
COLUMNS = ("min us", "median us", "launches")


def stem_alone() -> nn.Module:
    """Return a ResNet-50 without blocks and head. Its output is flattened, which copies it."""
    net = fastres.resnet50()
    net.layer1 = net.layer2 = net.layer3 = net.layer4 = net.avgpool = net.fc = nn.Identity()
    return net


# The modules that are called, and the shapes of their inputs.
CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic block": (lambda: fastres.resnet18().layer1[0], (2, 64, 16, 16)),
    "bottleneck": (lambda: fastres.resnet50().layer1[1], (2, 256, 16, 16)),
    "bottleneck, projection": (lambda: fastres.resnet50().layer2[0], (2, 256, 16, 16)),
    "stem": (stem_alone, (2, 3, 64, 64)),
    "ResNet-50": (lambda: fastres.resnet50(num_classes=10), (2, 3, 64, 64)),
}


def feign_gpu() -> None:
    """Make CPU tensors take the path of tensors on an H200, for the lifetime of this process."""
    dispatch._kernel_less = lambda device: None
    dispatch.passes_engine = lambda *_: "triton"
    checks.INTERPRETER = checks.H200  # the GPU reported for CPU tensors
    for module in (fprop, stem):
        module.check_device = lambda *_: None


class Call:
    """A module in bf16 with its input, in training or eval mode."""

    def __init__(self, name: str, train: bool) -> None:
        make, shape = CALLS[name]
        self.name, self.train, self.passes = name, train, PASSES[train]
        self.net = make().to(torch.bfloat16, memory_format=torch.channels_last).train(train)
        self.x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        self.x.requires_grad_(train and shape[1] > 3)
        self.leaves = (self.x, *self.net.parameters())
        self.dy = torch.ones_like(self.net(self.x).detach())

    def __call__(self, clock: Callable[[], int]) -> list[int]:
        """Run the module and return how far `clock` advances in each pass."""
        with torch.set_grad_enabled(self.train):
            stamps = [clock()]
            y = self.net(self.x)
            stamps.append(clock())
        if self.train:
            y.backward(self.dy)
            stamps.append(clock())
            for leaf in self.leaves:
                leaf.grad = None
        return [end - begin for begin, end in itertools.pairwise(stamps)]


def measure(rounds: int, forgetful: bool = False) -> list[dict[str, str | float]]:
    """Return a row for each pass of each entry of CALLS. With `forgetful`, launchers don't remember their launches."""
    rows = []
    deciding = launcher.forgetful() if forgetful else nullcontext()
    with deciding, stub_cuda.driver() as launched, fastres.backend("triton"):
        calls = [Call(name, train) for name in CALLS for train in PASSES]
        launches = [[call(lambda: len(launched)) for _ in range(WARM_UPS)][-1] for call in calls]
        stub_cuda.library().stub_on_launch(None)
        for call, counts in zip(calls, launches, strict=True):
            taken = zip(*(call(time.perf_counter_ns) for _ in range(rounds)), strict=True)
            for pass_, ns, count in zip(call.passes, taken, counts, strict=True):
                numbers = (min(ns) / 1000, statistics.median(ns) / 1000, count)
                rows.append({"call": call.name, "pass": pass_, **dict(zip(COLUMNS, numbers, strict=True))})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="timed repetitions of each call; default: 300")
    parser.add_argument("--forgetful", action="store_true", help="let launchers remember no launches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if torch.cuda.is_available():
        parser.error("torch sees a CUDA GPU; set CUDA_VISIBLE_DEVICES= in the environment to hide it")
    torch.set_num_threads(1)
    feign_gpu()
    rows = measure(options.rounds, options.forgetful)
    print(f"{'call':24}{'pass':14}" + "".join(f"{column:>12}" for column in COLUMNS))
    for row in rows:
        print(f"{row['call']:24}{row['pass']:14}" + "".join(f"{row[column]:12.0f}" for column in COLUMNS))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
