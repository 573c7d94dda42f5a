"""Trained nets: from the names of their weights to nets, the views that they are tested with, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastres.classes import IGNORE, difference
from fastres.evaluate import SCALES, Predictor, Views
from fastres.models import families
from fastres.train.data import Preprocess, by_channel
from fastres.train.loop import DTYPES, default_dtype
from fastres.train.recipe import RECIPES, Recipe
from fastres.weights import Weights, load_into, read

_USUAL = {"digits": "digits", "cifar10": "cifar-2015", "cifar100": "cifar-2015"}  # recipes by data


@dataclass(frozen=True)
class TrainedNets:
    """One net or an ensemble, with their weights loaded. recipe: None for unknown. preset: size and resize of the views
    that they are tested with, as far as they are known. channels: of the images that all of them read."""

    weights: list[Weights]
    models: list[nn.Module]
    names: list[str]
    recipe: Recipe | None
    preset: dict[str, int]
    channels: int

    @property
    def title(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"an ensemble of {', '.join(self.names)}"

    @property
    def taken(self) -> list[str]:
        """Which weights were read of each file with averaged ones, or several."""
        return [f"{each.taken} of {each.source}" for each in self.weights if each.taken is not None]

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    @property
    def classes(self) -> list[str]:
        """Their names, or where no weights tell them their numbers."""
        numbers = [str(k) for k in range(self.weights[0].classes or 0)]
        return next((each.names for each in self.weights if each.names), numbers)

    def views(
        self,
        crops: str = "center",
        size: int | None = None,
        resize: int | None = None,
        scales: Sequence[int] | None = None,
        flip: bool = True,
    ) -> Views:
        """None: as the nets were trained, else 224 and 256; the paper's scales in proportion to the size."""
        size = size or self.preset.get("size", 224)
        resize = resize or max(size, self.preset.get("resize", 256))
        return Views(crops, size, resize, tuple(scales or (round(side * size / SCALES[0]) for side in SCALES)), flip)

    def predictor(self, views: Views, preprocess: nn.Module | None = None, **options: Any) -> Predictor:
        """preprocess: of the data, for nets whose weights don't tell their own. options: `Predictor`'s."""
        return Predictor(self.models, views, [self._preprocess(each, preprocess) for each in self.weights], **options)

    def _preprocess(self, weights: Weights, of_data: nn.Module | None) -> nn.Module:
        if weights.preprocess:
            mean, std = weights.preprocess["mean"], weights.preprocess["std"]
            return Preprocess(mean, std, torch.zeros(len(mean), len(mean)))
        if of_data is not None:
            return of_data
        if self.recipe is not None and self.recipe.normalise == "pixel":
            raise ValueError(
                f"{weights.source} doesn't hold the mean image that its recipe subtracts, and no training images are "
                "at hand to compute it from; all files that fastres train writes hold it"
            )
        if self.channels != 3:
            raise ValueError(f"{weights.source} reads images of {self.channels} channels and doesn't hold their mean")
        return by_channel()


def load(
    sources: Sequence[str],
    models: Sequence[str],
    device: torch.device,
    *,
    recipe: str | None = None,
    data: str | None = None,
    ignore_class_names: bool = False,
) -> TrainedNets:
    """The nets of `sources`, as `fastres.weights.read` takes them, on `device` in eval mode.

    models: their names as `families.named` takes them, one for all or one each; none: as the weights say themselves.
    recipe: a key of `RECIPES` instead of theirs. data: what they are shown. Raises ValueError for weights that can't be
    read or don't fit, and for an ensemble whose classes or images differ.
    """
    if len(models) not in (0, 1, len(sources)):
        raise ValueError(f"--model names {len(models)} nets for {len(sources)} files: one for all or one each")
    asked: list[str | None] = [*models] or [None]
    asked = asked * len(sources) if len(asked) == 1 else asked
    weights = [read(source, name) for source, name in zip(sources, asked, strict=True)]
    _require_ensemble(weights, ignore_class_names)
    names = [name or _net_name(each) for name, each in zip(asked, weights, strict=True)]
    nets = []
    for name, each in zip(names, weights, strict=True):
        sizes = {"num_classes": each.classes, "in_channels": each.channels}
        net = families.named(name, **{key: size for key, size in sizes.items() if size is not None})
        load_into(net, each, name)
        nets.append(net.to(memory_format=torch.channels_last).to(device).eval())  # type: ignore[call-overload]
    channels = {each.channels for each in weights}
    if len(channels) != 1:
        raise ValueError(f"the nets of an ensemble read images of {', '.join(map(str, channels))} channels")
    meta, preset = weights[0].meta, weights[0].preset
    row = RECIPES.get(recipe or meta.get("recipe") or _USUAL.get(data or meta.get("data", "")) or "")
    if row is not None and (recipe is not None or not preset):
        preset = {"size": row.val_size, "resize": row.resize}
    return TrainedNets(weights, nets, names, row, preset, channels.pop() or 3)


def load_predictor(source: str, model: str | None = None) -> tuple[Predictor, str, list[str]]:
    """What `predict --optimize` runs on a GPU, or else on the CPU; with the net's name and its classes' names.

    source, model: as its --weights and --model take them. Raises ValueError for weights that it refuses.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nets = load([source], [] if model is None else [model], device)
    predictor = nets.predictor(nets.views(), dtype=DTYPES[default_dtype(device)], fast=True)
    return predictor, nets.title, nets.classes


def _require_ensemble(weights: Sequence[Weights], ignore_class_names: bool) -> None:
    """Raises ValueError unless class i is the same to all of them, as far as they name their classes."""
    if len({each.classes for each in weights}) != 1:
        counts = ", ".join(f"{each.source} has {each.classes}" for each in weights)
        raise ValueError(f"the nets of an ensemble have one number of classes: {counts}")
    named = [(each.source, each.names) for each in weights if each.names is not None]
    for source, names in named[1:]:
        differing = difference(named[0][1], names, (named[0][0], source))
        if differing is not None and not ignore_class_names:
            raise ValueError(f"the nets of an ensemble have different classes: {differing}. {IGNORE}")


def _net_name(weights: Weights) -> str:
    """As the weights say themselves."""
    if weights.net is not None:
        return weights.net
    meta = weights.meta
    if "family" not in meta or "depth" not in meta:
        raise ValueError(f"{weights.source} doesn't say which net it is of: give --model")
    parts = (meta["family"], meta["depth"], meta.get("shortcut"))
    return "-".join(str(part) for part in parts if part is not None)
