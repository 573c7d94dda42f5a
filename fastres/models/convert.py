"""`fastres.convert` and `fastres.restore`: give an existing net fastres's blocks, and take them away again.

A block is converted by assigning fastres's class to its `__class__`. That class inherits from the block's class and
replaces `forward`. So parameters, buffers and hooks stay the same objects, the names in the state dict don't change,
and an optimizer of the parameters stays valid. `restore` assigns the block's own class again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torchvision.models.resnet as tv
from torch import nn
from torchvision.models import _utils

from fastres.models import features, paper, resnet
from fastres.models.wrappers import compiled_form
from fastres.ops import eligibility

_REPLACED = "its forward has been replaced"


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`."""

    model: nn.Module  # the net that was passed to `convert`
    converted: tuple[str, ...]  # names of the converted modules; "" is the net itself, with its stem
    kept: Mapping[str, str]  # name -> reason, for blocks, containers and compiled programs that were not converted

    def __str__(self) -> str:
        return _told("converted", self.converted, self.kept)


@dataclass(frozen=True)
class Restoration:
    """The result of `restore`."""

    model: nn.Module  # the net that was passed to `restore`
    restored: tuple[str, ...]  # names of the restored modules; "" is the net itself, with its stem
    kept: Mapping[str, str]  # name -> reason, for fastres's modules and compiled programs that were not restored

    def __str__(self) -> str:
        return _told("restored", self.restored, self.kept)


def _told(done: str, names: Sequence[str], kept: Mapping[str, str]) -> str:
    lines = [f"{done}: {len(names)}, kept: {len(kept)}"]
    lines += [f"  {name or '(the net)'}: {reason}" for name, reason in kept.items()]
    return "\n".join(lines)


def convert(model: nn.Module) -> Conversion:
    """Convert the residual blocks and the stem of a torchvision or timm ResNet to fastres's, in place.

    model: such a ResNet, or any net that contains one or parts of one, such as a detection backbone, a segmentation net
    or a feature extractor. Its parameters stay the same objects under the same names.

    Returns a `Conversion` with the net, the names of the converted modules, and the modules that were kept with the
    reasons. Only modules for which fastres's are equivalent are converted. Subclasses and modules with a replaced
    `forward` are kept, and so are timm's blocks with attention, anti-aliasing, DropBlock, drop path, or an
    activation other than ReLU.

    The containers that run a ResNet's stem and stages and return their outputs are converted, too, so that these run
    fused: torchvision's `IntermediateLayerGetter`, and timm's `FeatureListNet` and `FeatureDictNet`. timm's
    `FeatureGetterNet` calls the converted ResNet. `FeatureHookNet` has hooks on what it returns: the stem runs module
    by module then, and a stage block by block. torchvision's `create_feature_extractor` records what blocks do: its
    graph has no blocks, whether the net is converted before or not. With the blocks' classes as `leaf_modules` they
    stay blocks, and can be converted before and after.

    A converted block decides in each call whether it runs fused; `fastres.status(model)` reports it. The converted net
    computes the same function; the fused path may round differently. `fastres.restore` undoes it. Equivalent to

        for block in model.modules():
            if type(block) is torchvision.models.resnet.Bottleneck:
                block.__class__ = fastres.models.resnet.Bottleneck

    and likewise for `BasicBlock`, `ResNet`, the containers and timm's classes.

    Raises TypeError if `model` is not an `nn.Module`.
    """
    families = _families()
    ours, theirs = tuple(families.values()), tuple(families)
    blocks = tuple(kind for kind in families if not issubclass(kind, nn.ModuleDict))
    converted: list[str] = []
    kept: dict[str, str] = {}
    for name, module in _eager(model, "convert", kept):
        if isinstance(module, nn.ModuleDict) and not any(isinstance(each, blocks) for each in module.modules()):
            continue  # of another net, or of a stem alone
        if isinstance(module, ours):
            kept[name] = "it is already fastres's"
        elif isinstance(module, theirs):
            reason = _take(module, families)
            if reason is None:
                converted.append(name)
            else:
                kept[name] = reason
    return Conversion(model, tuple(converted), kept)


def restore(model: nn.Module) -> Restoration:
    """Give the blocks, stems and feature extractors of a net torchvision's and timm's classes again, in place.

    model: a net that `convert` has changed, one that fastres has built, or any net that contains parts of one.
    Parameters, buffers and hooks stay the same objects under the same names, so an optimizer stays valid. After
    `convert` it brings back the net as it was.

    Returns a `Restoration` with the net, the names of the restored modules, and fastres's modules that were kept with
    the reasons. If none was kept, a pickle of the net can be read where fastres is not installed. Kept are subclasses,
    modules with a replaced `forward`, compiled programs, and modules that neither torchvision nor timm has: of the
    paper's nets those with option-A shortcuts, plain blocks, and small-image stems. Equivalent to

        for block in model.modules():
            if type(block) is fastres.models.resnet.Bottleneck:
                block.__class__ = torchvision.models.resnet.Bottleneck

    and likewise for the other classes.

    Raises TypeError if `model` is not an `nn.Module`.
    """
    stock = {ours: theirs for theirs, ours in _families().items()}
    stock |= {paper.Bottleneck: tv.Bottleneck, paper.ResNet: tv.ResNet}  # as torchvision's, but built in another way
    restored: list[str] = []
    kept: dict[str, str] = {}
    for name, module in _eager(model, "restore", kept):
        kind = type(module)
        base = next((each for each in kind.__mro__ if each.__module__.partition(".")[0] == "fastres"), None)
        if base is None:
            continue
        if "forward" in module.__dict__:
            kept[name] = _REPLACED
        elif kind in stock:
            module.__class__ = stock[kind]
            restored.append(name)
        else:
            kept[name] = f"torchvision and timm have no {base.__name__}" if base is kind else _subclass(kind)
    return Restoration(model, tuple(restored), kept)


def _eager(model: nn.Module, verb: str, kept: dict[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for all modules of `model` that are not compiled or in a compiled program.

    Compiled programs and optimized nets are added to `kept`, with the reason. Raises TypeError if `model` is not an
    `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}() takes an nn.Module, got {type(model).__name__}")
    inside: tuple[str, ...] = ()  # prefixes of the names of modules inside compiled programs
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        optimized = type(module).__module__.startswith("fastres.inference.")
        form = "net made by fastres.optimize" if optimized else compiled_form(module)
        if form is None:
            yield name, module
        else:
            inside = (*inside, f"{name}." if name else "")
            kept[name] = f"it is a {form}, which has no blocks; {verb} the original eager module"


def _families() -> dict[type[nn.Module], type[nn.Module]]:
    """Return torchvision's or timm's class -> fastres's class.

    timm is not imported here: if `timm.models.resnet` has not been imported, `model` can't contain its blocks.
    """
    families: dict[type[nn.Module], type[nn.Module]] = {
        tv.BasicBlock: resnet.BasicBlock,
        tv.Bottleneck: resnet.Bottleneck,
        tv.ResNet: resnet.ResNet,
        _utils.IntermediateLayerGetter: features.IntermediateLayerGetter,
    }
    if "timm.models.resnet" in sys.modules:
        import timm.models.resnet as theirs
        from timm.models import _features

        import fastres.models.timm as ours

        families |= {
            theirs.BasicBlock: ours.BasicBlock,
            theirs.Bottleneck: ours.Bottleneck,
            theirs.ResNet: ours.ResNet,
            _features.FeatureDictNet: ours.FeatureDictNet,
            _features.FeatureListNet: ours.FeatureListNet,
        }
    return families


def _take(module: nn.Module, families: Mapping[type[nn.Module], type[nn.Module]]) -> str | None:
    """Convert the module in place and return None, or return the reason why fastres's class would not be equivalent."""
    kind = type(module)
    if kind not in families:
        return _subclass(kind)
    if "forward" in module.__dict__:
        return _REPLACED
    module.__class__ = families[kind]
    # For torchvision's blocks ours are equivalent with any submodules, and so are containers for any net; timm's blocks
    # have more parts than ours support.
    strict = kind.__module__ == "timm.models.resnet"
    reason = eligibility.foreign(module.parts()) if strict else None  # type: ignore[operator]
    if reason is not None:
        module.__class__ = kind
    return reason


def _subclass(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__} is a subclass and may have another forward"
