"""Class names: check that class i of some weights is class i of a data set, and describe the differences."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from torchvision.models._meta import _IMAGENET_CATEGORIES

__all__ = ["IGNORE", "IMAGENET", "are_imagenet_ids", "difference", "out_of_order"]

IMAGENET = tuple(_IMAGENET_CATEGORIES)  # names of the ILSVRC 2012 classes, in the order of their WordNet ids
_IMAGENET_IDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"  # SHA-256 of the ids, one per line
_SHOWN = 5
IGNORE = "--ignore-class-names (in Python: ignore_class_names=True) treats class i as the same class on both sides"


def are_imagenet_ids(names: Sequence[str]) -> bool:
    """Return whether `names` are the 1000 WordNet ids of ILSVRC 2012, sorted. ImageNet's folders have these names."""
    return len(names) == len(IMAGENET) and hashlib.sha256("\n".join(names).encode()).hexdigest() == _IMAGENET_IDS


def difference(first: Sequence[str], second: Sequence[str], whose: tuple[str, str]) -> str | None:
    """Describe how two lists of class names differ, or return None if they are equal.

    The text lists the classes that only one side has, and the first index whose names differ. ImageNet's WordNet ids
    and its class names count as equal. whose: the names of the two sides in the text, e.g. ("the net", "the data").
    """
    sides = (list(first), list(second))
    if sides[0] == sides[1]:
        return None
    for name, ids, words in ((whose[0], *sides), (whose[1], *sides[::-1])):
        if words == list(IMAGENET) and all(re.fullmatch(r"n\d{8}", each) for each in ids):
            return None if are_imagenet_ids(ids) else f"{name} has WordNet ids, but not ImageNet's 1000 in their order"
    counts = [Counter(side) for side in sides]
    parts = []
    for name, only in zip(whose, (counts[0] - counts[1], counts[1] - counts[0]), strict=True):
        if only:
            parts.append(f"only {name} has {', '.join([*only][:_SHOWN])}" + ", ..." * (len(only) > _SHOWN))
    if not parts:
        parts.append("they have the same classes in another order")
    pairs = enumerate(zip(*sides, strict=False))  # the sides may differ in length
    parts += [f"class {i} is {a} in {whose[0]}, {b} in {whose[1]}" for i, (a, b) in pairs if a != b][:1]
    return "; ".join(parts)


def out_of_order(names: Sequence[str]) -> str | None:
    """Describe the order of folders whose names are numbers, if it is not the numeric order; else return None.

    Folders are sorted as text, so that "10" comes before "2".
    """
    if not all(name.isdecimal() for name in names) or sorted(names, key=int) == list(names):
        return None
    place = next(i for i, (a, b) in enumerate(zip(names, sorted(names, key=int), strict=True)) if a != b)
    return (
        f"folders with numeric names are sorted as text ({', '.join(names[: place + 1])}, ...), so class {place} is "
        f"folder {names[place]}"
    )
