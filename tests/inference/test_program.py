"""Test programs: which engines steps are bound to by dispatch, fallback or timing, and that results are the same."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close_to_reference, by_library, relative_error
from nets import DEVICE, Adds, answers, images, needs_kernels, tiny
from tolerances import EXACT_BLOCK, ROUNDING, SUMS, lost_in_sums
from torch import Tensor, nn

import fastres
from fastres import optimize
from fastres.inference import program
from fastres.inference.plan import fuse
from fastres.inference.trace import trace
from fastres.ops import dispatch, folded
from fastres.ops.layout import Geometry


@pytest.fixture
def chains_run_as_one(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Make dispatch run every chain as one kernel, replaced by plain PyTorch; return a list of its inputs' shapes.

    Each call of the kernel appends the shape of x.
    """
    calls: list[tuple[int, ...]] = []

    def bottleneck_chain(
        x: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, residual: Tensor, w1: Tensor, b1: Tensor
    ) -> tuple[Tensor, Tensor]:
        calls.append(tuple(x.shape))

        def conv(a: Tensor, w: Tensor, b: Tensor, pad: int, residual: Tensor | None = None) -> Tensor:
            p = folded.Folded(w, b, b)
            return folded.by_library(a, residual, weights=p, geometry=Geometry(pad=pad), relu=True)

        out = conv(conv(x, w2, b2, 1), w3, b3, 0, residual)
        return out, conv(out, w1, b1, 0)

    module = types.ModuleType("fastres.kernels.chain")
    module.bottleneck_chain = bottleneck_chain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastres.kernels.chain", module)
    monkeypatch.setattr(dispatch, "why_chained", lambda problem, dtype, device: "measured somewhere")
    return calls


def test_a_chain_computes_its_three_convolutions(
    chains_run_as_one: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = tiny().double(), images(dtype=torch.float64)
    (expected,) = answers(model, x)
    net = optimize(model)
    assert relative_error(net(x), expected) <= EXACT_BLOCK
    # From the second bottleneck into the third. The first's 3x3 has a stride and the third's is grouped: no chain.
    assert chains_run_as_one == [(2, 4, 4, 8)]
    row = next(line for line in net.explain().splitlines() if "chain: " in line)
    assert "chain: 3x3 8->8 + relu -> 1x1 8->32 + residual + relu -> 1x1 32->8 + relu" in row
    assert row.endswith("  triton  measured somewhere")
    assert relative_error(net(x), expected) <= EXACT_BLOCK
    monkeypatch.setattr(dispatch, "why_chained", lambda problem, dtype, device: None)
    unchained = optimize(model)
    separate = unchained(x)
    assert len(chains_run_as_one) == 2
    unchained._steps = fuse(*trace(model))  # the same plan without chains
    unchained._fold()
    assert torch.equal(unchained(x), separate)


def test_each_backend_has_separate_programs() -> None:
    net, x = optimize(tiny()), images()
    first = net(x)
    with fastres.backend("reference"):
        torch.testing.assert_close(net(x), first, rtol=SUMS, atol=ROUNDING)  # oneDNN sums in another order
        assert "backend('reference')" in net.explain()
    net(x)
    assert "backend" not in net.explain()


@pytest.mark.skipif(dispatch.interpreting() or torch.cuda.is_available(), reason="kernels can run here")
def test_forced_kernels_without_a_gpu_are_refused() -> None:
    with fastres.backend("triton"), pytest.raises(RuntimeError, match="use a CUDA GPU or TRITON_INTERPRET=1"):
        optimize(tiny(), images())


@pytest.mark.parametrize(
    "what",
    [
        lambda x, m: m.conv(x) + m.pool(x),
        lambda x, m: m.pool(x) + m.conv(x),
        lambda x, m: m.conv(m.pool(x)) + x,
        lambda x, m: m.conv(x) + x.shape[2],
        lambda x, m: m.conv(x) + x.mean(),
        lambda x, m: m.conv(x) + x[0],
        lambda x, m: m.conv(x) + m.shift,
    ],
)
def test_a_residual_may_broadcast(what: Callable[[Tensor, Any], Any]) -> None:
    model, x = Adds(what).double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= EXACT_BLOCK


def test_a_residual_that_does_not_broadcast_raises() -> None:
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        optimize(Adds(lambda x, m: m.conv(x) + x[:, :, 1:]).eval())(images())


@needs_kernels
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_give_the_results_of_the_original(dtype: torch.dtype) -> None:
    model, x = tiny().to(DEVICE), images(2, 12).to(DEVICE)
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype))
    with fastres.backend("triton"):
        net = optimize(model, dtype=dtype)
        assert_close_to_reference(net(x), reference, baseline, lost=lost_in_sums(9 * 32, baseline))
        ours = sum(isinstance(m, (nn.Conv2d, nn.MaxPool2d)) for m in model.modules())
        assert net.explain().count("  triton  ") == ours


class Named(nn.Module):
    """A net with a module and a function of the same name that pool differently, and a pool of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.max_pool2d = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.register_buffer("fixed", torch.randn(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool2d(F.max_pool2d(self.conv(x), 2)) + self.max_pool2d(self.fixed)


@needs_kernels
@pytest.mark.interpret
def test_a_function_named_like_a_module_is_not_confused_with_it() -> None:
    model, x = Named().eval().to(DEVICE), images(2, 16).to(DEVICE)
    with fastres.backend("triton"):
        net = optimize(model)
        assert_close_to_reference(net(x), *answers(copy.deepcopy(model).double(), x.double()), *answers(model, x))


@needs_kernels
@pytest.mark.interpret
@pytest.mark.parametrize(
    ("pool", "ours"),
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), False),
        (nn.MaxPool2d(3, 2, 1, dilation=2), False),
        (nn.MaxPool2d((3, 2), 2, 1), False),
        (nn.MaxPool2d(3, 5, 1), False),
        (nn.MaxPool2d(17, 2, 8), False),
    ],
    ids=str,
)
def test_our_kernel_computes_the_pools_that_it_supports(pool: nn.Module, ours: bool) -> None:
    """PyTorch computes the other pools. In both cases the result is that of the original."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), pool).eval().to(DEVICE)
    x = images(2, 18).to(DEVICE)
    with fastres.backend("triton"):
        net = optimize(model)
        assert_close_to_reference(net(x), *answers(copy.deepcopy(model).double(), x.double()), *answers(model, x))
        row = next(line for line in net.explain().splitlines() if "MaxPool2d" in line)
    assert ("writes no indices" in row) == ours, row


@needs_kernels
@pytest.mark.interpret
def test_our_pass_after_the_librarys_convolution_gives_the_same_result() -> None:
    w, shift = torch.randn(8, 4, 3, 3).to(DEVICE), torch.randn(8).to(DEVICE)
    x, residual = torch.randn(2, 5, 6, 4).to(DEVICE), torch.randn(2, 5, 6, 8).to(DEVICE)
    packed, exact = (folded.pack(w, shift, dtype, "layer") for dtype in (torch.float32, torch.float64))
    static: dict[str, Any] = {"geometry": Geometry(pad=1), "relu": True}
    for inputs in ((x,), (x, residual)):
        reference = by_library(folded.by_library, *(t.double() for t in inputs), weights=exact, **static)
        baseline = by_library(folded.by_library, *inputs, weights=packed, **static)
        got = folded.by_library_and_kernel(*inputs, ones=torch.ones(8).to(DEVICE), weights=packed, **static)
        assert_close_to_reference(got, reference, baseline)


class Clock:
    """Runs every step in PyTorch and fakes cuDNN's fused convolution and the timing.

    takes: the microseconds reported for the fused and the separate call.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: tuple[float, float]) -> None:
        self.takes, self.capturing, self.asked = list(takes), False, 0
        self.fused: list[tuple[int, ...]] = []
        # On the first call, a plan in float64 is checked against the model. The library runs its convolutions.
        engine = {torch.float64: "aten"}
        monkeypatch.setattr(
            dispatch, "why_engine", lambda _, problem, dtype, on: (engine.get(dtype, "cudnn"), "as chosen")
        )
        monkeypatch.setattr(dispatch, "passes_engine", lambda *_: "aten")
        monkeypatch.setattr(folded, "by_cudnn", self.by_cudnn)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(program, "_fused_times", {})
        monkeypatch.setattr(program, "_microseconds", self.microseconds)

    def by_cudnn(self, x: Tensor, residual: Tensor | None = None, **static: Any) -> Tensor:
        self.fused.append(tuple(x.shape))
        return folded.by_library(x, residual, relu=True, **static)

    def microseconds(self, calls: list[Callable[[], tuple[Tensor]]], device: torch.device) -> list[float]:
        self.asked += 1
        (fused,), (separate,) = (call() for call in calls)
        assert device == fused.device
        assert torch.equal(fused, separate)
        return self.takes


@pytest.mark.parametrize(("takes", "taken"), [((61.2, 54.9), "cudnn"), ((40.0, 54.9), "cudnn fused")])
def test_the_fused_convolution_is_used_if_it_is_faster(
    takes: tuple[float, float], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, model, x = Clock(monkeypatch, takes), tiny(), images()
    net = optimize(model, x)
    rows = [line for line in net.explain().splitlines() if "+ relu" in line]
    why = f"as chosen; measured: fused {takes[0]:.0f} us, separate 55 us"
    assert rows
    assert all(f"  {taken}  " in row and row.endswith(why) for row in rows)
    clock.fused.clear()
    (reference,) = answers(model.double(), x.double())
    assert relative_error(net(x), reference) < SUMS
    assert len(clock.fused) == (len(rows) if taken == "cudnn fused" else 0)


def test_equal_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model, clock = nn.Sequential(*layers).eval(), Clock(monkeypatch, (1.0, 2.0))
    net = optimize(model, torch.randn(2, 8, 6, 6))
    assert clock.asked == 1
    clock.takes[:] = [2.0, 1.0]
    optimize(copy.deepcopy(model), torch.randn(2, 8, 6, 6))
    assert clock.asked == 1
    net(torch.randn(3, 8, 6, 6))
    assert clock.asked == 1, "a call at a new size times nothing"
    net.ready(torch.randn(3, 8, 6, 6))
    assert clock.asked == 2, "another size is timed separately"
    assert "measured: fused 2 us, separate 1 us" in net.explain()
    assert "measured: fused 1 us, separate 2 us" in net.explain((2, 8, 6, 6))
    optimize(model, torch.randn(2, 8, 6, 6), dtype=torch.bfloat16)
    assert clock.asked == 3


def test_nothing_is_timed_in_a_capture_or_if_the_separate_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), images()
    clock = Clock(monkeypatch, (2.0, 1.0))
    clock.capturing = True
    net = optimize(model, x)
    assert clock.asked == 0
    assert "cudnn fused  as chosen\n" in net.explain() + "\n"
    clock.capturing = False
    assert "  cudnn   as chosen; measured: fused 2 us" in optimize(model, x).explain()

    def fails(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory\nfor one more tensor")

    monkeypatch.setattr(program, "_fused_times", {})
    with monkeypatch.context() as within:
        within.setattr(program, "_microseconds", fails)
        net = optimize(model, x)
    assert "cudnn fused  as chosen; separate: out of memory\n" in net.explain() + "\n"


def test_the_timing_takes_the_fastest_of_three_interleaved_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    def taking(name: str, *milliseconds: float) -> Callable[[], None]:
        spans = iter(milliseconds)

        def call() -> None:
            ran.append(name)
            now[0] += next(spans)

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: ran.append("sleep"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = types.SimpleNamespace(synchronize=lambda: ran.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    calls = [taking("a", 3.0, 1.0, 2.0), taking("b", 0.5, 0.25, 4.0)]
    assert program._microseconds(calls, torch.device("cuda")) == pytest.approx([1000.0, 250.0])
    assert ran == ["sleep", "a", "b", "a", "b", "a", "b", "wait"]
