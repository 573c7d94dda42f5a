"""`fastres.optimize`: the plan answers as the original does, whoever calls it, however often, and says what it does."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cases import assert_close_to_reference, by_library, lost_in_sums, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import v2
from torchvision.tv_tensors import Image

import fastres
from fastres import optimize, paper
from fastres.inference import program
from fastres.inference.optimized import MAX_SHAPES, Optimized
from fastres.inference.plan import Chain, Conv, fuse, fuse_chains
from fastres.inference.trace import trace
from fastres.ops import dispatch, folded, quantised, reference
from fastres.ops.layout import Geometry
from fastres.ops.quantised import Grid, Quantised

FLOAT8 = torch.float8_e4m3fn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or dispatch.interpreting()), reason="neither a GPU nor TRITON_INTERPRET=1"
)


def lived_in(model: nn.Module) -> nn.Module:
    """`model` in eval mode with BN statistics and parameters unlike those of a fresh net."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


def tiny() -> nn.Module:
    """A stem, bottlenecks with and without a projection, one of them grouped, a basic block and a head; 10 classes."""
    projection = nn.Sequential(conv1x1(16, 32, stride=2), nn.BatchNorm2d(32))
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(Bottleneck(16, 8, 2, projection), Bottleneck(32, 8), Bottleneck(32, 8, groups=4, base_width=16)),
        *(BasicBlock(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    return lived_in(model)


def images(n: int = 2, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64).to(dtype)


def answers(net: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [net(x) for x in inputs]


# The answers are the original's.

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": fastres.resnet18,
    "resnet50": fastres.resnet50,
    "torchvision resnet": lambda: torchvision.models.ResNet(Bottleneck, [1, 2, 1, 1]),
    "torchvision resnext": lambda: torchvision.models.ResNet(Bottleneck, [1, 2, 1, 1], groups=32, width_per_group=4),
    "torchvision wide": lambda: torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=128),
    "dilated": lambda: fastres.models.resnet.ResNet(
        fastres.models.resnet.Bottleneck, [1, 2, 1, 1], replace_stride_with_dilation=[False, True, True]
    ),
    "group norm": lambda: fastres.resnet18(norm_layer=lambda channels: nn.GroupNorm(8, channels)),
    "frozen norm": lambda: fastres.resnet18(norm_layer=FrozenBatchNorm2d),
    "paper 18 A": lambda: paper.resnet(18, shortcut="A"),
    "paper 18 B": lambda: paper.resnet(18, shortcut="B"),
    "paper 18 C": lambda: paper.resnet(18, shortcut="C"),
    "paper plain": lambda: paper.plain(18),
    "paper cifar": lambda: paper.cifar(20),
    "paper cifar stem": lambda: paper.cifar_stem(18),
    "timm resnet26": lambda: timm.create_model("resnet26"),
    "timm deep stem, average down": lambda: timm.create_model("resnet26t", layers=(1, 1, 1, 1)),
    "timm squeeze-excitation": lambda: timm.create_model("seresnet18", layers=(1, 1, 1, 1)),
    "timm blur": lambda: timm.create_model("resnetblur18", layers=(1, 1, 1, 1)),
    "timm efficient attention": lambda: timm.create_model("ecaresnet26t", layers=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_exact_in_float64(name: str) -> None:
    model = lived_in(NETS[name]()).double()
    x = images(2, 33, torch.float64)
    (expected,) = answers(model, x)
    net = optimize(model)
    assert relative_error(net(x), expected) <= 1e-12
    assert relative_error(net(x.contiguous(memory_format=torch.channels_last)), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["torchvision resnext", "paper cifar"])
def test_error_is_within_twice_the_libraries(name: str, dtype: torch.dtype) -> None:
    model = lived_in(NETS[name]())
    x = images(2, 32)
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert_close_to_reference(optimize(model, dtype=dtype)(x), reference, baseline)


def test_dtypes() -> None:
    model, x = tiny(), images()
    assert optimize(model)(x.double()).dtype == torch.float32
    assert optimize(copy.deepcopy(model).bfloat16())(x).dtype == torch.bfloat16
    net = optimize(model, dtype=torch.float16)
    assert net(x).dtype == torch.float16
    assert torch.equal(net(x.half().float()), net(x.half()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(optimize(model)(x), optimize(model)(x.clone()))
        assert optimize(model)(x).dtype == torch.float32
    mixed = copy.deepcopy(model).bfloat16()
    mixed[1].float()  # a BatchNorm kept in float32 doesn't decide
    assert optimize(mixed)(x).dtype == torch.bfloat16


def test_inference_mode() -> None:
    model, x = tiny().to(DEVICE), images().to(DEVICE)
    with torch.inference_mode():
        net = optimize(model, x)
        expected = net(x).clone()
    assert torch.equal(net(x), expected)
    with torch.inference_mode():
        assert torch.equal(net(x.clone()), expected)
    net(x).add_(1)
    net.load_state_dict(model.state_dict())


def test_empty_batch_and_odd_sizes() -> None:
    model = tiny().double()
    net = optimize(model)
    for shape in ((0, 3, 16, 16), (1, 3, 9, 23), (3, 3, 17, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        assert net(x).shape == (shape[0], 10)
        assert relative_error(net(x), answers(model, x)[0]) <= 1e-12


def test_original_is_untouched() -> None:
    model = tiny()
    before = copy.deepcopy(model)
    state = {name: (t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    net = optimize(model, images(), dtype=torch.bfloat16)
    net(images())
    assert {name: (t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()} == state
    assert all(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert not net(images().requires_grad_()).requires_grad


class InPlace(nn.Module):
    """What an operation in place changes is seen by whoever reads its operand later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        kept = self.same(x)
        y = self.conv2(self.relu(x))
        early = kept.sigmoid()
        kept += y
        return early + kept * x.flatten(1).mean(1).reshape(-1, 1, 1, 1)


def test_in_place_operations() -> None:
    model, x = InPlace().double().eval(), images(dtype=torch.float64)
    (expected,) = answers(model, x)
    assert expected.dim() == 4
    assert relative_error(optimize(model)(x), expected) <= 1e-12


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda z: z.flatten(2),
    "torch.flatten": lambda z: torch.flatten(z, 1),
    "nn.Flatten": nn.Flatten(),
    "view": lambda z: z.view(z.size(0), -1),
    "reshape": lambda z: z.reshape(z.shape[0], -1),
    "slice": lambda z: z[:, 1:],
    "expand_as": lambda z: z.expand_as(z),
    "contiguous": lambda z: z.contiguous(),
    "a view of a view": lambda z: z[:, 1:].flatten(1),
}


def _plus_equal(z: Tensor) -> None:
    z += 1.0


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "relu_": torch.relu_,
    "F.relu": lambda z: F.relu(z, inplace=True),
    "F.relu by name": lambda z: F.relu(input=z, inplace=True),
    "nn.ReLU": nn.ReLU(inplace=True),
    "add_": lambda z: z.add_(1.0),
    "mul_": lambda z: z.mul_(0.5),
    "+=": _plus_equal,
}


class Shared(nn.Module):
    """A value, a view of it, a change of one, and `body` says who is read then."""

    def __init__(self, view: Any, change: Any, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.view, self.change, self.body = view, change, body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(self.conv(x)), self.view, self.change)


def _base_changed(z: Tensor, view: Any, change: Any) -> Tensor:
    v = view(z)
    change(z)
    return v * 2.0


def _view_changed(z: Tensor, view: Any, change: Any) -> Tensor:
    v = view(z)
    change(v)
    return z * 2.0


@pytest.mark.parametrize("body", [_base_changed, _view_changed])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_not_read_after_its_memory_changed(view: str, change: str, body: Callable[..., Tensor]) -> None:
    """Whether it would see the change depends on the memory format; eager does one or the other, a plan neither."""
    with pytest.raises(ValueError, match=r"that writes into '\w+': '\w+' may share its memory and is read later"):
        optimize(Shared(VIEWS[view], CHANGES[change], body).double().eval())


def _view_after(z: Tensor, view: Any, change: Any) -> Tensor:
    change(z)
    return view(z) * 2.0


def _view_alone(z: Tensor, view: Any, change: Any) -> Tensor:
    v = view(z)
    change(v)
    return v * 2.0


def _read_before(z: Tensor, view: Any, change: Any) -> Tensor:
    v = view(z).mean()
    change(z)
    return z * v


def _size_counted_up(z: Tensor, view: Any, change: Any) -> Tensor:
    """A number is no tensor: += gives another one, and the first stays."""
    before = count = z.shape[1]
    count += 1
    return z * before + count


@pytest.mark.parametrize("body", [_view_after, _view_alone, _read_before, _size_counted_up])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("view", ["flatten", "slice", "contiguous"])
def test_what_is_in_nobodys_way_may_change_in_place(view: str, change: str, body: Callable[..., Tensor]) -> None:
    model, x = lived_in(Shared(VIEWS[view], CHANGES[change], body)).double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= 1e-12


class ScaledByBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.full((4, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (self.scale + 1.0)


def test_what_is_computed_of_buffers_follows_a_loaded_state() -> None:
    model, x = ScaledByBuffer().double().eval(), images(dtype=torch.float64)
    net = optimize(model)
    assert dict(model.named_buffers()).keys() == {"scale"}
    assert vars(model).keys() == vars(ScaledByBuffer()).keys()  # tracing left nothing behind
    model.scale.fill_(5.0)
    net.load_state_dict(model.state_dict())
    assert relative_error(net(x), answers(model, x)[0]) <= 1e-12


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mul_(2.0))
        return y * x.mean()


def test_the_input_is_never_changed() -> None:
    model, x = ChangesItsInput().double().eval(), images(dtype=torch.float64)
    given = x.clone()
    with torch.no_grad():
        assert relative_error(optimize(model)(given), model(x.clone())) <= 1e-12
    assert torch.equal(given, x)


class ReadTwice(nn.Module):
    """The convolution's raw output, its normalised form and the sum are all read: only the last ReLU may merge."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        y = z + self.norm(z)
        return F.relu(self.last(y)) + y + F.relu(y)


def test_values_read_twice_are_not_merged_away() -> None:
    model, x = lived_in(ReadTwice()).double(), images(dtype=torch.float64)
    net = optimize(model)
    assert relative_error(net(x), answers(model, x)[0]) <= 1e-12
    assert sum(isinstance(step, Conv) and step.relu for step in net._steps) == 1


def test_shared_modules_and_parametrized_weights() -> None:
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    other = parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    model = lived_in(nn.Sequential(conv, norm, nn.ReLU(), conv, norm, other, nn.Dropout())).double()
    x = images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= 1e-12


# The plan.


def test_everything_fuses() -> None:
    raw, output = trace(fastres.resnet50().eval())
    plan = fuse(raw, output)
    convs = [step for step in plan if isinstance(step, Conv)]
    assert len(convs) == 53
    assert all(conv.pair.norm for conv in convs)
    assert sum(conv.relu for conv in convs) == 49  # all but the projections
    assert sum(conv.residual is not None for conv in convs) == 16
    assert sum(conv.bare for conv in convs) == sum(conv.absorbed is not None for conv in convs) == 4
    assert [step.name for step in plan if not isinstance(step, Conv)] == ["maxpool", "avgpool", "flatten", "fc"]
    chains = [step for step in fuse_chains(plan, output) if isinstance(step, Chain)]
    assert len(chains) == 2 + 2 + 4 + 1
    assert chains[0].name == "layer1.0.conv2 + layer1.0.conv3 + layer1.1.conv1"


@pytest.fixture
def chains_run_as_one(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Dispatch wants every chain as one kernel, here its meaning in plain PyTorch; returns the inputs' shapes."""
    calls: list[tuple[int, ...]] = []

    def bottleneck_chain(
        x: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, residual: Tensor, w1: Tensor, b1: Tensor
    ) -> tuple[Tensor, Tensor]:
        calls.append(tuple(x.shape))

        def conv(a: Tensor, w: Tensor, b: Tensor, pad: int, residual: Tensor | None = None) -> Tensor:
            p = folded.Folded(w, b, b)
            return folded.by_library(a, residual, p=p, geometry=Geometry(pad=pad), relu=True)

        out = conv(conv(x, w2, b2, 1), w3, b3, 0, residual)
        return out, conv(out, w1, b1, 0)

    module = types.ModuleType("fastres.kernels.chain")
    module.bottleneck_chain = bottleneck_chain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastres.kernels.chain", module)
    monkeypatch.setattr(dispatch, "why_chained", lambda problem, dtype, device: "measured somewhere")
    return calls


def test_chain_means_its_parts(chains_run_as_one: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny().double(), images(dtype=torch.float64)
    (expected,) = answers(model, x)
    net = optimize(model)
    assert relative_error(net(x), expected) <= 1e-12
    assert chains_run_as_one == [(2, 4, 4, 8)]  # 1 -> 2; the third bottleneck is grouped
    row = next(line for line in net.explain().splitlines() if "chain: " in line)
    assert "chain: 3x3 8->8 + relu -> 1x1 8->32 + residual + relu -> 1x1 32->8 + relu" in row
    assert row.endswith("  triton  measured somewhere")
    assert relative_error(net(x), expected) <= 1e-12
    monkeypatch.setattr(dispatch, "why_chained", lambda problem, dtype, device: None)
    unchained = optimize(model)
    apart = unchained(x)
    assert len(chains_run_as_one) == 2
    unchained._steps = fuse(*trace(model))  # the same plan, never chained
    unchained._fold()
    assert torch.equal(unchained(x), apart)


def test_explain() -> None:
    net = optimize(tiny())
    with pytest.raises(ValueError, match=r"^no plan yet; call it on a batch first$"):
        net.explain()
    net(images())
    lines = net.explain().splitlines()
    assert lines[0] == "Sequential in torch.float32, one step after the other"
    assert lines[1].split() == ["step", "layer", "what", "output", "engine", "why"]
    row = next(line for line in lines if "4.conv2" in line)
    assert "3x3 8->8 /2 + relu" in row
    assert "[2, 8, 4, 4]" in row
    assert ("onednn" in row and "one primitive does all of it" in row) or torch.cuda.is_available()
    net(images(1))
    assert "[1, 8, 4, 4]" in net.explain()
    assert net.explain((2, 3, 16, 16)).splitlines() == lines
    with pytest.raises(ValueError, match=r"\[5, .* \[2, 3, 16, 16\], \[1, 3, 16, 16\]\); call it on"):
        net.explain((5, 3, 16, 16))


def test_backend_in_force_has_plans_of_its_own() -> None:
    net, x = optimize(tiny()), images()
    first = net(x)
    with fastres.backend("reference"):
        torch.testing.assert_close(net(x), first, rtol=1e-5, atol=1e-6)  # on a CPU oneDNN sums in another order
        assert "backend('reference')" in net.explain()
    net(x)
    assert "backend" not in net.explain()


@pytest.mark.skipif(dispatch.interpreting() or torch.cuda.is_available(), reason="kernels can run here")
def test_forced_kernels_without_a_gpu() -> None:
    with fastres.backend("triton"), pytest.raises(RuntimeError, match="use a CUDA GPU or TRITON_INTERPRET=1"):
        optimize(tiny(), images())


# Results belong to the caller.


def test_results_are_the_callers_own() -> None:
    for model in (tiny(), tiny()[:7].eval()):  # scores and a feature map
        net, x = optimize(model), images()
        first = net(x)
        kept = first.clone()
        second = net(images())
        assert torch.equal(first, kept)
        assert not torch.equal(second, kept)
        first.fill_(7)
        assert torch.equal(net(x), kept)


def test_input_is_not_changed() -> None:
    net = optimize(InPlace().eval())
    x = images().contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    net(x)
    assert torch.equal(x, kept)


def test_threads() -> None:
    net = optimize(tiny(), torchscript=False)
    inputs = [images(1 + i % 3) for i in range(12)]
    expected = [optimize(tiny_like(net))(x) for x in inputs]
    results: list[list[Tensor | None]] = [[None] * len(inputs) for _ in range(4)]
    start = threading.Barrier(4)

    def work(row: list[Tensor | None]) -> None:
        start.wait()
        for i, x in enumerate(inputs):
            row[i] = net(x)

    threads = [threading.Thread(target=work, args=(row,)) for row in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in results:
        assert all(r is not None and torch.equal(r, e) for r, e in zip(row, expected, strict=True))


def tiny_like(net: nn.Module) -> nn.Module:
    model = tiny()
    model.load_state_dict(net.state_dict())
    return model


def test_number_of_shapes_is_bounded() -> None:
    model = tiny()
    net = optimize(model)
    for size in range(8, 8 + MAX_SHAPES + 3):
        x = images(1, size)
        assert_close_to_reference(net(x), answers(copy.deepcopy(model).double(), x.double())[0], answers(model, x)[0])
    assert len(net._programs) == MAX_SHAPES
    with pytest.raises(ValueError, match="no plan yet"):
        net.explain((1, 3, 8, 8))


# Saving and loading.


def test_state_dict_is_the_originals() -> None:
    model, x = tiny(), images()
    net = optimize(model)
    state = net.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert tiny_like(net).state_dict().keys() == state.keys()
    other = tiny()
    assert not torch.equal(optimize(other)(x), net(x))
    assert str(net.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(net(x), optimize(other)(x))
    nested = nn.ModuleDict({"net": optimize(model)})
    nested.load_state_dict({f"net.{key}": value for key, value in other.state_dict().items()})
    assert torch.equal(nested["net"](x), net(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})


def test_deepcopy_and_pickle() -> None:
    net, x = optimize(tiny(), dtype=torch.bfloat16), images()
    expected = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert isinstance(twin, Optimized)
        assert twin.dtype == torch.bfloat16
        assert torch.equal(twin(x), expected)
        twin.load_state_dict(tiny().state_dict())
        assert not torch.equal(twin(x), expected)
    assert torch.equal(net(x), expected)


def test_stays_in_eval_mode_and_dtype() -> None:
    net = optimize(tiny())
    assert net.eval() is net
    assert not net.training
    with pytest.raises(RuntimeError, match="frozen for inference"):
        net.train()
    with pytest.raises(TypeError, match=r"stays in torch\.float32"):
        net.half()
    assert net.to("cpu", memory_format=torch.channels_last) is net
    assert not any(p.requires_grad for p in net.parameters())
    assert "dtype=torch.float32" in repr(net)


# Refusals.


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class ManyImages(nn.Module):
    """A detector's input: a list."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [-image for image in images]


FUSED = {
    # net: convolutions with a BatchNorm folded in, with a ReLU, with a residual; chains of three
    "torchvision.resnet18": (20, 17, 8, 0),
    "torchvision.resnet34": (36, 33, 16, 0),
    "torchvision.resnet50": (53, 49, 16, 9),
    "torchvision.resnet101": (104, 100, 33, 26),
    "torchvision.resnet152": (155, 151, 50, 43),
    "torchvision.resnext50_32x4d": (53, 49, 16, 0),
    "torchvision.resnext101_32x8d": (104, 100, 33, 0),
    "torchvision.resnext101_64x4d": (104, 100, 33, 0),
    "torchvision.wide_resnet50_2": (53, 49, 16, 0),
    "torchvision.wide_resnet101_2": (104, 100, 33, 0),
    "torchvision.vgg11_bn": (8, 8, 0, 0),
    "torchvision.mobilenet_v2": (52, 0, 10, 0),
    "timm.resnet18": (20, 17, 8, 0),
    "timm.resnet50": (53, 49, 16, 9),
    "timm.resnet50d": (55, 51, 16, 9),
    "timm.resnext50_32x4d": (53, 49, 16, 0),
    "timm.wide_resnet50_2": (53, 49, 16, 0),
    "timm.seresnet50": (53, 53, 4, 0),
    "timm.ecaresnet50d": (55, 39, 4, 0),
    "timm.resnetrs50": (56, 56, 4, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_caution_costs_no_fusion(name: str) -> None:
    """What `optimize` refuses or leaves alone for safety's sake isn't what these nets consist of."""
    library, _, builder = name.partition(".")
    with torch.device("meta"):
        model = timm.create_model(builder) if library == "timm" else getattr(torchvision.models, builder)()
    steps, output = trace(model.eval())
    plan = fuse(steps, output)
    convs = [step for step in plan if isinstance(step, Conv)]
    counts = (
        sum(conv.pair.norm is not None for conv in convs),
        sum(conv.relu for conv in convs),
        sum(conv.residual is not None for conv in convs),
        sum(isinstance(step, Chain) for step in fuse_chains(plan, output)),
    )
    assert all(count >= least for count, least in zip(counts, FUSED[name], strict=True)), counts


class WritesItsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("calls", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.calls.add_(1.0)


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.conv(x)


class ViewInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        y += 1
        return x


def _hooked() -> nn.Module:
    model = tiny()
    model[4].conv2.register_forward_hook(lambda *_: None)
    return model


def _training() -> nn.Module:
    model = tiny()
    model[4].bn3.train()
    return model


def _parametrized_after_eval() -> nn.Module:
    model = tiny()
    parametrizations.weight_norm(model[4].conv2)
    return model


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "message"),
    [
        (lambda: "resnet50", {}, TypeError, "takes an nn.Module, got str"),
        (lambda: optimize(tiny()), {}, TypeError, "optimized already"),
        (_training, {}, ValueError, r"layer '4.bn3' \(BatchNorm2d\) is in training mode; call model.eval"),
        (_parametrized_after_eval, {}, ValueError, r"model.eval\(\) after the last change: .* parametrizations too"),
        (_hooked, {}, ValueError, "layer '4.conv2' carries a hook"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 3)).eval(), {}, ValueError, "no convolution"),
        (lambda: TwoInputs().eval(), {}, ValueError, "one input, this one also reads 'y'"),
        (lambda: TwoOutputs().eval(), {}, ValueError, "returns one tensor"),
        (lambda: Branching().eval(), {}, ValueError, "torch.fx can trace, Branching is none"),
        (
            lambda: ManyImages().eval(),
            {},
            ValueError,
            r"is none \(Proxy object cannot be iterated\); .* after fastres\.convert\(model\)$",
        ),
        (lambda: Inverse().eval(), {}, ValueError, "no step for linalg_inv.*accepts Conv2d, BatchNorm2d"),
        (
            lambda: ViewInPlace().eval(),
            {},
            ValueError,
            r"iadd\(\) that writes into 'flatten': 'x' may share its memory and is read later",
        ),
        (lambda: WritesItsBuffer().eval(), {}, ValueError, r"add_\(\) that writes into the model's own 'calls'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.LSTM(3, 3)).eval(), {}, ValueError, "layer '1', a LSTM"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, (1, 3), padding=(0, 1))).eval(),
            {},
            ValueError,
            "layer '0'.*same number",
        ),
        (lambda: nn.Conv2d(3, 3, 3, padding="same").eval(), {}, ValueError, "optimize"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)).eval(),
            *({}, ValueError, "layer '1' takes its statistics from the batch"),
        ),
        (
            lambda: _with_head(nn.BatchNorm1d(32, track_running_stats=False)),
            *({}, ValueError, "layer '10' takes its statistics from the batch"),
        ),
        (tiny, {"dtype": torch.int16}, ValueError, "accepted: torch.bfloat16, torch.float16"),
        (tiny, {"dtype": FLOAT8}, ValueError, "need calibration="),
        (tiny, {"dtype": torch.float16, "calibration": []}, ValueError, "no other dtype takes it"),
        (lambda: tiny().to("meta"), {}, ValueError, "on one device, got meta"),
    ],
)
def test_refused(model: Callable[[], Any], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize(model(), **kwargs)


def test_weights_that_are_not_finite() -> None:
    model = tiny()
    model[4].bn2.running_var[3] = -1
    with pytest.raises(ValueError, match=r"'4.conv2 \+ 4.bn2': the folded scale.* channels \[3\] of 8"):
        optimize(model)
    model = tiny()
    with torch.no_grad():
        model[0].weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"'0 \+ 1': the folded weight isn't finite in output channels \[1\]"):
        optimize(model)
    model = tiny()
    with torch.no_grad():
        model[4].bn1.weight[5] = 1e7
    with pytest.raises(ValueError, match=r"'4.conv1': the folded weight in torch.float16 .*\[5\]"):
        optimize(model, dtype=torch.float16)
    optimize(model, dtype=torch.bfloat16)


def test_input_that_does_not_fit() -> None:
    net = optimize(tiny())
    with pytest.raises(TypeError, match=r"floating dtype expected, got torch\.uint8"):
        net(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\] expected, got shape \[3, 16, 16\]"):
        net(images()[0])
    with pytest.raises(ValueError, match=r"layer '0' takes 3 channels \[N, 3, H, W\], got \[2, 5, 16, 16\]"):
        net(torch.zeros(2, 5, 16, 16))
    with pytest.raises(ValueError, match="the net is on cpu, the input on meta"):
        net(images().to("meta"))
    large = optimize(nn.Sequential(nn.Conv2d(3, 3, 7)).eval())
    with pytest.raises(ValueError, match="layer '0': the 7x7 filter is larger than the padded input"):
        large(images(1, 4))


class Adds(nn.Module):
    """A number or what broadcasts, added to a convolution's output or the other way round."""

    def __init__(self, what: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.conv, self.pool, self.what = nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), what
        self.register_buffer("shift", torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.what(x, self))


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
def test_what_is_added_may_broadcast(what: Callable[[Tensor, Any], Any]) -> None:
    model, x = Adds(what).double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= 1e-12


def test_what_is_added_must_fit() -> None:
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        optimize(Adds(lambda x, m: m.conv(x) + x[:, :, 1:]).eval())(images())


class Asks(nn.Module):
    """The model's own code looks at what it is given."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 3, 1), body
        self.register_buffer("table", torch.tensor([2, 0]))
        self.plain = torch.randn(3, 1, 1)
        self.counted = 0

    def count(self) -> int:
        self.counted += 1
        return self.counted

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, twice: bool = False) -> Tensor:
        self.last = x
        return self.body(self, x, mask, scale, twice)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x, mask, scale, twice: m.conv(x) if mask is None else x,
        lambda m, x, mask, scale, twice: m.conv(x) * scale if twice is False else x,
        lambda m, x, mask, scale, twice: m.conv(x) if not torch.is_grad_enabled() else x,
        lambda m, x, mask, scale, twice: m.conv(x)[:, m.table],
        lambda m, x, mask, scale, twice: torch.reshape(input=m.conv(x), shape=(x.shape[0], -1)),
    ],
)
def test_branches_are_those_of_a_call(body: Callable[..., Tensor]) -> None:
    model, x = Asks(body).double().eval(), images(dtype=torch.float64)
    net = optimize(model)
    assert not hasattr(model, "last"), "the model stays as it was"
    assert relative_error(net(x), answers(model, x)[0]) <= 1e-12
    copy.deepcopy(net)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda m, x, *_: m.conv(x) + m.plain, "neither a parameter nor a buffer"),
        (lambda m, x, *_: m.conv(x) + torch.randn(3, 1, 1), "neither a parameter nor a buffer"),
        (lambda m, x, *_: m.conv(x * m.count()), "attribute 'counted' when it is called"),
        (lambda m, x, *_: m.conv(x) + m.conv.weight.view(-1).mul_(0.5).sum(), "the model's own 'conv.weight'"),
        (lambda m, x, *_: torch.add(m.conv(x), 2, x), r"add\(\) with"),
    ],
)
def test_what_depends_on_more_than_the_input_is_refused(body: Callable[..., Tensor], message: str) -> None:
    model = Asks(body).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        optimize(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "tells",
    [
        lambda x: isinstance(x, Tensor),
        torch.is_tensor,
        lambda x: type(x) is Tensor,
        lambda x: not hasattr(x, "decoded"),
        lambda x: not callable(x),
        lambda x: "tensor" in f"{x}",
    ],
)
def test_a_model_that_tells_tensors_from_stand_ins_is_refused(tells: Callable[[Any], bool]) -> None:
    model = Asks(lambda m, x, *_: m.conv(x) if tells(x) else m.conv(x) * 2.0).eval()
    with pytest.raises(ValueError, match="the plan of Asks doesn't answer as Asks does"):
        optimize(model)(images())
    with pytest.raises(ValueError, match="the plan of Asks doesn't answer as Asks does"):
        optimize(model, images())


def test_a_net_for_one_size_of_batch() -> None:
    model, x = Asks(lambda m, x, *_: m.conv(x).reshape(1, 12, 16, 16)).double().eval(), images(4, dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= 1e-12


def test_under_transforms_it_answers_too() -> None:
    model, x = tiny().double(), images(dtype=torch.float64)
    y, _ = torch.func.jvp(optimize(model), (x,), (torch.ones_like(x),))
    assert relative_error(y, answers(model, x)[0]) <= 1e-12


def test_a_call_of_its_own_is_refused() -> None:
    class Called(Adds):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2.0

    with pytest.raises(ValueError, match=r"the model \(Called\) has a __call__ of its own"):
        optimize(Called(lambda x, m: m.conv(x)).eval())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="a hook for all modules"):
            optimize(tiny())
    finally:
        handle.remove()


def test_what_raises_once_raises_again() -> None:
    """A comparison that fails is not done with."""
    net = optimize(Asks(lambda m, x, *_: m.conv(x) if type(x) is Tensor else m.conv(x) * 2.0).eval())
    for other in (net, copy.deepcopy(net)):
        for _ in range(2):
            with pytest.raises(ValueError, match="doesn't answer as Asks does"):
                other(images())


def test_a_traced_net_is_accepted() -> None:
    model, x = tiny().double(), images(dtype=torch.float64)
    again = torch.fx.symbolic_trace(model).eval()
    assert relative_error(optimize(again)(x), answers(model, x)[0]) <= 1e-12


class Normalises(nn.Module):
    """Its own input, by what registers as buffers or by numbers, before a net."""

    def __init__(self, body: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.net, self.body = tiny(), body
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(shape or 3))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(shape or 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.body(self, x))


def _in_place(m: Any, x: Tensor) -> Tensor:
    x -= m.mean
    x /= m.std
    return x


FRONTS: dict[str, Callable[[], nn.Module]] = {
    "[1, C, 1, 1]": lambda: Normalises(lambda m, x: (x - m.mean) / m.std, 1, 3, 1, 1),
    "[C, 1, 1]": lambda: Normalises(lambda m, x: (x - m.mean) / m.std, 3, 1, 1),
    "[C]": lambda: Normalises(lambda m, x: (x - m.mean[None, :, None, None]) / m.std.view(1, -1, 1, 1)),
    "numbers": lambda: Normalises(lambda m, x: x / 255 - 0.5),
    "from -1 to 1": lambda: Normalises(lambda m, x: 1 - 2 * x / 255),
    "methods": lambda: Normalises(lambda m, x: x.sub(m.mean).div(m.std), 3, 1, 1),
    "methods in place": lambda: Normalises(lambda m, x: x.sub_(m.mean).div_(m.std), 3, 1, 1),
    "operators in place": lambda: Normalises(_in_place, 3, 1, 1),
}
HEADS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 16), nn.ReLU()).append(
        nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))
    ),
    "its kinds": lambda: nn.Sequential(nn.BatchNorm1d(32, affine=False), nn.BatchNorm1d(32, eps=0.1, momentum=None)),
}


def _with_head(head: nn.Module) -> nn.Module:
    model = nn.Sequential(*tiny()[:-1], head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.track_running_stats:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", [*FRONTS, *HEADS])
def test_fronts_and_heads(name: str, dtype: torch.dtype) -> None:
    model = FRONTS[name]().eval() if name in FRONTS else _with_head(HEADS[name]())
    x = torch.rand(6, 3, 16, 16) * (255 if "numbers" in name or "from" in name else 1)
    kept, (reference,) = x.clone(), answers(copy.deepcopy(model).double(), x.double())
    if dtype == torch.int8:
        with fastres.backend("reference"):
            net = optimize(model, dtype=dtype, calibration=[x])
            assert relative_error(net(x), reference) < 0.1
    else:
        net = optimize(model, dtype=dtype)
        got = net(x)
        assert torch.equal(x, kept)
        (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype, copy=True))
        if dtype == torch.float64:
            assert relative_error(got, reference) <= 1e-12
        else:
            assert_close_to_reference(got, reference, baseline)
    assert torch.equal(x, kept)
    assert net._by_image == (name != "[C]")


class Embeds(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.body = nn.Sequential(*tiny()[:-2]), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.net(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.normalize(x.flatten(1)),
        lambda x: F.normalize(x.flatten(1), p=1, dim=-1),
        lambda x: x.squeeze(-1).squeeze(-1),
        torch.squeeze,
    ],
)
def test_embeddings(body: Callable[[Tensor], Tensor]) -> None:
    model, x = Embeds(body).double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= 1e-12


def test_a_constant_is_no_batch() -> None:
    """What is computed of the model's tensors alone has no images to be cut into."""
    body: Any = lambda m, x: F.relu(m.mean) if m.net is not None else x  # noqa: E731
    for front in (lambda m, x: m.mean - m.std, body):
        steps_of = Normalises(lambda m, x, front=front: x * front(m, x), 1, 3, 1, 1).eval()
        assert not optimize(steps_of)._by_image


def _exported(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()


def _compiled(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(net, backend="eager", dynamic=True, fullgraph=True)


def _as_onnx(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    runtime, file = pytest.importorskip("onnxruntime"), io.BytesIO()
    torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


RECORDERS: dict[str, Callable[..., Any]] = {
    "torch.jit.trace": torch.jit.trace,
    "torch.export": _exported,
    "torch.compile": _compiled,
    "vmap": lambda net, x: lambda x: torch.func.vmap(lambda image: net(image[None])[0])(x),
    "onnx": pytest.param(_as_onnx, marks=pytest.mark.extra),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("called", [False, True], ids=["cold", "called before"])
@pytest.mark.parametrize("recorder", RECORDERS.values(), ids=RECORDERS)
def test_a_recording_answers_for_any_number_of_images(recorder: Any, called: bool) -> None:
    model = tiny()
    net = optimize(model, images(2) if called else None)
    recorded = recorder(net, images(2))
    assert {key[0] for key in net._programs} <= {(2, 3, 16, 16)}  # jit.trace checks with a call
    for n in (1, 2, 5):
        x = images(n)
        assert relative_error(recorded(x), answers(model, x)[0]) <= 1e-5
    assert relative_error(net(x), answers(model, x)[0]) <= 1e-5


def test_a_recording_is_made_in_whatever_mode() -> None:
    net, x = optimize(tiny()), images()
    for mode in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with mode:
            assert torch.equal(_compiled(net, x)(x), net._run_recorded(x))
    exported = torch.export.export(optimize(tiny(), dtype=torch.bfloat16), (x.requires_grad_(),)).module()
    assert exported(x).dtype == torch.bfloat16
    assert not exported(x).requires_grad


def test_what_cannot_be_recorded_says_so() -> None:
    model, x = tiny(), images()
    with fastres.backend("reference"):
        small = optimize(model, dtype=torch.int8, calibration=[x])
    for recorder in (torch.jit.trace, _exported):
        with pytest.raises(RuntimeError, match="this int8 net can't be traced, exported, compiled or transformed"):
            recorder(small, x)


def test_a_tensor_that_carries_more_is_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision's transforms give: it goes to the engines, and the answer is a plain tensor."""
    net, x = optimize(tiny()), images()
    expected = net(x)
    monkeypatch.setattr(Optimized, "_run_recorded", None)
    for given in (Image(x), nn.Parameter(x)):
        y = net(given)
        assert type(y) is Tensor
        assert torch.equal(y, expected)


@pytest.mark.parametrize("first", [1, 5])
def test_shifts_of_convolutions_that_broadcast(first: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, first, 1), nn.Conv2d(3, 6 - first, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + self.b(x))

    model, x = Two().double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= 1e-12


@pytest.mark.parametrize("body", [lambda x, m: x, lambda x, m: m.shift.expand_as(x), lambda x, m: m.shift])
def test_results_that_nothing_computes_are_the_callers_own(body: Callable[[Tensor, Any], Any]) -> None:
    class Returned(Adds):
        def forward(self, x: Tensor) -> Tensor:
            return body(x, self)[:, :] if self.conv(x) is not None else x

    net, x = optimize(Returned(body).eval()), images()
    kept = x.clone()
    first = net(x)
    want = first.clone()
    first.add_(1.0)
    assert torch.equal(x, kept)
    assert torch.equal(net(x), want)


# FP8.


@pytest.fixture
def simulated() -> Iterator[None]:
    with fastres.backend("reference"):
        yield


def e4m3(x: Tensor) -> Tensor:
    """x (float64) rounded to e4m3: 3 fraction bits, smallest exponent -6, saturating at 448."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(2.0**-9))).clamp_min(-6) - 3)
    return (torch.round(x / step) * step).clamp(-448, 448)


def test_float8_convolution_from_its_definition() -> None:
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
    arguments: dict[str, Any] = {"p": p, "geometry": Geometry(pad=1), "relu": True, "wide": torch.float32}
    inputs = quantised.to_float8(x / x_scale), quantised.to_float8(residual / residual_scale)
    arguments["dtype"] = torch.float32
    got = reference.conv_quantised(*inputs, **arguments, grids=replace(grids, out=None))
    assert relative_error(got, y) <= 1e-6
    got = reference.conv_quantised(*inputs, **arguments, grids=grids)
    expected = e4m3(y / y_scale)
    assert (expected == 448).any()
    assert expected.max() < (y / y_scale).max()  # saturated
    near = (got.double() - expected).abs() / expected.clamp_min(2.0**-6)
    assert near.max() <= 2.0**-3  # one step apart, where float32 fell on the other side of a tie
    assert (near == 0).double().mean() > 0.99


def test_float8_net(simulated: None) -> None:
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
def test_float8_nets_of_the_family(name: str, simulated: None) -> None:
    model = lived_in(NETS[name]())
    x = images(2, 32)
    net = optimize(model, dtype=FLOAT8, calibration=[x])
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    assert relative_error(net(x), reference) < 0.2


def test_agreement(simulated: None) -> None:
    model = tiny()
    with torch.no_grad():
        model[-1].weight.mul_(8)  # scores far apart
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


def test_float8_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA GPU, the model is on cpu"):
            optimize(tiny(), dtype=FLOAT8, calibration=[images()])
    from fastres.inference import freeze

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an older GPU")
    with pytest.raises(ValueError, match=r"8\.9 or above, an older GPU has 8\.6"):
        freeze._require_engine(FLOAT8, torch.device("cuda"))
    with fastres.backend("reference"):
        with pytest.raises(ValueError, match="calibration is empty"):
            optimize(tiny(), dtype=FLOAT8, calibration=[])
        with pytest.raises(ValueError, match=r"calibration: .* aren't finite"):
            optimize(tiny(), dtype=FLOAT8, calibration=[images() * float("inf")])


# Our kernels, in the interpreter or on a GPU.


@needs_kernels
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_answer_as_the_original(dtype: torch.dtype) -> None:
    model, x = tiny().to(DEVICE), images(2, 12).to(DEVICE)
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype))
    with fastres.backend("triton"):
        net = optimize(model, dtype=dtype)
        assert_close_to_reference(net(x), reference, baseline, lost=lost_in_sums(9 * 32, baseline))
        ours = sum(isinstance(m, (nn.Conv2d, nn.MaxPool2d)) for m in model.modules())
        assert net.explain().count("  triton  ") == ours


class Named(nn.Module):
    """A module and a function of one name, which pool differently, and a pool of what never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.max_pool2d = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.register_buffer("fixed", torch.randn(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool2d(F.max_pool2d(self.conv(x), 2)) + self.max_pool2d(self.fixed)


@needs_kernels
@pytest.mark.interpret
def test_a_function_named_like_a_module() -> None:
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
def test_which_pools_are_ours(pool: nn.Module, ours: bool) -> None:
    """Whatever computes it, the answer is PyTorch's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), pool).eval().to(DEVICE)
    x = images(2, 18).to(DEVICE)
    with fastres.backend("triton"):
        net = optimize(model)
        assert_close_to_reference(net(x), *answers(copy.deepcopy(model).double(), x.double()), *answers(model, x))
        row = next(line for line in net.explain().splitlines() if "MaxPool2d" in line)
    assert ("writes no indices" in row) == ours, row


@needs_kernels
@pytest.mark.interpret
def test_kernel_after_the_library() -> None:
    w, shift = torch.randn(8, 4, 3, 3).to(DEVICE), torch.randn(8).to(DEVICE)
    x, residual = torch.randn(2, 5, 6, 4).to(DEVICE), torch.randn(2, 5, 6, 8).to(DEVICE)
    packed, exact = (folded.pack(w, shift, dtype, "layer") for dtype in (torch.float32, torch.float64))
    static: dict[str, Any] = {"geometry": Geometry(pad=1), "relu": True}
    for inputs in ((x,), (x, residual)):
        reference = by_library(folded.by_library, *(t.double() for t in inputs), p=exact, **static)
        baseline = by_library(folded.by_library, *inputs, p=packed, **static)
        got = folded.by_library_and_kernel(*inputs, ones=torch.ones(8).to(DEVICE), p=packed, **static)
        assert_close_to_reference(got, reference, baseline)


@needs_kernels
@pytest.mark.interpret
def test_float8_kernel_means_its_simulation() -> None:
    w, shift = torch.randn(16, 16, 3, 3).double().to(DEVICE), torch.randn(16).double().to(DEVICE)
    x, residual = (quantised.to_float8(100 * torch.randn(1, 5, 6, 16)).to(DEVICE) for _ in range(2))
    arguments: dict[str, Any] = {
        "p": quantised.pack(w, shift, Grid(0.01, 0, FLOAT8)),
        "geometry": Geometry(pad=1),
        "relu": True,
    }
    grids = Quantised(Grid(0.01, 0, FLOAT8), Grid(0.03, 0, FLOAT8), None)
    expected = 5 * reference.conv_quantised(
        x, residual, **arguments, grids=grids, dtype=torch.float32, wide=torch.float32
    )
    scales: dict[str, Any] = {"residual_scale": 0.03, "out_scale": 5.0, "out_dtype": torch.float32}
    got = folded.by_triton(x, residual, precision="ieee", **arguments, **scales)
    assert relative_error(got, expected) <= 1e-5 + lost_in_sums(9 * 16, x)


# cuDNN's fused convolution, here a stand-in, and the clock.


class Clock:
    """Every step by the library, its fused convolution feigned; `takes` are the microseconds of fused and apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: tuple[float, float]) -> None:
        self.takes, self.capturing, self.asked = list(takes), False, 0
        self.fused: list[tuple[int, ...]] = []
        # The plan that is held against the model beforehand is in float64.
        engine = {torch.float64: "aten"}
        monkeypatch.setattr(
            dispatch, "why_engine", lambda _, problem, dtype, on: (engine.get(dtype, "cudnn"), "said so")
        )
        monkeypatch.setattr(dispatch, "pointwise_engine", lambda *_: "aten")
        monkeypatch.setattr(folded, "by_cudnn", self.by_cudnn)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(program, "_fused_times", {})
        monkeypatch.setattr(program, "_microseconds", self.microseconds)

    def by_cudnn(self, x: Tensor, residual: Tensor | None = None, **static: Any) -> Tensor:
        self.fused.append(tuple(x.shape))
        return folded.by_library(x, residual, relu=True, **static)

    def microseconds(self, calls: list[Callable[[], tuple[Tensor]]], device: torch.device) -> list[float]:
        self.asked += 1
        (fused,), (apart,) = (call() for call in calls)
        assert device == fused.device
        assert torch.equal(fused, apart)
        return self.takes


@pytest.mark.parametrize(("takes", "taken"), [((61.2, 54.9), "cudnn"), ((40.0, 54.9), "cudnn fused")])
def test_the_fused_convolution_is_taken_where_it_is_faster(
    takes: tuple[float, float], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, model, x = Clock(monkeypatch, takes), tiny(), images()
    net = optimize(model, x)
    rows = [line for line in net.explain().splitlines() if "+ relu" in line]
    said = f"said so; measured: fused {takes[0]:.0f} us, apart 55 us"
    assert rows
    assert all(f"  {taken}  " in row and row.endswith(said) for row in rows)
    clock.fused.clear()
    (reference,) = answers(model.double(), x.double())
    assert relative_error(net(x), reference) < 1e-5
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
    assert clock.asked == 2, "another size has times of its own"
    assert "measured: fused 2 us, apart 1 us" in net.explain()
    assert "measured: fused 1 us, apart 2 us" in net.explain((2, 8, 6, 6))
    optimize(model, torch.randn(2, 8, 6, 6), dtype=torch.bfloat16)
    assert clock.asked == 3


def test_nothing_is_timed_in_a_capture_or_beside_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), images()
    clock = Clock(monkeypatch, (2.0, 1.0))
    clock.capturing = True
    net = optimize(model, x)
    assert clock.asked == 0
    assert "cudnn fused  said so\n" in net.explain() + "\n"
    clock.capturing = False
    assert "  cudnn   said so; measured: fused 2 us" in optimize(model, x).explain()

    def fails(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory\nfor one more tensor")

    monkeypatch.setattr(program, "_fused_times", {})
    with monkeypatch.context() as within:
        within.setattr(program, "_microseconds", fails)
        net = optimize(model, x)
    assert "cudnn fused  said so; apart: out of memory\n" in net.explain() + "\n"


def test_the_clock_takes_the_fastest_of_three_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
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


# CUDA graphs and streams.


def on_gpu() -> Optimized:
    return optimize(tiny().cuda(), dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton", "cudnn", "reference"])
def test_gpu_answers_as_the_original(backend: str, dtype: torch.dtype) -> None:
    model = lived_in(fastres.resnet50()).cuda()
    x = images(4, 96).cuda()
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastres.backend("reference"):
        (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastres.backend(backend):
        graphed, stepped = optimize(model, x, dtype=dtype), optimize(model, dtype=dtype, cuda_graph=False)
        for net in (graphed, stepped):
            assert_close_to_reference(net(x), reference, baseline, lost=lost_in_sums(9 * 512, baseline))
        assert "replayed as a CUDA graph" in graphed.explain()
        assert "one step after the other" in stepped.explain()


@pytest.mark.gpu
def test_gpu_results_survive_later_calls_threads_and_streams() -> None:
    net = on_gpu()
    inputs = [images(1 + i % 3).cuda() for i in range(12)]
    expected = [net(x).clone() for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                results = [net(x) for x in inputs]
                wrong.extend(i for i, (r, e) in enumerate(zip(results, expected, strict=True)) if not torch.equal(r, e))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_gpu_number_of_graphs_is_bounded() -> None:
    net = on_gpu()
    for _ in range(2):
        for size in range(8, 8 + MAX_SHAPES + 2):
            x = images(1, size).cuda()
            assert torch.equal(net(x), net(x))
    assert len(net._programs) == MAX_SHAPES
    assert net(images(0).cuda()).shape == (0, 10)


@pytest.mark.gpu
def test_gpu_inside_anothers_graph() -> None:
    net = on_gpu()
    x = images().cuda()
    expected = net(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_gpu_switches_of_pytorch() -> None:
    model = lived_in(fastres.resnet18()).cuda()  # wide enough that the library has TF32 kernels for it
    net, x = optimize(model), images(8, 64).cuda()
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    errors = {}
    for tf32 in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            errors[tf32] = relative_error(net(x), reference)
    assert errors[False] < 1e-5 < errors[True]
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False), fastres.backend("cudnn"):
        assert relative_error(net(x), reference) < 1e-5
        assert "cudnn.enabled is off" in net.explain()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False), fastres.backend("cudnn"):
        net(x)
        assert "cudnn fused" not in net.explain()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastres.backend("cudnn"):
        net(x)
        assert "measured: fused" in net.explain()


@pytest.mark.gpu
def test_gpu_moves_and_copies() -> None:
    net, x = optimize(tiny(), dtype=torch.float16), images()
    expected = net(x)
    moved = copy.deepcopy(net).cuda()
    assert relative_error(moved(x.cuda()).cpu(), expected.double()) < 1e-2
    assert torch.equal(copy.deepcopy(moved)(x.cuda()), moved(x.cuda()))
    assert torch.equal(pickle.loads(pickle.dumps(moved))(x.cuda()), moved(x.cuda()))


@pytest.mark.gpu
def test_gpu_float8() -> None:
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


@pytest.mark.parametrize("kind", [torchvision.transforms.Normalize, v2.Normalize])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torchvisions_normalize_in_front(kind: type[Any], dtype: torch.dtype) -> None:
    model, x = nn.Sequential(kind([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]), tiny()).eval(), images()
    before = x.clone()
    net = optimize(model, dtype=dtype)
    exact, baseline = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert_close_to_reference(net(x), exact, baseline)
    assert torch.equal(x, before)
    assert net.state_dict().keys() == model.state_dict().keys()
    assert type(model[0]) is kind
    with pytest.raises(ValueError, match="no convolution"):
        optimize(nn.Sequential(model[0]).eval())
    model[0].inplace = True  # a stand-in passes through that of v2; the comparison at the first call hears of it
    with pytest.raises(ValueError, match=r"can trace|doesn't answer as Sequential does"):
        optimize(model)(x)
