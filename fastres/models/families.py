"""The nets by name: which families there are, which depths and shortcuts each has, and how to build one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastres.models import paper, resnet


@dataclass(frozen=True)
class Family:
    """depths: those to name to a user; the builder decides what it accepts. size: the side of its usual images.

    build(depth, shortcut, **sizes), where sizes may be num_classes and in_channels.
    """

    meaning: str
    build: Callable[..., nn.Module]
    depths: tuple[int, ...]
    size: int
    shortcuts: tuple[str, ...] = ()


def _torchvision(depth: int, shortcut: str | None, *, in_channels: int = 3, **sizes: int) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"family torchvision reads images of 3 channels, not {in_channels}")
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
        "those without shortcuts",
        lambda depth, _, **sizes: paper.cifar(depth, residual=False, **sizes),
        paper.CIFAR_DEPTHS,
        32,
    ),
    "cifar-stem": Family(
        "the ImageNet nets behind a 3x3 entrance",
        lambda depth, _, **sizes: paper.cifar_stem(depth, **sizes),
        _DEPTHS,
        32,
    ),
}


def build(family: str, depth: int, shortcut: str | None = None, **sizes: int) -> nn.Module:
    """The net of `family`, a key of `FAMILIES`, with its usual number of classes and input channels.

    shortcut: for a family that has a choice; None for its default. sizes: num_classes, in_channels, where others are
    wanted. Raises ValueError, listing what exists, for any name
    or depth that does not.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} does not exist; there are {', '.join(FAMILIES)}")
    chosen = FAMILIES[family]
    if shortcut is not None and not chosen.shortcuts:
        choosing = ", ".join(name for name, other in FAMILIES.items() if other.shortcuts)
        raise ValueError(f"family {family} has no choice of shortcut; only {choosing} has")
    if family == "torchvision" and depth not in chosen.depths:
        raise ValueError(f"depth {depth} does not exist; there are {', '.join(map(str, chosen.depths))}")
    return chosen.build(depth, shortcut, **sizes)


def named(name: str, **sizes: int) -> nn.Module:
    """The net called `name`: torchvision's resnet50, wide_resnet50_2, ..., or family-depth[-shortcut]: cifar-20,
    paper-34-B.

    sizes: num_classes, in_channels. Raises ValueError, listing what exists, for any other name.
    """
    if name in BUILDERS:
        if sizes.get("in_channels", 3) != 3:
            raise ValueError(f"{name} reads images of 3 channels, not {sizes['in_channels']}")
        builder: Callable[..., nn.Module] = getattr(resnet, name)
        return builder(**{key: value for key, value in sizes.items() if key != "in_channels"})
    family, depth, shortcut = split(name)
    return build(family, depth, shortcut, **sizes)


def split(name: str) -> tuple[str, int, str | None]:
    """What `build` takes for the net called family-depth[-shortcut]. Raises ValueError, listing what exists, where no
    family is called so."""
    family, _, rest = name.rpartition("-")
    shortcut = rest if rest in paper.SHORTCUTS else None
    if shortcut is not None:
        family, _, rest = family.rpartition("-")
    if family not in FAMILIES or not rest.isdecimal():
        raise ValueError(
            f"model {name!r} does not exist; there are {', '.join(BUILDERS)}, and {', '.join(FAMILIES)} as cifar-20"
        )
    return family, int(rest), shortcut


def usual_size(name: str) -> int:
    """The side of the images that the net called `name` is made for. Raises ValueError as `named` does."""
    return FAMILIES["torchvision" if name in BUILDERS else split(name)[0]].size
