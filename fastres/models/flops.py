"""What a net costs: multiply-adds (the paper's "FLOPs") and parameters, beside the paper's own figures.

`count` runs the real modules on the meta device, where tensors have shapes and no memory, and adds up what each
convolution and linear layer does. BN, ReLU, pooling and additions count as nothing, as in the paper. A count is the
net's, whatever kernels would run it; what the fused operators report to `torch.utils.flop_counter` stands beside them,
in `fastres.ops.operators`.
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
    """One module's share. output: the shape of what it returned, () if that was no tensor; its last call's."""

    name: str
    kind: str
    output: tuple[int, ...]
    multiply_adds: int
    parameters: int


@dataclass(frozen=True)
class Cost:
    """Totals, and `layers` in the order of their first call."""

    multiply_adds: int
    parameters: int
    layers: tuple[Layer, ...]

    def under(self, name: str) -> Cost:
        """The share of the module called `name` and of everything in it, by rows of `layers`."""
        layers = tuple(row for row in self.layers if row.name == name or row.name.startswith(f"{name}."))
        return Cost(sum(row.multiply_adds for row in layers), sum(row.parameters for row in layers), layers)


def count(model: nn.Module, size: int | Sequence[int] = 224) -> Cost:
    """Multiply-adds of one forward in eval mode, and parameters; no memory is allocated and `model` is left alone.

    size: the images' side, their (H, W), or the whole input shape (N, C, H, W); N is 1 and C the first convolution's
    unless given. Only modules count: a convolution called as a function is not seen. A shared parameter counts once.
    Raises ValueError for another form of size, for one no tensor can have, or where C has to be given.
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
    except (RuntimeError, TypeError) as error:  # 2^63 bytes, a side of 2^63
        raise ValueError(f"size {size!r} is larger than any tensor") from error
    with torch.no_grad():
        model(images)
    total = sum(layer.multiply_adds for layer in found.values())
    return Cost(total, sum(p.numel() for p in model.parameters()), tuple(found.values()))


def _multiply_adds(module: nn.Module, args: tuple[Any, ...], output: Any) -> int:
    if not isinstance(module, (_ConvNd, nn.Linear)):
        return 0
    # weight [K, C/groups, R, S] meets every element of the output once, a transposed [C, K/groups, R, S] of the input.
    met = args[0] if getattr(module, "transposed", False) else output
    return met.numel() * module.weight.shape[1:].numel()


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with `model` and holds its parameters' and buffers' shapes only."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _input_shape(model: nn.Module, size: int | Sequence[int]) -> tuple[int, ...]:
    dims = (size, size) if isinstance(size, int) else tuple(size)
    if len(dims) not in (2, 4) or not all(isinstance(d, int) and d > 0 for d in dims):
        raise ValueError(f"size {size!r}; accepted: a side, (H, W) or (N, C, H, W), positive whole numbers")
    if len(dims) == 4:
        return dims
    convs = (module.in_channels for module in model.modules() if isinstance(module, _ConvNd))
    channels = next(convs, None)
    if channels is None:
        raise ValueError("no convolution tells the number of channels; give the input as (N, C, H, W)")
    return (1, channels, *dims)


@dataclass(frozen=True)
class Error:
    """An error rate in per cent as the paper prints it. top1, top5: None where it prints none."""

    source: str
    protocol: str
    top1: float | None
    top5: float | None = None
    note: str = ""


@dataclass(frozen=True)
class PaperRow:
    """One net of the paper with the figures printed for it, and what builds ours.

    family, depth, shortcut: as in `fastres.models.families`, and "vgg" (torchvision's) for the baselines. gflops: 1e9
    multiply-adds; mparams: 1e6 parameters; None where the paper prints none.
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
        """Side of the images that the figures are for."""
        return 32 if self.family.startswith("cifar") else 224

    def build(self) -> nn.Module:
        """Our variant of the net."""
        if self.family == "vgg":
            builder: Any = getattr(vgg, f"vgg{self.depth}")
            return builder()
        return families.build(self.family, self.depth, self.shortcut)

    def cost(self) -> Cost:
        """Our count for the variant, at `size`."""
        with torch.device("meta"):
            model = self.build()
        return count(model, self.size)


def _crop(source: str, top1: float, top5: float | None = None) -> Error:
    return Error(source, "ImageNet validation, 10-crop", top1, top5)


def _scales(top1: float, top5: float) -> Error:
    return Error("Table 4", "ImageNet validation, single model, multi-scale", top1, top5)


def _cifar(top1: float, note: str = "") -> Error:
    return Error("Table 6", "CIFAR-10 test", top1, note=note)


# FLOPs: Table 1, Fig. 3 and section 3.3. ResNet-34 stands in Fig. 3 with option A, the bottleneck nets use B.
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
