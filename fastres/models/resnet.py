"""torchvision's ResNet family with blocks that may run fused.

The modules, their names, their order, their initialisation and their weights are torchvision's: the classes here
inherit them and replace only `forward`. A forward first asks `fastres.ops.eligibility` whether the fused path serves
this call; if not (a hook, a foreign norm layer, tracing, scripting, no kernel for this device), it runs the modules one
by one, exactly as torchvision does.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2015), in the v1.5 form that strides the 3x3 conv.
"""

from typing import Any

import torch
import torchvision.models.resnet as tv
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum, register_model
from torchvision.models._utils import _ovewrite_named_param, handle_legacy_interface
from torchvision.models.resnet import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
    ResNeXt50_32X4D_Weights,
    ResNeXt101_32X8D_Weights,
    ResNeXt101_64X4D_Weights,
    Wide_ResNet50_2_Weights,
    Wide_ResNet101_2_Weights,
)

from fastres.ops import eligibility
from fastres.ops.block import residual_block, stages, stem

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNeXt50_32X4D_Weights",
    "ResNeXt101_32X8D_Weights",
    "ResNeXt101_64X4D_Weights",
    "ResNet",
    "ResNet18_Weights",
    "ResNet34_Weights",
    "ResNet50_Weights",
    "ResNet101_Weights",
    "ResNet152_Weights",
    "Wide_ResNet50_2_Weights",
    "Wide_ResNet101_2_Weights",
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
]


# Every block spells its `forward` out: TorchScript knows no `super()`, and Dynamo's cache with its limit of
# recompilations belongs to a code object, which a mixin would make all blocks share.


class BasicBlock(tv.BasicBlock):
    """Two 3x3 convolutions and a shortcut (paper, Fig. 5 left). Constructor and state_dict are torchvision's.

    `forward` takes and returns [N, C, H, W] of one floating dtype, in any memory format.
    """

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The residual branch as (conv, norm) pairs; ReLU stands between them and after the addition."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def parts(self) -> eligibility.Parts:
        """The block's modules by role, as `eligibility` asks for them."""
        return eligibility.Parts(self.pairs(), [self.relu], shortcut=self.downsample)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return residual_block(x, self.pairs(), self.downsample)
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(tv.Bottleneck):
    """1x1 reduce, 3x3, 1x1 expand and a shortcut (paper, Fig. 5 right). Constructor and state_dict are torchvision's.

    `forward` takes and returns [N, C, H, W] of one floating dtype, in any memory format.
    """

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The residual branch as (conv, norm) pairs; ReLU stands between them and after the addition."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]

    def parts(self) -> eligibility.Parts:
        """The block's modules by role, as `eligibility` asks for them."""
        return eligibility.Parts(self.pairs(), [self.relu], shortcut=self.downsample)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return residual_block(x, self.pairs(), self.downsample)
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def run_stages(x: Tensor, *layers: nn.Module) -> Tensor:
    """x through `layers`, the blocks of each as one call where `eligibility` says so, and neighbours of such layers
    with their borders fused."""
    rest = [(layer, _blocks(layer)) for layer in layers]
    while rest:
        count = eligibility.serves_stages(x, [blocks for _, blocks in rest])
        served = [blocks for _, blocks in rest[:count]]
        if served:
            while not eligibility.wants_gradients(x, served[0][:1]):  # frozen: keeps nothing for backward
                x = served[0].pop(0)(x)
            x = stages(x, [[(block.pairs(), block.downsample) for block in blocks] for blocks in served])
        else:
            x = rest[0][0](x)
        rest = rest[max(1, count) :]
    return x


def _blocks(layer: nn.Module) -> list[Any]:
    """The blocks of a stage that calling `layer` runs one after the other, and that alone; else none."""
    return list(layer) if type(layer) is nn.Sequential and eligibility.is_bare(layer) else []


def pooled(x: Tensor, avgpool: nn.Module) -> Tensor:
    """torch.flatten(avgpool(x), 1), bit for bit, where the gradient for a channels_last x [N, C, H, W] is
    channels_last, too: a global average pool's own is NCHW, which the block before it would have to copy."""
    if eligibility.serves_global_pool(x, avgpool):
        return x.permute(0, 2, 3, 1).mean((1, 2))
    return torch.flatten(avgpool(x), 1)


class ResNet(tv.ResNet):
    """torchvision's `ResNet` whose stem may run fused too. Same constructor, attributes and state_dict.

    `forward` takes images [N, 3, H, W] and returns scores [N, num_classes].
    """

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        if not torch.jit.is_scripting():
            if eligibility.runs_stages():
                x = run_stages(x, self.layer1, self.layer2, self.layer3, self.layer4)
                return self.fc(pooled(x, self.avgpool))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self._head(x)

    def _head(self, x: Tensor) -> Tensor:
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def stem_parts(self) -> eligibility.Parts:
        """The stem's modules by role, as `eligibility` asks for them."""
        return eligibility.Parts([(self.conv1, self.bn1)], [self.relu], pool=self.maxpool)

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.stem_parts()):
                return stem(x, self.conv1, self.bn1, self.maxpool)
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


def _build(
    block: type[BasicBlock | Bottleneck], layers: list[int], weights: WeightsEnum | None, progress: bool, **kwargs: Any
) -> ResNet:
    """Mirrors torchvision's own `_resnet`; `kwargs` are `ResNet`'s.

    The builders' annotations stay real objects (no `from __future__ import annotations`): torchvision's registry reads
    the weights enum out of the signature.
    """
    if weights is not None:
        _ovewrite_named_param(kwargs, "num_classes", len(weights.meta["categories"]))
    model = ResNet(block, layers, **kwargs)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


@register_model("fastres_resnet18")
@handle_legacy_interface(weights=("pretrained", ResNet18_Weights.IMAGENET1K_V1))
def resnet18(*, weights: ResNet18_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18, as `torchvision.models.resnet18`."""
    return _build(BasicBlock, [2, 2, 2, 2], ResNet18_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet34")
@handle_legacy_interface(weights=("pretrained", ResNet34_Weights.IMAGENET1K_V1))
def resnet34(*, weights: ResNet34_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34, as `torchvision.models.resnet34`."""
    return _build(BasicBlock, [3, 4, 6, 3], ResNet34_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet50")
@handle_legacy_interface(weights=("pretrained", ResNet50_Weights.IMAGENET1K_V1))
def resnet50(*, weights: ResNet50_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 v1.5, as `torchvision.models.resnet50`."""
    return _build(Bottleneck, [3, 4, 6, 3], ResNet50_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet101")
@handle_legacy_interface(weights=("pretrained", ResNet101_Weights.IMAGENET1K_V1))
def resnet101(*, weights: ResNet101_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 v1.5, as `torchvision.models.resnet101`."""
    return _build(Bottleneck, [3, 4, 23, 3], ResNet101_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet152")
@handle_legacy_interface(weights=("pretrained", ResNet152_Weights.IMAGENET1K_V1))
def resnet152(*, weights: ResNet152_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 v1.5, as `torchvision.models.resnet152`."""
    return _build(Bottleneck, [3, 8, 36, 3], ResNet152_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnext50_32x4d")
@handle_legacy_interface(weights=("pretrained", ResNeXt50_32X4D_Weights.IMAGENET1K_V1))
def resnext50_32x4d(*, weights: ResNeXt50_32X4D_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d, as `torchvision.models.resnext50_32x4d`."""
    _ovewrite_named_param(kwargs, "groups", 32)
    _ovewrite_named_param(kwargs, "width_per_group", 4)
    return _build(Bottleneck, [3, 4, 6, 3], ResNeXt50_32X4D_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnext101_32x8d")
@handle_legacy_interface(weights=("pretrained", ResNeXt101_32X8D_Weights.IMAGENET1K_V1))
def resnext101_32x8d(
    *, weights: ResNeXt101_32X8D_Weights | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101 32x8d, as `torchvision.models.resnext101_32x8d`."""
    _ovewrite_named_param(kwargs, "groups", 32)
    _ovewrite_named_param(kwargs, "width_per_group", 8)
    return _build(Bottleneck, [3, 4, 23, 3], ResNeXt101_32X8D_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnext101_64x4d")
@handle_legacy_interface(weights=("pretrained", ResNeXt101_64X4D_Weights.IMAGENET1K_V1))
def resnext101_64x4d(
    *, weights: ResNeXt101_64X4D_Weights | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101 64x4d, as `torchvision.models.resnext101_64x4d`."""
    _ovewrite_named_param(kwargs, "groups", 64)
    _ovewrite_named_param(kwargs, "width_per_group", 4)
    return _build(Bottleneck, [3, 4, 23, 3], ResNeXt101_64X4D_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_wide_resnet50_2")
@handle_legacy_interface(weights=("pretrained", Wide_ResNet50_2_Weights.IMAGENET1K_V1))
def wide_resnet50_2(*, weights: Wide_ResNet50_2_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2, as `torchvision.models.wide_resnet50_2`."""
    _ovewrite_named_param(kwargs, "width_per_group", 128)
    return _build(Bottleneck, [3, 4, 6, 3], Wide_ResNet50_2_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_wide_resnet101_2")
@handle_legacy_interface(weights=("pretrained", Wide_ResNet101_2_Weights.IMAGENET1K_V1))
def wide_resnet101_2(
    *, weights: Wide_ResNet101_2_Weights | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Wide ResNet-101-2, as `torchvision.models.wide_resnet101_2`."""
    _ovewrite_named_param(kwargs, "width_per_group", 128)
    return _build(Bottleneck, [3, 4, 23, 3], Wide_ResNet101_2_Weights.verify(weights), progress, **kwargs)
