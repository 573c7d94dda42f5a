"""Test plans that TorchScript compiles as a oneDNN graph: when that happens, the results, and side effects."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import assert_close_to_reference
from nets import NETS, Unread, lived_in, tiny
from test_onednn import DTYPES, assert_same, photographs
from tolerances import ONEDNN_GRAPH
from torch import Tensor, nn

from fastres import optimize
from fastres.inference import optimized, program
from fastres.ops import dispatch, onednn
from fastres.ops.layout import nhwc

pytestmark = pytest.mark.skipif(
    dispatch.why_no_onednn(torch.float32) is not None, reason=str(dispatch.why_no_onednn(torch.float32))
)


@pytest.fixture
def graph_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the compiled plan always win the timing against the steps."""
    monkeypatch.setattr(program, "_seconds", lambda calls: [1.0, 2.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shape_used_often_is_compiled(dtype: torch.dtype, graph_wins: None) -> None:
    model, x = tiny().to(dtype), photographs(2, 32).to(dtype)
    with torch.no_grad():
        want, theirs = model.double()(x.double()), model.to(dtype)(x)
    net = optimize(model)
    for call in range(optimized.PREPARED_AFTER["cpu"] + 3):
        y = net(x)
        assert y.dtype == dtype
        assert_close_to_reference(y, want, theirs)
        assert ("by TorchScript" in net.explain().splitlines()[0]) == (call >= optimized.PREPARED_AFTER["cpu"])
    with torch.no_grad():
        assert_close_to_reference(net(x[:1]), want[:1], model(x[:1]))


def test_an_example_is_compiled_immediately(graph_wins: None) -> None:
    net = optimize(tiny(), photographs())
    assert "by TorchScript, as a oneDNN graph" in net.explain()


def test_layouts_of_the_input_make_no_difference(graph_wins: None) -> None:
    """Strides of dimensions of size 1 are arbitrary, and a compiled graph would treat them as another layout."""
    for shape in ((1, 3, 16, 16), (2, 1, 16, 16), (2, 3, 1, 16)):
        model = lived_in(nn.Sequential(nn.Conv2d(shape[1], 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)))
        x = torch.randn(shape)
        with torch.no_grad():
            want = model(x)
        net = optimize(model, x)
        odd = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for given in (x, x.contiguous(memory_format=torch.channels_last), odd, x.double(), x.flip(3).flip(3)):
            assert_same(net(given), want)


def test_a_plan_is_not_compiled_if_that_is_disabled_or_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    x = photographs()
    net = optimize(tiny(), x, torchscript=False)
    assert "step by step" in net.explain()
    torch.use_deterministic_algorithms(True)
    try:
        assert "step by step" in optimize(tiny(), x).explain()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(program, "_seconds", lambda calls: [0.002, 0.001])
    assert "(not by TorchScript: measured 2.0 ms, step by step 1.0 ms)" in optimize(tiny(), x).explain()


def test_a_graph_with_another_result_is_not_used(monkeypatch: pytest.MonkeyPatch, graph_wins: None) -> None:
    right = onednn.graph
    monkeypatch.setattr(onednn, "graph", lambda function, x: lambda x: [y * 1.001 for y in right(function, x)(x)])
    model, x = tiny(), photographs()
    net = optimize(model, x)
    assert "differs from that of the steps" in net.explain()
    with torch.no_grad():
        assert_same(net(x), model(x))


def test_a_plan_that_the_graph_compiler_refuses_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such function")

    monkeypatch.setattr(onednn, "script", refuse)
    assert "(not by TorchScript: RuntimeError: no such function)" in optimize(tiny(), photographs()).explain()
    assert not torch.jit.onednn_fusion_enabled()


def test_compiling_leaves_pytorchs_switch_as_it_was(graph_wins: None) -> None:
    for before in (False, True):
        torch.jit.enable_onednn_fusion(before)
        try:
            optimize(tiny(), photographs())
            assert torch.jit.onednn_fusion_enabled() == before
        finally:
            torch.jit.enable_onednn_fusion(False)


def test_threads_that_compile_leave_pytorchs_switch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock, the first thread would restore the switch while the second still compiles."""
    inside = threading.Barrier(2)

    def script(*_: Any) -> Any:
        assert torch.jit.onednn_fusion_enabled()
        with suppress(threading.BrokenBarrierError):
            inside.wait(0.2)
        time.sleep(0.2 * (threading.current_thread().name == "second"))
        raise RuntimeError("enough")

    def compile() -> None:
        with suppress(RuntimeError):
            onednn.graph(torch.relu, torch.zeros(1, 1, 1, 1))

    monkeypatch.setattr(onednn, "script", script)
    threads = [threading.Thread(target=compile, name=name) for name in ("first", "second")]
    try:
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        assert not torch.jit.onednn_fusion_enabled()
    finally:
        torch.jit.enable_onednn_fusion(False)


def test_a_graph_dies_with_its_weights() -> None:
    """No compilation unit of PyTorch keeps the compiled code, and with it the weights, alive."""
    kept, x = numpy.ones((8, 3, 3, 3), numpy.float32), photographs()
    alive = weakref.ref(kept)

    def graph(w: Tensor) -> Callable[[Tensor], Tensor]:
        return onednn.graph(lambda x: F.relu(F.conv2d(x, w)), x)

    function = graph(torch.from_numpy(kept))
    del kept
    function(x)
    assert alive() is not None
    del function
    gc.collect()
    assert alive() is None


def test_the_output_need_not_be_computed_last(graph_wins: None) -> None:
    model, x = Unread().eval(), photographs()
    net = optimize(model, x)
    assert "by TorchScript, as a oneDNN graph" in net.explain()
    with torch.no_grad():
        assert_same(net(x), model(x))


class Busy(nn.Module):
    """A net whose BatchNorm can't be folded, because its input is read again. The graph compiler would hang on it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.bn(y)


def test_an_unfolded_batch_norm_stays_out_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(onednn, "graph", lambda *given: asked.append(given))
    model, x = lived_in(Busy()), photographs()
    net = optimize(model, x)
    assert not asked
    assert "(not by TorchScript: 'bn' is not a step that oneDNN's graph compiler may take" in net.explain()
    with torch.no_grad():
        assert_same(net(x), model(x))


def test_no_call_uses_a_graph_before_it_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that runs during the comparison of a wrong graph uses the steps."""
    model, x = tiny(), photographs()
    net = optimize(model, torchscript=False)
    found: list[Any] = []
    net(x)
    (plan,) = net._programs.values()

    def meanwhile(x: Tensor) -> tuple[Tensor]:
        if not found:
            found.append(None)
            (found[0],) = plan.run(nhwc(x))
        return (x.new_zeros(2, 10),)

    monkeypatch.setattr(onednn, "graph", lambda *_: meanwhile)
    plan.compile(nhwc(x))
    assert "differs from that of the steps" in net.explain()
    with torch.no_grad():
        assert_same(found[0], model(x))


def test_loaded_weights_reach_the_graph(graph_wins: None) -> None:
    model, other, x = tiny(), tiny(), photographs()
    net = optimize(model, x)
    net.load_state_dict(other.state_dict())
    net.ready(x)
    assert "by TorchScript, as a oneDNN graph" in net.explain()
    with torch.no_grad():
        assert_same(net(x), other(x))


def test_the_caller_owns_returned_tensors(graph_wins: None) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    x = photographs()
    net = optimize(model, x)
    first = net(x)
    assert first.is_contiguous(memory_format=torch.channels_last)
    kept = first.clone()
    first.zero_()
    assert torch.equal(net(x), kept)


@pytest.mark.parametrize("graph", [False, True], ids=["steps", "graph"])
def test_threads_call_one_net_concurrently(graph: bool, graph_wins: None) -> None:
    model = tiny()
    inputs = [photographs(1 + i % 3) for i in range(9)]
    net = optimize(model, torchscript=graph)
    for x in inputs[:3]:
        net.ready(x)
    with torch.no_grad():
        want = [model(x) for x in inputs]
    results: list[list[Tensor]] = [[] for _ in range(4)]

    def work(row: list[Tensor]) -> None:
        for _ in range(3):
            row.extend(net(x) for x in inputs)

    threads = [threading.Thread(target=work, args=(row,)) for row in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in results:
        assert len(row) == 27
        for y, right in zip(row, want * 3, strict=True):
            assert_same(y, right)


STEPS_ONLY = {
    "group norm",
    "timm deep stem, average down",
    "timm squeeze-excitation",
    "timm blur",
    "timm efficient attention",
}


@pytest.mark.extra
@pytest.mark.parametrize("name", NETS)
def test_every_compiled_net_gives_the_right_results(name: str, graph_wins: None) -> None:
    model, x = lived_in(NETS[name]()), photographs(2, 33)
    with torch.no_grad():
        theirs, want = model(x), copy.deepcopy(model).double()(x.double())
    net = optimize(model, x)
    assert_close_to_reference(net(x), want, theirs, factor=ONEDNN_GRAPH)
    assert ("by TorchScript, as a oneDNN graph" in net.explain()) == (name not in STEPS_ONLY)
