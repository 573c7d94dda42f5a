"""The nets by name: which families there are, which depths and shortcuts each has, and how to build one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastres.models import paper, resnet


@dataclass(frozen=True)
class Family:
    """depths: those to name to a user; the builder decides what it accepts. size: the side of its usual images."""

    meaning: str
    build: Callable[[int, str | None], nn.Module]
    depths: tuple[int, ...]
    size: int
    shortcuts: tuple[str, ...] = ()


def _torchvision(depth: int, shortcut: str | None) -> nn.Module:
    builder: Callable[[], nn.Module] = getattr(resnet, f"resnet{depth}")
    return builder()


_DEPTHS = tuple(paper.LAYERS)

FAMILIES = {
    "torchvision": Family("torchvision's nets (v1.5: a bottleneck strides its 3x3)", _torchvision, _DEPTHS, 224),
    "paper": Family("the paper's nets (Table 1)", paper.resnet, _DEPTHS, 224, tuple(paper.SHORTCUTS)),
    "plain": Family("the paper's nets without shortcuts", lambda depth, _: paper.plain(depth), paper.PLAIN_DEPTHS, 224),
    "cifar": Family(
        "the paper's 6n+2-layer nets (section 4.2)", lambda depth, _: paper.cifar(depth), paper.CIFAR_DEPTHS, 32
    ),
    "cifar-plain": Family(
        "those without shortcuts", lambda depth, _: paper.cifar(depth, residual=False), paper.CIFAR_DEPTHS, 32
    ),
    "cifar-stem": Family(
        "the ImageNet nets behind a 3x3 entrance", lambda depth, _: paper.cifar_stem(depth), _DEPTHS, 32
    ),
}


def build(family: str, depth: int, shortcut: str | None = None) -> nn.Module:
    """The net of `family`, a key of `FAMILIES`, with its usual number of classes.

    shortcut: for a family that has a choice; None for its default. Raises ValueError, listing what exists, for any name
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
    return chosen.build(depth, shortcut)
