"""Test `optimize` on a CPU: oneDNN's fused operators, their packed weights, and slices of a batch."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close_to_reference
from nets import tiny
from tolerances import SUMS
from torch import Tensor, nn

import fastres
from fastres import optimize
from fastres.inference import optimized
from fastres.inference.plan import Conv, fuse, overwritable
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
    """Assert equality up to float32 rounding in sums of a few hundred products of numbers around 1, in any order."""
    torch.testing.assert_close(y, want, rtol=SUMS, atol=SUMS, equal_nan=True)


def engines(net: optimized.Optimized) -> set[str]:
    return {bound.engine for p in net._programs.values() for bound in p.bound if isinstance(bound.step, Conv)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("n", [1, 3])
def test_a_convolution_is_as_exact_as_pytorchs(name: str, n: int, dtype: torch.dtype) -> None:
    """Every geometry, with and without bias, residual and ReLU, and with the residual overwritten or not."""
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


def test_weights_are_stored_once_for_each_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size adds weights only if oneDNN requires another format. Nothing is packed for it without `exact`."""
    packings, geometry = onednn.Packings(), Geometry(pad=1)
    w = nhwc(torch.randn(64, 64, 3, 3))
    sizes = (16, 24, 32, 40, 48, 56)
    exact = [packings.conv("a", w, geometry, torch.empty(2, size, size, 64)) for size in sizes]
    assert len({id(packed) for packed in exact}) <= 2, "one more on CPUs where a format of its own serves some sizes"
    assert packings.conv("b", w, geometry, torch.empty(2, 16, 16, 64)) is not exact[0]
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", lambda *_: pytest.fail("packed again"))
    for size in range(8, 64):
        assert packings.conv("a", w, geometry, torch.empty(3, size, size, 64), exact=False) is exact[0]


def test_weights_in_another_format_give_the_same_answer() -> None:
    """Sizes are served by weights that were packed for any other; oneDNN converts them where it must."""
    packings, w, sizes = onednn.Packings(), torch.randn(128, 32, 1, 1), (1, 3, 7, 8, 9, 16, 33)
    for packed_for in sizes:
        packed = packings.conv("a", nhwc(w), Geometry(), torch.empty(1, packed_for, packed_for, 32))
        for size in sizes:
            x = torch.randn(2, 32, size, size)
            y = onednn.conv(nhwc(x), w=packed, bias=None, geometry=Geometry(), relu=False)
            assert_close_to_reference(nchw(y), F.conv2d(x.double(), w.double()), F.conv2d(x, w))


def test_dispatch_decides_the_engine() -> None:
    net = optimize(tiny(), torchscript=False)
    net(photographs())
    assert engines(net) == {"onednn"}
    with fastres.backend("reference"):
        net(photographs())
    assert engines(net) == {"onednn", "aten"}
    with torch.backends.mkldnn.flags(enabled=False):
        net(photographs(3))
        assert "torch.backends.mkldnn.enabled is False" in net.explain()


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16 convolutions")
def test_a_grouped_convolution_with_a_residual_falls_back() -> None:
    """PyTorch's oneDNN operator raises an error for this case in bfloat16, so the fallback must compute it."""

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


def test_a_refused_call_falls_back_and_explains_why(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_images_that_are_not_finite_give_pytorchs_results(value: float, dtype: torch.dtype) -> None:
    """oneDNN's ReLU turns NaN into 0, but a broken image must not get plausible scores."""
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


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16 convolutions")
def test_images_that_are_finite_only_in_their_own_dtype_give_pytorchs_results() -> None:
    model, x = tiny().bfloat16(), photographs()
    x[1, 2, 5, 5] = 3.4e38  # bfloat16 rounds it to infinity
    with torch.no_grad():
        want = model(x.bfloat16())
    assert want[1].isnan().all()
    assert torch.equal(optimize(model)(x).isnan(), want.isnan())


def test_where_activations_may_overflow_nan_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 PyTorch's ReLU runs after oneDNN's convolution, so that NaN stays. float32 stands in for float16."""
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


def test_large_finite_input_gives_pytorchs_results() -> None:
    """The sum over the input overflows float16, or float32, though every element is finite."""
    model = tiny()
    for x in (photographs().half() * 1000, photographs() * 1e37):
        with torch.no_grad():
            theirs, want = model(x.float()), copy.deepcopy(model).double()(x.double())
        assert_close_to_reference(optimize(model)(x), want, theirs)


class Twice(nn.Module):
    """A net whose residual is or is not read again after its addition, as `again` says."""

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
def test_only_residuals_that_are_not_read_later_are_overwritten(again: str) -> None:
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


@pytest.mark.parametrize("n", [1, 4, 5, 9, 16])
def test_a_large_batch_is_split(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here slices have at most two images; the scores are those of the whole batch in PyTorch."""
    model, x = tiny(), photographs(n)
    net = optimize(model, torchscript=False)
    net(x[:2])
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 2 * net._image_bytes[(3, 16, 16)])
    for _ in range(2):
        with torch.no_grad():
            assert_same(net(x), model(x))
    assert max(key[0][0] for key in net._programs) <= 2


def test_a_few_images_tell_how_large_slices_may_be_of_any_image_size() -> None:
    net = optimize(tiny(), torchscript=False)
    for size, learns in ((64, [optimized.FIRST_SLICE]), (96, [])):
        net(photographs(300, size))
        cut = [key[0][0] for key in net._programs if key[0][2] == size]
        assert cut[: len(learns)] == learns
        assert 1 < max(cut) < 300
        assert max(cut) * net._image_bytes[(3, size, size)] <= optimized.MAX_ALIVE_BYTES


def test_a_batch_in_many_slices_counts_as_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = optimize(tiny(), torchscript=False), photographs(32)
    net(x[:1])
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 2 * net._image_bytes[(3, 16, 16)])
    for call in range(1, optimized.PREPARED_AFTER["cpu"] + 2):
        net(x)
        prepared = [program.prepared for key, program in net._programs.items() if key[0][0] == 2]
        assert prepared == [call > optimized.PREPARED_AFTER["cpu"]]


class Mixes(nn.Module):
    """A net that may mix the images of a batch."""

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
    """A net that adds the means [N, C] of its input to a result [N, C, H, W].

    They broadcast as if they were [H, W]: row n of every image gets the means of image n.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x.mean((2, 3))


def test_a_residual_that_lost_dimensions_keeps_the_batch_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = AddsMean().eval(), torch.randn(4, 3, 4, 3)
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 1)
    monkeypatch.setattr(optimized, "FIRST_SLICE", 1)
    with torch.no_grad():
        assert_same(optimize(model)(x), model(x))


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
@pytest.mark.skipif(sys.platform != "linux", reason="requires Linux's count of page faults")
@pytest.mark.parametrize("graph", [False, True], ids=["steps", "graph"])
def test_repeated_calls_allocate_almost_nothing(graph: bool) -> None:
    """Repeated calls cause almost no page faults, although the net's values take megabytes.

    Each 4 KiB of memory that the process has not written before would cause one.
    """
    command = [sys.executable, "-c", STEADY, *(["graph"] if graph else [])]
    faults = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(faults) == 3
    assert all(float(each) < 32 for each in faults), faults
