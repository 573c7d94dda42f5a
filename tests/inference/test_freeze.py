"""Test which models and arguments `optimize` accepts and which it refuses before it runs anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from cases import assert_close_to_reference
from nets import images, tiny
from torch import nn
from torchvision.transforms import v2

from fastres import optimize
from fastres.ops.quantised import FLOAT8


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "message"),
    [
        (lambda: "resnet50", {}, TypeError, "takes an nn.Module, got str"),
        (lambda: optimize(tiny()), {}, TypeError, "already optimized"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 3)).eval(), {}, ValueError, "no convolution"),
        (tiny, {"dtype": torch.int16}, ValueError, "accepted: torch.bfloat16, torch.float16"),
        (tiny, {"dtype": FLOAT8}, ValueError, "need calibration="),
        (tiny, {"dtype": torch.float16, "calibration": []}, ValueError, "no other dtype accepts it"),
        (lambda: tiny().to("meta"), {}, ValueError, "on one device, got meta"),
    ],
)
def test_unsupported_arguments_are_refused(
    model: Callable[[], Any], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimize(model(), **kwargs)


def test_weights_that_are_not_finite_are_refused() -> None:
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


@pytest.mark.parametrize("kind", [torchvision.transforms.Normalize, v2.Normalize])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torchvisions_normalize_in_front_is_supported(kind: type[Any], dtype: torch.dtype) -> None:
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
    # A proxy passes through v2's Normalize unchanged, so only the comparison at the first call finds the difference.
    model[0].inplace = True
    with pytest.raises(ValueError, match=r"can trace|gives other results than Sequential"):
        optimize(model)(x)
