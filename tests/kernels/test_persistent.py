"""Persistent kernels for fprop and dgrad against float64, in float16.

There are one or several programs, more or fewer tiles than programs, and partly masked tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import test_conv_backward as backward
import test_fprop as forward
import torch
from cases import Broken, check_statistics
from covering import covered

from fastres.kernels import checks, launcher, persistent
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.fprop import conv_fprop
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import Tile

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]

DEVICE, HALF = forward.DEVICE, torch.float16
ONE_STEP = Tile(16, 32, 32, 4, 3, (1, 1, 32), persistent=1)
STEPS = Tile(16, 16, 16, 4, 3, (1, 1, 16), persistent=1)  # BM = BK: the epilogue's tensors are loaded ahead
TILES = {"one step": ONE_STEP, "several steps": STEPS}
PROBLEMS = {
    "tails everywhere": ConvProblem(2, 7, 5, 24, 40),
    "no tails": ConvProblem(4, 8, 8, 32, 32),
    "fewer pixels than a tile": ConvProblem(1, 2, 3, 8, 16),
}


@pytest.fixture(params=[1, 5, 1000], ids=lambda sms: f"{sms} multiprocessors")
def sms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    gpu = checks.INTERPRETER._replace(sms=request.param)
    monkeypatch.setattr(persistent, "gpu_of", lambda _: gpu)
    return int(request.param)


problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


@problems
@tiles
def test_fprop(problem: ConvProblem, tile: Tile, sms: int) -> None:
    """A prologue with statistics, as in training, and all epilogues; most cases have only every fourth epilogue."""
    x, w = forward.operands(problem, HALF)
    given = forward.extras(problem, HALF, "prologue")
    y, partials = conv_fprop(x, w, ConvProblem.of(x.shape, w.shape), **given, statistics=True, tile=tile)
    forward.hold(problem, y, x, w, tile, **given)
    check_statistics(partials, y)
    rows = min(-(-problem.pixels // tile.BN), max(1, sms // -(-problem.K // tile.BM)))
    assert partials.shape == (rows, 3, problem.K)
    assert (partials[:, 0] > 0).all()
    for names in forward.EPILOGUES[:: 1 if tile is ONE_STEP and sms == 5 else 4]:
        forward.check(problem, HALF, tile, *names)


@problems
@tiles
@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
def test_end_of_the_block_before(problem: ConvProblem, tile: Tile, projection: bool, sms: int) -> None:
    forward.check_block_end(problem, HALF, projection, tile)


@covered(
    problem=PROBLEMS,
    tile=TILES,
    features={**backward.FEATURES, "everything": "bn residual out end projection"},
    sms={"1 multiprocessor": 1, "5 multiprocessors": 5, "1000 multiprocessors": 1000},
)
def test_dgrad(problem: ConvProblem, tile: Tile, features: str, sms: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persistent, "gpu_of", lambda _: checks.INTERPRETER._replace(sms=sms))
        o = backward.make(problem, HALF)
        backward.check_dgrad(o, features, tile)
        _, partials = backward.run_dgrad(o, features, tile)
    rows = min(-(-problem.pixels // tile.BN), max(1, sms // -(-problem.C // tile.BM)))
    for each in partials if isinstance(partials, tuple) else (partials,):
        assert each is None or each.shape == (rows, 2, problem.C)


def test_statistics_survive_a_mean_far_from_zero(sms: int) -> None:
    """The mean is about 50 standard deviations. With few multiprocessors, a program merges statistics of many tiles."""
    problem = ConvProblem(8, 16, 16, 16, 16)
    x, w = forward.operands(problem, HALF)
    shift = torch.full((16,), 50.0, device=DEVICE)
    y, partials = conv_fprop(
        x, w, ConvProblem.of(x.shape, w.shape), shift=shift, statistics=True, out_dtype=torch.float32, tile=ONE_STEP
    )
    check_statistics(partials, y)


def test_equal_inputs_give_equal_bits(sms: int) -> None:
    problem = PROBLEMS["tails everywhere"]
    x, w = forward.operands(problem, HALF)
    first, again = (
        conv_fprop(x, w, ConvProblem.of(x.shape, w.shape), statistics=True, tile=ONE_STEP) for _ in range(2)
    )
    assert all(map(torch.equal, first, again))
    o = backward.make(problem, HALF)
    first, again = (backward.run_dgrad(o, "bn residual end", STEPS) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_without_pixels() -> None:
    x, w = forward.operands(PROBLEMS["no tails"], HALF)
    y, partials = conv_fprop(x[:0], w, ConvProblem.of(x[:0].shape, w.shape), statistics=True, tile=ONE_STEP)
    assert (y.shape, partials.shape) == ((0, 8, 8, 32), (0, 3, 32))
    below = x[:0], torch.zeros(32, device=DEVICE)
    dx, sums = conv_dgrad(x[:0], w, ConvProblem.of((0, 8, 8, 32), w.shape), below=below, tile=ONE_STEP)  # type: ignore[misc]
    assert (dx.shape, sums.shape) == ((0, 8, 8, 32), (0, 2, 32))


def wrong_arguments() -> Iterator[Any]:
    for name, kernel, wrong in (
        ("a tile forgotten", "fprop", {"tiles": 1}),
        ("a step forgotten", "fprop", {"STEPS": 1}),
        ("tails that count", "fprop", {"FULL": True}),
        ("tails that count", "dgrad", {"FULL": True}),
        ("a gradient forgotten", "dgrad", {"residual": None}),
        ("a step forgotten", "dgrad", {"STEPS": 1}),
    ):
        yield pytest.param(kernel, wrong, id=f"{kernel}, {name}")


@pytest.mark.parametrize(("kernel", "wrong"), [*wrong_arguments()])
def test_a_wrong_kernel_fails(kernel: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name, problem = f"pointwise_{kernel}_kernel", PROBLEMS["tails everywhere"]

    def check() -> None:
        if kernel == "fprop":
            x, w = forward.operands(problem, HALF)
            given = forward.extras(problem, HALF, "prologue", "shift")
            y, partials = conv_fprop(x, w, ConvProblem.of(x.shape, w.shape), **given, statistics=True, tile=STEPS)
            forward.hold(problem, y, x, w, STEPS, **given)
            check_statistics(partials, y)
        else:
            o = backward.make(problem, HALF)
            backward.check_dgrad(o, "bn relu residual", STEPS)

    with launcher.forgetful():
        check()
        monkeypatch.setattr(persistent, name, Broken(getattr(persistent, name), **wrong))
        with pytest.raises(AssertionError):
            check()


def test_unsupported_problems_raise() -> None:
    def refused(message: str, tile: Tile = ONE_STEP, dtype: torch.dtype = HALF, R: int = 1, **geometry: int) -> None:
        x, w = torch.zeros(1, 8, 8, 16, device=DEVICE).to(dtype), torch.zeros(16, R, R, 16, device=DEVICE).to(dtype)
        problem = ConvProblem.of(x.shape, w.shape, **geometry)
        with pytest.raises(ValueError, match=message):
            conv_fprop(x, w, problem, tile=tile)
        with pytest.raises(ValueError, match=message):
            conv_dgrad(torch.zeros(problem.y_shape).to(x), w, problem, tile=tile)

    refused("16-bit 1x1 convolution of stride 1 .* got torch.float32", dtype=torch.float32)
    refused("16-bit 1x1 convolution of stride 1 .* R=3", R=3)
    refused("16-bit 1x1 convolution of stride 1 .* stride=2", stride=2)
    refused("16-bit 1x1 convolution of stride 1 .* pad=1", pad=1)
    refused("requires the box .1, 1, 32.", tile=Tile(16, 32, 32, 4, 3, persistent=1))
    refused("requires the box .1, 1, 32.", tile=Tile(16, 32, 32, 4, 3, (2, 4, 4), persistent=1))
