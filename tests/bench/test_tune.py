"""Tests of bench/tune.py and bench/kernels.py: they time what the nets run, and a wrong result never wins."""

from __future__ import annotations

import importlib
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from binary import record
from torch import Tensor

import fastres
from fastres.inference import plan
from fastres.inference.trace import trace
from fastres.kernels import checks, dgrad, fprop, tables, tiles, wgrad
from fastres.kernels.problem import ConvProblem
from fastres.ops import conv_bn, dispatch, reference
from fastres.ops.layout import Geometry

BENCH = Path(__file__).resolve().parents[2] / "bench"
SQUARE = ConvProblem(2, 8, 8, 16, 16, 3, 3, 1, 1)
STEM = ConvProblem(1, 16, 16, 3, 16, 7, 7, 2, 3)
POINTWISE = ConvProblem(2, 8, 8, 16, 32)
NONE = tiles.Gpu("none", 1, tiles.H200.shared, (9, 0))  # a GPU without a table
META, CPU, BF16 = torch.device("meta"), torch.device("cpu"), torch.bfloat16

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for the interpreter")


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(checks, "_gpu", lambda index: NONE)
    tables.forget_tables()
    conv_bn.conv_bn.cache_clear()
    yield
    tables.forget_tables()
    conv_bn.conv_bn.cache_clear()


@pytest.fixture
def layers() -> ModuleType:
    return importlib.import_module("layers")


@pytest.fixture
def tune(layers: ModuleType) -> ModuleType:
    return importlib.import_module("tune")


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors take the path of tensors on a GPU."""
    monkeypatch.setattr(dispatch, "_kernel_less", lambda device: None)
    monkeypatch.setattr(dispatch, "passes_engine", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta tensors have no autocast


class Calls(list[tuple[str, ConvProblem, frozenset[str]]]):
    """The (launcher, problem, fused options) of every convolution that our kernels run."""

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module, name in ((fprop, "conv_fprop"), (dgrad, "conv_dgrad"), (wgrad, "conv_wgrad")):
            monkeypatch.setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Tensor, second: Tensor, problem: ConvProblem, **given: Any) -> Any:
            fused = ("prologue", "join", "statistics", "bn_backward", "residual", "relu_mask", "norm", "below")
            on = frozenset(key for key in fused if given.get(key) is not None and given[key] is not False)
            self.append((launcher.__name__, problem, on))
            return launcher(first, second, problem, **given)

        return call


@pytest.mark.parametrize("depth", [18, 50])
def test_every_role_is_timed_as_the_net_runs_it(
    depth: int, layers: ModuleType, tune: ModuleType, on_meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training step of the whole net on our kernels launches the same convolutions as the roles."""
    monkeypatch.setattr(dispatch, "conv_engine", lambda *_: "triton")
    calls = Calls()
    calls.watch(monkeypatch)
    net = getattr(fastres, f"resnet{depth}")().to(META, BF16, memory_format=torch.channels_last)
    net.fc = torch.nn.Identity()
    x = torch.empty(2, 3, 224, 224, dtype=BF16, device=META).contiguous(memory_format=torch.channels_last)
    with record():
        net(x).float().sum().backward()
        run, timed = Counter(calls), Counter[Any]()
        for (problem, role), count in layers.roles(depth, 2, 224).items():
            for pass_ in ("fprop", "dgrad", "wgrad"):
                if layers.applicable(problem, pass_):
                    operands = layers.Operands.random(problem, BF16, META)
                    calls.clear()
                    dz = dispatch.bn_backward_on_load(problem)
                    layers.call(tune.our_pairs(problem, pass_, role, BF16, META, dz)[0], pass_, operands, role)()
                    assert len(calls) == 1
                    timed[calls[0]] += count
    # The pool's side of the stem's BatchNorm and the two ends of a stage are fused with no convolution, and so are not
    # counted.
    assert timed == run


@pytest.mark.parametrize("depth", [34, 50])
def test_every_role_infers_as_optimize_does(
    depth: int, tune: ModuleType, layers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, found = Counter[Any](), Counter[Any]()

    def by_triton(
        x: Tensor, residual: Tensor | None = None, *, weights: Any, geometry: Any, relu: bool, **_: Any
    ) -> Any:
        return tuple(weights.w.shape), tuple(geometry), residual is not None, relu, weights.shift is None

    monkeypatch.setattr(layers.folded, "by_triton", by_triton)
    for (problem, role), count in layers.roles(depth, 1, 64).items():
        (step,) = tune.our_pairs(problem, "infer", role, BF16, META, True)
        calls[layers.call(step, "infer", layers.Operands.random(problem, BF16, META), role)()] += count
    for step in plan.fuse(*trace(getattr(fastres, f"resnet{depth}")().eval())):
        for c in plan.convs(step):
            found[c.filter, tuple(c.geometry), c.residual is not None, c.relu, c.bare] += 1
    assert calls == found


def test_a_problem_is_measured_in_its_most_frequent_role(layers: ModuleType) -> None:
    found = layers.problems([50], 256, 224)
    expand = ConvProblem(256, 56, 56, 64, 256)
    assert found[expand] == (4, layers.Role("last", summed=True)), (
        "three times as the last of a block, once as a projection"
    )
    assert found[ConvProblem(256, 14, 14, 1024, 256)] == (5, layers.Role("first", boundary=True, summed=True))
    of_two = layers.problems([18, 50], 256, 224)
    square = ConvProblem(256, 56, 56, 64, 64, 3, 3, 1, 1)
    assert [one[square] for one in (found, of_two)] == [
        (3, layers.Role("inner", summed=True)),
        (7, layers.Role("inner", summed=True)),
    ]
    assert sum(count for count, _ in of_two.values()) == 20 + 53


def named_roles(layers: ModuleType, problem: ConvProblem) -> list[Any]:
    role = layers.Role
    found = [role("inner", summed=True), role("last"), role("first", summed=True), role("first", True, True)]
    return [*found, role("project")] if problem.R == 1 else found


@pytest.mark.parametrize("problem", [SQUARE, ConvProblem(256, 28, 28, 512, 128)], ids=["3x3", "1x1"])
@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
def test_either_way_of_loading_is_launched(
    problem: ConvProblem,
    pass_: str,
    layers: ModuleType,
    tune: ModuleType,
    on_meta: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pass with a choice is launched in two ways: by default, with its operand computed on load (dz only for 1x1
    filters), and the opposite. Passes without a choice have one way, without such an operand."""
    calls = Calls()
    calls.watch(monkeypatch)
    operands, rule = layers.Operands.random(problem, BF16, META), dispatch.bn_backward_on_load(problem)
    assert rule == (problem.R == 1)
    of_pass = {"fprop": {"prologue", "join"}, "dgrad": {"bn_backward"}, "wgrad": {"prologue"}}[pass_]
    for role in named_roles(layers, problem):
        ours = tune.our_pairs(problem, pass_, role, BF16, META, rule)
        calls.clear()
        with record():
            for step in ours:
                layers.call(step, pass_, operands, role)()
        loaded = [bool(of_pass & fused) for _, _, fused in calls]
        joined = role.boundary and rule
        choice = {"fprop": role.normed or joined, "dgrad": role.summed, "wgrad": role.normed}[pass_]
        first = rule if pass_ == "dgrad" else True
        assert loaded == ([first, not first] if choice else [False]), role
        if pass_ == "wgrad":
            assert all(("bn_backward" in fused) == (role.summed and rule) for _, _, fused in calls)


@pytest.mark.parametrize("problem", [SQUARE, POINTWISE], ids=["3x3", "1x1"])
@pytest.mark.parametrize("pass_", ["dgrad", "wgrad"])
@pytest.mark.parametrize("on_load", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_half_of_the_pass_that_stores_dz_is_charged_to_who_needs_it(
    pass_: str,
    on_load: bool,
    summed: bool,
    problem: ConvProblem,
    layers: ModuleType,
    tune: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Candidates that need a stored dz are charged half of the pass if another candidate doesn't need it, and the
    table's entry says which way was the best."""
    role = layers.Role("inner", summed=summed)
    monkeypatch.setattr(dispatch, "_kernel_less", lambda device: None)
    monkeypatch.setattr(tune, "right", lambda *_: True)
    monkeypatch.setattr(tune, "candidates", lambda step, *_: ["on load" if step.engines.dz_on_load else "stored"])
    monkeypatch.setattr(tune, "with_tile", lambda tile, work: tile)
    charged = []
    monkeypatch.setattr(layers, "half_of_dz", lambda step, operands: charged.append(step) or 4.0)
    monkeypatch.setattr(layers, "microseconds", lambda work: 20.0 if type(work()) is str else 17.0)
    found, line = tune.tune(problem, pass_, role, torch.float32, CPU, 6, on_load)
    free = summed and (on_load or pass_ == "dgrad")  # dgrad tries both ways; wgrad reads dz in dgrad's way
    assert len(charged) == free
    assert f"ours {20.0:9.1f} us, cuDNN {21.0 if free else 17.0:9.1f} us" in line
    assert found.winner == ("triton" if free else "cudnn")
    assert found.on_load == (free or on_load if pass_ == "dgrad" else True)
    assert found.tile == ("on load" if (found.on_load if pass_ == "dgrad" else on_load) else "stored")


def test_half_of_a_pass_is_half_of_its_time(layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    operands, ran = layers.Operands.random(POINTWISE, torch.float32, CPU), []
    monkeypatch.setattr(layers, "microseconds", lambda work: ran.append(work()) or 8.0)
    assert layers.half_of_dz(layers.pair(POINTWISE, torch.float32, CPU), operands) == 4
    torch.testing.assert_close(ran[0], reference.backward_apply(operands.dz, *operands.bn))


def test_wgrad_reads_dz_as_the_winner_for_dgrad_has_it(tune: ModuleType) -> None:
    def asked(*entry: Any) -> list[bool]:
        table = {("dgrad", POINTWISE, BF16): tables.Measurement(*entry)} if entry else {}
        return [tune.dz_on_load(table, pass_, POINTWISE, BF16) for pass_ in ("dgrad", "wgrad")]

    assert asked() == [True, True], "the rule for 1x1 filters"
    assert asked("triton", None, True) == [True, True]
    assert asked("triton", None, False) == [True, False]
    assert asked("cudnn", None, True) == [True, False], "dz is only computed on load if both passes are ours"
    assert asked("cudnn", None, True, "hung") == [True, False], "the library computes it"
    assert asked("cudnn", None, True, "unfinished") == [True, True], "dgrad's winner is unknown"
    assert tune.dz_on_load({}, "wgrad", SQUARE, BF16) is False


@pytest.mark.parametrize("pass_", ["infer", "fprop", "dgrad", "wgrad"])
def test_candidates_are_those_of_the_launchers(
    pass_: str, layers: ModuleType, tune: ModuleType, on_meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`candidates` passes the launcher's own arguments to the tile functions and puts the launcher's tile first.

    It adds persistent tiles only for 1x1 filters with few steps, and never in wgrad.
    """
    asked: list[Any] = []

    def watched(tiles: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = tiles(*arguments)
            asked.append((arguments, found[0]))
            return found

        return call

    for name in ("fprop_tiles", "dgrad_tiles", "wgrad_tiles"):
        seen = watched(getattr(tiles, name))
        for module in (tables, tiles):  # launchers call it through the tables
            monkeypatch.setattr(module, name, seen)
    for problem in (ConvProblem(256, 28, 28, 128, 512), ConvProblem(256, 56, 56, 256, 64), SQUARE):
        operands = layers.Operands.random(problem, BF16, META)
        for role in named_roles(layers, problem):
            for dz in (True, False):
                for step in tune.our_pairs(problem, pass_, role, BF16, META, dz):
                    asked.clear()
                    tables.forget_tables()
                    with record():
                        layers.call(step, pass_, operands, role)()
                    by_launcher = asked[0]  # the second call is for pointers, among which a table's tile may be
                    asked.clear()
                    found = tune.candidates(step, pass_, role, BF16, META, 1)
                    assert asked[0] == by_launcher, (step, role)
                    assert found[0] == by_launcher[1]
                    usual = [tile for tile in found if not tile.persistent]
                    kinds = {tile.splits > 1 for tile in usual} if pass_ == "infer" else {0}
                    assert len(usual) == len(kinds), "in inference one with splits and one without"
                    few_steps = problem.pointwise and problem.gemm(pass_).k <= 256  # type: ignore[arg-type]
                    assert (len(found) > len(usual)) == (few_steps and pass_ != "wgrad")


def test_few_candidates_by_pointers_where_tma_serves(tune: ModuleType, layers: ModuleType) -> None:
    problem = ConvProblem(256, 56, 56, 64, 64, 3, 3, 1, 1)
    odd = ConvProblem(256, 55, 55, 64, 64, 3, 3, 2, 1)
    role = layers.Role("inner", summed=True)
    for pass_ in ("infer", "fprop", "dgrad", "wgrad"):

        def boxed(of: ConvProblem, most: int, pass_: str = pass_) -> list[bool]:
            step = tune.our_pairs(of, pass_, role, BF16, META, False)[0]
            return [tile.box is not None for tile in tune.candidates(step, pass_, role, BF16, META, most)]

        assert boxed(problem, 5) == [True] * 5 + [False] * 2
        assert boxed(problem, 2) == [True] * 2
        if pass_ != "dgrad":
            assert boxed(odd, 3) == [False] * 3, "x can't be viewed as pairs of rows, so only pointers work"


def test_the_opposite_way_gets_few_candidates_except_in_wgrad(tune: ModuleType, layers: ModuleType) -> None:
    problem, role = ConvProblem(256, 56, 56, 64, 64, 3, 3, 1, 1), layers.Role("inner", summed=True)
    for pass_ in ("fprop", "dgrad", "wgrad"):
        ours = tune.our_pairs(problem, pass_, role, BF16, META, False)
        found = Counter(
            getattr(pair.engines, tune.ON_LOAD[pass_])
            for _, _, pair, _ in tune.ways(ours, pass_, role, layers.Operands.random(problem, BF16, META), 5)
        )
        rule = pass_ != "dgrad"
        assert found == {rule: 5 + 2, not rule: 5 + 2 if pass_ == "wgrad" else 2}


@pytest.mark.parametrize(
    ("place", "operator"), [("last", "cudnn_convolution_add_relu"), ("inner", "cudnn_convolution_relu")]
)
def test_inference_is_compared_with_the_fused_operator(
    place: str, operator: str, layers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's side is cuDNN's operator for convolution, bias, addition and ReLU. If cuDNN refuses it, it is the
    convolution and one pass of ours."""
    monkeypatch.setattr(dispatch, "_kernel_less", lambda device: None)
    monkeypatch.setattr(dispatch, "why_engine", lambda *_: ("cudnn", ""))
    monkeypatch.setattr(dispatch, "passes_engine", lambda *_: "aten" if dispatch.wants_reference() else "triton")
    operands = layers.Operands.random(POINTWISE, torch.float32, CPU)
    step = layers.pair(POINTWISE, torch.float32, CPU)
    assert step.engines.infer == "cudnn"
    conv2d, passes = torch.nn.functional.conv2d, []

    def fused(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        passes.append(operator)
        z, _, bias = rest[:3] if place == "last" else (0, 1.0, rest[0])
        return (conv2d(x, w, bias) + z).relu()

    def refused(*_: Any) -> None:
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    def normalize(z: Tensor, *rest: Any, **given: Any) -> Tensor:
        passes.append("normalize")
        return reference.normalize(z, *rest, **given)

    monkeypatch.setattr(torch, operator, fused)
    monkeypatch.setattr("fastres.inference.program._faster_fused", lambda *_: (True, ""))
    monkeypatch.setattr("fastres.kernels.batch_norm.normalize", normalize)
    expected = reference.conv_fprop(operands.x, operands.w, geometry=step.geometry) + operands.shift
    expected = (expected + operands.z if place == "last" else expected).relu()
    for rival, said in ((fused, operator), (refused, "normalize")):
        monkeypatch.setattr(torch, operator, rival)
        work = layers.call(step, "infer", operands, layers.Role(place))
        passes.clear()
        torch.testing.assert_close(work(), expected)
        assert passes == [said]


@pytest.mark.interpret
@interpreted
@pytest.mark.parametrize("pass_", ["infer", "fprop", "dgrad", "wgrad"])
def test_every_candidate_agrees_with_the_library(
    pass_: str, tune: ModuleType, layers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuning prints no failure, and our kernels win. The times are invented: each is shorter than the one before, so
    the last candidate wins."""
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(tune.layers, "microseconds", lambda work: float(next(times)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cases = [(problem, role) for problem in (SQUARE, POINTWISE) for role in named_roles(layers, problem)]
    for problem, role in cases if pass_ == "dgrad" else [*cases, (STEM, layers.Role("stem"))]:
        found, text = tune.tune(problem, pass_, role, torch.float16, CPU, 1, problem.R == 1)
        assert len(text.splitlines()) == 1, text
        assert found.winner == ("stem" if problem is STEM else "triton")

    role = layers.Role("inner")
    monkeypatch.setattr(tune.layers, "microseconds", lambda work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune.tune(SQUARE, pass_, role, torch.float16, CPU, 1, False)


@pytest.mark.interpret
@interpreted
def test_a_wrong_candidate_never_wins(tune: ModuleType, layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate as fast as the library doesn't win if its tensor is right but its partial sums are wrong."""
    monkeypatch.setattr(tune.layers, "microseconds", lambda work: 1.0)
    launcher = fprop.conv_fprop

    def forgetful(*args: Any, **given: Any) -> Any:
        y, partials = launcher(*args, **given)
        partials[0, 1] += 1e-2 * partials[0, 1].abs().amax()
        return y, partials

    monkeypatch.setattr(tune.fprop, "conv_fprop", forgetful)
    found, text = tune.tune(POINTWISE, "fprop", layers.Role("inner"), torch.float16, CPU, 1, True)
    assert found == tables.Measurement("cudnn", None)
    assert "gives a wrong result" in text


@pytest.mark.parametrize("lost", [None, "an illegal memory access"])
def test_a_tile_that_raises_is_skipped_unless_the_context_is_lost(
    lost: str | None, tune: ModuleType, layers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ways(*_: Any) -> Iterator[Any]:
        yield "triton", "too small", layers.pair(POINTWISE, torch.float32, CPU), lambda: 1 / 0

    monkeypatch.setattr(tune, "ways", ways)
    monkeypatch.setattr(tune, "lost_context", lambda: lost)
    monkeypatch.setattr(layers, "microseconds", lambda work: 1.0)
    monkeypatch.setattr(dispatch, "_kernel_less", lambda device: None)
    arguments = (POINTWISE, "dgrad", layers.Role("inner"), torch.float32, CPU, 1, False)
    if lost is None:
        assert "too small: ZeroDivisionError" in tune.tune(*arguments)[1]
    else:
        with pytest.raises(RuntimeError, match="triton too small: ZeroDivisionError"):
            tune.tune(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_roundings_agree_and_three_do_not(dtype: torch.dtype, tune: ModuleType) -> None:
    x = torch.randn(4, 16, 16, 64, dtype=torch.float64)
    allowed = tune.tolerance(SQUARE, "fprop", dtype)
    assert tune.agrees(x.to(dtype), x, allowed)
    twice = (x * 1.25).to(dtype).double() / 1.25
    assert tune.agrees(x.to(dtype), twice.to(dtype), allowed)
    assert not tune.agrees(x * (1 + 2.5 * torch.finfo(dtype).eps), x, allowed)
    assert not tune.agrees(x.clone().fill_(torch.nan), x, allowed)
    wrong = x.clone()
    wrong[0, 0, 0] = 0  # one pixel in a thousand
    assert not tune.agrees(wrong, x, allowed)


def tiled(v: Tensor, *others: Tensor) -> list[Tensor]:
    return [t.reshape(-1, 128, v.shape[-1]) for t in (v, *others)]


def test_sums_are_checked_against_their_values(tune: ModuleType) -> None:
    """fp32 sums over tiles of 128 pixels are accepted. They are refused without one tile, with a tile that is wrong by
    1 % or NaN, or if they are sums of the values before rounding."""
    z, below, mean = torch.randn(2, 64, 64, 32), torch.randn(2, 64, 64, 32), torch.randn(32)
    raw, z = z, z.bfloat16()

    def statistics(value: Tensor) -> Tensor:
        (tiles,) = tiled(value.float())
        m2 = tiles.var(1, correction=0) * 128
        return torch.stack([torch.full_like(m2, 128), tiles.mean(1), m2], 1)

    def sums(value: Tensor) -> Tensor:
        g, centred = tiled(value.float(), below - mean)
        return torch.stack([g.sum(1), (g * centred).sum(1)], 1)

    for make, under in ((statistics, None), (sums, (below, mean))):
        partials = make(z)
        assert tune.sums_agree(partials, z, under)
        assert not tune.sums_agree(partials[1:], z, under)
        assert not tune.sums_agree(make(raw), z, under)
        for row in range(partials.shape[1]):
            broken = partials.clone()
            broken[3, row] *= 1.01
            assert not tune.sums_agree(broken, z, under), row
        broken[0] = torch.nan
        assert not tune.sums_agree(broken, z, under)
    assert not tune.sums_agree(sums(z), z, (below, mean + 1e-2))


def test_pending_masks_are_applied_before_comparing(tune: ModuleType) -> None:
    x, dx = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8)
    o = SimpleNamespace(x=x)
    sums = torch.zeros(1, 2, 8)
    (masked,), partials = tune.parts("dgrad", (dx, (torch.ones(8), torch.zeros(8)), sums), o)
    assert torch.equal(masked, dx * (x > 0))
    assert partials is sums
    assert torch.equal(tune.parts("dgrad", (dx, x, sums), o)[0][0], masked)
    assert torch.equal(tune.parts("dgrad", (dx, None, sums), o)[0][0], dx)
    assert tune.parts("wgrad", dx, o) == ([dx], None)


def test_the_chain_is_compared_with_tuned_kernels(
    tune: ModuleType, layers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that dispatch cached before this run's measurements are dropped."""
    tables.measured("infer", SQUARE, BF16, NONE)
    layers.pair(SQUARE, BF16, META)
    assert tables.serving.cache_info().currsize == conv_bn.conv_bn.cache_info().currsize == 1
    seen = []

    def step(*_: Any) -> None:
        seen.append(tables.serving.cache_info().currsize + conv_bn.conv_bn.cache_info().currsize)
        raise InterruptedError

    monkeypatch.setattr(layers, "pair", step)
    with pytest.raises(InterruptedError):
        tune.tune_chain(SQUARE, BF16, CPU)
    assert seen == [0]


def test_three_kernels_are_those_of_optimize(
    tune: ModuleType, layers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain is compared with three convolutions that have the residual and the folded shifts, by dispatch's
    engines."""
    times = iter((2.0, 1.0))
    monkeypatch.setattr(layers, "microseconds", lambda work: work() and next(times))
    made = []
    infer = layers.infer

    def watched(step: Any, w: Tensor, shift: Tensor, inputs: Any, relu: bool) -> Any:
        made.append((step.engines.infer, len(inputs), relu))
        monkeypatch.setattr(dispatch, "_kernel_less", lambda device: "there is none")
        return infer(step, w, shift, inputs, relu)

    def chain(x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, res: Tensor, w3: Tensor, s3: Tensor) -> Any:
        hidden = (reference.conv_fprop(x, w1, geometry=Geometry(1, 1)) + s1).relu()
        out = (reference.conv_fprop(hidden, w2, geometry=Geometry()) + s2 + res).relu()
        return out, (reference.conv_fprop(out, w3, geometry=Geometry()) + s3).relu()

    monkeypatch.setattr(layers, "infer", watched)
    monkeypatch.setattr(tune.chain, "bottleneck_chain", chain)
    found, text = tune.tune_chain(SQUARE, torch.float32, CPU)
    library = dispatch.conv_engine("infer", SQUARE, torch.float32, CPU)
    assert library in ("onednn", "aten")
    assert made == [(library, 1, True), (library, 2, True), (library, 1, True)]
    assert found == tables.Measurement("cudnn", None), text
    assert "one kernel       2.0 us, three       1.0 us" in text


def test_only_bottlenecks_are_chained(tune: ModuleType, layers: ModuleType) -> None:
    def found(*depths: int) -> list[int]:
        return [p.C for p, (_, role) in layers.problems(depths, 8, 224).items() if tune.chained(p, role)]

    assert found(18) == found(34) == []
    assert found(50) == found(18, 34, 50, 101, 152) == [64, 128]


class LocalWorker:
    """A `Worker` in this process."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self.made = make(*arguments)

    def __enter__(self) -> LocalWorker:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        return getattr(self.made, method)(*arguments)


@pytest.fixture
def on_gpu(tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` finds a GPU, and nothing is compiled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "compile_candidates", lambda *_: True)
    monkeypatch.setattr(tune, "Worker", LocalWorker)
    monkeypatch.setattr(tune.Tuner, "reach", lambda self: None)
    with torch.backends.cudnn.flags():
        yield


def test_main_measures_what_is_missing(
    tune: ModuleType,
    layers: ModuleType,
    on_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Problems are measured pass by pass, the chain last, with TF32 off. wgrad gets dz in the way of dgrad's result. A
    second run has nothing to measure."""
    monkeypatch.setattr(tune, "compile_candidates", lambda missing, *_: compiled_first.append(len(missing)))
    compiled_first: list[int] = []
    measured: list[Any] = []
    tf32: list[bool] = []

    def measure(problem: ConvProblem, pass_: str, role: Any, dtype: torch.dtype, *rest: Any) -> Any:
        tf32.append(torch.backends.cudnn.allow_tf32)
        measured.append((pass_, problem, role, rest[-1]))
        return tables.Measurement("triton", None, on_load=problem.C > 64), ""

    def measure_chain(problem: ConvProblem, *_: Any) -> Any:
        measured.append(("chain", problem))
        return tables.Measurement("cudnn", None), ""

    monkeypatch.setattr(tune, "tune", measure)
    monkeypatch.setattr(tune, "tune_chain", measure_chain)
    assert tune.main(["--depth", "50", "--batch", "8", "--jobs", "1"]) == 0
    assert not any(tf32)
    passes = [one[0] for one in measured]
    assert list(dict.fromkeys(passes)) == list(tune.TUNED)
    assert Counter(passes) == {"infer": 23, "fprop": 23, "dgrad": 22, "wgrad": 23, "chain": 2}
    asked = {(pass_, problem): dz for pass_, problem, _, dz in measured[:-2]}
    for (pass_, problem), dz in asked.items():
        wanted = problem.C > 64 if pass_ == "wgrad" and problem.C > 3 else problem.R == 1
        assert dz == wanted, (pass_, problem)
    assert {problem: role for _, problem, role, _ in measured[:-2]} == {
        problem: role for problem, (_, role) in layers.problems([50], 8, 224).items()
    }
    capsys.readouterr()
    assert tune.main(["--depth", "50", "--batch", "8", "--jobs", "1"]) == 0
    assert "0 of 93 problems to measure" in capsys.readouterr().out
    assert len(measured) == 93
    assert compiled_first == [93, 0]
    assert tables.read_table_of(tables.table_file("none"))[0] == NONE
    assert not any(found.note for found in tables.read_table(tables.table_file("none")).values())


def test_only_this_gpus_own_entries_for_this_batch_count(
    tune: ModuleType, on_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "_gpu", lambda index: NONE._replace(sms=132))
    tables.forget_tables()
    assert [entries.gpu for entries in tables.serving(NONE._replace(sms=132))] == [tiles.H200.name]
    assert tune.main(["--depth", "50", "--seconds", "-1"]) == 0
    assert "93 of 93 problems to measure" in capsys.readouterr().out
    monkeypatch.setattr(checks, "_gpu", lambda index: tiles.H200)
    assert tune.main(["--depth", "50", "--batch", "8", "--ship", "--seconds", "-1"]) == 0
    assert "93 of 93 problems to measure" in capsys.readouterr().out
    assert tune.main(["--depth", "50", "--ship", "--seconds", "-1"]) == 0
    assert "0 of 93 problems to measure" in capsys.readouterr().out


FPROP_18 = ["--depth", "18", "--batch", "2", "--pass", "fprop"]


def fprop_problems(layers: ModuleType) -> list[ConvProblem]:
    return list(layers.problems([18], 2, 224))


def written() -> dict[ConvProblem, tables.Measurement]:
    """Return the table's entries for fprop."""
    table = tables.read_table(tables.table_file(NONE.name))
    assert {(pass_, dtype) for pass_, _, dtype in table} <= {("fprop", BF16)}
    return {problem: found for (_, problem, _), found in table.items()}


OURS, NOTED = tables.Measurement("triton", None), tables.Measurement("cudnn", None)


@pytest.mark.parametrize(
    ("said", "note"),
    [
        ("no answer within 40 s, so its process was killed", "hung"),
        ("its process lost the CUDA context and ended: no answer", "lost the CUDA context"),
        ("its process ended (exit status -11)", "died"),
    ],
)
def test_a_problem_that_breaks_its_process_is_left_to_the_library(
    said: str,
    note: str,
    tune: ModuleType,
    layers: ModuleType,
    on_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """cuDNN wins the problem, a new process measures the rest, and later runs don't try it again without --again."""
    problems = fprop_problems(layers)
    bad, asked, processes, patience = problems[3], [], [], set()

    class Fragile(LocalWorker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.gone = False
            processes.append(self)

        def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
            assert not self.gone
            if method == "tune":
                patience.add(seconds)
                asked.append(arguments[0])
                assert written()[arguments[0]] == NOTED._replace(note="unfinished"), "first on disk"
                if arguments[0] == bad:
                    self.gone = True
                    raise tune.WorkerLost(note, said)
            return super().ask(method, *arguments, seconds=seconds)

    monkeypatch.setattr(tune, "Worker", Fragile)
    monkeypatch.setattr(tune, "tune", lambda *_: (OURS, "measured"))
    assert tune.main(FPROP_18) == 0
    assert asked == problems
    assert len(processes) == 2
    assert patience == {tune.PATIENCE}
    expected = dict.fromkeys(problems, OURS) | {bad: NOTED._replace(note=note)}
    assert written() == expected
    out = capsys.readouterr().out
    assert out.count("measured\n") == len(problems) - 1
    assert f"left to cuDNN: {said}" in out

    asked.clear()
    assert tune.main(FPROP_18) == 0
    assert asked == []
    assert len(processes) == 2, "there was nothing to measure"
    assert tune.main([*FPROP_18, "--again", "--patience", "7"]) == 0
    assert asked == [*(problem for problem in problems if problem != bad), bad]
    assert patience == {tune.PATIENCE, 7}
    assert written() == expected


def test_a_problem_that_raises_leaves_the_table_unchanged(
    tune: ModuleType,
    layers: ModuleType,
    on_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    problems = fprop_problems(layers)

    def measure(problem: ConvProblem, *_: Any) -> Any:
        if problem == problems[1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return OURS, ""

    monkeypatch.setattr(tune, "tune", measure)
    assert tune.main(FPROP_18) == 0
    assert written() == {problem: OURS for problem in problems if problem != problems[1]}
    assert "not measured: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    for before, after in ((OURS, OURS), (NOTED._replace(note="hung"),) * 2, (NOTED._replace(note="unfinished"), None)):
        path = tables.table_file(NONE.name)
        tables.write_table({("fprop", problems[1], BF16): before}, path, NONE)
        assert tune.main([*FPROP_18, "--again"]) == 0
        assert written().get(problems[1]) == after


def test_a_stopped_run_leaves_its_problem_unfinished(
    tune: ModuleType, layers: ModuleType, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run measures the unfinished problem last."""
    problems, measured = fprop_problems(layers), []

    def stopped(problem: ConvProblem, *_: Any) -> Any:
        if problem == problems[2]:
            raise KeyboardInterrupt
        return OURS, ""

    def measure(problem: ConvProblem, *_: Any) -> Any:
        measured.append(problem)
        return OURS, ""

    monkeypatch.setattr(tune, "tune", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.main(FPROP_18)
    assert written() == dict.fromkeys(problems[:2], OURS) | {problems[2]: NOTED._replace(note="unfinished")}
    monkeypatch.setattr(tune, "tune", measure)
    assert tune.main(FPROP_18) == 0
    assert measured == [*problems[3:], problems[2]]
    assert written() == dict.fromkeys(problems, OURS)


def test_nothing_is_marked_if_the_gpu_does_not_answer(
    tune: ModuleType, on_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(self: Any) -> None:
        raise tune.WorkerLost("hung", "no answer within 120 s, so its process was killed")

    monkeypatch.setattr(tune.Tuner, "reach", silent)
    assert tune.main(FPROP_18) == 1
    assert "no process reaches the GPU: no answer" in capsys.readouterr().out
    assert written() == {}


class Hanging:
    """A `Tuner` that measures nothing, hangs on images of 56 x 56 and dies on 28 x 28."""

    def __init__(self, dtype: torch.dtype, most: int) -> None:
        self.given = dtype, most

    def reach(self) -> None:
        pass

    def tune(self, problem: ConvProblem, pass_: str, role: Any, dz_on_load: bool) -> tuple[tables.Measurement, str]:
        assert self.given == (BF16, 6)
        while problem.H == 56:
            time.sleep(1)
        if problem.H == 28:
            os._exit(3)
        return OURS, f"{os.getpid()} measured"


def test_a_process_that_hangs_is_replaced(
    tune: ModuleType,
    layers: ModuleType,
    on_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs with real worker processes."""
    monkeypatch.setattr(tune, "Worker", importlib.import_module("worker").Worker)
    monkeypatch.setattr(tune, "Tuner", Hanging)
    by_size = {problem.H: problem for problem in fprop_problems(layers)}
    chosen = [by_size[H] for H in (224, 56, 14, 28, 7)]
    roles = dict.fromkeys(chosen, (1, layers.Role("inner")))
    monkeypatch.setattr(layers, "problems", lambda *_: roles)
    assert tune.main([*FPROP_18, "--patience", "2"]) == 0
    hung, died = (NOTED._replace(note=note) for note in ("hung", "died"))
    assert list(written().items()) == list(zip(chosen, (OURS, hung, OURS, died, OURS), strict=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" measured")]
    assert len(set(lines)) == 3, "three processes measured"


def test_the_compiled_candidates_are_those_that_are_timed(
    tune: ModuleType, layers: ModuleType, on_meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates of every problem are compiled, for wgrad with dz both ways, because dgrad's result isn't known
    yet."""
    monkeypatch.setattr(checks, "_gpu", lambda index: tiles.H200)
    tasks: list[Any] = []
    monkeypatch.setattr(tune.precompile, "compile_all", lambda found, processes: tasks.extend(found) or [])
    role, cuda = layers.Role("inner", summed=True), torch.device("cuda")
    problem = ConvProblem(8, 28, 28, 64, 64)
    passes = ("infer", "fprop", "dgrad", "wgrad", "chain")
    measured = [(pass_, problem, role) for pass_ in passes]
    assert not tune.compile_candidates(measured, BF16, cuda, 3, 1)
    operands, timed = layers.Operands.random(problem, BF16, META), []
    with record():
        for pass_ in passes[:-1]:
            for dz in (True, False) if pass_ == "wgrad" else (True,):
                ours = tune.our_pairs(problem, pass_, role, BF16, cuda, dz)
                timed += [(pair.engines, pass_, tile) for _, tile, pair, _ in tune.ways(ours, pass_, role, operands, 3)]
    assert [(engines, pass_, tile) for _, (_, engines, pass_, _, _, tile) in tasks] == timed
    for function, arguments in pickle.loads(pickle.dumps(tasks)):
        with record() as launched:
            function(*arguments)
        convolutions = [one for one in launched if "PRECISION" in one.kwargs]
        assert [one.kwargs["BM"] for one in convolutions] == [arguments[-1].BM]


def test_merging_replaces_only_by_what_is_finished(
    tune: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Entries of the shipped table stay unless the file passed to --merge has a finished one for the same problem."""
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    shipped, brought = tables.table_file(NONE.name, tables.SHIPPED), tmp_path / "brought.json"
    tables.write_table({("fprop", SQUARE, BF16): NOTED, ("fprop", STEM, BF16): NOTED}, shipped, NONE)
    unfinished = NOTED._replace(note=tables.UNFINISHED)
    tables.write_table({("fprop", SQUARE, BF16): OURS, ("fprop", STEM, BF16): unfinished}, brought, NONE)
    assert tune.main(["--merge", str(brought)]) == 0
    assert f"1 problems of {brought} are now in {shipped}" in capsys.readouterr().out
    assert tables.read_table_of(shipped) == (NONE, {("fprop", SQUARE, BF16): OURS, ("fprop", STEM, BF16): NOTED})
    brought.write_text("[]")
    with pytest.raises(SystemExit):
        tune.main(["--merge", str(brought)])
    assert "brought.json is not a table of tiles" in capsys.readouterr().err


def test_the_heuristic_agrees_better_with_the_measured_latency(
    layers: ModuleType, tune: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For ResNet-50 at batch 256, the model's first candidate is our fastest measured tile (but for box, splits and
    stages) more often than with the latency that was assumed before the measurements."""
    monkeypatch.setattr(dispatch, "_kernel_less", lambda device: None)
    monkeypatch.setattr(tune, "gpu_of", lambda device: tiles.H200)
    table = tables.read_table(tables.table_file(tiles.H200.name, tables.SHIPPED))

    def found() -> int:
        hits = 0
        for problem, (_, role) in layers.problems([50], 256, 224).items():
            for pass_ in layers.PASSES if problem.C > 3 else ():
                measured, dz = table[pass_, problem, BF16], tune.dz_on_load(table, pass_, problem, BF16)
                ways, field = tune.our_pairs(problem, pass_, role, BF16, META, dz), tune.ON_LOAD.get(pass_, "infer")
                step = next((way for way in ways if getattr(way.engines, field) == measured.on_load), ways[0])
                tiles = tune.candidates(step, pass_, role, BF16, META, 99)
                first = next(tile for tile in tiles if not tile.persistent)
                hits += all(
                    getattr(first, side) == getattr(measured.tile, side) for side in ("BM", "BN", "BK", "warps")
                )
        return hits

    now = found()
    monkeypatch.setattr(tiles, "LATENCY", 2000)
    before = found()
    print(f"the measured tile comes first in {now} problems, with the latency assumed before in {before}")
    assert now > before
