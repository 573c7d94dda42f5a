"""The nets of the 2015 paper, which differ in some details from torchvision's.

`resnet` and `plain` are the nets of Table 1 and Fig. 3. Their bottlenecks have the stride in the first 1x1 convolution
(torchvision's v1.5 has it in the 3x3), and a shortcut between different shapes is one of section 3.3's three options.
`cifar` is section 4.2's 6n+2-layer family. `cifar_stem` is not in the paper: it is the common adaptation of the
ImageNet nets to 32x32 images.

The stages use the blocks of `fastres.models.resnet`. New here are blocks with option-A shortcuts, blocks without a
shortcut, and the assembly of the nets.

Source: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2015).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastres.models import resnet as v15
from fastres.models.resnet import BasicBlock
from fastres.ops import eligibility
from fastres.ops.block import plain_block, residual_block
from fastres.ops.shortcut import PadShortcut, is_traced, pad_shortcut_add_relu

__all__ = [
    "Bottleneck",
    "CifarResNet",
    "CifarStemResNet",
    "PadBasicBlock",
    "PadBottleneck",
    "PlainBlock",
    "ResNet",
    "cifar",
    "cifar_stem",
    "plain",
    "resnet",
]

SHORTCUTS = {
    "A": "identity, zero-padded where the number of channels grows: no parameters",
    "B": "1x1 projection where the shape changes, identity elsewhere",
    "C": "1x1 projection on every block",
}


class Bottleneck(v15.Bottleneck):
    """The paper's bottleneck ("v1"), which has its stride in the first 1x1 convolution instead of the 3x3."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride


class _PadEnd:
    """Mixin for blocks whose `downsample` is a `PadShortcut` (option A).

    If a block doesn't run fused as a whole, its last operations relu(y + shortcut(x)) may still run as one operation.
    """

    if TYPE_CHECKING:  # attributes of the block class that this is mixed into
        relu: nn.ReLU
        downsample: PadShortcut

        def pairs(self) -> list[tuple[nn.Module, nn.Module]]: ...

        def parts(self) -> eligibility.Parts: ...

        def branch(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return residual_block(x, self.pairs(), self.downsample)
        y = self.branch(x)
        if not torch.jit.is_scripting():
            if eligibility.serves_pad_end(x, self.relu, self.downsample):
                return pad_shortcut_add_relu(y, x, self.downsample.stride)
        y += self.downsample(x)
        return self.relu(y)


class PadBasicBlock(_PadEnd, BasicBlock):
    """A `BasicBlock` whose output shape differs from its input shape, with an option-A (zero-padding) shortcut."""

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class PadBottleneck(_PadEnd, Bottleneck):
    """A `Bottleneck` whose output shape differs from its input shape, with an option-A (zero-padding) shortcut."""

    def branch(self, x: Tensor) -> Tensor:
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))))


class PlainBlock(nn.Module):
    """A `BasicBlock` without the shortcut: two 3x3 convolutions, each followed by BN and ReLU (Fig. 3 middle).

    The modules have the same names and order as those of `BasicBlock`.
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the (convolution, BatchNorm) pairs of the block. A ReLU follows each pair."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def parts(self) -> eligibility.Parts:
        """Return the block's modules by role, for `eligibility`."""
        return eligibility.Parts(self.pairs(), [self.relu])

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if eligibility.serves(x, self.parts()):
                return plain_block(x, self.pairs())
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


_PADDED: dict[type[Any], type[Any]] = {BasicBlock: PadBasicBlock, Bottleneck: PadBottleneck}


def _stages(
    block: type[Any], layers: Sequence[int], widths: Sequence[int], shortcut: str | None
) -> list[nn.Sequential]:
    """Build the stages conv2_x, conv3_x, ...: `layers[i]` blocks of `widths[i]` channels (times `block.expansion`).

    The first block of every stage except the first has stride 2. shortcut: a key of `SHORTCUTS`, or None if `block`
    takes no shortcut.
    """
    stages, inplanes = [], widths[0]
    for i, (count, planes) in enumerate(zip(layers, widths, strict=True)):
        blocks = []
        for j in range(count):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(_block(block, inplanes, planes, stride, shortcut))
            inplanes = planes * block.expansion
        stages.append(nn.Sequential(*blocks))
    return stages


def _block(block: type[Any], inplanes: int, planes: int, stride: int, shortcut: str | None) -> nn.Module:
    if shortcut is None:
        return block(inplanes, planes, stride)
    outplanes = planes * block.expansion
    changes = stride != 1 or inplanes != outplanes
    if shortcut == "C" or (shortcut == "B" and changes):
        projection = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
        return block(inplanes, planes, stride, nn.Sequential(projection, nn.BatchNorm2d(outplanes)))
    if changes:
        return _PADDED[block](inplanes, planes, stride, PadShortcut(stride, outplanes))
    return block(inplanes, planes, stride)


def _initialise(net: nn.Module) -> None:
    """Initialise weights from N(0, 2/fan_in) and biases to 0, as section 3.4 does. BN keeps weight 1 and bias 0.

    Section 3.4 follows its reference [13] (He et al., Delving Deep into Rectifiers, 2015). That paper derives one
    condition from the forward signal, with n_l = k^2 c inputs, and one from the gradients, with k^2 d outputs. It shows
    that either one suffices, and uses the forward one (Eqn. 10) for all layers, including the first, which has no ReLU
    before it. torchvision's ResNets use the other one (fan_out).
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check_images(x: Tensor, conv1: nn.Module) -> None:
    """Raise ValueError unless x is [N, C, H, W] with conv1's input channels. A traced x has no shape to check."""
    if is_traced(x) or not isinstance(conv1, nn.Conv2d):
        return
    if x.dim() != 4 or x.shape[1] != conv1.in_channels:
        raise ValueError(f"this net takes images [N, {conv1.in_channels}, H, W], got {list(x.shape)}")


class ResNet(v15.ResNet):
    """The nets of Table 1 and their plain counterparts. Module names are torchvision's.

    `forward` maps images [N, in_channels, H, W] of any size to scores [N, num_classes].
    """

    def __init__(
        self, block: type[Any], layers: Sequence[int], shortcut: str | None, num_classes: int, in_channels: int
    ) -> None:
        nn.Module.__init__(self)  # torchvision's constructor would build other stages
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, layers, (64, 128, 256, 512), shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            _check_images(x, self.conv1)
        return self._forward_impl(x)


class _SmallImageStem(nn.Module):
    """The stem of the nets for 32x32 images: a 3x3 convolution with stride 1, BN and ReLU, but no max pooling."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def parts(self) -> eligibility.Parts:
        """Return the stem's modules by role, for `eligibility`."""
        return eligibility.Parts([(self.conv1, self.bn1)], [self.relu])

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            _check_images(x, self.conv1)
            if eligibility.serves(x, self.parts()):
                return plain_block(x, [(self.conv1, self.bn1)])
        return self.relu(self.bn1(self.conv1(x)))


class CifarResNet(_SmallImageStem):
    """Section 4.2's net of 6n+2 layers, or its plain counterpart: n blocks each at 32x32, 16x16 and 8x8.

    `forward` maps images [N, in_channels, H, W] (32x32 in the paper) to scores [N, num_classes].
    """

    def __init__(self, n: int, residual: bool, num_classes: int, in_channels: int) -> None:
        super().__init__(in_channels, 16)
        block, shortcut = (BasicBlock, "A") if residual else (PlainBlock, None)
        self.layer1, self.layer2, self.layer3 = _stages(block, (n, n, n), (16, 32, 64), shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        if not torch.jit.is_scripting():
            if eligibility.runs_stages():
                x = v15.run_stages(x, self.layer1, self.layer2, self.layer3)
                return self.fc(v15.pooled(x, self.avgpool))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarStemResNet(_SmallImageStem):
    """An ImageNet net with the small-image stem. Its classifier is called `linear`.

    `forward` maps images [N, in_channels, H, W] to scores [N, num_classes]. The average pool is global: 4x4 for images
    of 32x32.
    """

    def __init__(self, block: type[Any], layers: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__(in_channels, 64)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, layers, (64, 128, 256, 512), "B")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        if not torch.jit.is_scripting():
            if eligibility.runs_stages():
                x = v15.run_stages(x, self.layer1, self.layer2, self.layer3, self.layer4)
                return self.linear(v15.pooled(x, self.avgpool))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.linear(torch.flatten(self.avgpool(x), 1))


LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
PLAIN_DEPTHS = (18, 34)
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)


def _one_of(what: str, value: object, accepted: Collection[object], more: str = "") -> None:
    if value not in list(accepted):
        raise ValueError(f"unknown {what} {value!r}; accepted: {', '.join(map(str, accepted))}{more}")


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number, at least 1: got {size!r}")


def default_shortcut(depth: int) -> str:
    """Return the shortcut of the paper's FLOPs and main results: "A" for 18 and 34 layers (Table 2), "B" for more."""
    return "A" if depth < 50 else "B"


def resnet(depth: int, shortcut: str | None = None, *, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Build the paper's ResNet of 18, 34, 50, 101 or 152 layers.

    shortcut: "A", "B" or "C", see `SHORTCUTS`; None for "A" with 18 and 34 layers and "B" with more. The net maps
    images [N, in_channels, H, W] to scores [N, num_classes] in the dtype of its parameters or of autocast.

    Equivalent, with shortcut "B" and up to 34 layers, to

        net = torchvision.models.resnet34(num_classes=num_classes)

    apart from the weights, which are drawn from N(0, 2 / fan_in). A bottleneck has its stride in the first 1x1.

    Raises ValueError for any other depth or shortcut, and for num_classes or in_channels below 1. Source: Table 1,
    sections 3.3 and 3.4.
    """
    _one_of("depth", depth, LAYERS, "; for 6n+2 layers see cifar")
    shortcut = default_shortcut(depth) if shortcut is None else shortcut
    _one_of("shortcut", shortcut, SHORTCUTS)
    _positive(num_classes=num_classes, in_channels=in_channels)
    block = BasicBlock if depth < 50 else Bottleneck
    return ResNet(block, LAYERS[depth], shortcut, num_classes, in_channels)


def plain(depth: int, *, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Build the plain net of 18 or 34 layers: the layers of `resnet` without shortcuts.

    It maps images [N, in_channels, H, W] to scores [N, num_classes] in the dtype of its parameters or of autocast.
    Raises ValueError for any other depth, and for num_classes or in_channels below 1. Source: Fig. 3 (middle), Table 2.
    """
    _one_of("plain depth", depth, PLAIN_DEPTHS)
    _positive(num_classes=num_classes, in_channels=in_channels)
    return ResNet(PlainBlock, LAYERS[depth], None, num_classes, in_channels)


def cifar(depth: int, residual: bool = True, *, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Build the net of section 4.2 for 32x32 images: 6n+2 layers, in three stages of 16, 32 and 64 channels.

    residual: whether blocks have option-A shortcuts or none (plain nets). The net maps images [N, in_channels, H, W] to
    scores [N, num_classes] in the dtype of its parameters or of autocast. The paper trains 20, 32, 44, 56, 110 and 1202
    layers. Source: section 4.2.

    Raises ValueError for a depth that is not 6n+2 with n >= 1, and for num_classes or in_channels below 1.
    """
    if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        trained = ", ".join(map(str, CIFAR_DEPTHS))
        raise ValueError(f"depth {depth!r} is not 6n+2 (8, 14, 20, ...); the paper trains {trained}")
    _positive(num_classes=num_classes, in_channels=in_channels)
    return CifarResNet(depth // 6, residual, num_classes, in_channels)


def cifar_stem(depth: int, *, num_classes: int = 10, in_channels: int = 3) -> CifarStemResNet:
    """Build the common adaptation of the ImageNet nets of 18, 34, 50, 101 or 152 layers to 32x32 images.

    The stem is a 3x3 convolution of stride 1 without a pool. The four stages have widths of 64 to 512 channels at 32x32
    to 4x4 pixels, with projection shortcuts where the shape changes and the stride of a bottleneck in its 3x3. A global
    average pool and the classifier `linear` follow. The net maps images [N, in_channels, H, W] to scores
    [N, num_classes] in the dtype of its parameters or of autocast. It is not in the paper.

    Raises ValueError for any other depth, and for num_classes or in_channels below 1.
    """
    _one_of("depth", depth, LAYERS)
    _positive(num_classes=num_classes, in_channels=in_channels)
    block = BasicBlock if depth < 50 else v15.Bottleneck
    return CifarStemResNet(block, LAYERS[depth], num_classes, in_channels)
