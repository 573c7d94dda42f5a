"""Test `optimize(model, dtype=torch.int8)`: each step against its definition, and the behaviour of whole nets."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from covering import extra
from nets import NETS, Unread, answers, images, lived_in, tiny
from tolerances import HALF_STEP, INT8, INT8_SIMULATED, INT8_STEPS, QUOTIENTS, SUMS, TIES
from torch import Tensor, nn

import fastres
from fastres import optimize
from fastres.inference import freeze, program
from fastres.inference.optimized import MAX_SHAPES, PREPARED_AFTER, Optimized
from fastres.inference.plan import Conv
from fastres.ops import dispatch, quantised, reference
from fastres.ops.folded import Folded
from fastres.ops.layout import Geometry
from fastres.ops.quantised import Grid, Quantised, grid

CPU = torch.device("cpu")
U8 = torch.quint8
served = pytest.mark.skipif(dispatch.why_no_int8(CPU) is not None, reason="this CPU has no int8 convolutions")


def stored(*shape: int, on: Grid) -> Tensor:
    """Return random stored values [N, H, W, C], from the whole range of the quantisation grid `on`."""
    return quantised.as_quint8(torch.randint(0, 256, shape), on)


def int8(model: nn.Module, *batches: Tensor, **options: Any) -> Optimized:
    return optimize(model, dtype=torch.int8, calibration=batches or [images(4), images(4)], **options)


def int8_like(net: Optimized) -> Optimized:
    """Return a copy of `net` that has not been called yet."""
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0.0, 5.1, 0.02, 0),  # as after ReLU
        (1.0, 5.1, 0.02, 0),  # 0 is always a number of the grid
        (-5.1, 0.0, 0.02, 255),
        (-5.1, -1.0, 0.02, 255),
        (-1.0, 4.1, 0.02, 50),
        (-0.0051, 5.0949, 0.02, 0),
        (0.0, 0.0, 1.0, 0),
        (0.0, 1e-40, 1.0, 0),  # float32 could not represent its scale
    ],
)
def test_a_grid_spans_its_ends_and_zero(low: float, high: float, scale: float, zero: int) -> None:
    found = grid(low, high, torch.int8)
    assert (found.zero, found.dtype) == (zero, U8)
    assert math.isclose(found.scale, scale, rel_tol=QUOTIENTS)
    ends = found.load(found.store(torch.tensor([[[[low, high, 0.0]]]])), torch.float32).flatten()
    assert (ends - torch.tensor([low, high, 0.0])).abs().max() <= HALF_STEP * found.scale
    assert ends[2] == 0


def test_a_grid_stores_the_nearest_of_its_numbers() -> None:
    on = Grid(0.5, 3, U8)
    x = torch.tensor([-9.0, -1.5, -0.25, 0.25, 0.75, 1.0, 126.0, 126.2, 1e30, float("inf"), -float("inf")])
    assert on.store(x).int_repr().tolist() == [0, 0, 3, 3, 5, 5, 255, 255, 255, 255, 0]  # ties to even, ends clamp
    assert torch.equal(on.load(on.store(x), torch.float64)[2:7], torch.tensor([0, 0, 1, 1, 126]).double())


KINDS: dict[str, dict[str, Any]] = {
    "1x1": {"filter": (24, 1, 1, 16)},
    "3x3": {"filter": (16, 3, 3, 16), "geometry": Geometry(pad=1)},
    "stem": {"filter": (16, 7, 7, 3), "geometry": Geometry(2, 3)},
    "stride 3, wide padding": {"filter": (8, 3, 3, 8), "geometry": Geometry(3, 4)},
    "dilation": {"filter": (8, 3, 3, 8), "geometry": Geometry(pad=2, dilation=2)},
    "groups": {"filter": (32, 3, 3, 4), "geometry": Geometry(pad=1, groups=8)},
    "depthwise": {"filter": (32, 3, 3, 1), "geometry": Geometry(pad=1, groups=32)},
    "odd channels": {"filter": (5, 3, 3, 7), "geometry": Geometry(pad=1)},
    "one input channel": {"filter": (9, 1, 1, 1)},
    "one output channel": {"filter": (1, 3, 3, 16)},
    "deep": {"filter": (16, 3, 3, 512), "geometry": Geometry(pad=1)},  # sums far beyond 16 bits
}


def exact(
    x: Tensor, residual: Tensor | None, p: Folded, geometry: Geometry, relu: bool, x_on: Grid, residual_on: Grid | None
) -> Tensor:
    """Return [relu](conv + shift + residual) of the dequantised tensors, in float64: [N, P, Q, K].

    x_on, residual_on: the quantisation grids on which x and residual are stored.
    """
    assert p.scale is not None
    whole = x.int_repr().double() - x_on.zero
    stride, pad, dilation, groups = geometry
    y = F.conv2d(whole.permute(0, 3, 1, 2), p.w.double().permute(0, 3, 1, 2), None, stride, pad, dilation, groups)
    y = y.permute(0, 2, 3, 1) * p.scale.double()
    if p.shift is not None:
        y = y + p.shift.double()
    if residual is not None:
        assert residual_on is not None
        y = y + (residual.int_repr().double() - residual_on.zero) * residual_on.scale
    return y.relu() if relu else y


def assert_rounded(got: Tensor, y: Tensor, out: Grid) -> None:
    """Assert that `got` is y rounded to the grid `out`. A few values next to a tie may be one step off."""
    q = y / out.scale + out.zero
    steps = (got.int_repr().double() - q.round().clamp(0, 255)).abs()
    from_tie = ((q - q.floor()) - 0.5).abs()
    assert steps.max() <= 1
    assert from_tie[steps == 1].numel() == 0 or from_tie[steps == 1].max() < TIES
    assert (steps == 1).double().mean() < TIES


@pytest.mark.parametrize("engine", ["simulation", pytest.param("onednn", marks=served)])
@pytest.mark.parametrize("added", ["nothing", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_follows_its_definition(kind: str, relu: bool, added: str, engine: str) -> None:
    (k, r, s, c), geometry = KINDS[kind]["filter"], KINDS[kind].get("geometry", Geometry())
    x_on, residual_on = Grid(0.02, 120, U8), Grid(0.03, 30, U8) if added == "residual" else None
    x = stored(2, 9, 11, c * geometry.groups, on=x_on)
    w = torch.randn(k, c, r, s).double() * torch.logspace(0, -2, k).double().view(-1, 1, 1, 1)
    if k > 1:
        w[-1] = 0
    p = quantised.pack(w, None if kind == "1x1" and not relu else torch.randn(k).double(), x_on)
    assert p.w.dtype == torch.int8
    assert p.scale is not None
    step = p.scale.double().view(-1, 1, 1, 1) / x_on.scale
    assert ((p.w.double().permute(0, 3, 1, 2) * step - w).abs() <= HALF_STEP * step).all()
    residual = None
    if residual_on is not None:
        residual = stored(*exact(x, None, p, geometry, relu, x_on, None).shape, on=residual_on)
    y = exact(x, residual, p, geometry, relu, x_on, residual_on)
    out = grid(0.7 * float(y.min()), 0.7 * float(y.max()), torch.int8)  # so that both ends clamp something
    grids = Quantised(x_on, residual_on, out)
    inputs = (x,) if residual is None else (x, residual)
    if engine == "onednn":
        (got,) = quantised.ByOneDNN(p, geometry=geometry, relu=relu, grids=grids, keep=False)(*inputs)
    else:
        wide: dict[str, Any] = {"dtype": torch.float32, "wide": torch.float64}
        got = reference.conv_quantised(*inputs, weights=p, geometry=geometry, relu=relu, grids=grids, **wide)
    assert got.is_contiguous()
    assert (got.q_scale(), got.q_zero_point()) == (out.scale, out.zero)
    assert {0, 255} <= set(got.int_repr().flatten().tolist())
    assert_rounded(got, y, out)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("engine", ["simulation", pytest.param("onednn", marks=served)])
def test_ties_go_to_even(engine: str, zero: int) -> None:
    """x / 2, stored with scale 1, rounds ties to even after the zero point is added."""
    on = Quantised(Grid(1.0, 0, U8), None, Grid(1.0, zero, U8))
    w = torch.zeros(16, 16, 1, 1).double()
    w[0, 0], w[0, 1] = 0.5, 63.5  # the second makes the scale 0.5
    p = quantised.pack(w, None, on.x)
    x = torch.zeros(12, 1, 1, 16)
    x[:, 0, 0, 0] = torch.arange(12)
    q = quantised.as_quint8(x, on.x)
    if engine == "onednn":
        (y,) = quantised.ByOneDNN(p, geometry=Geometry(), relu=False, grids=on, keep=False)(q)
    else:
        options: dict[str, Any] = {"dtype": torch.float32, "wide": torch.float64}
        y = reference.conv_quantised(q, weights=p, geometry=Geometry(), relu=False, grids=on, **options)
    assert y.int_repr()[:, 0, 0, 0].tolist() == (torch.arange(12) / 2 + zero).round().tolist()


@served
@pytest.mark.parametrize("keep", [False, True])
def test_the_residual_is_overwritten_unless_keep_is_set(keep: bool) -> None:
    """oneDNN's operator writes its result over the residual; with `keep` it works on a copy."""
    on = Quantised(Grid(0.02, 0, U8), Grid(0.02, 3, U8), Grid(1.0, 0, U8))
    p = quantised.pack(torch.randn(8, 16, 1, 1).double(), None, on.x)
    x, residual = stored(2, 4, 4, 16, on=on.x), stored(2, 4, 4, 8, on=Grid(0.02, 3, U8))
    before = residual.int_repr()
    (y,) = quantised.ByOneDNN(p, geometry=Geometry(), relu=True, grids=on, keep=keep)(x, residual)
    assert (y.data_ptr() != residual.data_ptr()) == keep
    assert torch.equal(residual.int_repr(), before) == keep


@served
def test_pytorchs_quantised_engine_is_restored() -> None:
    before = torch.backends.quantized.engine
    other = next(name for name in torch.backends.quantized.supported_engines if name not in ("onednn", "none"))
    torch.backends.quantized.engine = other
    try:
        net = int8(tiny())
        net(images())
        assert torch.backends.quantized.engine == other
        assert net.explain().count("onednn int8") == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    finally:
        torch.backends.quantized.engine = before


def test_a_max_pool_keeps_the_grid() -> None:
    x = stored(2, 7, 9, 5, on=Grid(0.02, 200, U8))
    pool = nn.MaxPool2d(3, 2, 1)
    want = pool(x.int_repr().double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    simulated = quantised.by_pool(lambda q: (pool(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous(),), x)[0]
    library = pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for got in (simulated, library):
        assert torch.equal(got.int_repr().double(), want)
        assert (got.q_scale(), got.q_zero_point()) == (0.02, 200)


class Residuals(nn.Module):
    """Residuals that are read later, are the convolution's own input, are added twice, or have another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(5))
        self.squeeze = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        stem = F.relu(self.stem(x))
        a = F.relu(self.convs[0](stem))
        later = self.convs[1](a) + stem  # stem is read once more
        own = F.relu(self.convs[2](later) + later)  # its input is what it adds
        plain = self.convs[3](own) + stem
        broadcast = F.relu(self.convs[4](plain) + self.squeeze(own))
        return broadcast + later


def stepwise(net: Optimized, x: Tensor) -> dict[str, Tensor]:
    """Return every value of one call, by name: copies, because a step may overwrite a value that is not read later."""
    values: dict[str, Tensor] = {}
    net.observed(x, lambda name, value: values.__setitem__(name, value.clone() if isinstance(value, Tensor) else value))
    return values


def assert_each_step_from_its_definition(net: Optimized, x: Tensor) -> None:
    values = stepwise(net, x)
    for step in net._steps:
        if isinstance(step, Conv):
            grids = step.quantised
            assert grids is not None
            assert grids.out is not None
            residual = None if step.residual is None else values[step.residual]
            if residual is not None and residual.shape != values[step.out].shape:
                residual = residual.expand(values[step.out].shape)
            p = net._folded[step.out]
            y = exact(values[step.x], residual, p, step.geometry, step.relu, grids.x, grids.residual)
            assert_rounded(values[step.out], y, grids.out)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "tiny": tiny,
    "residuals": lambda: Residuals().eval(),
    **{name: lambda name=name: lived_in(NETS[name]()) for name in ("resnet18", "torchvision resnext", "paper 18 A")},
}
MORE = [name for name in NETS if name not in SMALL]


@served
@pytest.mark.parametrize("name", [*SMALL, *map(extra, MORE)])
def test_each_step_of_a_net_follows_its_definition(name: str) -> None:
    model = SMALL[name]() if name in SMALL else lived_in(NETS[name]())
    net = int8(model, images(2, 33))
    assert_each_step_from_its_definition(net, images(2, 33))
    engines = {bound.engine for bound in net._programs.popitem()[1].bound if isinstance(bound.step, Conv)}
    assert engines == ({"onednn int8", "aten"} if name == "residuals" else {"onednn int8"})


@pytest.mark.parametrize("name", ["tiny", "residuals", "resnet18", "paper 18 A"])
@pytest.mark.parametrize("engine", [pytest.param("auto", marks=served), "reference"])
def test_a_nets_error_is_that_of_8_bits(name: str, engine: str) -> None:
    """The error is small, but not so small that the net can't have computed in 8 bits."""
    model, x = SMALL[name](), images(4, 32)
    (expected,) = answers(copy.deepcopy(model).double(), x.double())
    with fastres.backend(engine):
        y = int8(model, x)(x)
    assert y.dtype == torch.float32
    assert 1e-4 < relative_error(y, expected) < 0.1


@served
def test_explain_shows_the_engine_of_each_step() -> None:
    net = int8(tiny())
    net(images())
    table = net.explain()
    assert table.count("onednn int8") == sum(isinstance(m, nn.Conv2d) for m in tiny().modules())
    assert "simulated" not in table
    assert net.dtype == torch.float32


@served
def test_what_oneDNN_refuses_runs_in_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("could not create a primitive\nsecond line")

    model, x = tiny(), images(4)
    want = int8(model, x)(x)
    monkeypatch.setattr(quantised.ByOneDNN, "__call__", refuse)
    net = int8(model, x)
    assert relative_error(net(x), want.double()) < INT8_SIMULATED
    assert "oneDNN: could not create a primitive; int8 simulated in float32" in net.explain()


@served
def test_inputs_of_all_shapes_dtypes_and_layouts_work() -> None:
    net = int8(tiny(), images(4, 16), images(4, 17))
    for shape in ((1, 3, 16, 16), (3, 3, 17, 9), (2, 3, 1, 1), (2, 3, 40, 5)):
        x = torch.randn(shape)
        y = net(x)
        assert torch.equal(net(x), y)
        assert torch.equal(net(x.contiguous(memory_format=torch.channels_last)), y)
        assert torch.equal(net(x.double()), y)
        assert torch.equal(net(x.flip(3).flip(3)), y)
        with torch.inference_mode():
            assert torch.equal(net(x), y)
        for image, scores in zip(x, y, strict=True):
            assert relative_error(net(image[None])[0], scores.double()) < SUMS  # the classifier sums in another order
    assert net(torch.zeros(0, 3, 16, 16)).shape == (0, 10)


@served
def test_a_convolution_that_adds_its_own_input_does_not_overwrite_it() -> None:
    """The convolution still reads its input while it writes, and here the input is also the caller's tensor."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x) + x)

    x = torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    before, net = x.clone(), int8(Adds().eval(), x)
    assert_each_step_from_its_definition(net, x)
    first = net(x)
    kept = first.clone()
    assert torch.equal(x, before)
    first.zero_()  # the caller owns the result
    assert torch.equal(net(x), kept)


@served
def test_threads_call_one_net_concurrently() -> None:
    net = int8(lived_in(fastres.resnet18()), images(2, 32))
    inputs = [images(1 + i % 2, 32) for i in range(4)]
    wanted = [net(x) for x in inputs]
    wrong = []

    def call(i: int) -> None:
        for _ in range(10):
            if not torch.equal(net(inputs[i]), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("engine", [pytest.param("auto", marks=served), "reference"])
def test_values_beyond_the_range_are_clamped(engine: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        model[0].bias.zero_()
    with fastres.backend(engine):
        net = int8(model, torch.linspace(-1, 2, 48).view(1, 3, 4, 4))
        y = net(torch.tensor([-7.0, 50.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2))
    ends = torch.tensor([-1.0, 2.0, 1.0])
    assert (y[0, :, 0, 0] - ends).abs().max() < INT8_STEPS


@served
def test_copies_give_the_same_results() -> None:
    model, x = tiny(), images(4)
    net = int8(model)
    y = net(x)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(x), y)
    assert list(net.state_dict()) == list(model.state_dict())
    assert net.agreement(net, [x, (x, "labels")]) == 1.0
    assert net.agreement(model, [images(64)]) > 0.9
    with pytest.raises(RuntimeError, match="this int8 net belong to the weights they were calibrated with"):
        net.load_state_dict(model.state_dict())
    with pytest.raises(TypeError, match=r"stays in torch\.float32"):
        net.half()


def test_int8_is_refused_where_nothing_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="float8_e4m3fn and int8 need calibration="):
        optimize(tiny(), dtype=torch.int8)
    with pytest.raises(ValueError, match="percentile= is accepted only with calibration="):
        optimize(tiny(), percentile=99.0)
    with pytest.raises(ValueError, match=r"int8 needs a CPU, but the model is on cuda:0; use float8_e4m3fn on a GPU"):
        freeze._require_engine(torch.int8, torch.device("cuda:0"))
    with fastres.backend("reference"):
        freeze._require_engine(torch.int8, torch.device("cuda:0"))
        with pytest.raises(ValueError, match="calibration is empty"):
            optimize(tiny(), dtype=torch.int8, calibration=[])
        with pytest.raises(ValueError, match=r"calibration: .* are not finite"):
            int8(tiny(), images() * float("nan"), percentile=99)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match=r"int8 is not supported: this CPU has no AVX512-VNNI.*saturate.*'reference'"):
        int8(tiny())
    with fastres.backend("reference"):
        assert int8(tiny())(images()).shape == (2, 10)


@served
def test_a_oneDNN_that_saturates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not quantised.saturates()
    monkeypatch.setattr(quantised, "saturates", lambda: True)
    with pytest.raises(ValueError, match="oneDNN saturates"):
        int8(tiny())


@served
def test_forced_kernels_are_refused() -> None:
    net = int8(tiny())
    with fastres.backend("cudnn"), pytest.raises(RuntimeError, match=r"backend\('cudnn'\) is in force but"):
        net(images())


@served
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_gets_nan(value: float) -> None:
    """int8 can't represent NaN or infinity. A broken image must not get plausible scores; the others are unaffected."""
    net, whole = int8(tiny()), images(3)
    x = whole.clone()
    x[1, 2, 5, 5] = value
    for name in ("auto", "reference"):
        with fastres.backend(name):
            want, got = net(whole), net(x)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@served
def test_an_image_beyond_float32s_range_gets_nan() -> None:
    net, x = int8(tiny()), images(3).double()
    x[1, 2, 5, 5] = 1e300
    assert net(x).isnan().all(1).tolist() == [False, True, False]


@served
def test_a_shape_used_often_goes_through_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript gives the same bits as the steps, and PyTorch's quantised engine is the same afterwards."""
    monkeypatch.setattr(program, "_seconds", lambda calls: [1.0, 2.0])
    before = torch.backends.quantized.engine
    net = int8(tiny())
    inputs = [images(2) for _ in range(PREPARED_AFTER["cpu"] + 3)]
    want = [int8_like(net)(x) for x in inputs]
    for x, y in zip(inputs, want, strict=True):
        assert torch.equal(net(x), y)
    assert "by TorchScript, step by step" in net.explain()
    assert torch.backends.quantized.engine == before


@served
def test_the_output_may_precede_unread_steps() -> None:
    """The net returns features and computes scores that are not read.

    The part that TorchScript compiles would end with the input of the scores, not with the output.
    """
    model, x = Unread().eval(), images(2)
    assert relative_error(int8(model, x, example=x)(x), model(x).double()) < INT8


@served
def test_a_residual_that_is_read_again_stays_out_of_torchscript() -> None:
    """TorchScript does not know that the operator overwrites its residual.

    It could therefore merge the two copies that protect a residual which is read again.
    """

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a = torch.relu(self.a(x))
            return torch.relu(self.b(x) + a) + torch.relu(self.c(x) + a)

    model, x = Again().eval(), images(2)
    net = int8(model, x, example=x)
    assert "not by TorchScript: a convolution must not overwrite its residual" in net.explain()
    assert relative_error(net(x), model(x).double()) < INT8


@served
def test_weights_are_packed_for_another_batch_size_only_if_it_is_used_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes longer than a call, so a new batch size first shares packed weights, with the same results."""
    net = int8(tiny(), torchscript=False)
    net(images(2))
    made, init = [], quantised.ByOneDNN.__init__

    def counting(self: Any, *args: Any, **options: Any) -> None:
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(quantised.ByOneDNN, "__init__", counting)
    x = images(3)
    want = net(x)
    assert not made
    for _ in range(PREPARED_AFTER["cpu"] + 2):
        assert torch.equal(net(x), want)
    assert len(made) == sum(isinstance(m, nn.Conv2d) for m in tiny().modules())
    for size in range(16, 16 + 2 * MAX_SHAPES):
        net(images(2, size))
    gc.collect()
    alive = sum(type(each) is quantised.ByOneDNN for each in gc.get_objects())
    assert alive <= 3 * len(made), "for many pixels, for few, and for the batch of three"


@served
def test_a_pool_of_a_model_tensor_stays_in_float32() -> None:
    """The pool's input is a parameter, which no step computes, so it is never in 8 bits."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.randn(2, 8, 32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + F.max_pool2d(self.table, 2))

    model, x = Table().eval(), images(2)
    assert relative_error(int8(model, x, example=x)(x), model(x).detach().double()) < INT8
