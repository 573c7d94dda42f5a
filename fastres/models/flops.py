"""The cost of a net: multiply-adds (the paper's "FLOPs") and parameters, and the paper's figures for comparison.

`count` runs the modules on the meta device, where tensors have shapes but no memory, and adds up the multiply-adds of
every convolution and linear layer. BatchNorm, ReLU, pooling and additions count as 0, as in the paper. The count does
not depend on which kernels run the net. (The fused operators report their FLOPs to `torch.utils.flop_counter` in
`fastres.ops.operators`.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.models import vgg

from fastres.models import families


@dataclass(frozen=True)
class Layer:
    """The cost of one module.

    name: the module's path. kind: its class. output: shape of its output in its last call; () if the output is not a
    tensor. parameters: without those that an earlier layer shares.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    multiply_adds: int
    parameters: int


@dataclass(frozen=True)
class Cost:
    """Total multiply-adds and parameters, and the layers in the order of their first call.

    The total of the parameters includes modules that are not among the layers.
    """

    multiply_adds: int
    parameters: int
    layers: tuple[Layer, ...]

    def under(self, name: str) -> Cost:
        """Return the cost of the module `name` and of all modules inside it."""
        layers = tuple(row for row in self.layers if row.name == name or row.name.startswith(f"{name}."))
        return Cost(sum(row.multiply_adds for row in layers), sum(row.parameters for row in layers), layers)


def count(model: nn.Module, size: int | Sequence[int] = 224) -> Cost:
    """Count the multiply-adds of one forward in eval mode, and the parameters.

    The forward runs on a copy of `model` on the meta device: no memory is allocated, and `model` is not changed.

    size: side of the images, (H, W), or the full input shape (N, C, H, W). By default N is 1, and C is that of the
    first convolution.

    Only modules are counted, not functional convolutions. A shared parameter counts once. Raises ValueError for another
    form of size, for a size beyond the limits of a tensor, and if C can't be derived because there is no convolution.
    """
    shape = _input_shape(model, size)
    model = _on_meta(model).eval()
    found: dict[str, Layer] = {}
    seen: set[nn.Parameter] = set()

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before = found.get(name)
        if before is None:
            own = set(module.parameters()) - seen
            seen.update(own)
            before = Layer(name, type(module).__name__, (), 0, sum(p.numel() for p in own))
        dims = tuple(output.shape) if isinstance(output, Tensor) else ()
        work = before.multiply_adds + _multiply_adds(module, args, output)
        found[name] = Layer(name, before.kind, dims, work, before.parameters)

    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)) or not any(module.children()):
            module.register_forward_hook(partial(record, name))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    try:
        images = torch.empty(shape, device="meta", dtype=dtype)
    except (RuntimeError, TypeError) as error:  # for 2^63 bytes or more, and for a side of 2^63 or more
        raise ValueError(f"size {size!r} is larger than any tensor") from error
    with torch.no_grad():
        model(images)
    total = sum(layer.multiply_adds for layer in found.values())
    return Cost(total, sum(p.numel() for p in model.parameters()), tuple(found.values()))


def _multiply_adds(module: nn.Module, args: tuple[Any, ...], output: Any) -> int:
    if not isinstance(module, (_ConvNd, nn.Linear)):
        return 0
    # A weight [K, C/groups, R, S] takes C/groups R S multiply-adds per output element. The weight of a transposed
    # convolution, [C, K/groups, R, S], takes K/groups R S per input element.
    tensor = args[0] if getattr(module, "transposed", False) else output
    return tensor.numel() * module.weight.shape[1:].numel()


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model` whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _input_shape(model: nn.Module, size: int | Sequence[int]) -> tuple[int, ...]:
    dims = (size, size) if isinstance(size, int) else tuple(size)
    if len(dims) not in (2, 4) or not all(isinstance(d, int) and d > 0 for d in dims):
        raise ValueError(f"size must be a side, (H, W) or (N, C, H, W), in positive whole numbers: got {size!r}")
    if len(dims) == 4:
        return dims
    convs = (module.in_channels for module in model.modules() if isinstance(module, _ConvNd))
    channels = next(convs, None)
    if channels is None:
        raise ValueError("the net has no convolution that sets the number of channels; pass size as (N, C, H, W)")
    return (1, channels, *dims)


@dataclass(frozen=True)
class Error:
    """An error rate of the paper, in per cent.

    source: table or figure. protocol: images and testing method. top1, top5: None if the paper prints none.
    """

    source: str
    protocol: str
    top1: float | None
    top5: float | None = None
    note: str = ""


@dataclass(frozen=True)
class PaperRow:
    """A net of the paper with the figures that the paper prints for it.

    family, depth, shortcut: arguments of `fastres.models.families.build`, or "vgg" for torchvision's VGG baselines.
    gflops: 1e9 multiply-adds. mparams: 1e6 parameters. Each is None if the paper doesn't print it.
    """

    name: str
    family: str
    depth: int
    shortcut: str | None = None
    gflops: float | None = None
    mparams: float | None = None
    errors: tuple[Error, ...] = ()

    @property
    def size(self) -> int:
        """Side of the images for which the paper gives the figures."""
        return 32 if self.family.startswith("cifar") else 224

    def build(self) -> nn.Module:
        """Build the net: ours, or torchvision's VGG."""
        if self.family == "vgg":
            builder: Any = getattr(vgg, f"vgg{self.depth}")
            return builder()
        return families.build(self.family, self.depth, self.shortcut)

    def cost(self) -> Cost:
        """Count the cost of the net at `size`."""
        with torch.device("meta"):
            model = self.build()
        return count(model, self.size)


def _crop(source: str, top1: float, top5: float | None = None) -> Error:
    return Error(source, "ImageNet validation, 10-crop", top1, top5)


def _scales(top1: float, top5: float) -> Error:
    return Error("Table 4", "ImageNet validation, single model, multi-scale", top1, top5)


def _cifar(top1: float, note: str = "") -> Error:
    return Error("Table 6", "CIFAR-10 test", top1, note=note)


# FLOPs are from Table 1, Fig. 3 and section 3.3. Fig. 3 gives ResNet-34 with option A; the bottleneck nets use B.
PAPER_TABLE = (
    PaperRow("VGG-16", "vgg", 16, gflops=15.3),
    PaperRow("VGG-19", "vgg", 19, gflops=19.6),
    PaperRow("plain-18", "plain", 18, gflops=1.8, errors=(_crop("Table 2", 27.94),)),
    PaperRow("plain-34", "plain", 34, gflops=3.6, errors=(_crop("Table 2", 28.54),)),
    PaperRow("ResNet-18 A", "paper", 18, "A", gflops=1.8, errors=(_crop("Table 2", 27.88),)),
    PaperRow("ResNet-34 A", "paper", 34, "A", gflops=3.6, errors=(_crop("Tables 2, 3", 25.03, 7.76),)),
    PaperRow("ResNet-34 B", "paper", 34, "B", errors=(_crop("Table 3", 24.52, 7.46), _scales(21.84, 5.71))),
    PaperRow("ResNet-34 C", "paper", 34, "C", errors=(_crop("Table 3", 24.19, 7.40), _scales(21.53, 5.60))),
    PaperRow("ResNet-50", "paper", 50, "B", gflops=3.8, errors=(_crop("Table 3", 22.85, 6.71), _scales(20.74, 5.25))),
    PaperRow("ResNet-101", "paper", 101, "B", gflops=7.6, errors=(_crop("Table 3", 21.75, 6.05), _scales(19.87, 4.60))),
    PaperRow(
        "ResNet-152", "paper", 152, "B", gflops=11.3, errors=(_crop("Table 3", 21.43, 5.71), _scales(19.38, 4.49))
    ),
    PaperRow("ResNet-20", "cifar", 20, mparams=0.27, errors=(_cifar(8.75),)),
    PaperRow("ResNet-32", "cifar", 32, mparams=0.46, errors=(_cifar(7.51),)),
    PaperRow("ResNet-44", "cifar", 44, mparams=0.66, errors=(_cifar(7.17),)),
    PaperRow("ResNet-56", "cifar", 56, mparams=0.85, errors=(_cifar(6.97),)),
    PaperRow("ResNet-110", "cifar", 110, mparams=1.7, errors=(_cifar(6.43, "best of 5 runs; 6.61 +- 0.16"),)),
    PaperRow("ResNet-1202", "cifar", 1202, mparams=19.4, errors=(_cifar(7.93),)),
    PaperRow("plain-110", "cifar-plain", 110, errors=(Error("Fig. 6", "CIFAR-10", None, note="above 60"),)),
)

ENSEMBLE = Error("Table 5", "ImageNet test, ensemble of six nets", None, 3.57)
