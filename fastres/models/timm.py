"""timm's ResNet and its blocks on our operations: `forward` replaced, and everything else, names included, timm's."""

from __future__ import annotations

import timm.models.resnet as timm_resnet
import torch
from timm.models import checkpoint_seq
from torch import Tensor

from fastres.models import resnet
from fastres.models.resnet import FusedBlock, plain_forward
from fastres.ops import eligibility
from fastres.ops.block import stem


class _FusedBlock(FusedBlock):
    """Fused where it is plain: no attention, anti-aliasing, dropped block or path; ReLU."""

    def parts(self) -> eligibility.Parts:
        pairs = self.pairs()
        acts = [getattr(self, f"act{i}") for i in range(1, len(pairs) + 1)]
        idle = [getattr(self, name) for name in ("drop_block", "aa", "se", "drop_path")]
        return eligibility.Parts(pairs, acts, shortcut=self.downsample, idle=idle)


class BasicBlock(_FusedBlock, timm_resnet.BasicBlock):
    """timm's BasicBlock."""

    one_by_one = plain_forward(timm_resnet.BasicBlock)
    pairs = resnet.BasicBlock.pairs


class Bottleneck(_FusedBlock, timm_resnet.Bottleneck):
    """timm's Bottleneck."""

    one_by_one = plain_forward(timm_resnet.Bottleneck)
    pairs = resnet.Bottleneck.pairs


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
