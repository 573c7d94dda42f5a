"""Gives an existing net our blocks: `convert(model)`.

A block is converted by changing its class to ours, which inherits it and replaces only `forward`. So the parameters,
buffers, hooks, names and state_dict stay the same objects, and optimizers that hold them stay valid.
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
    """What `convert` did. `model` is the net it was given."""

    model: nn.Module
    converted: tuple[str, ...]  # names of the modules that are ours now; "" is the net itself, with its stem
    kept: Mapping[str, str]  # name -> reason, of blocks, ResNets and programs that stayed what they were

    def __str__(self) -> str:
        lines = [f"converted: {len(self.converted)}, kept: {len(self.kept)}"]
        lines += [f"  {name or '(the net)'}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> Conversion:
    """Makes the residual blocks of a torchvision or timm ResNet ours, and its stem, in place.

    model: such a ResNet or any net that contains one or a part of one: a detection backbone, a segmentation net, a
    feature extractor. Its parameters stay the same objects under the same names. Only blocks that compute exactly what
    ours do are taken: subclasses with their own `forward`, and timm's blocks with attention, anti-aliasing, dropped
    paths or another activation, are kept, each with its reason. Whether a converted block then runs fused is decided
    at each call, and `fastres.status(model)` says it (with FrozenBatchNorm2d, for one, it runs plain). Raises TypeError
    if `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes an nn.Module, not {type(model).__name__}")
    families = _families()
    ours, theirs = tuple(families.values()), tuple(families)
    converted: list[str] = []
    kept: dict[str, str] = {}
    inside: tuple[str, ...] = ()  # of programs that were made of nets: what their layers' names start with
    for name, module in model.named_modules():
        if isinstance(module, ours):
            kept[name] = "it is fastres's already"
        elif isinstance(module, theirs):
            reason = _take(module, families)
            if reason is None:
                converted.append(name)
            else:
                kept[name] = reason
        elif not name.startswith(inside) and (form := compiled_form(module)) is not None:
            inside = (*inside, f"{name}." if name else "")
            kept[name] = f"it is a {form}, which holds no blocks; convert the original eager module"
    return Conversion(model, tuple(converted), kept)


def _families() -> dict[type[nn.Module], type[nn.Module]]:
    """Foreign class -> ours. A net of timm's can only exist where timm.models.resnet is imported already."""
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
    """Makes the module ours, or gives the reason why ours would not mean the same."""
    kind = type(module)
    if kind not in families:
        return f"{kind.__module__}.{kind.__qualname__} is a subclass and may have a forward of its own"
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    module.__class__ = families[kind]
    # torchvision's blocks mean the same with any submodules; timm's have places for more than ours know.
    reason = eligibility.foreign(module.parts()) if kind.__module__.startswith("timm.") else None  # type: ignore[operator]
    if reason is not None:
        module.__class__ = kind
    return reason
