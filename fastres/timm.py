"""timm's ResNets on fastres's blocks. Importing this registers `fastres_resnet50` and its kin with timm.

`timm.create_model("fastres_resnet50.a1_in1k", pretrained=True, num_classes=10)` is timm's resnet50 with that tag,
converted: all its options, weights and methods are timm's own, and so are the names in its state_dict. Raises
ImportError where timm is missing.
"""

from __future__ import annotations

from typing import Any

try:
    import timm.models.resnet as timm_resnet
    from timm.models import checkpoint_seq, register_model
except ImportError as error:
    raise ImportError("fastres.timm needs timm: pip install timm") from error

import torch
from torch import Tensor, nn

from fastres.models.convert import convert
from fastres.ops import eligibility
from fastres.ops.conv_bn_act import residual_block, stem

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]  # timm's registry adds the builders


class BasicBlock(timm_resnet.BasicBlock):
    """timm's BasicBlock; fused where it is plain (no attention, anti-aliasing, dropped block or path; ReLU)."""

    def units(self) -> list[tuple[nn.Module, nn.Module]]:
        """The residual branch as (conv, norm) pairs."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def parts(self) -> eligibility.Parts:
        """The block's modules by role, as `eligibility` asks for them."""
        idle = [self.drop_block, self.aa, self.se, self.drop_path]
        return eligibility.Parts(self.units(), [self.act1, self.act2], shortcut=self.downsample, idle=idle)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return residual_block(x, self.units(), self.downsample)
        shortcut = x
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class Bottleneck(timm_resnet.Bottleneck):
    """timm's Bottleneck; fused where it is plain (no attention, anti-aliasing, dropped block or path; ReLU)."""

    def units(self) -> list[tuple[nn.Module, nn.Module]]:
        """The residual branch as (conv, norm) pairs."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]

    def parts(self) -> eligibility.Parts:
        """The block's modules by role, as `eligibility` asks for them."""
        idle = [self.drop_block, self.aa, self.se, self.drop_path]
        return eligibility.Parts(self.units(), [self.act1, self.act2, self.act3], shortcut=self.downsample, idle=idle)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return residual_block(x, self.units(), self.downsample)
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))  # type: ignore[misc]
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class ResNet(timm_resnet.ResNet):
    """timm's ResNet; its stem is fused where it is the 7x7 one with a max pool."""

    def parts(self) -> eligibility.Parts:
        """The stem's modules by role, as `eligibility` asks for them."""
        return eligibility.Parts([(self.conv1, self.bn1)], [self.act1], pool=self.maxpool)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return stem(x, self.conv1, self.bn1, self.maxpool)
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))


def _register(name: str) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return convert(getattr(timm_resnet, name)(pretrained, **kwargs)).model

    build.__name__ = build.__qualname__ = f"fastres_{name}"
    build.__doc__ = f"timm's {name} on fastres's blocks; options and weights are timm's."
    register_model(build)


for _name in (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
):
    _register(_name)
