"""timm's ResNet and its blocks with fastres's fused operations. They inherit from timm's and replace only `forward`."""

from __future__ import annotations

import timm.models.resnet as timm_resnet
import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

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
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return stem(x, self.conv1, self.bn1, self.maxpool)
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))
