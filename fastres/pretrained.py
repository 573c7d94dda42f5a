"""Load trained nets from their weights, with the image sizes and the normalisation to test them with."""

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

_USUAL = {"digits": "digits", "cifar10": "cifar-2015", "cifar100": "cifar-2015"}  # data set -> its usual recipe


@dataclass(frozen=True)
class TrainedNets:
    """One net, or an ensemble, with its weights loaded.

    weights, models, names: one entry per net, in the same order. recipe: the one asked for, else the first net's, else
    the usual one for the data; None if unknown. preset: "size" (side of the crop) and "resize" (shorter side before
    cropping) for testing, from the first net or the recipe; empty if unknown. channels: the number of image channels,
    the same for all nets.
    """

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
        """Return one line for each file with several sets of weights, or averaged ones, that names the set read."""
        return [f"{each.taken} of {each.source}" for each in self.weights if each.taken is not None]

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    @property
    def classes(self) -> list[str]:
        """The class names from the first weights that have them, else the class indices as strings."""
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
        """Return the `Views` to test the nets with.

        crops: a key of `evaluate.CROPS`. size, resize: None for those of `preset`, or 224 and 256 if unknown; the
        default of resize is never below size. scales: None for the paper's scales, multiplied by size / 224. flip: for
        multiscale, also test mirror images.
        """
        size = size or self.preset.get("size", 224)
        resize = resize or max(size, self.preset.get("resize", 256))
        return Views(crops, size, resize, tuple(scales or (round(side * size / SCALES[0]) for side in SCALES)), flip)

    def predictor(self, views: Views, preprocess: nn.Module | None = None, **options: Any) -> Predictor:
        """Return a `Predictor` of the nets.

        preprocess: normalisation computed from the data, for nets whose weights don't contain their own; None for
        ImageNet's mean and std. options: passed on to `Predictor`. Raises ValueError if the normalisation of a net is
        unknown.
        """
        return Predictor(self.models, views, [self._preprocess(each, preprocess) for each in self.weights], **options)

    def _preprocess(self, weights: Weights, of_data: nn.Module | None) -> nn.Module:
        if weights.preprocess:
            mean, std = weights.preprocess["mean"], weights.preprocess["std"]
            return Preprocess(mean, std, torch.zeros(len(mean), len(mean)))
        if of_data is not None:
            return of_data
        if self.recipe is not None and self.recipe.normalise == "pixel":
            raise ValueError(
                f"{weights.source} doesn't contain the mean image that its recipe subtracts, and there are no training "
                "images to compute it from; every file that fastres train writes contains it"
            )
        if self.channels != 3:
            raise ValueError(
                f"{weights.source} doesn't contain the mean and std of its images, which have {self.channels} "
                "channels; ImageNet's are the default for 3 channels only"
            )
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
    """Load the nets of `sources` in channels_last format onto `device`, in eval mode.

    sources: files or names of weights, as `fastres.weights.read` takes them. models: names of nets, as `families.named`
    takes them: one for all sources, or one per source; if empty, the weights must name their net. recipe: a key of
    `RECIPES` that replaces the one in the weights. data: the name of the test data, which selects a recipe if the
    weights name none. ignore_class_names: accept an ensemble whose nets have different class names.

    Raises ValueError if weights can't be read, don't fit their net or don't name it, or if the nets of an ensemble
    differ in classes or image channels.
    """
    if len(models) not in (0, 1, len(sources)):
        raise ValueError(
            f"expected one net name (--model) for all files, or one per file: got {len(models)} for {len(sources)}"
        )
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
        raise ValueError(
            f"the nets of an ensemble must have the same image channels: got {', '.join(map(str, channels))}"
        )
    meta, preset = weights[0].meta, weights[0].preset
    row = RECIPES.get(recipe or meta.get("recipe") or _USUAL.get(data or meta.get("data", "")) or "")
    if row is not None and (recipe is not None or not preset):
        preset = {"size": row.val_size, "resize": row.resize}
    return TrainedNets(weights, nets, names, row, preset, channels.pop() or 3)


def load_predictor(source: str, model: str | None = None) -> tuple[Predictor, str, list[str]]:
    """Return an optimized predictor, the name of its net and its class names.

    The predictor runs on a GPU (bf16) if there is one, else on the CPU (fp32), as `predict --optimize` does.

    source, model: the weights and the name of the net, as in `load`. Raises ValueError as `load` does.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nets = load([source], [] if model is None else [model], device)
    predictor = nets.predictor(nets.views(), dtype=DTYPES[default_dtype(device)], fast=True)
    return predictor, nets.title, nets.classes


def _require_ensemble(weights: Sequence[Weights], ignore_class_names: bool) -> None:
    """Raise ValueError unless all weights have the same number of classes, and those with class names the same names.

    ignore_class_names: check the number only.
    """
    if len({each.classes for each in weights}) != 1:
        counts = ", ".join(f"{each.source} has {each.classes}" for each in weights)
        raise ValueError(f"the nets of an ensemble must have the same number of classes: {counts}")
    named = [(each.source, each.names) for each in weights if each.names is not None]
    for source, names in named[1:]:
        differing = difference(named[0][1], names, (named[0][0], source))
        if differing is not None and not ignore_class_names:
            raise ValueError(f"the nets of an ensemble have different classes: {differing}. {IGNORE}")


def _net_name(weights: Weights) -> str:
    """Return the name of the net from the metadata of its weights. Raises ValueError if they don't have it."""
    if weights.net is not None:
        return weights.net
    meta = weights.meta
    if "family" not in meta or "depth" not in meta:
        raise ValueError(f"{weights.source} doesn't say which net it belongs to: give the net's name (--model)")
    parts = (meta["family"], meta["depth"], meta.get("shortcut"))
    return "-".join(str(part) for part in parts if part is not None)
