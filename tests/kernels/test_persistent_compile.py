"""Persistent kernels with the tiles that tuning tries at ResNet-50's layers, compiled without a GPU.

As many programs fit on a multiprocessor as the tile says, wgmma reads both operands from shared memory, and the boxes
of the next tiles are loaded while a tile is finished.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import stub_cuda
import test_backward_compile as backward
import test_conv_compile as forward
import torch
import triton
from binary import Launch, check
from covering import extra
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastres.kernels import checks, fprop
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.fprop import conv_fprop
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import H200, Tile, dgrad_tiles, fprop_tiles

pytestmark = pytest.mark.compiles

EXPAND = {64: ConvProblem(256, 56, 56, 64, 256), 128: ConvProblem(256, 28, 28, 128, 512)}
EXPAND[256] = ConvProblem(256, 14, 14, 256, 1024)
REDUCE = {64: ConvProblem(256, 56, 56, 256, 64), 128: ConvProblem(256, 28, 28, 512, 128)}
REDUCE[256] = ConvProblem(256, 14, 14, 1024, 256)
JOINED = ConvProblem(256, 56, 56, 256, 64)


def candidates(pass_: str, problem: ConvProblem, use: str) -> list[Tile]:
    if pass_ == "fprop":
        tiles = fprop_tiles(problem, 2, True, computed=("prologue" in use) + ("join" in use))
    else:
        met = sum((name in use) * count for name, count in backward.MET.items())
        tiles = dgrad_tiles(problem, 2, True, operands=1 + ("bn" in use), epilogue=met)
    return [tile for tile in tiles if tile.persistent]


def launched(pass_: str, problem: ConvProblem, use: str, tile: Tile, dtype: torch.dtype = torch.bfloat16) -> Launch:
    launches = (
        forward.launches(problem, use, tile, dtype)
        if pass_ == "fprop"
        else backward.launches("dgrad", problem, use, tile, dtype)
    )
    (found,) = launches
    return found


def cases() -> Iterator[Any]:
    for channels in (64, 128, 256):
        yield "fprop", EXPAND[channels], "prologue statistics"
        yield (
            ("fprop", EXPAND[channels], "shift residual relu")
            if channels == 64
            else extra("fprop", EXPAND[channels], "shift residual relu")
        )
        yield "dgrad", REDUCE[channels], "bn residual end"
        yield extra("dgrad", REDUCE[channels], "residual out end")
        yield extra("dgrad", REDUCE[channels], "bn residual end projection")
        yield extra("fprop", EXPAND[channels], "norm residual relu")
    yield "fprop", JOINED, "prologue join projection statistics"
    yield extra("fprop", JOINED, "statistics")
    yield extra("dgrad", EXPAND[64], "bn relu")
    yield extra("dgrad", EXPAND[64], "")


@pytest.mark.parametrize(("pass_", "problem", "use"), [*cases()])
def test_candidates(pass_: str, problem: ConvProblem, use: str) -> None:
    tiles = candidates(pass_, problem, use)
    assert tiles
    for tile in tiles:
        one = launched(pass_, problem, use, tile)
        binary = one.compile(90)
        room = (H200.shared + 1024) // tile.persistent - 1024  # the driver takes 1 KiB per program
        registers = min(255, 65536 // (32 * tile.warps * tile.persistent) // 8 * 8)
        vectors = () if {"scale", "shift", "norm", "join"} & {*use.split()} else ("LDG",)
        check(
            binary, registers=registers, shared=room, matrix="HGMMA", present=("UTMALDG", "UTMASTG"),
            loop_absent=(*vectors, "STG"),
        )  # fmt: skip
        assert all(name.endswith("SS") for name in binary.matrix), binary.matrix
        assert_ahead(one)


def assert_ahead(one: Launch) -> None:
    """Check in Triton's TTGIR that all loads of a tile are issued after the dot of an earlier tile.

    After the last dot of the loop's body, every box is requested before any is waited for. Filters are loaded outside
    the loop.
    """
    fn, types, constexprs, attrs, options = one.specialization(90)
    source = ASTSource(fn, signature=types, constexprs=dict(constexprs), attrs=attrs)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    before, loop = re.split(r"scf\.for", text, maxsplit=1)
    loop = loop[: loop.index("scf.yield")]
    behind = loop[loop.rindex("warp_group_dot_wait") :]
    copy = re.compile(r"async_tma_copy_global_to_local %(\w+?)\[")
    read = ("x", "shortcut", "residual", "dy", "z", "z_below", "z_proj", "relu_mask", "residual_mask")
    given = {name for name in read if one.kwargs.get(name) is not None}
    assert {*copy.findall(behind)} == given
    assert copy.findall(loop) == copy.findall(behind)
    assert {*copy.findall(before)} == given | {"w"}
    assert "wait_barrier" not in behind


def test_float16() -> None:
    for pass_, problem, use in (
        ("fprop", EXPAND[64], "prologue statistics"),
        ("fprop", EXPAND[64], "statistics"),
        ("fprop", EXPAND[128], "shift residual relu"),
        ("dgrad", REDUCE[64], "bn residual end"),
    ):
        binary = launched(pass_, problem, use, candidates(pass_, problem, use)[0], torch.float16).compile(90)
        check(binary, matrix="HGMMA", present=("UTMALDG", "UTMASTG"), shared=H200.shared)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a driver")
@pytest.mark.skipif(stub_cuda.unbuildable() is not None, reason=str(stub_cuda.unbuildable()))
def test_the_driver_accepts_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid has as many programs as fit on the GPU."""
    monkeypatch.setattr(checks, "INTERPRETER", H200)
    monkeypatch.setattr(fprop, "check_device", lambda *_: None)
    x, w = torch.empty(16, 56, 56, 64, dtype=torch.bfloat16), torch.empty(256, 1, 1, 64, dtype=torch.bfloat16)
    tile = Tile(64, 64, 64, 4, 3, (1, 1, 64), persistent=3)
    with stub_cuda.driver() as accepted:
        conv_fprop(
            x,
            w,
            ConvProblem.of(x.shape, w.shape),
            prologue=(torch.empty(64), torch.empty(64)),
            statistics=True,
            tile=tile,
        )
        y = torch.empty(16, 56, 56, 256, dtype=torch.bfloat16)
        conv_dgrad(y, w, ConvProblem.of(x.shape, w.shape), below=(x, torch.empty(64)), tile=tile)  # type: ignore[arg-type]
    assert [one.grid for one in accepted] == [(396, 1, 1), (396, 1, 1)]


def test_unsuitable_problems_have_no_persistent_tiles() -> None:
    """Long reductions, fewer than two tiles per program, other dtypes, other convolutions, pointers, other GPUs."""
    for problem, itemsize in (
        (ConvProblem(256, 14, 14, 1024, 256), 2),
        (ConvProblem(1, 14, 14, 64, 256), 2),
        (EXPAND[64], 4),
        (EXPAND[64], 1),
        (ConvProblem(256, 56, 56, 64, 64, 3, 3, 1, 1), 2),
        (ConvProblem(256, 56, 56, 64, 64, stride=2), 2),
    ):
        assert not any(tile.persistent for tile in fprop_tiles(problem, itemsize, True))
    assert not any(tile.persistent for tile in fprop_tiles(EXPAND[64], 2, False))
    assert not any(tile.persistent for tile in fprop_tiles(EXPAND[64], 2, True, forward.GPUS[100]))
    assert not any(tile.persistent for tile in dgrad_tiles(EXPAND[128], 2, True))
    assert not any(tiles(EXPAND[64], 2, True)[0].persistent for tiles in (fprop_tiles, dgrad_tiles))
