"""Compare the instruction counts of the kernels' main loops on sm_90 with recorded ones, to detect worse compilation.

The counts are valid for one Triton version and are stored in golden.json. `python tests/kernels/test_golden.py`
overwrites them. Do this only on purpose, and give the reason in the commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from binary import record

from fastres.kernels.batch_norm import backward_apply, backward_reduce, normalize, statistics
from fastres.kernels.chain import bottleneck_chain
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.fprop import conv_fprop
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import conv_stem, conv_stem_wgrad, stem_columns
from fastres.kernels.tiles import Tile, stem_tiles
from fastres.kernels.wgrad import conv_wgrad

FILE = Path(__file__).with_name("golden.json")
ALLOWED = 0.10
PERSISTENT = Tile(64, 64, 64, 4, 3, (1, 1, 64), persistent=2)
N, SIZE, C = 256, 14, 256
STEM = ConvProblem(N, 224, 224, 3, 64, 7, 7, 2, 3)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> dict[str, Callable[[], Any]]:
    """Return calls by name, mostly with the sizes of ResNet-50's stages 1 and 3 and its stem at batch 256."""
    x, wide = meta(N, SIZE, SIZE, C), meta(N, SIZE, SIZE, 4 * C)
    v, v4 = meta(C, dtype=torch.float32), meta(4 * C, dtype=torch.float32)
    spatial, expand = meta(C, 3, 3, C), meta(4 * C, 1, 1, C)
    narrow, broad = meta(N, 56, 56, 64), meta(N, 56, 56, 256)
    images = meta(N, 224, 230, 4)
    by_pointers = stem_tiles(stem_columns(STEM), 2, tma=False)[0]
    s, s4 = meta(64, dtype=torch.float32), meta(256, dtype=torch.float32)
    single = meta(1, SIZE, SIZE, C)
    return {
        "infer 3x3": lambda: conv_fprop(
            x, spatial, ConvProblem.of(x.shape, spatial.shape, pad=1), scale=v, shift=v, relu=True
        ),
        "infer 1x1 residual": lambda: conv_fprop(
            x, expand, ConvProblem.of(x.shape, expand.shape), scale=v4, shift=v4, residual=wide, relu=True
        ),
        "infer 3x3 split": lambda: conv_fprop(
            single,
            spatial,
            ConvProblem.of(single.shape, spatial.shape, pad=1),
            shift=v,
            relu=True,
            tile=Tile(64, 32, 64, 4, 6, (1, 2, 16), splits=4),
        ),
        "fprop 3x3 prologue statistics": lambda: conv_fprop(
            x, spatial, ConvProblem.of(x.shape, spatial.shape, pad=1), prologue=(v, v), statistics=True
        ),
        "fprop 1x1 prologue statistics": lambda: conv_fprop(
            x, expand, ConvProblem.of(x.shape, expand.shape), prologue=(v, v), statistics=True
        ),
        "dgrad 3x3 mask": lambda: conv_dgrad(
            x, spatial, ConvProblem.of(x.shape, spatial.shape, pad=1), relu_mask=(v, v), below=(x, v)
        ),
        "dgrad 1x1 dz mask": lambda: conv_dgrad(
            wide,
            expand,
            ConvProblem.of(x.shape, expand.shape),
            bn_backward=(wide, v4, v4, v4),
            relu_mask=(v, v),
            below=(x, v),
        ),
        "fprop 1x1 persistent": lambda: conv_fprop(
            narrow,
            meta(256, 1, 1, 64),
            ConvProblem.of(narrow.shape, meta(256, 1, 1, 64).shape),
            prologue=(s, s),
            statistics=True,
            tile=PERSISTENT,
        ),
        "infer 1x1 persistent residual": lambda: conv_fprop(
            narrow,
            meta(256, 1, 1, 64),
            ConvProblem.of(narrow.shape, meta(256, 1, 1, 64).shape),
            shift=s4,
            residual=broad,
            relu=True,
            tile=PERSISTENT,
        ),
        "dgrad 1x1 persistent end": lambda: conv_dgrad(
            narrow,
            meta(64, 1, 1, 256),
            ConvProblem.of(broad.shape, meta(64, 1, 1, 256).shape),
            bn_backward=(narrow, s, s, s),
            residual=broad,
            relu_mask=broad,
            below=(broad, s4),
            tile=PERSISTENT,
        ),
        "wgrad 3x3 prologue": lambda: conv_wgrad(x, x, ConvProblem.of(x.shape, spatial.shape, pad=1), prologue=(v, v)),
        "wgrad 1x1 dz prologue": lambda: conv_wgrad(
            wide, x, ConvProblem.of(x.shape, expand.shape), bn_backward=(wide, v4, v4, v4), prologue=(v, v)
        ),
        "chain": lambda: bottleneck_chain(
            narrow, meta(64, 3, 3, 64), s, meta(256, 1, 1, 64), s4, broad, meta(64, 1, 1, 256), s
        ),
        "stem by boxes": lambda: conv_stem(images, meta(64, 7, 8, 4), STEM, statistics=True),
        "stem by pointers": lambda: conv_stem(images, meta(64, 7, 8, 4), STEM, statistics=True, tile=by_pointers),
        "stem wgrad": lambda: conv_stem_wgrad(meta(N, 112, 112, 64), images, STEM),
        "statistics": lambda: statistics(x),
        "normalize add relu": lambda: normalize(wide, v4, v4, relu=True, residual=wide),
        "backward reduce": lambda: backward_reduce(wide, wide, v4, mask=wide),
        "backward apply": lambda: backward_apply(wide, wide, v4, v4, v4, mask=wide),
    }


def counts(launch: Callable[[], Any]) -> list[int]:
    """Return the number of instructions in each kernel's main loop, or in the whole kernel if it has no loop."""
    with record() as recorded:
        launch()
    binaries = [one.compile(90) for one in recorded]
    return [len(binary.loop or binary.code) for binary in binaries]


@pytest.mark.compiles
@pytest.mark.parametrize("name", launches())
def test_main_loop_is_no_longer_than_it_was(name: str) -> None:
    golden = json.loads(FILE.read_text())
    if golden["triton"] != triton.__version__:
        pytest.skip(f"the recorded counts are of Triton {golden['triton']}, this is {triton.__version__}")
    got, want = counts(launches()[name]), golden["counts"][name]
    assert len(got) == len(want)
    for count, recorded in zip(got, want, strict=True):
        assert count <= recorded * (1 + ALLOWED), f"{name}: {count} instructions, {recorded} recorded"
        assert count >= recorded * (1 - ALLOWED), f"{name}: {count} instructions, {recorded} recorded: update it"


if __name__ == "__main__":
    found = {name: counts(launch) for name, launch in launches().items()}
    FILE.write_text(json.dumps({"triton": triton.__version__, "counts": found}, indent=1) + "\n")
    print(FILE.read_text())
