"""A step in a CUDA graph: what it leaves behind where it can't be recorded, and what other threads may do meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models import families
from fastres.ops import conv_bn_act, reference
from fastres.train.graph import WARM_UPS, Graph

REFUSED = r"BatchNorm2d\(\d+, momentum=None\) averages over all batches.*Give the layer a momentum"

pytestmark = pytest.mark.usefixtures("one_thread")


class Pretence:
    """CUDA streams and captures without a GPU: a capture runs what it would record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = self
        self.modes: list[str] = []
        self.capturing = False
        for name, value in {
            "is_available": lambda: True,
            "is_current_stream_capturing": lambda: self.capturing,
            "current_stream": lambda: self.stream,
            "Stream": lambda: Pretence.__new__(Pretence),
            "stream": self.on,
            "graph": self.capture,
            "CUDAGraph": object,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def wait_stream(self, other: Any) -> None:
        assert other is not self

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capture(self, graph: Any, stream: Any, capture_error_mode: str = "global") -> Iterator[None]:
        """Like torch's, it stays on its stream where it fails."""
        self.modes.append(capture_error_mode)
        before, self.stream, self.capturing = self.stream, stream, True
        try:
            yield
        finally:
            self.capturing = False
        self.stream = before


@pytest.fixture
def pretence(monkeypatch: pytest.MonkeyPatch) -> Pretence:
    return Pretence(monkeypatch)


def units(momentum: float | None) -> nn.ModuleList:
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)) for _ in range(2)]
    layers[1][1].momentum = momentum
    return nn.ModuleList(layers)


def training(layers: nn.ModuleList, ops: Any) -> Callable[[Tensor], tuple[Tensor]]:
    """Forward, backward and a plain update of the residual block."""

    def step(x: Tensor) -> tuple[Tensor]:
        loss = ops.residual_block(x, [tuple(unit) for unit in layers], None).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in layers.parameters():
                p -= p.grad
        return (loss.detach(),)

    return step


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("ops", [conv_bn_act, reference], ids=["fused", "reference"])
def test_a_cumulative_average_is_refused_in_a_capture(ops: Any, pretence: Pretence) -> None:
    """Not while warming up, which is no capture: so there is something to put back."""
    layers, x = units(None), torch.randn(2, 4, 5, 5)
    before, here = state(layers), pretence.stream
    with pytest.raises(RuntimeError, match=REFUSED):
        Graph(training(layers, ops), (x,), [*layers.state_dict(keep_vars=True).values()])
    assert_unchanged(layers, before)
    assert pretence.stream is here
    training(layers, ops)(x)
    assert int(layers[1][1].num_batches_tracked) == 1


@pytest.mark.parametrize("change", ["momentum", "eval", "untracked"])
def test_a_step_that_counts_nothing_is_captured(change: str, pretence: Pretence) -> None:
    """In a mode that leaves other threads alone."""
    layers = units(0.1 if change == "momentum" else None)
    if change == "eval":
        layers.eval()
    elif change == "untracked":
        layers[1][1] = nn.BatchNorm2d(4, momentum=None, track_running_stats=False)
    before = state(layers)
    Graph(training(layers, conv_bn_act), (torch.randn(2, 4, 5, 5),), [*layers.state_dict(keep_vars=True).values()])
    assert_unchanged(layers, before)
    assert pretence.modes == ["thread_local"]


@pytest.mark.parametrize("at", [1, WARM_UPS, WARM_UPS + 1])
def test_a_step_that_fails_leaves_no_trace(at: int, pretence: Pretence) -> None:
    weight, calls, here = torch.zeros(3), [], pretence.stream

    def step(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        weight.add_(x)
        if len(calls) == at:
            raise MemoryError
        return (weight,)

    with pytest.raises(MemoryError):
        Graph(step, (torch.ones(3),), [weight])
    assert len(calls) == at
    assert not weight.any()
    assert pretence.stream is here


def cifar(momentum: float | None) -> tuple[nn.Module, Callable[[Tensor, Tensor], tuple[Tensor]]]:
    """A net on the GPU, and its forward and backward."""
    net = families.named("cifar-8").cuda().to(memory_format=torch.channels_last)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = momentum

    def step(x: Tensor, y: Tensor) -> tuple[Tensor]:
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return (loss.detach(),)

    return net, step


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    return x, torch.arange(8, device="cuda")


@pytest.mark.gpu
def test_another_thread_allocates_pinned_memory() -> None:
    """Memory that is kept, so that each allocation asks the driver."""
    net, step = cifar(0.1)
    started, done = threading.Event(), threading.Event()

    def pin() -> None:
        kept = []
        while not done.is_set():
            kept.append(torch.empty(1024).pin_memory())
            started.set()

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        try:
            assert started.wait(60)
            for _ in range(5):
                x, y = batch()
                expected = step(x, y)[0]
                captured = Graph(step, (x, y), [*net.buffers()])
                # A library may choose other algorithms while a graph records; a broken replay is off by far more.
                torch.testing.assert_close(captured(x, y)[0], expected, rtol=1e-3, atol=1e-3)
        finally:
            done.set()
        pinning.result()


@pytest.mark.gpu
def test_gpu_refuses_a_cumulative_average_in_a_capture() -> None:
    net, step = cifar(None)
    before, here = state(net), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=REFUSED):
        Graph(step, batch(), [*net.buffers()])
    assert_unchanged(net, before)
    assert torch.cuda.current_stream() == here
    step(*batch())
    assert all(int(m.num_batches_tracked) == 1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
