"""torchvision's ResNet family with blocks that can run fused.

The classes here inherit from torchvision's and replace only `forward`. So modules, their names and order,
initialisation and weights are torchvision's. Every forward asks `fastres.ops.eligibility` whether the fused path
supports this call. If not (for example because of a hook, another norm layer, tracing, scripting, or no kernel for the
device), it runs the modules one by one, exactly as torchvision does.

Source: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2015), in the v1.5 form, which has the stride
of a bottleneck in the 3x3 convolution.
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


# Every block class has its own `forward` in full. TorchScript does not support `super()`. And Dynamo counts
# recompilations per code object, up to a limit: with a mixin, all block classes would share one code object.


class BasicBlock(tv.BasicBlock):
    """Two 3x3 convolutions and a shortcut. Constructor, module names and state dict are torchvision's.

    `forward` maps x [N, inplanes, H, W] to [N, planes, H/stride, W/stride], of the same floating-point dtype (or
    autocast's), in any memory format. Equivalent to torchvision's `BasicBlock`:

        y = relu(bn1(conv1(x)))
        y = bn2(conv2(y))
        return relu(y + (x if downsample is None else downsample(x)))

    Source: the paper's Fig. 5 (left).
    """

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the (convolution, BatchNorm) pairs of the residual branch.

        A ReLU follows every pair but the last, and one follows the addition.
        """
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def parts(self) -> eligibility.Parts:
        """Return the block's modules by role, for `eligibility`."""
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
    """1x1 (reduce), 3x3 and 1x1 (expand) convolutions and a shortcut. Names and state dict are torchvision's.

    `forward` maps x [N, inplanes, H, W] to [N, 4 planes, H/stride, W/stride], of the same floating-point dtype (or
    autocast's), in any memory format. Equivalent to torchvision's `Bottleneck`:

        y = relu(bn1(conv1(x)))
        y = relu(bn2(conv2(y)))
        y = bn3(conv3(y))
        return relu(y + (x if downsample is None else downsample(x)))

    Source: the paper's Fig. 5 (right).
    """

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the (convolution, BatchNorm) pairs of the residual branch.

        A ReLU follows every pair but the last, and one follows the addition.
        """
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]

    def parts(self) -> eligibility.Parts:
        """Return the block's modules by role, for `eligibility`."""
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
    """Run x [N, C, H, W] through the stages `layers`, with operations of neighbouring blocks fused where possible.

    Consecutive stages that `eligibility.serves_stages` accepts run as one call, which also fuses operations across the
    boundaries between these stages. Each of the others is called as a module.
    """
    rest = [(layer, _blocks(layer)) for layer in layers]
    while rest:
        count = eligibility.serves_stages(x, [blocks for _, blocks in rest])
        served = [blocks for _, blocks in rest[:count]]
        if served:
            while not eligibility.wants_gradients(x, served[0][:1]):  # frozen leading blocks save nothing for backward
                x = served[0].pop(0)(x)
            x = stages(x, [[(block.pairs(), block.downsample) for block in blocks] for blocks in served])
        else:
            x = rest[0][0](x)
        rest = rest[max(1, count) :]
    return x


def _blocks(layer: nn.Module) -> list[Any]:
    """Return the blocks of a stage if calling `layer` only runs them one after another; else an empty list."""
    return list(layer) if type(layer) is nn.Sequential and eligibility.is_bare(layer) else []


def pooled(x: Tensor, avgpool: nn.Module) -> Tensor:
    """Return torch.flatten(avgpool(x), 1), [N, C], bit for bit, for x [N, C, H, W].

    For a global average pool and a channels_last x, a mean is used instead, because its gradient is channels_last. The
    gradient of the pool is NCHW, and the block before it would have to copy it.
    """
    if eligibility.serves_global_pool(x, avgpool):
        return x.permute(0, 2, 3, 1).mean((1, 2))
    return torch.flatten(avgpool(x), 1)


class ResNet(tv.ResNet):
    """torchvision's `ResNet`, whose stem can run fused as well. Constructor, attributes and state dict are
    torchvision's.

    `forward` maps images [N, 3, H, W] to scores [N, num_classes].
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

    def parts(self) -> eligibility.Parts:
        """Return the stem's modules by role, for `eligibility`."""
        return eligibility.Parts([(self.conv1, self.bn1)], [self.relu], pool=self.maxpool)

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return stem(x, self.conv1, self.bn1, self.maxpool)
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


def _build(
    block: type[BasicBlock | Bottleneck], layers: list[int], weights: WeightsEnum | None, progress: bool, **kwargs: Any
) -> ResNet:
    """Build a net and load its weights, like torchvision's `_resnet`. kwargs: those of `ResNet`.

    This module must not use `from __future__ import annotations`: torchvision's registry reads the weights enum from
    the annotations of the builders, which must be objects and not strings.
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
    """Build ResNet-18 as a drop-in replacement for torchvision's.

    weights: None, a `ResNet18_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g. num_classes=1000. The
    net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its parameters or of autocast. Equivalent to

        torchvision.models.resnet18(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights. Source: Table 1 of the ResNet paper (2015).
    """
    return _build(BasicBlock, [2, 2, 2, 2], ResNet18_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet34")
@handle_legacy_interface(weights=("pretrained", ResNet34_Weights.IMAGENET1K_V1))
def resnet34(*, weights: ResNet34_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Build ResNet-34 as a drop-in replacement for torchvision's.

    weights: None, a `ResNet34_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g. num_classes=1000. The
    net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its parameters or of autocast. Equivalent to

        torchvision.models.resnet34(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights. Source: Table 1 of the ResNet paper (2015).
    """
    return _build(BasicBlock, [3, 4, 6, 3], ResNet34_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet50")
@handle_legacy_interface(weights=("pretrained", ResNet50_Weights.IMAGENET1K_V1))
def resnet50(*, weights: ResNet50_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Build ResNet-50 as a drop-in replacement for torchvision's.

    weights: None, a `ResNet50_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g. num_classes=1000. The
    net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its parameters or of autocast. Equivalent to

        torchvision.models.resnet50(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights. Source: Table 1 of the ResNet paper (2015), in the v1.5 form with the stride in the
    3x3.
    """
    return _build(Bottleneck, [3, 4, 6, 3], ResNet50_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet101")
@handle_legacy_interface(weights=("pretrained", ResNet101_Weights.IMAGENET1K_V1))
def resnet101(*, weights: ResNet101_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Build ResNet-101 as a drop-in replacement for torchvision's.

    weights: None, a `ResNet101_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g. num_classes=1000.
    The net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its
    parameters or of autocast. Equivalent to

        torchvision.models.resnet101(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights. Source: Table 1 of the ResNet paper (2015), in the v1.5 form with the stride in the
    3x3.
    """
    return _build(Bottleneck, [3, 4, 23, 3], ResNet101_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnet152")
@handle_legacy_interface(weights=("pretrained", ResNet152_Weights.IMAGENET1K_V1))
def resnet152(*, weights: ResNet152_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Build ResNet-152 as a drop-in replacement for torchvision's.

    weights: None, a `ResNet152_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g. num_classes=1000.
    The net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its
    parameters or of autocast. Equivalent to

        torchvision.models.resnet152(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights. Source: Table 1 of the ResNet paper (2015), in the v1.5 form with the stride in the
    3x3.
    """
    return _build(Bottleneck, [3, 8, 36, 3], ResNet152_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnext50_32x4d")
@handle_legacy_interface(weights=("pretrained", ResNeXt50_32X4D_Weights.IMAGENET1K_V1))
def resnext50_32x4d(*, weights: ResNeXt50_32X4D_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Build ResNeXt-50 32x4d as a drop-in replacement for torchvision's.

    weights: None, a `ResNeXt50_32X4D_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g.
    num_classes=1000. The net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its
    parameters or of autocast. Equivalent to

        torchvision.models.resnext50_32x4d(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights and for another groups or width_per_group than the net's. Source: Xie et al.:
    Aggregated Residual Transformations for Deep Neural Networks (2016).
    """
    _ovewrite_named_param(kwargs, "groups", 32)
    _ovewrite_named_param(kwargs, "width_per_group", 4)
    return _build(Bottleneck, [3, 4, 6, 3], ResNeXt50_32X4D_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnext101_32x8d")
@handle_legacy_interface(weights=("pretrained", ResNeXt101_32X8D_Weights.IMAGENET1K_V1))
def resnext101_32x8d(
    *, weights: ResNeXt101_32X8D_Weights | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Build ResNeXt-101 32x8d as a drop-in replacement for torchvision's.

    weights: None, a `ResNeXt101_32X8D_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g.
    num_classes=1000. The net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its
    parameters or of autocast. Equivalent to

        torchvision.models.resnext101_32x8d(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights and for another groups or width_per_group than the net's. Source: Xie et al.:
    Aggregated Residual Transformations for Deep Neural Networks (2016).
    """
    _ovewrite_named_param(kwargs, "groups", 32)
    _ovewrite_named_param(kwargs, "width_per_group", 8)
    return _build(Bottleneck, [3, 4, 23, 3], ResNeXt101_32X8D_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_resnext101_64x4d")
@handle_legacy_interface(weights=("pretrained", ResNeXt101_64X4D_Weights.IMAGENET1K_V1))
def resnext101_64x4d(
    *, weights: ResNeXt101_64X4D_Weights | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Build ResNeXt-101 64x4d as a drop-in replacement for torchvision's.

    weights: None, a `ResNeXt101_64X4D_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g.
    num_classes=1000. The net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its
    parameters or of autocast. Equivalent to

        torchvision.models.resnext101_64x4d(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights and for another groups or width_per_group than the net's. Source: Xie et al.:
    Aggregated Residual Transformations for Deep Neural Networks (2016).
    """
    _ovewrite_named_param(kwargs, "groups", 64)
    _ovewrite_named_param(kwargs, "width_per_group", 4)
    return _build(Bottleneck, [3, 4, 23, 3], ResNeXt101_64X4D_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_wide_resnet50_2")
@handle_legacy_interface(weights=("pretrained", Wide_ResNet50_2_Weights.IMAGENET1K_V1))
def wide_resnet50_2(*, weights: Wide_ResNet50_2_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Build Wide ResNet-50-2 as a drop-in replacement for torchvision's.

    weights: None, a `Wide_ResNet50_2_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g.
    num_classes=1000. The net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its
    parameters or of autocast. Equivalent to

        torchvision.models.wide_resnet50_2(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights and for another width_per_group than 128. Source: Zagoruyko, Komodakis: Wide Residual
    Networks (2016).
    """
    _ovewrite_named_param(kwargs, "width_per_group", 128)
    return _build(Bottleneck, [3, 4, 6, 3], Wide_ResNet50_2_Weights.verify(weights), progress, **kwargs)


@register_model("fastres_wide_resnet101_2")
@handle_legacy_interface(weights=("pretrained", Wide_ResNet101_2_Weights.IMAGENET1K_V1))
def wide_resnet101_2(
    *, weights: Wide_ResNet101_2_Weights | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Build Wide ResNet-101-2 as a drop-in replacement for torchvision's.

    weights: None, a `Wide_ResNet101_2_Weights` or its name. kwargs: those of torchvision's `ResNet`, e.g.
    num_classes=1000. The net maps images [N, 3, H, W] to scores [N, num_classes] in the dtype of its
    parameters or of autocast. Equivalent to

        torchvision.models.wide_resnet101_2(weights=weights, progress=progress, **kwargs)

    Raises TypeError for the weights of another net, KeyError for an unknown name, and ValueError for a num_classes
    other than that of the weights and for another width_per_group than 128. Source: Zagoruyko, Komodakis: Wide Residual
    Networks (2016).
    """
    _ovewrite_named_param(kwargs, "width_per_group", 128)
    return _build(Bottleneck, [3, 4, 23, 3], Wide_ResNet101_2_Weights.verify(weights), progress, **kwargs)
