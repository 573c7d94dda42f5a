"""Compare the stem's kernels with float64: forward by TMA boxes and by pointers, and the gradient of the filters.

On a CPU the kernels are interpreted, in float32 and float16. On a GPU the tests also run in bfloat16.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
import triton
from cases import Broken, assert_close_to_reference, by_library, check_statistics
from conv_cases import geometry, reference
from covering import covered, some_seeds
from tolerances import lost_in_sums
from torch import Tensor
from torch.nn.grad import conv2d_weight

import fastres
from fastres.kernels import launcher, stem
from fastres.kernels import wgrad as wgrad_module
from fastres.kernels.checks import gpu_of
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import conv_stem, conv_stem_wgrad, pack_filters, pack_images
from fastres.kernels.tiles import Tile, stem_wgrad_tiles
from fastres.ops import dispatch
from fastres.ops.conv_bn import conv_bn
from fastres.ops.layout import Geometry
from fastres.ops.reference import BNBackward

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]

DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
PROBLEMS = {
    "7x7": ConvProblem(2, 16, 12, 3, 24, 7, 7, 2, 3),
    "7x7, odd image": ConvProblem(1, 13, 11, 3, 16, 7, 7, 2, 3),
    "5x5, 1 channel": ConvProblem(2, 9, 10, 1, 16, 5, 5, 2, 2),
    "3x3, 4 channels, no padding": ConvProblem(1, 14, 14, 4, 16, 3, 3, 2, 0),
    "3x3, odd batch": ConvProblem(3, 7, 8, 3, 40, 3, 3, 2, 1),
    "more padding than filter": ConvProblem(1, 4, 5, 2, 8, 3, 3, 2, 4),
    "one pixel": ConvProblem(1, 1, 1, 3, 8, 7, 7, 2, 3),
    "flat filter": ConvProblem(1, 9, 8, 3, 16, 2, 8, 2, 3),
}
FPROP = {
    "boxes": Tile(16, 32, 32, 4, 2, (1, 4, 8)),
    "a row": Tile(16, 32, 32, 4, 2),
    "two rows": Tile(32, 16, 64, 4, 2),
    "half a row": Tile(16, 32, 16, 4, 2),
}
WGRAD = {
    "a row, 3 splits": Tile(16, 32, 16, 4, 2, splits=3),
    "two rows": Tile(64, 64, 32, 4, 2),
    "all rows, 2 splits": Tile(16, 256, 16, 4, 2, splits=2),
}


def drawn(p: ConvProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return random images [N, C, H, W] in an unusual layout, filters scaled to outputs of about 1, and dz."""
    images = torch.randn(p.N, p.W, p.C, p.H, device=DEVICE).permute(0, 2, 3, 1)
    w = torch.randn(p.K, p.R, p.S, p.C, device=DEVICE) / p.gemm("fprop").k ** 0.5
    dz = torch.randn(p.N, p.P, p.Q, p.K, device=DEVICE)
    return images.to(dtype), w.to(dtype), dz.to(dtype)


def hold_fprop(p: ConvProblem, dtype: torch.dtype, tile: Tile | None) -> None:
    images, w, _ = drawn(p, dtype)
    scale, shift = torch.rand(p.K, device=DEVICE) + 0.5, torch.randn(p.K, device=DEVICE)
    packed, filters = pack_images(images.float() if p.N > 1 else images, p, dtype), pack_filters(w)
    for options in ({"scale": scale, "shift": shift, "relu": True}, {"shift": shift}, {}):
        y, partials = conv_stem(packed, filters, p, statistics=True, tile=tile, **options)
        x = images.permute(0, 2, 3, 1)
        exact, usual = (reference(p, x, w, kind, **options) for kind in (torch.float64, dtype))
        assert_close_to_reference(y, exact, usual, what=f"{tile}", lost=lost_in_sums(p.gemm("fprop").k, w))
        check_statistics(partials, y)
        assert torch.equal(conv_stem(packed, filters, p, tile=tile, **options), y)


def hold_wgrad(p: ConvProblem, dtype: torch.dtype, tile: Tile | None, out_dtype: torch.dtype = torch.float32) -> None:
    images, _, dz = drawn(p, dtype)
    packed = pack_images(images, p, dtype)
    dw = conv_stem_wgrad(dz, packed, p, tile=tile, out_dtype=out_dtype)
    assert (dw.dtype, dw.is_contiguous()) == (out_dtype, True)
    exact, usual = (wgrad(p, images, dz, kind) for kind in (torch.float64, torch.float32))
    lost = lost_in_sums(p.gemm("wgrad").k, dz)
    assert_close_to_reference(dw, exact, usual.to(out_dtype), what=f"{tile}", lost=lost)
    assert torch.equal(conv_stem_wgrad(dz, packed, p, tile=tile, out_dtype=out_dtype), dw)


def wgrad(p: ConvProblem, images: Tensor, dz: Tensor, dtype: torch.dtype) -> Tensor:
    given = images.to(dtype), (p.K, p.C, p.R, p.S), dz.to(dtype).permute(0, 3, 1, 2)
    return by_library(conv2d_weight, *given, **geometry(p)).permute(0, 2, 3, 1).contiguous()


@covered(dtype=DTYPES, problem=PROBLEMS, tile=FPROP)
def test_fprop(dtype: torch.dtype, problem: ConvProblem, tile: Tile) -> None:
    hold_fprop(problem, dtype, tile)


@covered(dtype=DTYPES, problem=PROBLEMS, tile=WGRAD)
def test_wgrad(dtype: torch.dtype, problem: ConvProblem, tile: Tile) -> None:
    hold_wgrad(problem, dtype, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_default(dtype: torch.dtype) -> None:
    problem = PROBLEMS["7x7"]
    hold_fprop(problem, dtype, None)
    hold_wgrad(problem, dtype, None, dtype)
    ieee = dtype == torch.float32
    for tile in stem_wgrad_tiles(problem, dtype.itemsize, gpu_of(torch.device(DEVICE)), ieee):
        hold_wgrad(problem, dtype, tile)


@pytest.mark.parametrize("seed", some_seeds(24 if DEVICE == "cpu" else 200))
def test_fuzz(seed: int) -> None:
    draw = random.Random(seed)
    while True:
        sizes = draw.randint(1, 3), draw.randint(1, 15), draw.randint(1, 15), draw.randint(1, 4), draw.randint(1, 40)
        try:
            problem = ConvProblem(*sizes, draw.randint(2, 8), draw.randint(2, 8), 2, draw.randint(0, 4))
            break
        except ValueError:
            continue
    torch.manual_seed(seed)
    dtype = draw.choice(DTYPES)
    hold_fprop(problem, dtype, draw.choice([FPROP["a row"], FPROP["two rows"]]))
    hold_wgrad(problem, dtype, dataclasses.replace(draw.choice([*WGRAD.values()]), splits=draw.randint(1, 4)))


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("stem_fprop_kernel", {"PAD": 2}),
        ("stem_fprop_kernel", {"R": 6}),
        ("stem_fprop_kernel", {"H": 15}),
        ("stem_fprop_kernel", {"pixels": 40}),
        ("stem_wgrad_kernel", {"PAD": 2}),
        ("stem_wgrad_kernel", {"H": 15}),
        ("stem_wgrad_kernel", {"S": 6}),
        ("stem_wgrad_kernel", {"pixels": 95}),
        ("stem_wgrad_kernel", {"steps_per_split": 1}),
        ("wgrad_reduce_kernel", {"splits": 2}),
    ],
    ids=str,
)
def test_a_wrong_kernel_fails(kernel: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hold, tile = (hold_fprop, FPROP["a row"]) if "fprop" in kernel else (hold_wgrad, WGRAD["a row, 3 splits"])
    hold(PROBLEMS["7x7"], torch.float32, tile)
    launcher.forget()
    module = wgrad_module if kernel == "wgrad_reduce_kernel" else stem
    monkeypatch.setattr(module, kernel, Broken(getattr(module, kernel), **wrong))
    with pytest.raises(AssertionError):
        hold(PROBLEMS["7x7"], torch.float32, tile)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_conv_bn_pair_uses_the_stem(dtype: torch.dtype) -> None:
    """A conv-BN pair uses the stem's kernels in inference, forward and wgrad.

    In wgrad, dz is given, or scaled by a frozen BatchNorm, or computed from g and z.
    """
    p = PROBLEMS["7x7"]
    images, w, dz = drawn(p, dtype)
    x = images.permute(0, 2, 3, 1).contiguous()
    with fastres.backend("triton"):
        facts = 1e-5, True, dtype, torch.device(DEVICE), dispatch.choice(dtype, torch.device(DEVICE))
        pair = conv_bn((p.N, p.H, p.W), tuple(w.permute(0, 3, 1, 2).shape), Geometry(2, 3, 1, 1), *facts)
    by = pair.engines
    assert (by.infer, by.fprop, by.dgrad, by.wgrad) == ("stem", "stem", "triton", "stem")
    one, z = torch.ones(p.K, device=DEVICE), torch.randn_like(dz)
    y = reference(p, x, w)
    assert_close_to_reference(pair.infer(x, w, one, one), (y + 1).relu(), reference(p, x, w, dtype))
    assert_close_to_reference(pair.fprop(x, w, None)[0], y, reference(p, x, w, dtype))
    scaled, added = 2 * dz.double(), 2 * dz.double() + z.double() / 2 + 0.25
    frozen, batch = BNBackward(z, 2 * one, None, None), BNBackward(z, 2 * one, one / 2, one / 4)
    bns = (None, dz.double()), (frozen, scaled), (batch, added)
    for bn, exact in bns:
        dw, rounded = pair.wgrad(dz, x, bn, None, torch.float32), exact.to(dtype)
        assert_close_to_reference(dw, wgrad(p, images, exact, torch.float64), wgrad(p, images, rounded, torch.float32))


@pytest.mark.parametrize("tile", FPROP.values(), ids=FPROP)
def test_pixels_that_are_infinite(tile: Tile) -> None:
    """An infinite pixel reaches exactly the windows that contain it: they are 8 columns wide, a filter only 7."""
    problem = PROBLEMS["7x7"]
    images, w, _ = drawn(problem, torch.float16)
    for column in (4, 5):
        spoilt = images.clone()
        spoilt[0, 1, 6, column] = float("inf")
        packed = pack_images(spoilt, problem, torch.float16)
        rows, columns = (
            (~conv_stem(packed, pack_filters(w), problem, tile=tile).isfinite()).any(3)[0].nonzero(as_tuple=True)
        )
        assert {*rows.tolist()} == {2, 3, 4}
        assert {*columns.tolist()} == {1, 2, 3} | ({0} if column == 4 else {4})


def test_empty_batch() -> None:
    problem = dataclasses.replace(PROBLEMS["7x7"], N=0)
    images, w, dz = drawn(problem, torch.float32)
    packed = pack_images(images, problem, torch.float32)
    assert conv_stem(packed, pack_filters(w), problem).shape == (0, 8, 6, 24)
    assert not conv_stem_wgrad(dz, packed, problem).any()


def test_without_overlapping_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the driver rejects overlapping boxes, the default tile falls back to pointers and TMA isn't tried again.

    A tile with a box raises instead, and so does any other error of the driver.
    """
    problem, asked, message = PROBLEMS["7x7"], [], "Triton Error [CUDA]: out of memory"

    def refuse(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise RuntimeError(message)

    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("boxes need compute capability 9.0")
    monkeypatch.setattr(stem, "_refusing", {})
    monkeypatch.setattr(stem, "launch_boxes", refuse)
    launcher.forget()
    with pytest.raises(RuntimeError, match="out of memory"):
        hold_fprop(problem, torch.float16, None)
    message = "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"
    with pytest.raises(RuntimeError, match="invalid argument"):
        hold_fprop(problem, torch.float16, FPROP["boxes"])
    with pytest.warns(UserWarning, match="by pointers, because the driver rejects TMA over its windows: Triton Error"):
        hold_fprop(problem, torch.float16, None)
    assert len(asked) == 3
    with pytest.raises(ValueError, match="impossible here: Triton Error"):
        hold_fprop(problem, torch.float16, FPROP["boxes"])


def test_refusals() -> None:
    problem = PROBLEMS["7x7"]
    images, w, dz = drawn(problem, torch.float32)
    packed, filters = pack_images(images, problem, torch.float32), pack_filters(w)
    wide = dataclasses.replace(problem, C=5)
    with pytest.raises(ValueError, match="at most 4 channels and 2x2 to 8x8 filters, got 5 channels and 7x7"):
        conv_stem_wgrad(dz, packed, wide)
    for R, S in ((1, 3), (3, 1)):
        with pytest.raises(ValueError, match=f"at most 4 channels and 2x2 to 8x8 filters, got 3 channels and {R}x{S}"):
            conv_stem(packed, filters, dataclasses.replace(problem, R=R, S=S))
    with pytest.raises(ValueError, match="need stride=2, dilation=1, groups=1, got stride=1, dilation=1, groups=1"):
        conv_stem(packed, filters, dataclasses.replace(problem, stride=1))
    with pytest.raises(ValueError, match=r"dz must have shape \[2, 8, 6, 24\], got \[2, 8, 6, 23\]"):
        conv_stem_wgrad(dz[..., :23].contiguous(), packed, problem)
    with pytest.raises(ValueError, match=r"dz must be torch.float32, got torch.float16"):
        conv_stem_wgrad(dz.half(), packed, problem)
    with pytest.raises(ValueError, match=r"packed must have shape \[2, 16, 18, 4\]"):
        conv_stem(packed[:1], filters, problem)
    with pytest.raises(ValueError, match=r"out_dtype must be a floating-point dtype, got torch\.int8"):
        conv_stem_wgrad(dz, packed, problem, out_dtype=torch.int8)
    with pytest.raises(ValueError, match="precision must be 'ieee' or 'tf32', got 'bf16'"):
        conv_stem_wgrad(dz, packed, problem, precision="bf16")
    for tile in (Tile(16, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2, splits=0), Tile(16, 32, 16, 4, 2, (1, 4, 4))):
        with pytest.raises(ValueError, match="BN a multiple of 32 and no box"):
            conv_stem_wgrad(dz, packed, problem, tile=tile)
