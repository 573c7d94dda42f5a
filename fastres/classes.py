"""Names of classes: whether class i is the same thing to weights and to data, and what differs."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from torchvision.models._meta import _IMAGENET_CATEGORIES

__all__ = ["IGNORE", "IMAGENET", "are_imagenet_ids", "difference", "out_of_order"]

IMAGENET = tuple(_IMAGENET_CATEGORIES)  # ILSVRC 2012's classes in words, in the order of their WordNet ids
_IMAGENET_IDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"  # of those, one a line, sorted
_SHOWN = 5
IGNORE = "--ignore-class-names (in Python: ignore_class_names=True) treats class i as the same class on both sides"


def are_imagenet_ids(names: Sequence[str]) -> bool:
    """Whether they are the 1000 WordNet ids of ILSVRC 2012, sorted, as the folders of ImageNet are called."""
    return len(names) == len(IMAGENET) and hashlib.sha256("\n".join(names).encode()).hexdigest() == _IMAGENET_IDS


def difference(first: Sequence[str], second: Sequence[str], whose: tuple[str, str]) -> str | None:
    """In what the classes of two sides differ: which only one has, and the first that isn't the other's; None in
    nothing. ImageNet's ids equal its words. whose: what the sides are called."""
    sides = (list(first), list(second))
    if sides[0] == sides[1]:
        return None
    for name, ids, words in ((whose[0], *sides), (whose[1], *sides[::-1])):
        if words == list(IMAGENET) and all(re.fullmatch(r"n\d{8}", each) for each in ids):
            return None if are_imagenet_ids(ids) else f"{name} has WordNet ids, but not ImageNet's 1000 in their order"
    counts = [Counter(side) for side in sides]
    told = []
    for name, only in zip(whose, (counts[0] - counts[1], counts[1] - counts[0]), strict=True):
        if only:
            told.append(f"only {name} has {', '.join([*only][:_SHOWN])}" + ", ..." * (len(only) > _SHOWN))
    if not told:
        told.append("they have the same classes in another order")
    pairs = enumerate(zip(*sides, strict=False))  # one side may be longer
    told += [f"class {i} is {a} in {whose[0]}, {b} in {whose[1]}" for i, (a, b) in pairs if a != b][:1]
    return "; ".join(told)


def out_of_order(names: Sequence[str]) -> str | None:
    """For folders called by numbers that aren't read in the order of the numbers: in which; None for all others."""
    if not all(name.isdecimal() for name in names) or sorted(names, key=int) == list(names):
        return None
    place = next(i for i, (a, b) in enumerate(zip(names, sorted(names, key=int), strict=True)) if a != b)
    return (
        f"folders called by numbers are read in the order of text ({', '.join(names[: place + 1])}, ...), so class "
        f"{place} is folder {names[place]}"
    )
