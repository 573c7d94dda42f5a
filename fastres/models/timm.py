"""timm's ResNet, its blocks and its feature extractors with fastres's fused operations.

The classes inherit from timm's and replace only what runs in a forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import timm.models.resnet as timm_resnet
import torch
from timm.models import _features as timm_features
from timm.models import checkpoint_seq
from torch import Tensor, nn

from fastres.models.features import outputs, stem_parts
from fastres.models.resnet import run_stages
from fastres.ops import eligibility
from fastres.ops.block import residual_block, stem


class BasicBlock(timm_resnet.BasicBlock):
    """timm's `BasicBlock`, fused if it uses ReLU and no attention, anti-aliasing, drop block or drop path."""

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the (convolution, BatchNorm) pairs of the residual branch."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def parts(self) -> eligibility.Parts:
        """Return the block's modules by role, for `eligibility`."""
        idle = [self.drop_block, self.aa, self.se, self.drop_path]
        return eligibility.Parts(self.pairs(), [self.act1, self.act2], shortcut=self.downsample, idle=idle)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return residual_block(x, self.pairs(), self.downsample)
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
    """timm's `Bottleneck`, fused if it uses ReLU and no attention, anti-aliasing, drop block or drop path."""

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the (convolution, BatchNorm) pairs of the residual branch."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]

    def parts(self) -> eligibility.Parts:
        """Return the block's modules by role, for `eligibility`."""
        idle = [self.drop_block, self.aa, self.se, self.drop_path]
        return eligibility.Parts(self.pairs(), [self.act1, self.act2, self.act3], shortcut=self.downsample, idle=idle)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return residual_block(x, self.pairs(), self.downsample)
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
    """timm's `ResNet`, whose stem is fused if it is a single convolution with BatchNorm, ReLU and a max pool."""

    def parts(self) -> eligibility.Parts:
        """Return the stem's modules by role, for `eligibility`."""
        return eligibility.Parts([(self.conv1, self.bn1)], [self.act1], pool=self.maxpool)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        if not torch.jit.is_scripting():
            if self.grad_checkpointing:
                return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
            if eligibility.runs_stages():
                return run_stages(x, self.layer1, self.layer2, self.layer3, self.layer4)  # type: ignore[arg-type]
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return stem(x, self.conv1, self.bn1, self.maxpool)
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        if torch.compiler.is_compiling() or self.grad_checkpointing or output_fmt != "NCHW":
            return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        taken, last = timm_features.feature_take_indices(5, indices)
        stages = ["layer1", "layer2", "layer3", "layer4"][: last if stop_early else 4]
        children = {name: getattr(self, name) for name in ("conv1", "bn1", "act1", "maxpool", *stages)}
        wanted = {("act1", *stages)[i] for i in taken}
        found = [*outputs(x, children, {*wanted, [*children][-1]})]
        intermediates = [y for name, y in found if name in wanted]
        return intermediates if intermediates_only else (found[-1][1], intermediates)


class FeatureDictNet(timm_features.FeatureDictNet):
    """timm's `FeatureDictNet`, in which the stem and whole stages of a ResNet can run fused."""

    def parts(self) -> eligibility.Parts | None:
        """Return the stem's modules by role, for `eligibility`."""
        return stem_parts(self, self.return_layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not torch.jit.is_scripting():
            if not (torch.compiler.is_compiling() or self.grad_checkpointing):
                return _collected(x, self)
        return self._collect(x)


class FeatureListNet(timm_features.FeatureListNet):
    """timm's `FeatureListNet`, which `features_only=True` creates, in which the stem and whole stages can run fused."""

    def parts(self) -> eligibility.Parts | None:
        """Return the stem's modules by role, for `eligibility`."""
        return stem_parts(self, self.return_layers)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        if not torch.jit.is_scripting():
            if not (torch.compiler.is_compiling() or self.grad_checkpointing):
                return list(_collected(x, self).values())
        return list(self._collect(x).values())


def _collected(x: Tensor, net: timm_features.FeatureDictNet) -> dict[str, Tensor]:
    """Return what `net._collect(x)` does without gradient checkpointing."""

    def feature(y: Any) -> Tensor:
        if not isinstance(y, (tuple, list)):
            return y
        return torch.cat(y, 1) if net.concat else y[0]

    return OrderedDict((net.return_layers[name], feature(y)) for name, y in outputs(x, net, net.return_layers))
