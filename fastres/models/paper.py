"""The nets of the 2015 paper as it describes them, where torchvision's family differs.

`resnet` and `plain` are Table 1 and Fig. 3: a bottleneck strides its first 1x1 convolution (torchvision's v1.5 strides
the 3x3), and the shortcut across a change of shape is one of section 3.3's three options. `cifar` is section 4.2's
6n+2-layer family. `cifar_stem` is no net of the paper but the common adaptation of its ImageNet nets to 32x32 images.

The stages are built of `fastres.models.resnet`'s blocks; what is new here are the option-A end of a block, the block
without a shortcut and the assembly.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2015).
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
    """The paper's bottleneck ("v1"): a block that halves the image does so in its first 1x1 convolution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride


class _PadEnd:
    """A block with `downsample` a `PadShortcut` (option A), whose end relu(y + shortcut(x)) is a single pass."""

    if TYPE_CHECKING:  # what the block that it is mixed into has
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
    """`BasicBlock` across a change of shape, option A."""

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class PadBottleneck(_PadEnd, Bottleneck):
    """`Bottleneck` across a change of shape, option A."""

    def branch(self, x: Tensor) -> Tensor:
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))))


class PlainBlock(nn.Module):
    """What remains of a `BasicBlock` without its shortcut: two 3x3 convolutions, each with BN and ReLU (Fig. 3 middle).

    Names and order of its modules are `BasicBlock`'s.
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
        """The block as (conv, norm) pairs; a ReLU follows each."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def parts(self) -> eligibility.Parts:
        """The block's modules by role, as `eligibility` asks for them."""
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
    """conv2_x and on: `layers[i]` blocks of `widths[i]`; every stage but the first halves the image in its first block.

    shortcut: a key of `SHORTCUTS`, or None where `block` has none.
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
    """Weights from N(0, 2/fan_in), biases 0, as [13] does and section 3.4 adopts; BN starts as weight 1, bias 0.

    [13] (He et al., Delving Deep into Rectifiers, 2015) derives one condition from the forward signal, with n_l = k^2 c
    inputs, and one from the gradients, with k^2 d outputs; it shows that either alone suffices and takes the forward
    one (Eqn. 10) for every layer, the first included, although no ReLU stands before that. Torch's ResNets, and so
    torchvision's, take the other.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check_images(x: Tensor, conv1: nn.Module) -> None:
    """ValueError unless x is [N, C, H, W] with the C that conv1 reads; a traced x has no shape to ask."""
    if is_traced(x) or not isinstance(conv1, nn.Conv2d):
        return
    if x.dim() != 4 or x.shape[1] != conv1.in_channels:
        raise ValueError(f"this net takes images [N, {conv1.in_channels}, H, W], got {list(x.shape)}")


class ResNet(v15.ResNet):
    """Table 1's nets and their plain counterparts. Module names are torchvision's.

    `forward` takes images [N, in_channels, H, W] of any size and returns scores [N, num_classes].
    """

    def __init__(
        self, block: type[Any], layers: Sequence[int], shortcut: str | None, num_classes: int, in_channels: int
    ) -> None:
        nn.Module.__init__(self)  # torchvision's own would build other stages
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
    """The entrance of the nets for 32x32 images: one 3x3 convolution at full size, no pool."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def stem_parts(self) -> eligibility.Parts:
        """The stem's modules by role, as `eligibility` asks for them."""
        return eligibility.Parts([(self.conv1, self.bn1)], [self.relu])

    def _stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            _check_images(x, self.conv1)
            if eligibility.serves(x, self.stem_parts()):
                return plain_block(x, [(self.conv1, self.bn1)])
        return self.relu(self.bn1(self.conv1(x)))


class CifarResNet(_SmallImageStem):
    """Section 4.2's net of 6n+2 layers, or its plain counterpart: n blocks at each of 32x32, 16x16 and 8x8.

    `forward` takes images [N, in_channels, H, W], in the paper 32x32, and returns scores [N, num_classes].
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
    """An ImageNet net behind the small-image entrance; its classifier is called `linear`.

    `forward` takes images [N, in_channels, H, W] and returns scores [N, num_classes]. The average pool is global: 4x4
    for images of 32x32.
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
        raise ValueError(f"{what} {value!r} does not exist; there are {', '.join(map(str, accepted))}{more}")


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r}: any whole number from 1 is accepted")


def default_shortcut(depth: int) -> str:
    """The option behind the paper's FLOPs and main results: A for 18 and 34 (Table 2), B for the bottleneck nets."""
    return "A" if depth < 50 else "B"


def resnet(depth: int, shortcut: str | None = None, *, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """The paper's ResNet of 18, 34, 50, 101 or 152 layers (Table 1).

    shortcut: "A", "B" or "C" (section 3.3, `SHORTCUTS`); None for `default_shortcut`. Raises ValueError for any other
    depth or shortcut.
    """
    _one_of("depth", depth, LAYERS, "; for 6n+2 layers see cifar")
    shortcut = default_shortcut(depth) if shortcut is None else shortcut
    _one_of("shortcut", shortcut, SHORTCUTS)
    _positive(num_classes=num_classes, in_channels=in_channels)
    block = BasicBlock if depth < 50 else Bottleneck
    return ResNet(block, LAYERS[depth], shortcut, num_classes, in_channels)


def plain(depth: int, *, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """The plain net of 18 or 34 layers: `resnet`'s layers without shortcuts (Fig. 3 middle, Table 2).

    Raises ValueError for any other depth.
    """
    _one_of("plain depth", depth, PLAIN_DEPTHS)
    _positive(num_classes=num_classes, in_channels=in_channels)
    return ResNet(PlainBlock, LAYERS[depth], None, num_classes, in_channels)


def cifar(depth: int, residual: bool = True, *, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Section 4.2's net for 32x32 images: 6n+2 layers of widths 16, 32, 64, option-A shortcuts or (plain) none.

    The paper trains 20, 32, 44, 56, 110 and 1202 layers. Raises ValueError for a depth that is not 6n+2 with n >= 1.
    """
    if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        trained = ", ".join(map(str, CIFAR_DEPTHS))
        raise ValueError(f"depth {depth!r} is not 6n+2 (8, 14, 20, ...); the paper trains {trained}")
    _positive(num_classes=num_classes, in_channels=in_channels)
    return CifarResNet(depth // 6, residual, num_classes, in_channels)


def cifar_stem(depth: int, *, num_classes: int = 10, in_channels: int = 3) -> CifarStemResNet:
    """The ImageNet net of 18, 34, 50, 101 or 152 layers made for 32x32 images, as is common.

    The entrance is one 3x3 convolution of stride 1 without a pool; stages of widths 64 to 512 at 32x32 to 4x4;
    projection shortcuts where the shape changes; a 4x4 average pool and `linear`. Bottlenecks stride their 3x3, as
    this adaptation's nets do. Raises ValueError for any other depth.
    """
    _one_of("depth", depth, LAYERS)
    _positive(num_classes=num_classes, in_channels=in_channels)
    block = BasicBlock if depth < 50 else v15.Bottleneck
    return CifarStemResNet(block, LAYERS[depth], num_classes, in_channels)
