"""Test `optimize(model, dtype=torch.float8_e4m3fn)`: one convolution by its definition, nets against the originals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from nets import DEVICE, NETS, answers, images, lived_in, needs_kernels, tiny
from tolerances import ROUNDING, SUMS, lost_in_sums
from torch import Tensor

import fastres
from fastres import optimize
from fastres.inference.plan import Conv, fuse
from fastres.inference.trace import trace
from fastres.ops import folded, quantised, reference
from fastres.ops.layout import Geometry
from fastres.ops.quantised import FLOAT8, Grid, Quantised


@pytest.fixture
def simulated() -> Iterator[None]:
    with fastres.backend("reference"):
        yield


def e4m3(x: Tensor) -> Tensor:
    """Return x (float64) rounded to e4m3: 3 fraction bits, smallest exponent -6, saturating at 448."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(2.0**-9))).clamp_min(-6) - 3)
    return (torch.round(x / step) * step).clamp(-448, 448)


def test_a_convolution_follows_its_definition() -> None:
    x, residual = torch.randn(2, 5, 5, 6).double(), torch.randn(2, 5, 5, 4).double()
    w, shift = (
        torch.randn(4, 6, 3, 3).double() * torch.tensor([1.0, 10, 0.1, 0]).view(4, 1, 1, 1),
        torch.randn(4).double(),
    )
    x_scale, residual_scale, y_scale = x.abs().max() / 448, residual.abs().max() / 448, torch.tensor(0.01)
    w_scale = w.abs().amax((1, 2, 3)) / 448
    w_scale[3] = 1  # a channel of zeros
    x8, residual8 = e4m3(x / x_scale), e4m3(residual / residual_scale)
    w8 = e4m3(w / w_scale.view(4, 1, 1, 1))
    y = F.conv2d((x8 * x_scale).permute(0, 3, 1, 2), w8 * w_scale.view(4, 1, 1, 1), shift, padding=1)
    y = F.relu(y.permute(0, 2, 3, 1) + residual8 * residual_scale)

    grids = Quantised(*(Grid(float(scale), 0, FLOAT8) for scale in (x_scale, residual_scale, y_scale)))
    p = quantised.pack(w, shift, grids.x)
    assert p.w.dtype == FLOAT8
    arguments: dict[str, Any] = {"weights": p, "geometry": Geometry(pad=1), "relu": True, "wide": torch.float32}
    inputs = quantised.to_float8(x / x_scale), quantised.to_float8(residual / residual_scale)
    arguments["dtype"] = torch.float32
    got = reference.conv_quantised(*inputs, **arguments, grids=replace(grids, out=None))
    assert relative_error(got, y) <= ROUNDING
    got = reference.conv_quantised(*inputs, **arguments, grids=grids)
    expected = e4m3(y / y_scale)
    assert (expected == 448).any()
    assert expected.max() < (y / y_scale).max()  # saturated
    near = (got.double() - expected).abs() / expected.clamp_min(2.0**-6)
    assert near.max() <= 2.0**-3  # one step off, where float32 rounds to the other side of a tie
    assert (near == 0).double().mean() > 0.99


def test_a_nets_error_is_that_of_float8(simulated: None) -> None:
    """The error is larger than in bfloat16 but small; all convolutions but the stem and grouped ones are float8."""
    model = tiny()
    batches = [images(4), (images(4), torch.zeros(4))]
    net = optimize(model, dtype=FLOAT8, calibration=batches)
    x = images(8)
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    y = net(x)
    assert y.dtype == torch.bfloat16
    half = relative_error(optimize(model, dtype=torch.bfloat16)(x), reference)
    assert half < relative_error(y, reference) < 0.1
    small = {step.name for step in net._steps if isinstance(step, Conv) and step.quantised is not None}
    every = {step.name for step in fuse(*trace(model)) if isinstance(step, Conv)}
    assert every - small == {"0", "6.conv2"}  # the stem and the grouped convolution
    assert net._folded[next(s.out for s in net._steps if isinstance(s, Conv) and s.quantised)].w.dtype == FLOAT8
    assert "Sequential in torch.bfloat16 with float8 convolutions" in net.explain()
    assert "float8 simulated in float32" in net.explain()
    assert torch.equal(copy.deepcopy(net)(x), y)
    assert list(net.state_dict()) == list(model.state_dict())
    with pytest.raises(RuntimeError, match="calibrated with"):
        net.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["torchvision resnext", "paper cifar", "timm squeeze-excitation"])
def test_other_resnets_are_close_to_their_originals(name: str, simulated: None) -> None:
    model = lived_in(NETS[name]())
    x = images(2, 32)
    net = optimize(model, dtype=FLOAT8, calibration=[x])
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    assert relative_error(net(x), reference) < 0.2


def test_agreement_is_the_share_of_equal_classes(simulated: None) -> None:
    model = tiny()
    with torch.no_grad():
        model[-1].weight.mul_(8)  # scores that differ clearly
    batches = [images(32), (images(32), "labels")]
    half = optimize(model, dtype=torch.bfloat16)
    assert half.agreement(half, batches) == 1.0
    assert optimize(model, dtype=FLOAT8, calibration=batches).agreement(model, batches) >= 0.8
    swapped = copy.deepcopy(model)
    with torch.no_grad():
        swapped[-1].weight.copy_(model[-1].weight.roll(1, 0))
        swapped[-1].bias.copy_(model[-1].bias.roll(1, 0))
    assert optimize(model).agreement(swapped, batches) == 0.0
    with pytest.raises(ValueError, match="no images"):
        half.agreement(model, [])


def test_float8_is_refused_where_nothing_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA GPU, but the model is on cpu"):
            optimize(tiny(), dtype=FLOAT8, calibration=[images()])
    from fastres.inference import freeze

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an older GPU")
    with pytest.raises(ValueError, match=r"8\.9 or above, but an older GPU has 8\.6"):
        freeze._require_engine(FLOAT8, torch.device("cuda"))
    with fastres.backend("reference"):
        with pytest.raises(ValueError, match="calibration is empty"):
            optimize(tiny(), dtype=FLOAT8, calibration=[])
        with pytest.raises(ValueError, match=r"calibration: .* are not finite"):
            optimize(tiny(), dtype=FLOAT8, calibration=[images() * float("inf")])


@needs_kernels
@pytest.mark.interpret
def test_the_kernel_computes_what_the_simulation_computes() -> None:
    w, shift = torch.randn(16, 16, 3, 3).double().to(DEVICE), torch.randn(16).double().to(DEVICE)
    x, residual = (quantised.to_float8(100 * torch.randn(1, 5, 6, 16)).to(DEVICE) for _ in range(2))
    arguments: dict[str, Any] = {
        "weights": quantised.pack(w, shift, Grid(0.01, 0, FLOAT8)),
        "geometry": Geometry(pad=1),
        "relu": True,
    }
    grids = Quantised(Grid(0.01, 0, FLOAT8), Grid(0.03, 0, FLOAT8), None)
    expected = 5 * reference.conv_quantised(
        x, residual, **arguments, grids=grids, dtype=torch.float32, wide=torch.float32
    )
    scales: dict[str, Any] = {"residual_scale": 0.03, "out_scale": 5.0, "out_dtype": torch.float32}
    got = folded.by_triton(x, residual, precision="ieee", **arguments, **scales)
    assert relative_error(got, expected) <= SUMS + lost_in_sums(9 * 16, x)


@pytest.mark.gpu
def test_gpu_float8_is_as_accurate_as_its_simulation() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    model, x = lived_in(fastres.resnet18()).cuda(), images(8, 64).cuda()
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    net = optimize(model, dtype=FLOAT8, calibration=[x])
    error = relative_error(net(x), reference)
    assert "simulated" not in net.explain()
    with fastres.backend("reference"):
        assert error <= 1.5 * relative_error(net(x), reference)
        assert "simulated" in net.explain()
