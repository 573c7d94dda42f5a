"""`fastres.convert`: give an existing net fastres's blocks.

A block is converted by assigning fastres's class to its `__class__`. That class inherits from the block's class and
replaces `forward`. So parameters, buffers and hooks stay the same objects, the names in the state dict don't change,
and an optimizer of the parameters stays valid.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torchvision.models.resnet as tv
from torch import nn

from fastres.models import resnet
from fastres.models.wrappers import compiled_form
from fastres.ops import eligibility


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`."""

    model: nn.Module  # the net that was passed to `convert`
    converted: tuple[str, ...]  # names of the converted modules; "" is the net itself, with its stem
    kept: Mapping[str, str]  # name -> reason, for blocks, ResNets and compiled programs that were not converted

    def __str__(self) -> str:
        lines = [f"converted: {len(self.converted)}, kept: {len(self.kept)}"]
        lines += [f"  {name or '(the net)'}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> Conversion:
    """Convert the residual blocks and the stem of a torchvision or timm ResNet to fastres's, in place.

    model: such a ResNet, or any net that contains one or parts of one, such as a detection backbone, a segmentation net
    or a feature extractor. Its parameters stay the same objects under the same names.

    Returns a `Conversion` with the net, the names of the converted modules, and the modules that were kept with the
    reasons. Only blocks for which fastres's are equivalent are converted. Subclasses and modules with a replaced
    `forward` are kept, and so are timm's blocks with attention, anti-aliasing, DropBlock, drop path, or an
    activation other than ReLU.

    A converted block decides in each call whether it runs fused; `fastres.status(model)` reports it. A torchvision
    block with FrozenBatchNorm2d, for example, is converted but runs as plain PyTorch. The converted net computes the
    same function; the fused path may round differently. Equivalent to

        for block in model.modules():
            if type(block) is torchvision.models.resnet.Bottleneck:
                block.__class__ = fastres.models.resnet.Bottleneck

    and likewise for `BasicBlock`, `ResNet` and timm's classes.

    Raises TypeError if `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert() takes an nn.Module, got {type(model).__name__}")
    families = _families()
    ours, theirs = tuple(families.values()), tuple(families)
    converted: list[str] = []
    kept: dict[str, str] = {}
    inside: tuple[str, ...] = ()  # prefixes of the names of modules inside compiled programs
    for name, module in model.named_modules():
        if isinstance(module, ours):
            kept[name] = "it is already fastres's"
        elif isinstance(module, theirs):
            reason = _take(module, families)
            if reason is None:
                converted.append(name)
            else:
                kept[name] = reason
        elif not name.startswith(inside) and (form := compiled_form(module)) is not None:
            inside = (*inside, f"{name}." if name else "")
            kept[name] = f"it is a {form}, which has no blocks; convert the original eager module"
    return Conversion(model, tuple(converted), kept)


def _families() -> dict[type[nn.Module], type[nn.Module]]:
    """Return torchvision's or timm's class -> fastres's class.

    timm is not imported here: if `timm.models.resnet` has not been imported, `model` can't contain its blocks.
    """
    families: dict[type[nn.Module], type[nn.Module]] = {
        tv.BasicBlock: resnet.BasicBlock,
        tv.Bottleneck: resnet.Bottleneck,
        tv.ResNet: resnet.ResNet,
    }
    if "timm.models.resnet" in sys.modules:
        import timm.models.resnet as theirs

        import fastres.models.timm as ours

        families |= {
            theirs.BasicBlock: ours.BasicBlock,
            theirs.Bottleneck: ours.Bottleneck,
            theirs.ResNet: ours.ResNet,
        }
    return families


def _take(module: nn.Module, families: Mapping[type[nn.Module], type[nn.Module]]) -> str | None:
    """Convert the module in place and return None, or return the reason why fastres's class would not be equivalent."""
    kind = type(module)
    if kind not in families:
        return f"{kind.__module__}.{kind.__qualname__} is a subclass and may have another forward"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    module.__class__ = families[kind]
    # For torchvision's blocks ours are equivalent with any submodules; timm's have more parts than ours support.
    reason = eligibility.foreign(module.parts()) if kind.__module__.startswith("timm.") else None  # type: ignore[operator]
    if reason is not None:
        module.__class__ = kind
    return reason
