"""The nets of `fastres.models` in plain PyTorch, which the peers run.

torchvision's nets come from torchvision. fastres builds the paper's nets; then each of their modules becomes an
instance of the class that it inherits from or, where torchvision has no such class, of one of the classes below. Names,
parameters and initialisation thus stay the same, and no `forward` of fastres remains that could take a fused path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
import torchvision.models.resnet as tv
from torch import Tensor, nn

from fastres.models import families, paper, resnet
from fastres.ops.shortcut import PadShortcut


class Pad(nn.Module):
    """The zero-padded identity shortcut (option A)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels - x.shape[1]))


class Block(nn.Module):
    """Two 3x3 convolutions without a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


class Cifar(nn.Module):
    """A 3x3 convolution followed by three stages."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarStem(nn.Module):
    """A 3x3 convolution followed by four stages."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(self.avgpool(x), 1))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: tv.BasicBlock,
    resnet.Bottleneck: tv.Bottleneck,
    resnet.ResNet: tv.ResNet,
    paper.Bottleneck: tv.Bottleneck,
    paper.PadBasicBlock: tv.BasicBlock,
    paper.PadBottleneck: tv.Bottleneck,
    paper.PlainBlock: Block,
    paper.ResNet: tv.ResNet,
    paper.CifarResNet: Cifar,
    paper.CifarStemResNet: CifarStem,
    PadShortcut: Pad,
}


def net(name: str) -> nn.Module:
    """Return the net that `families.named` calls `name`, with the same state_dict keys.

    Raises ValueError for a name that `families.named` refuses, and TypeError if a module of fastres remains.
    """
    if name in families.BUILDERS:
        return getattr(torchvision.models, name)()
    model = families.named(name)
    for module in model.modules():
        module.__class__ = CLASSES.get(type(module), type(module))
        if type(module).__module__.startswith("fastres"):
            raise TypeError(
                f"{name} has a {type(module).__name__}, a class of fastres; add its plain counterpart to CLASSES"
            )
    return model
