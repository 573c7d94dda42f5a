"""Measure what `fastres.optimize` costs on a CPU when the shape of its input varies.

    python bench/ragged.py
    python bench/ragged.py --depth 50 --dtype int8 --batch 7 --size 224
    python bench/ragged.py --memory 200 --dtype fp32

Each row compares the first call at a new shape with later calls at the same shape. The net is prepared for a shape of
its own first, as `optimize(model, example)` does. Then images of a few heights that it has not seen come, and the row
shows the ratio of the first call to the fastest later one: the smallest and the median over these heights. On a shared
machine the smallest is the one to read. "eager" is the same ratio for the model itself, which is in float32 for int8.
"first/eager" compares the net's first call with the model's later ones: below 1, fastres is faster even where no shape
comes twice.

--memory N calls the net with N different shapes instead, and prints how the memory of the process grows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres.ops import dispatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
DEPTHS = (18, 34, 50, 101, 152)
BATCHES, SIZES = (1, 7, 32), (32, 112, 224)
EXAMPLE = (2, 3, 96, 96)  # the shape for which nets are prepared
LATER = 4  # calls after the first
STEP = 8  # pixels between two heights
COLUMNS = (
    f"{'':14}{'batch':>6}{'size':>6}{'later ms':>10}{'first/later':>13}{'median':>8}{'eager':>8}{'first/eager':>13}"
)


def seconds(call: Callable[[Tensor], Any], x: Tensor) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


def first_and_later(call: Callable[[Tensor], Any], batch: int, height: int, width: int) -> tuple[float, float]:
    """Return the seconds of the first call at a shape, and those of the fastest of `LATER` more."""
    x = torch.rand(batch, 3, height, width)
    first = seconds(call, x)
    return first, min(seconds(call, x) for _ in range(LATER))


def model_and_net(depth: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Return a ResNet, in float32 for int8, and its optimized net."""
    torch.manual_seed(0)
    model = getattr(fastres, f"resnet{depth}")().eval()
    example = torch.rand(EXAMPLE)
    options = {"calibration": [example]} if dtype == torch.int8 else {}
    net = fastres.optimize(model, example, dtype=dtype, **options)
    return model.to(torch.float32 if dtype == torch.int8 else dtype), net


def row(model: nn.Module, net: nn.Module, batch: int, size: int, shapes: int) -> list[float]:
    """Return the numbers of one row, in the order of `COLUMNS`."""
    like = next(model.parameters()).dtype

    @torch.no_grad()
    def eager(x: Tensor) -> Tensor:
        return model(x.to(like))

    heights = [size + STEP * (i + 1) for i in range(shapes)]
    ours = [first_and_later(net, batch, height, size) for height in heights]
    theirs = [first_and_later(eager, batch, height, size) for height in heights]
    ratios = [first / later for first, later in ours]
    later = 1000 * min(later for _, later in ours)
    eager_ratio = min(first / later for first, later in theirs)
    once = statistics.median(first / later for (first, _), (_, later) in zip(ours, theirs, strict=True))
    return [later, min(ratios), statistics.median(ratios), eager_ratio, once]


def resident() -> float:
    """Return the memory of this process in MiB. Linux only."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def grow(net: nn.Module, shapes: int, size: int) -> list[tuple[int, float]]:
    """Call `net` with `shapes` different shapes; return (number of shapes, MiB in use) after each quarter."""
    found = []
    for i in range(shapes):
        net(torch.rand(1 + i % 3, 3, size + i // 3, size))
        if (i + 1) % max(1, shapes // 4) == 0:
            found.append((i + 1, resident()))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=DEPTHS, action="append", help="repeatable; default: 18 and 50")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default: what this CPU fuses")
    parser.add_argument("--batch", type=int, action="append", help=f"repeatable; default: {BATCHES}")
    parser.add_argument("--size", type=int, action="append", help=f"repeatable; default: {SIZES}")
    parser.add_argument("--shapes", type=int, default=4, help="new shapes per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--memory", type=int, metavar="N", help="measure the memory over N shapes instead")
    options = parser.parse_args(arguments)
    for name, least in (("batch", 1), ("size", 32), ("shapes", 1), ("threads", 1), ("memory", 4)):
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                parser.error(f"--{name} must be at least {least}: got {value}")
    torch.set_num_threads(options.threads)
    served = [name for name, dtype in DTYPES.items() if dispatch.why_no_onednn(dtype) is None]
    if not served:
        parser.error(str(dispatch.why_no_onednn(torch.float32)))
    for name in options.dtype or []:
        if name not in served:
            parser.error(f"--dtype {name}: {dispatch.why_no_onednn(DTYPES[name])}")
    print(f"{options.threads} thread(s), torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print("" if options.memory else COLUMNS)
    for depth in options.depth or (18, 50):
        for name in options.dtype or served:
            model, net = model_and_net(depth, DTYPES[name])
            title = f"ResNet-{depth} {name}"
            if options.memory:
                found = grow(net, options.memory, min(options.size or SIZES))
                print(title, *(f"{mib:.0f} MiB after {n} shapes" for n, mib in found), sep="   ", flush=True)
                continue
            for size in options.size or SIZES:
                for batch in options.batch or BATCHES:
                    later, least, median, eager_ratio, once = row(model, net, batch, size, options.shapes)
                    figures = f"{later:10.1f}{least:13.2f}{median:8.2f}{eager_ratio:8.2f}{once:13.2f}"
                    print(f"{title:14}{batch:6}{size:6}{figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
