"""Time the memory-bound kernels with different tile shapes: the one that `kernels/rows.py` chooses, and the
alternatives.

    python bench/memory_bound.py
    python bench/memory_bound.py --batch 64 --dtype fp16

Prints a line for each pass at activations of ResNet-50: microseconds and GB/s (every tensor moved once) as shipped,
then the three fastest choices, each as microseconds (elements/channels of a tile, warps). L2 is flushed before each
run. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from layers import DTYPES
from torch import Tensor

from fastres.kernels import batch_norm, launcher, max_pool
from fastres.kernels.rows import WARPS, Cut

CUTS = {
    "STREAMED": [Cut(*cut) for cut in product((2048, 4096, 8192), (64, 128, 256))],
    "REDUCED": [Cut(*cut) for cut in product((2048, 4096), (64, 128))],
    "WINDOWED": [Cut(elements, 64) for elements in (1024, 2048, 4096)],
}
# (pass, H = W, K): where ResNet-50 spends most time on the pass, and where its activations are small.
PLACES = [
    *(("normalize", 56, 64), ("normalize", 14, 1024), ("normalize, add", 56, 256)),
    *(("reduce", 56, 64), ("reduce", 14, 256), ("reduce, project", 56, 256), ("reduce, project", 14, 1024)),
    *(("apply", 56, 64), ("apply", 14, 256), ("apply, mask y", 56, 256), ("apply, project", 56, 256)),
    *(("normalize, pool", 112, 64), ("pool", 112, 64), ("reduce, pool", 112, 64), ("apply, pool", 112, 64)),
]


def work(name: str, N: int, side: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable, str, int]:
    """Return (the pass called `name` on [N, side, side, K], the kind of its tile shape, the bytes it has to move)."""

    def activation(size: int = side) -> Tensor:
        return torch.randn(N, size, size, K, device=device).to(dtype)

    v, z = torch.rand(K, device=device) + 0.5, activation()
    four, moved = (z, v, v, v), z.numel() * z.element_size()
    if "pool" in name:
        half = (side - 1) // 2 + 1
        dy = activation(half)
        taps = max_pool.Pool(torch.randint(0, 9, dy.shape, device=device).to(torch.uint8), 3, 2, 1)
        pooled = dy.numel() * (dy.element_size() + (name != "pool"))
        ways: dict[str, tuple[Callable, int]] = {
            "pool": (lambda: max_pool.max_pool(z), moved + pooled),
            "normalize, pool": (lambda: max_pool.normalize_max_pool(z, v, v), moved + pooled),
            "reduce, pool": (lambda: batch_norm.backward_reduce(dy, z, v, mask=(v, v), pool=taps), moved + pooled),
            "apply, pool": (lambda: batch_norm.backward_apply(dy, *four, mask=(v, v), pool=taps), 2 * moved + pooled),
        }
        return ways[name][0], "WINDOWED", ways[name][1]
    dy, z_proj, out, norm = activation(), activation(), activation(), batch_norm
    ways = {
        "normalize": (lambda: norm.normalize(z, v, v, relu=True), 2),
        "normalize, add": (lambda: norm.normalize(z, v, v, relu=True, residual=dy), 3),
        "reduce": (lambda: norm.backward_reduce(dy, z, v, mask=(v, v)), 2),
        "reduce, project": (lambda: norm.backward_reduce(dy, z, v, mask=out, projection=(z_proj, v)), 4),
        "apply": (lambda: norm.backward_apply(dy, *four, mask=(v, v)), 3),
        "apply, mask y": (lambda: norm.backward_apply(dy, *four, mask=out), 4),
        "apply, project": (lambda: norm.backward_apply(dy, *four, mask=out, projection=(z_proj, v, v, v)), 6),
    }
    call, tensors = ways[name]
    return call, "REDUCED" if name.startswith("reduce") else "STREAMED", tensors * moved


@contextmanager
def cut_by(kind: str, cut: Cut, warps: int) -> Iterator[None]:
    """Within the context, give tiles of that kind this shape and their programs this number of warps."""
    with ExitStack() as stack:
        launcher.forget()
        stack.callback(launcher.forget)
        for module in (batch_norm, max_pool):
            for constant, value in ((kind, cut), ("WARPS", warps)):
                if hasattr(module, constant):
                    stack.enter_context(patch.object(module, constant, value))
        yield


def line(place: tuple[str, int, int], batch: int, dtype: torch.dtype, device: torch.device, time: Callable) -> str:
    """Return a place's line. `time` maps a call to its microseconds."""
    name, side, K = place
    call, kind, moved = work(name, batch, side, K, dtype, device)
    shipped = getattr(max_pool if kind == "WINDOWED" else batch_norm, kind), WARPS
    times: dict[Any, float] = {}
    for cut, warps in dict.fromkeys([shipped, *product(CUTS[kind], (4, 8))]):
        with cut_by(kind, cut, warps):
            times[cut, warps] = time(call)
    us = times[shipped]
    best = ", ".join(
        f"{times[cut, warps]:.1f} ({cut.elements}/{cut.channels}, {warps})"
        for cut, warps in sorted(times, key=times.__getitem__)[:3]
    )
    return f"{name:16} {f'{K} @{side}x{side}':14} {us:8.1f} us {1e-3 * moved / us:6.0f} GB/s; fastest: {best}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: the passes are timed on one")
    from triton.testing import do_bench

    def time(call: Callable) -> float:
        return 1e3 * do_bench(call, warmup=3, rep=12, return_mode="median")

    print(f"batch {options.batch}, {options.dtype}, {torch.cuda.get_device_name()}", flush=True)
    for place in PLACES:
        print(line(place, options.batch, DTYPES[options.dtype], torch.device("cuda"), time), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
