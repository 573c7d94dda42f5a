"""Nets for the tests of `optimize`, small ones and all families of ResNets, and images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres import paper
from fastres.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ["auto", "reference"]  # what `fastres.backend` forces in the tests of nets

needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or dispatch.interpreting()), reason="neither a GPU nor TRITON_INTERPRET=1"
)


def lived_in(model: nn.Module) -> nn.Module:
    """Draw the statistics and parameters of all BatchNorms, put `model` into eval mode and return it."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


def tiny() -> nn.Module:
    """Return a small net of 10 classes: a stem, three bottlenecks (one projects, one is grouped), a basic block."""
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


class Adds(nn.Module):
    """relu(what(x, self)), for functions `what` that add a number or a broadcast tensor to a convolution's output."""

    def __init__(self, what: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.conv, self.pool, self.what = nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), what
        self.register_buffer("shift", torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.what(x, self))


class Asks(nn.Module):
    """A model whose forward calls body(self, x, mask, scale, twice), with a buffer, attributes and a method to use."""

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


class Unread(nn.Module):
    """Returns its features, and then computes scores that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        self.fc(torch.flatten(self.pool(y), 1))
        return y
