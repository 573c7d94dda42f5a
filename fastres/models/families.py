"""Build nets by name: the families, their depths and shortcuts, and a builder for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastres.models import paper, resnet


@dataclass(frozen=True)
class Family:
    """A family of nets.

    meaning: a description for help texts.
    build: build(depth, shortcut, **sizes), where sizes may be num_classes and in_channels. It may accept depths that
    are not in `depths`.
    depths: the depths that help texts list.
    size: side of the images that the family is made for.
    shortcuts: the accepted shortcuts; empty if there is no choice.
    """

    meaning: str
    build: Callable[..., nn.Module]
    depths: tuple[int, ...]
    size: int
    shortcuts: tuple[str, ...] = ()


def _torchvision(depth: int, shortcut: str | None, *, in_channels: int = 3, **sizes: int) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"family torchvision takes images of 3 channels, not {in_channels}")
    builder: Callable[..., nn.Module] = getattr(resnet, f"resnet{depth}")
    return builder(**sizes)


_DEPTHS = tuple(paper.LAYERS)
BUILDERS = tuple(name for name in resnet.__all__ if name.islower())  # torchvision's names

FAMILIES = {
    "torchvision": Family("torchvision's nets (v1.5: a bottleneck strides its 3x3)", _torchvision, _DEPTHS, 224),
    "paper": Family("the paper's nets (Table 1)", paper.resnet, _DEPTHS, 224, tuple(paper.SHORTCUTS)),
    "plain": Family(
        "the paper's nets without shortcuts",
        lambda depth, _, **sizes: paper.plain(depth, **sizes),
        paper.PLAIN_DEPTHS,
        224,
    ),
    "cifar": Family(
        "the paper's 6n+2-layer nets (section 4.2)",
        lambda depth, _, **sizes: paper.cifar(depth, **sizes),
        paper.CIFAR_DEPTHS,
        32,
    ),
    "cifar-plain": Family(
        "the 6n+2-layer nets without shortcuts",
        lambda depth, _, **sizes: paper.cifar(depth, residual=False, **sizes),
        paper.CIFAR_DEPTHS,
        32,
    ),
    "cifar-stem": Family(
        "the ImageNet nets with a 3x3 stem",
        lambda depth, _, **sizes: paper.cifar_stem(depth, **sizes),
        _DEPTHS,
        32,
    ),
}


def build(family: str, depth: int, shortcut: str | None = None, **sizes: int) -> nn.Module:
    """Build the net of a family, a key of `FAMILIES`.

    shortcut: for families with a choice of shortcuts; None for the default. sizes: num_classes and in_channels, if they
    differ from the family's defaults. Raises ValueError, which lists the accepted values, for an unknown family, depth
    or shortcut.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; accepted: {', '.join(FAMILIES)}")
    chosen = FAMILIES[family]
    if shortcut is not None and not chosen.shortcuts:
        choosing = ", ".join(name for name, other in FAMILIES.items() if other.shortcuts)
        raise ValueError(f"family {family} has no choice of shortcut; only {choosing} has")
    if family == "torchvision" and depth not in chosen.depths:
        raise ValueError(f"unknown depth {depth}; accepted: {', '.join(map(str, chosen.depths))}")
    return chosen.build(depth, shortcut, **sizes)


def named(name: str, **sizes: int) -> nn.Module:
    """Build a net by its name: a torchvision name such as resnet50, or family-depth[-shortcut] such as paper-34-B.

    sizes: num_classes, in_channels. Raises ValueError, which lists the accepted names, for any other name.
    """
    if name in BUILDERS:
        if sizes.get("in_channels", 3) != 3:
            raise ValueError(f"{name} takes images of 3 channels, not {sizes['in_channels']}")
        builder: Callable[..., nn.Module] = getattr(resnet, name)
        return builder(**{key: value for key, value in sizes.items() if key != "in_channels"})
    family, depth, shortcut = split(name)
    return build(family, depth, shortcut, **sizes)


def split(name: str) -> tuple[str, int, str | None]:
    """Split family-depth[-shortcut] into the arguments of `build`: (family, depth, shortcut or None).

    Raises ValueError, which lists the accepted names, for an unknown family or another form.
    """
    family, _, rest = name.rpartition("-")
    shortcut = rest if rest in paper.SHORTCUTS else None
    if shortcut is not None:
        family, _, rest = family.rpartition("-")
    if family not in FAMILIES or not rest.isdecimal():
        raise ValueError(
            f"unknown model {name!r}; accepted: {', '.join(BUILDERS)}, and families with a depth, such as cifar-20: "
            f"{', '.join(FAMILIES)}"
        )
    return family, int(rest), shortcut


def usual_size(name: str) -> int:
    """Return the side of the images that the net `name` is made for. Raises ValueError for an unknown name."""
    return FAMILIES["torchvision" if name in BUILDERS else split(name)[0]].size
