"""Test that changed memory formats are never visible, also with in-place operations and shared memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from compiled import ALWAYS, Case, conv_bn, tiny
from tolerances import EXACT
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

pytestmark = pytest.mark.usefixtures("compiled_afresh")


def then(change: Callable[[Tensor], Any], kept: Callable[[Tensor], Tensor] = lambda y: y) -> Callable[..., Any]:
    """Return a body: it applies `kept` to a conv-BN pair's result, changes the result, and returns what `kept` gave."""

    def body(x: Tensor, a: nn.Module) -> Tensor:
        y = a(x)
        names = kept(y)
        change(y)
        return names

    return body


def later(value: Callable[[Tensor], Tensor], change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Return a body: `value` of a conv-BN pair's result, then the other layers, then the outcome's change in place."""

    def body(x: Tensor, a: nn.Module, *rest: nn.Module) -> Tensor:
        y = value(a(x))
        for layer in rest:
            y = layer(y)
        change(y)
        return y

    return body


def second_name_in_place(x: Tensor, a: nn.Module) -> tuple[Tensor, Tensor]:
    y = a(x)
    z = y.flatten(1)
    z.relu_()
    return y, z


def plus_equal(y: Tensor) -> None:
    y += 1.0


def cleared(y: Tensor) -> None:
    y[:, :1] = 0.0


def input_in_place(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x)
    x.mul_(2.0)
    return F.relu(y + x)


def moved_before_padding(x: Tensor, a: nn.Module) -> Tensor:
    x = x * 1.0
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
    x.mul_(2.0)
    return F.relu(a(x) + shortcut)


def gate_in_place(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x) * 0.5
    whole = y[:]
    whole += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
    return F.relu(whole) + y


def other_shape(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return F.relu(a(x) + b(x))


def statistics_of_another_mode(x: Tensor, a: nn.Module) -> Tensor:
    """The second, functional BatchNorm reads the running statistics that the first one updates."""
    conv, norm = a
    y = F.relu(norm(conv(x)))
    return F.relu(F.batch_norm(conv(y), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, 1e-5))


def padding_changed(x: Tensor, a: nn.Module) -> Tensor:
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
    shortcut.mul_(2.0)
    return F.relu(a(x) + shortcut)


def changed_by_name(x: Tensor, a: nn.Module) -> Tensor:
    x = x * 1.0
    y = a(x)
    F.leaky_relu(input=x, negative_slope=0.1, inplace=True)
    return F.relu(y + x)


def statistics_without_batch_norm(x: Tensor, a: nn.Module) -> Tensor:
    """An ATen function updates the running statistics, though neither its name nor its schema says so."""
    conv, norm = a
    y = conv(x)
    with torch.no_grad():
        torch.ops.aten.native_batch_norm(x, None, None, norm.running_mean, norm.running_var, True, 0.5, 1e-5)
    return norm(y)


def turned(x: Tensor, a: nn.Module) -> Tensor:
    return a(x).transpose_(2, 3).transpose_(2, 3)


def detached(x: Tensor, a: nn.Module) -> Tensor:
    return F.relu(a(x)).detach_() + x


def moved_away(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x)
    with torch.no_grad():
        y.set_((x * 2.0).contiguous())
    return y * 1.0


_INPLACE = nn.ReLU(inplace=True)
SHARED: dict[str, tuple[Callable[..., Any], Callable[[], list[nn.Module]]]] = {
    # name: (body, its pairs on [3, 4, 8, 6]); each was, or could have been, silently wrong
    **{
        f"{name} before return": (then(change), lambda: [conv_bn(4, 4)])
        for name, change in {
            "nn.ReLU(inplace)": _INPLACE,
            "F.relu(inplace)": lambda y: F.relu(y, inplace=True),
            "F.relu(x, True)": lambda y: F.relu(y, True),
            "relu_": torch.relu_,
            "add_": lambda y: y.add_(1.0),
            "+=": plus_equal,
            "setitem": cleared,
            "out=": lambda y: torch.add(y, 1.0, out=y),
            "a view's relu_": lambda y: y[:, :1].relu_(),
        }.items()
    },
    **{
        f"{name}, then relu_": (then(torch.relu_, kept), lambda: [conv_bn(4, 4)])
        for name, kept in {
            "view": lambda y: y.view(3, 4, -1) if y.is_contiguous() else y[:],
            "flatten(1)": lambda y: y.flatten(1),
            "flatten(2)": lambda y: y.flatten(2),
            "Identity": nn.Identity(),
            "contiguous": lambda y: y.contiguous(),
            "detach": lambda y: y.detach(),
            "unsqueeze": lambda y: y.unsqueeze(1),
            "permute": lambda y: y.permute(0, 2, 3, 1),
            "slice": lambda y: y[:, 1:],
            "clone": lambda y: y.clone(),
        }.items()
    },
    "a later conv, add_": (later(lambda y: y, lambda y: y.add_(1.0)), lambda: [conv_bn(4, 4), nn.Conv2d(4, 4, 1)]),
    "a later pool, relu_": (later(lambda y: F.max_pool2d(y, 2), torch.relu_), lambda: [conv_bn(4, 4)]),
    "a later slice, zero_": (later(lambda y: y * 2.0, lambda y: y[:, :1].zero_()), lambda: [conv_bn(4, 4)]),
    "flatten, relu_, both returned": (second_name_in_place, lambda: [conv_bn(4, 4)]),
    "two results, one memory": (lambda x, a: (y := a(x), y[:, :2]), lambda: [conv_bn(4, 4)]),
    "BatchNorm twice, once in a match": (lambda x, a: a(a[1](x)), lambda: [conv_bn(4, 4)]),
    "BatchNorm twice, once read": (statistics_of_another_mode, lambda: [conv_bn(4, 4)]),
    "the input, changed": (input_in_place, lambda: [conv_bn(4, 4)]),
    "padded, then changed": (moved_before_padding, lambda: [conv_bn(4, 6, stride=2)]),
    "a view added to in place": (gate_in_place, lambda: [conv_bn(4, 6, stride=2)]),
    "padded, then the padding changed": (padding_changed, lambda: [conv_bn(4, 6, stride=2)]),
    "padded twice": (lambda x, a: F.relu(a(x) + F.pad(x[:2][:, :, ::2, ::2], (0, 0, 0, 0, 0, 2, 0, 1))), lambda: [conv_bn(4, 6, stride=2)]),  # noqa: E501
    "padded from a slice": (lambda x, a: F.relu(a(x)[:2] + F.pad(x[:2], (0, 0, 0, 0, 0, 2))), lambda: [conv_bn(4, 6)]),
    "padding first, other weights": (
        lambda x, a: F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)) + a(x)),
        lambda: [conv_bn(4, 6, stride=2).to(memory_format=torch.channels_last)],
    ),
    "changed by name": (changed_by_name, lambda: [conv_bn(4, 4)]),
    "relu by name": (lambda x, a: F.relu(input=a(x), inplace=True) + torch.relu(input=x), lambda: [conv_bn(4, 4)]),
    "one channel": (lambda x, a, b: b(F.relu(a(x))), lambda: [conv_bn(4, 1), nn.Conv2d(1, 5, 3)]),
    "one pixel": (lambda x, a, b: b(F.relu(a(x))), lambda: [nn.Sequential(nn.Conv2d(4, 4, (8, 6)), nn.BatchNorm2d(4)), nn.ConvTranspose2d(4, 5, 3)]),  # noqa: E501
    "an empty batch": (lambda x, a: a(x[:0]), lambda: [conv_bn(4, 4)]),
    "statistics moved by ATen": (statistics_without_batch_norm, lambda: [conv_bn(4, 4)]),
    "transpose_": (turned, lambda: [conv_bn(4, 4)]),
    "detach_": (detached, lambda: [conv_bn(4, 4)]),
    "set_": (moved_away, lambda: [conv_bn(4, 4)]),
    "a projection that broadcasts": (other_shape, lambda: [conv_bn(4, 4), nn.Sequential(nn.Conv2d(4, 4, (8, 6)), nn.BatchNorm2d(4))]),  # noqa: E501
}  # fmt: skip


# On a CPU, a channels_last convolution with one output channel has other strides than PyTorch's tracing assumes.
NCHW_ONLY = ("one channel", "one pixel")


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [
        *(pytest.param(name, False, id=f"{name}-nchw") for name in SHARED),
        *(
            pytest.param(name, True, id=f"{name}-nhwc", marks=pytest.mark.extra)
            for name in SHARED
            if name not in NCHW_ONLY
        ),
    ],
)
def test_in_place_changes_reach_all_readers(name: str, channels_last: bool) -> None:
    """Results, gradients, statistics, the input and all aliases are those of eager."""
    body, pairs = SHARED[name]
    module = Case(body, *pairs()).double()
    for mode in fuzz.MODES:
        verdict = fuzz.compiled(lambda: copy.deepcopy(module), fuzz.images(0, channels_last), mode)
        assert verdict.faults == []
        assert not any("alone" in what for what in verdict.counts), mode


@pytest.mark.parametrize(
    "node", ["bn1", "layer1.0.bn2", "layer2.0.add", *(pytest.param(n, marks=pytest.mark.extra) for n in (
        "layer1.0.bn1", "layer1.0.add", "layer1.1.add", "layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1",
        "layer3.0.bn2", "layer3.0.add", "layer4.0.bn1", "layer4.0.downsample.1", "layer4.0.add",
    ))]
)  # fmt: skip
def test_features_before_an_inplace_relu_are_eagers(node: str) -> None:
    """torchvision's feature extractor returns tensors that the net's ReLU(inplace=True) changes afterwards."""
    model = create_feature_extractor(tiny().double().eval(), [node, "flatten"])
    x = torch.randn(2, 3, 64, 64).double()
    want = model(x)
    got = torch.compile(model, backend="fastres", options=ALWAYS)(x)
    assert relative_error(got[node], want[node]) < EXACT
    assert relative_error(got["flatten"], want["flatten"]) < EXACT
