"""Test that `trace` gives steps with the model's results, also for in-place operations, or raises a clear error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from nets import Adds, Asks, answers, images, lived_in, tiny
from tolerances import EXACT_BLOCK
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastres import optimize


class InPlace(nn.Module):
    """A net whose in-place operations change tensors that are read later, also under another name."""

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


def test_in_place_changes_reach_later_readers() -> None:
    model, x = InPlace().double().eval(), images(dtype=torch.float64)
    (expected,) = answers(model, x)
    assert expected.dim() == 4
    assert relative_error(optimize(model)(x), expected) <= EXACT_BLOCK


def test_an_input_in_channels_last_is_not_changed() -> None:
    net = optimize(InPlace().eval())
    x = images().contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    net(x)
    assert torch.equal(x, kept)


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
    """A net with a value, a view of it, and an in-place change of one of the two. `body` says which is read later."""

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
    """In eager, whether the view sees the change can depend on the memory format, so `optimize` refuses the model."""
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
    """A number is not a tensor: += gives a new number, and `before` keeps its value."""
    before = count = z.shape[1]
    count += 1
    return z * before + count


@pytest.mark.parametrize("body", [_view_after, _view_alone, _read_before, _size_counted_up])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("view", ["flatten", "slice", "contiguous"])
def test_harmless_in_place_changes_are_accepted(view: str, change: str, body: Callable[..., Tensor]) -> None:
    model, x = lived_in(Shared(VIEWS[view], CHANGES[change], body)).double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= EXACT_BLOCK


class ScaledByBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.full((4, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (self.scale + 1.0)


def test_values_computed_from_buffers_follow_a_loaded_state_dict() -> None:
    model, x = ScaledByBuffer().double().eval(), images(dtype=torch.float64)
    net = optimize(model)
    assert dict(model.named_buffers()).keys() == {"scale"}
    assert vars(model).keys() == vars(ScaledByBuffer()).keys()  # tracing added no attributes
    model.scale.fill_(5.0)
    net.load_state_dict(model.state_dict())
    assert relative_error(net(x), answers(model, x)[0]) <= EXACT_BLOCK


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
        assert relative_error(optimize(model)(given), model(x.clone())) <= EXACT_BLOCK
    assert torch.equal(given, x)


def test_shared_modules_and_parametrized_weights_are_folded() -> None:
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    other = parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    model = lived_in(nn.Sequential(conv, norm, nn.ReLU(), conv, norm, other, nn.Dropout())).double()
    x = images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= EXACT_BLOCK


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class ManyImages(nn.Module):
    """A model with a list as input, like a detector."""

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [-image for image in images]


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
    ("model", "message"),
    [
        (_training, r"layer '4.bn3' \(BatchNorm2d\) is in training mode; call model.eval"),
        (_parametrized_after_eval, r"model.eval\(\) after the last change to the model: .* parametrizations too"),
        (_hooked, "layer '4.conv2' has a hook"),
        (lambda: TwoInputs().eval(), "one input, this model also reads 'y'"),
        (lambda: Branching().eval(), "torch.fx can trace; tracing Branching failed"),
        (
            lambda: ManyImages().eval(),
            r"failed \(Proxy object cannot be iterated\)\. .* use fastres\.convert\(model\)$",
        ),
        (lambda: Inverse().eval(), "does not support linalg_inv.*accepts Conv2d, BatchNorm2d"),
        (
            lambda: ViewInPlace().eval(),
            r"iadd\(\) that writes into 'flatten': 'x' may share its memory and is read later",
        ),
        (lambda: WritesItsBuffer().eval(), r"add_\(\) that writes into the model's own 'calls'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.LSTM(3, 3)).eval(), "layer '1', a LSTM"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, (1, 3), padding=(0, 1))).eval(), "layer '0'.*same number"),
        (lambda: nn.Conv2d(3, 3, 3, padding="same").eval(), "optimize"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)).eval(),
            "layer '1' uses batch statistics",
        ),
        (
            lambda: nn.Sequential(*tiny()[:-1], nn.BatchNorm1d(32, track_running_stats=False)).eval(),
            "layer '10' uses batch statistics",
        ),
    ],
)
def test_models_that_no_plan_can_represent_are_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimize(model())


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
def test_branches_are_taken_as_in_an_ordinary_call(body: Callable[..., Tensor]) -> None:
    model, x = Asks(body).double().eval(), images(dtype=torch.float64)
    net = optimize(model)
    assert not hasattr(model, "last"), "the model stays as it was"
    assert relative_error(net(x), answers(model, x)[0]) <= EXACT_BLOCK
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
def test_models_that_depend_on_more_than_the_input_are_refused(body: Callable[..., Tensor], message: str) -> None:
    model = Asks(body).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        optimize(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_overridden_call_and_global_hooks_are_refused() -> None:
    class Called(Adds):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2.0

    with pytest.raises(ValueError, match=r"the model \(Called\) overrides __call__"):
        optimize(Called(lambda x, m: m.conv(x)).eval())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="a global hook for all modules"):
            optimize(tiny())
    finally:
        handle.remove()


def test_a_net_traced_by_fx_is_accepted() -> None:
    model, x = tiny().double(), images(dtype=torch.float64)
    again = torch.fx.symbolic_trace(model).eval()
    assert relative_error(optimize(again)(x), answers(model, x)[0]) <= EXACT_BLOCK
