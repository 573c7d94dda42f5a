"""`optimize` on a CPU: oneDNN's fused operators, their packed weights, slices of a batch, and the oneDNN graph."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
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
from test_optimize import NETS, lived_in, tiny
from torch import Tensor, nn

import fastres
from fastres import optimize
from fastres.inference import optimized, program
from fastres.inference.plan import Conv, by_image, fuse, overwritable
from fastres.inference.trace import trace
from fastres.ops import dispatch, onednn
from fastres.ops.layout import Geometry, nchw, nhwc

pytestmark = pytest.mark.skipif(
    dispatch.why_no_onednn(torch.float32) is not None, reason=str(dispatch.why_no_onednn(torch.float32))
)
HAS_BF16 = dispatch.why_no_onednn(torch.bfloat16) is None
DTYPES = [torch.float32, *([torch.bfloat16] if HAS_BF16 else [])]

GEOMETRIES = {
    "1x1": (Geometry(), 1),
    "1x1 stride": (Geometry(stride=2), 1),
    "3x3": (Geometry(pad=1), 3),
    "3x3 stride": (Geometry(2, 1), 3),
    "3x3 dilation": (Geometry(1, 2, 2), 3),
    "3x3 groups": (Geometry(1, 1, 1, 4), 3),
    "7x7": (Geometry(2, 3), 7),
}


def photographs(n: int = 2, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size)


def assert_same(y: Tensor, want: Tensor) -> None:
    """To float32's rounding, of sums of at most some hundred products of numbers around 1 in another order."""
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def engines(net: optimized.Optimized) -> set[str]:
    return {bound.engine for p in net._programs.values() for bound in p.bound if isinstance(bound.step, Conv)}


# The operators, as PyTorch has them today.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("n", [1, 3])
def test_a_convolution_is_as_exact_as_pytorchs(name: str, n: int, dtype: torch.dtype) -> None:
    """Every geometry, with and without bias, residual and ReLU, the residual overwritten and not."""
    geometry, taps = GEOMETRIES[name]
    x = nhwc(torch.randn(n, 16, 11, 9, dtype=dtype))
    w = nhwc(torch.randn(24, 16 // geometry.groups, taps, taps, dtype=dtype))
    bias = torch.randn(24, dtype=dtype)
    packed = onednn.Packings().conv("layer", w, geometry, x)
    for b in (bias, None):
        exact = F.conv2d(nchw(x).double(), nchw(w).double(), None if b is None else b.double(), *geometry)
        stock = F.conv2d(nchw(x), nchw(w), b, *geometry)
        residual = nhwc(torch.randn_like(stock))
        for added in (None, residual) if geometry.groups == 1 else (None,):
            for relu in (False, True):
                want = exact if added is None else exact + nchw(added).double()
                theirs = stock if added is None else stock + nchw(added)
                want, theirs = (want.relu(), theirs.relu()) if relu else (want, theirs)
                for overwrite in (False, True):
                    given = None if added is None else added.clone()
                    y = onednn.conv(x, given, w=packed, bias=b, geometry=geometry, relu=relu, overwrite=overwrite)
                    assert y.is_contiguous()
                    assert_close_to_reference(nchw(y), want, theirs)
                    if given is not None:
                        assert (y.data_ptr() == given.data_ptr()) == overwrite
                        assert overwrite or torch.equal(given, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 5])
def test_a_classifier_is_as_exact_as_pytorchs(n: int, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(33, 10).to(dtype).requires_grad_(False), torch.randn(n, 33, dtype=dtype)
    w = onednn.Packings().linear("fc", layer.weight, x)
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_close_to_reference(onednn.linear(x, w=w, bias=layer.bias), want, layer(x))


def test_weights_are_kept_once_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of images packs nothing, another size what oneDNN wants otherwise."""
    packings, geometry = onednn.Packings(), Geometry(pad=1)
    w = nhwc(torch.randn(64, 64, 3, 3))
    first = packings.conv("a", w, geometry, torch.empty(2, 14, 14, 64))
    assert packings.conv("a", w, geometry, torch.empty(7, 14, 14, 64)) is first
    assert packings.conv("b", w, geometry, torch.empty(2, 14, 14, 64)) is not first
    packings.conv("a", w, geometry, torch.empty(2, 28, 28, 64))
    packings.conv("a", w, geometry, torch.empty(1, 14, 14, 64))
    of_a = [packed for (name, _), packed in packings._by_format.items() if name == "a"]
    layouts = {bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist()) for packed in of_a}
    assert len(of_a) == len(layouts) <= len(packings._by_call) - 1


def test_a_new_number_of_images_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = optimize(tiny())
    net(photographs(2))
    packed = dict(net._packings._by_call)
    net(photographs(3)), net(photographs(4))
    assert net._packings._by_call == packed


# What is not oneDNN's.


def test_dispatch_decides() -> None:
    net = optimize(tiny(), torchscript=False)
    net(photographs())
    assert engines(net) == {"onednn"}
    with fastres.backend("reference"):
        net(photographs())
    assert engines(net) == {"onednn", "aten"}
    with torch.backends.mkldnn.flags(enabled=False):
        net(photographs(3))
        assert "torch.backends.mkldnn.enabled is False" in net.explain()


@pytest.mark.skipif(not HAS_BF16, reason="this CPU computes no bf16")
def test_a_grouped_convolution_with_a_residual() -> None:
    """PyTorch's operator has no kernel for it in bfloat16 and says so."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return torch.relu(self.b(y) + y)

    model, x = Grouped().eval().bfloat16(), photographs().bfloat16()
    net = optimize(model)
    with torch.no_grad():
        theirs = model(x)
        assert_close_to_reference(net(x), model.double()(x.double()), theirs)


def test_a_refused_call_falls_back_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such primitive\nat all")

    monkeypatch.setattr(onednn, "conv", refuse)
    monkeypatch.setattr(onednn, "linear", refuse)
    model, x = tiny(), photographs()
    net = optimize(model)
    with torch.no_grad():
        assert_same(net(x), model(x))
    assert engines(net) == {"aten"}
    assert "oneDNN: no such primitive" in net.explain()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_answers_as_in_pytorch(value: float, dtype: torch.dtype) -> None:
    """oneDNN's ReLU makes 0 of NaN: a broken image must not get scores that look right."""
    model = tiny().to(dtype)
    x = photographs(3).to(dtype)
    net = optimize(model, x)
    x[1, 2, 5, 5] = value
    with torch.no_grad():
        want = model(x)
    got = net(x)
    assert torch.equal(got.isnan(), want.isnan())
    assert got[0].isfinite().all()
    assert got[2].isfinite().all()


@pytest.mark.skipif(not HAS_BF16, reason="this CPU computes no bf16")
def test_what_is_finite_in_another_dtype_alone_answers_as_in_pytorch() -> None:
    model, x = tiny().bfloat16(), photographs()
    x[1, 2, 5, 5] = 3.4e38  # bfloat16 rounds it to infinity
    with torch.no_grad():
        want = model(x.bfloat16())
    assert want[1].isnan().all()
    assert torch.equal(optimize(model)(x).isnan(), want.isnan())


def test_where_activations_overflow_a_nan_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As float16 is served on CPUs that compute in it: here float32 stands for it."""
    x, w = nhwc(torch.randn(2, 16, 6, 6)), nhwc(torch.randn(8, 16, 3, 3))
    x[0, 2, 2, 2] = float("nan")
    packed = onednn.Packings().conv("layer", w, Geometry(pad=1), x)
    residual = nhwc(torch.randn(2, 8, 6, 6))
    options: dict[str, Any] = {"w": packed, "bias": None, "geometry": Geometry(pad=1), "relu": True}
    assert not onednn.conv(x, **options).isnan().any()
    monkeypatch.setattr(onednn, "_OVERFLOWS", (torch.float32,))
    z = F.conv2d(nchw(x), nchw(w), padding=1)
    for overwrite in (False, True):
        y = onednn.conv(x, residual.clone(), overwrite=overwrite, **options)
        assert_same(nchw(y), (z + nchw(residual)).relu())
    assert_same(nchw(onednn.conv(x, **options)), z.relu())


def test_large_finite_input_is_served() -> None:
    """Its sum leaves the range of float16, and of float32."""
    model = tiny()
    for x in (photographs().half() * 1000, photographs() * 1e37):
        with torch.no_grad():
            theirs, want = model(x.float()), copy.deepcopy(model).double()(x.double())
        assert_close_to_reference(optimize(model)(x), want, theirs)


# Values that are overwritten.


class Twice(nn.Module):
    """A residual that is read again after it was added, and one that is returned in the sum."""

    def __init__(self, again: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8 if i == 2 else 3, 8, 3, padding=1) for i in range(3))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        if self.again == "view":
            flat = torch.flatten(a, 2)
            return self.b(x) + a + flat.reshape(a.shape)
        y = torch.relu(self.b(x) + a)
        if self.again == "no":
            return self.c(y)
        return self.c(y) + a if self.again == "later" else self.c(a) + y


@pytest.mark.parametrize("again", ["no", "later", "read by another", "view"])
def test_only_what_nobody_reads_later_is_overwritten(again: str) -> None:
    model = Twice(again).eval()
    steps, output = trace(copy.deepcopy(model))
    steps = fuse(steps, output)
    x = photographs()
    net = optimize(model, torchscript=False)
    given = x.clone()
    with torch.no_grad():
        assert_same(net(given), model(x))
    assert torch.equal(given, x)
    residuals = {step.out for step in steps if isinstance(step, Conv) and step.residual is not None}
    assert (overwritable(steps, output) == residuals) == (again == "no")


# Slices.


@pytest.mark.parametrize("n", [1, 4, 5, 9, 16])
def test_a_batch_is_cut(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into slices of at most two images here; each image gets the scores that it gets alone."""
    model, x = tiny(), photographs(n)
    net = optimize(model, torchscript=False)
    net(x[:2])
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 2 * net._image_bytes[(3, 16, 16)])
    for _ in range(2):
        with torch.no_grad():
            assert_same(net(x), model(x))
    assert max(key[0][0] for key in net._programs) <= 2


def test_a_new_size_tries_a_few_images_first() -> None:
    net = optimize(tiny(), torchscript=False)
    net(photographs(300, 64))
    cut = [key[0][0] for key in net._programs]
    assert cut[0] == optimized.FIRST_SLICE
    assert 300 % max(cut) != 0 or max(cut) < 300
    assert max(cut) * net._image_bytes[(3, 64, 64)] <= optimized.MAX_ALIVE_BYTES


class Mixes(nn.Module):
    """Its scores of an image depend on the others."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.conv(x))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over the batch": lambda y: y + y.mean(0, keepdim=True),
    "mean over everything": lambda y: y + y.mean(),
    "mean over a flattened batch": lambda y: torch.flatten(y, 1).mean(-2),
    "flatten from the batch on": lambda y: torch.flatten(y, 0, 1),
    "reshape": lambda y: y.reshape(2, -1),
    "an image of the batch": lambda y: y + y[0],
    "the number of images": lambda y: y * y.shape[0],
    "a pool over a flattened batch": lambda y: F.max_pool2d(torch.flatten(y, 1, 2), 2),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_batch_whose_images_depend_on_each_other_stays_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Mixes(MIXING[name]).eval(), photographs(8)
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 1)
    with torch.no_grad():
        assert_same(optimize(model)(x), model(x))


class AddsMean(nn.Module):
    """What the convolution adds has lost dimensions, and broadcasts images over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x.mean((2, 3))


def test_a_convolution_that_adds_what_lost_dimensions_keeps_the_batch_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = AddsMean().eval(), torch.randn(4, 3, 4, 3)
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 1)
    monkeypatch.setattr(optimized, "FIRST_SLICE", 1)
    with torch.no_grad():
        assert_same(optimize(model)(x), model(x))


def test_nets_of_this_field_may_be_cut() -> None:
    for model in (fastres.resnet18(), fastres.resnet50(), fastres.paper.cifar(20), fastres.paper.resnet(18, "A")):
        steps, output = trace(model.eval())
        assert by_image(fuse(steps, output), model)


STEADY = """
import resource, sys, torch, fastres
torch.set_num_threads(1)
net = fastres.optimize(fastres.resnet18().eval(), torchscript=len(sys.argv) > 1)
for n in (1, 4, 24):
    x = torch.rand(n, 3, 128, 128)
    net.ready(x)
    for _ in range(3):
        net(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        net(x)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4)
"""


@pytest.mark.extra
@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
@pytest.mark.parametrize("graph", [False, True], ids=["steps", "graph"])
def test_a_steady_call_allocates_next_to_nothing(graph: bool) -> None:
    """In page faults, one for every 4 KiB that the process hasn't written before: the net's values take megabytes."""
    command = [sys.executable, "-c", STEADY, *(["graph"] if graph else [])]
    faults = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(faults) == 3
    assert all(float(each) < 32 for each in faults), faults


# The oneDNN graph.


@pytest.fixture
def graph_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured."""
    monkeypatch.setattr(program, "_seconds", lambda calls: [1.0, 2.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shape_that_comes_back_is_compiled(dtype: torch.dtype, graph_wins: None) -> None:
    model, x = tiny().to(dtype), photographs(2, 32).to(dtype)
    with torch.no_grad():
        want, theirs = model.double()(x.double()), model.to(dtype)(x)
    net = optimize(model)
    for call in range(optimized.SPECIALISED_AFTER + 3):
        y = net(x)
        assert y.dtype == dtype
        assert_close_to_reference(y, want, theirs)
        assert ("by TorchScript" in net.explain().splitlines()[0]) == (call >= optimized.SPECIALISED_AFTER)
    with torch.no_grad():
        assert_close_to_reference(net(x[:1]), want[:1], model(x[:1]))


def test_an_example_compiles_at_once(graph_wins: None) -> None:
    net = optimize(tiny(), photographs())
    assert "by TorchScript, as a oneDNN graph" in net.explain()


def test_layouts_of_the_input_make_no_difference(graph_wins: None) -> None:
    """Strides over dimensions of one are arbitrary, and a compiled graph would take them for another layout."""
    for shape in ((1, 3, 16, 16), (2, 1, 16, 16), (2, 3, 1, 16)):
        model = lived_in(nn.Sequential(nn.Conv2d(shape[1], 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)))
        x = torch.randn(shape)
        with torch.no_grad():
            want = model(x)
        net = optimize(model, x)
        odd = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for given in (x, x.contiguous(memory_format=torch.channels_last), odd, x.double(), x.flip(3).flip(3)):
            assert_same(net(given), want)


def test_where_it_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = photographs()
    net = optimize(tiny(), x, torchscript=False)
    assert "one step after the other" in net.explain()
    torch.use_deterministic_algorithms(True)
    try:
        assert "one step after the other" in optimize(tiny(), x).explain()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(program, "_seconds", lambda calls: [0.002, 0.001])
    assert "(not by TorchScript: measured: 2.0 ms, step by step 1.0 ms)" in optimize(tiny(), x).explain()


def test_a_graph_with_another_answer_is_not_taken(monkeypatch: pytest.MonkeyPatch, graph_wins: None) -> None:
    right = onednn.graph
    monkeypatch.setattr(onednn, "graph", lambda function, x: lambda x: right(function, x)(x) * 1.001)
    model, x = tiny(), photographs()
    net = optimize(model, x)
    assert "from that of the steps" in net.explain()
    with torch.no_grad():
        assert_same(net(x), model(x))


def test_what_the_graph_compiler_refuses_stays_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("it has gone")

    monkeypatch.setattr(onednn, "script", refuse)
    assert "(not by TorchScript: RuntimeError: it has gone)" in optimize(tiny(), photographs()).explain()
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
    """The first leaves while the second is inside, where nothing makes it wait."""
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
    """And so does what it compiled: no unit of PyTorch's own keeps it."""
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


class Unread(nn.Module):
    """Returns the features; nobody reads the scores, which it computes afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        self.fc(torch.flatten(self.pool(y), 1))
        return y


def test_what_a_net_returns_need_not_be_computed_last(graph_wins: None) -> None:
    model, x = Unread().eval(), photographs()
    net = optimize(model, x)
    assert "by TorchScript, as a oneDNN graph" in net.explain()
    with torch.no_grad():
        assert_same(net(x), model(x))


class Apart(nn.Module):
    """Its BatchNorm is not folded: what it reads is read again. The graph compiler never returns from it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.bn(y)


def test_a_batch_norm_by_itself_stays_out_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(onednn, "graph", lambda *given: asked.append(given))
    model, x = lived_in(Apart()), photographs()
    net = optimize(model, x)
    assert not asked
    assert "(not by TorchScript: 'bn' is none of the steps that oneDNN's graph compiler is given" in net.explain()
    with torch.no_grad():
        assert_same(net(x), model(x))


def test_no_call_takes_a_graph_before_it_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one with another answer, called by another thread while it is compared."""
    model, x = tiny(), photographs()
    net = optimize(model, torchscript=False)
    found: list[Any] = []
    net(x)
    (plan,) = net._programs.values()

    def meanwhile(x: Tensor) -> Tensor:
        if not found:
            found.append(None)
            found[0] = plan.run(nhwc(x))
        return x.new_zeros(2, 10)

    monkeypatch.setattr(onednn, "graph", lambda *_: meanwhile)
    plan._compile(nhwc(x))
    assert "from that of the steps" in net.explain()
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


def test_a_returned_tensor_is_the_callers_own(graph_wins: None) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    x = photographs()
    net = optimize(model, x)
    first = net(x)
    assert first.is_contiguous(memory_format=torch.channels_last)
    kept = first.clone()
    first.zero_()
    assert torch.equal(net(x), kept)


@pytest.mark.parametrize("graph", [False, True], ids=["steps", "graph"])
def test_threads_call_one_net_at_once(graph: bool, graph_wins: None) -> None:
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


# Nets with steps that the graph compiler isn't given.
STEPS_ONLY = {
    "group norm",
    "timm deep stem, average down",
    "timm squeeze-excitation",
    "timm blur",
    "timm efficient attention",
}


@pytest.mark.extra
@pytest.mark.parametrize("name", NETS)
def test_every_net_answers_when_it_is_compiled(name: str, graph_wins: None) -> None:
    model, x = lived_in(NETS[name]()), photographs(2, 33)
    with torch.no_grad():
        theirs, want = model(x), copy.deepcopy(model).double()(x.double())
    net = optimize(model, x)
    assert_close_to_reference(net(x), want, theirs, factor=4.0)
    assert ("by TorchScript, as a oneDNN graph" in net.explain()) == (name not in STEPS_ONLY)
