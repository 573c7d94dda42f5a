"""Compare the bottleneck chain with its three convolutions, and check its binaries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from binary import check, record
from cases import assert_close_to_reference, by_library, pieces
from torch import Tensor

from fastres.kernels.chain import ChainTile, bottleneck_chain
from fastres.kernels.checks import gpu_of
from fastres.ops.layout import nchw, nhwc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "w2", "shift2", "w3", "shift3", "residual", "w1", "shift1")


def operands(N: int, H: int, W: int, C: int, dtype: torch.dtype, device: str = DEVICE) -> list[Tensor]:
    shapes = [(N, H, W, C), (C, 3, 3, C), (C,), (4 * C, 1, 1, C), (4 * C,), (N, H, W, 4 * C), (C, 1, 1, 4 * C), (C,)]
    made = []
    for name, shape in zip(NAMES, shapes, strict=True):
        scale = (shape[1] * shape[2] * shape[3]) ** -0.5 if name.startswith("w") else 1.0
        tensor = torch.randn(shape, device=device) * scale
        made.append(tensor.to(torch.float32 if name.startswith("shift") else dtype))
    return made


def plain(
    x: Tensor, w2: Tensor, shift2: Tensor, w3: Tensor, shift3: Tensor, residual: Tensor, w1: Tensor, shift1: Tensor
) -> tuple[Tensor, Tensor]:
    def conv(a: Tensor, w: Tensor, shift: Tensor, pad: int) -> Tensor:
        return nhwc(by_library(F.conv2d, nchw(a), nchw(w), shift.to(a.dtype), padding=pad))

    hidden = F.relu(conv(x, w2, shift2, 1))
    out = F.relu(conv(hidden, w3, shift3, 0) + residual)
    return out, F.relu(conv(out, w1, shift1, 0))


def hold(given: list[Tensor], tile: ChainTile | None = None) -> None:
    """Compare both results of the chain with float64, a few images at a time to save memory."""
    got, (x, *_) = bottleneck_chain(*given, tile), given
    for part in pieces(len(x), 4 * x[0].numel()):
        some = [t[part] if name in ("x", "residual") else t for name, t in zip(NAMES, given, strict=True)]
        exact, stock = plain(*(t.double() for t in some)), plain(*some)
        for name, y, ref, base in zip(("out", "mid"), got, exact, stock, strict=True):
            assert_close_to_reference(y[part], ref, base, what=f"{name} {x.dtype} {part}")


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("N", "H", "W", "C", "tile"),
    [
        (1, 5, 6, 16, ChainTile(32, 16, 16, 4, 2)),
        (2, 7, 7, 32, ChainTile(64, 32, 16, 4, 2)),
        (3, 4, 4, 16, None),
        pytest.param(64, 56, 56, 64, None, marks=pytest.mark.gpu),
        pytest.param(64, 28, 28, 128, None, marks=pytest.mark.gpu),
        pytest.param(5, 55, 57, 64, None, marks=pytest.mark.gpu),
    ],
)
def test_equals_three_convolutions(poisoned: None, N: int, H: int, W: int, C: int, tile: ChainTile | None) -> None:
    dtypes = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
    for dtype in dtypes:
        hold(operands(N, H, W, C, dtype), tile)


@pytest.mark.interpret
def test_nan_stays_where_its_window_reaches() -> None:
    given = operands(1, 8, 8, 16, torch.float16)
    given[0][0, 2, 2] = float("nan")
    exact = plain(*(t.double().cpu() for t in given))  # on the CPU: cuDNN may spread a NaN over a tile
    for got, want in zip(bottleneck_chain(*given), exact, strict=True):
        assert torch.equal(got.isnan().cpu(), want.isnan())


def test_refusals() -> None:
    given = operands(1, 4, 4, 16, torch.float16, "meta")
    cases = {
        "x must be bfloat16 or float16": [given[0].float(), *given[1:]],
        "C one of": [given[0][..., :8], *given[1:]],
        "w3 must have shape": [*given[:3], given[3][:16], *given[4:]],
        "shift2 must be torch.float32": [*given[:2], given[2].half(), *given[3:]],
        "residual must be contiguous": [*given[:5], given[5].transpose(1, 2), *given[6:]],
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            bottleneck_chain(*arguments)


@pytest.mark.compiles
@pytest.mark.parametrize(("sm", "matrix"), [(90, "HGMMA"), (100, "UTCHMMA")])
@pytest.mark.parametrize(("C", "size"), [(64, 56), (128, 28)])
def test_compiles_without_spills(C: int, size: int, sm: int, matrix: str) -> None:
    with record() as launches:
        bottleneck_chain(*operands(256, size, size, C, torch.bfloat16, "meta"))
    binary = launches[0].compile(sm)
    # C7519 means that ptxas inserted a warpgroup.arrive. It doesn't serialise wgmma; C7515 would mean that.
    binary = replace(binary, warnings=tuple(w for w in binary.warnings if "(C7519)" not in w))
    shared = gpu_of(torch.device("meta")).shared
    check(binary, matrix=matrix, present=("UTMALDG", "UTMASTG"), loop_absent=("STG", "LDL"), shared=shared)
    if sm == 90:
        assert all(name.endswith("SS") for name in binary.matrix), binary.matrix
