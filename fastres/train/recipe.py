"""The recipes: each a row of data, with its source. Nothing here computes more than arithmetic on that data.

Batch, learning rate and iterations are global: neither the number of processes nor gradient accumulation changes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DATA = {
    "digits": "scikit-learn's 1797 handwritten digits of 8x8, shipped with it; every fifth is held out",
    "cifar10": "CIFAR-10, 32x32, as torchvision keeps it under --root",
    "cifar100": "CIFAR-100, likewise",
    "imagenet": "ImageNet, --root with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
    "folder": "any photographs, --root with train/<class>/* and val/<class>/*",
    "synthetic": "smooth random images of the recipe's size, to measure speed",
}

LOADERS = {
    "auto": "dali on a GPU where it is installed and has the recipe's augmentation, else torch",
    "torch": "Pillow in workers",
    "dali": "NVIDIA DALI",
}

GRAPHS = {
    "auto": "on for one process on a GPU without --compile",
    "on": "a GPU launches forward and backward whole, several processes average gradients after it",
    "off": "the host launches every kernel",
}


@dataclass(frozen=True)
class ScaleCrop:
    """The shorter side becomes a whole number drawn uniformly from [low, high]; then a square crop anywhere."""

    low: int
    high: int


@dataclass(frozen=True)
class AreaCrop:
    """torchvision's RandomResizedCrop: 8 to 100 % of the area, aspect 3/4 to 4/3, resized to the square."""


@dataclass(frozen=True)
class PadCrop:
    """`pad` zeros on each side, after normalisation, then a crop of the image's own size anywhere."""

    pad: int


@dataclass(frozen=True)
class Steps:
    """lr times `factor` at each of `milestones`, in iterations."""

    milestones: tuple[int, ...]
    factor: float = 0.1


@dataclass(frozen=True)
class Plateau:
    """lr times `factor` once the validation error has not fallen by `threshold` for `patience` evaluations.

    The paper says "when the error plateaus" and no more; patience and threshold are ours.
    """

    factor: float = 0.1
    patience: int = 5
    threshold: float = 0.001


@dataclass(frozen=True)
class Cosine:
    """By epoch: a linear rise from `start` times lr over `rise` epochs, then half a cosine down to 0 at the end."""

    rise: int = 0
    start: float = 0.01


@dataclass(frozen=True)
class Warmup:
    """Nets of at least `from_depth` layers begin with `lr`, until the training error is below `error`.

    The error is the mean over `window` iterations (ours: the paper only says that it took about 400 iterations).
    """

    lr: float
    error: float
    from_depth: int
    window: int = 50


@dataclass(frozen=True)
class Ema:
    """Every `every` iterations the averaged weights move to the trained ones by 1 - decay; copies for `warm` epochs."""

    decay: float
    every: int
    warm: int = 0


@dataclass(frozen=True)
class Recipe:
    """How to train: on what, which net by default, seen how, driven how, for how long.

    size: side of the training images; resize: shorter side before the centre crop of `val_size` in validation.
    normalise: "pixel" subtracts the training set's mean image, "channel" ImageNet's channel means and divides by their
    deviations; pixels are in [0, 1] (the scale itself cancels in the BN behind conv1). colour: deviation of the PCA
    colour shift, 0 for none. bn_batch: images that BN normalises together, so those of one forward pass; None for all
    that a process has. norm_decay: weight decay of BN's parameters, None for that of all the others. epochs or
    iterations: the one that the source states.
    """

    source: str
    data: str
    family: str
    depth: int
    size: int
    val_size: int
    resize: int
    crop: ScaleCrop | AreaCrop | PadCrop
    batch: int
    lr: float
    schedule: Steps | Plateau | Cosine
    weight_decay: float
    momentum: float = 0.9
    flip: bool = True
    normalise: str = "pixel"
    colour: float = 0.0
    bn_batch: int | None = None
    iterations: int | None = None
    epochs: int | None = None
    warmup: Warmup | None = None
    norm_decay: float | None = None
    label_smoothing: float = 0.0
    trivial_augment: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    ema: Ema | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "bn_batch", "iterations", "epochs", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: any whole number from 1 is accepted")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr {self.lr}: any number above 0 is accepted")
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("a recipe lasts either a number of iterations or a number of epochs")

    def total(self, steps_per_epoch: int) -> int:
        """Iterations of the whole training."""
        return self.iterations if self.iterations is not None else (self.epochs or 0) * steps_per_epoch

    def micro_batch(self, world: int) -> int:
        """Images per forward pass of each of `world` processes, unless the user says otherwise."""
        share = self.batch // world
        return share if self.bn_batch is None else min(self.bn_batch, share)


RECIPES = {
    "imagenet-2015": Recipe(
        source="the paper, section 3.4; 32 images per GPU as in the authors' release",
        data="imagenet",
        family="paper",
        depth=50,
        size=224,
        val_size=224,
        resize=256,
        crop=ScaleCrop(256, 480),
        colour=0.1,
        batch=256,
        bn_batch=32,
        lr=0.1,
        schedule=Plateau(),
        weight_decay=1e-4,
        iterations=600_000,
    ),
    "cifar-2015": Recipe(
        source="the paper, section 4.2; batch 128 on two GPUs",
        data="cifar10",
        family="cifar",
        depth=20,
        size=32,
        val_size=32,
        resize=32,
        crop=PadCrop(4),
        batch=128,
        bn_batch=64,
        lr=0.1,
        schedule=Steps((32_000, 48_000)),
        warmup=Warmup(lr=0.01, error=0.80, from_depth=110),
        weight_decay=1e-4,
        iterations=64_000,
    ),
    "imagenet-modern": Recipe(
        source="torchvision's reference training of ResNet50_Weights.IMAGENET1K_V2 on 8 GPUs",
        data="imagenet",
        family="torchvision",
        depth=50,
        size=176,
        val_size=224,
        resize=232,
        crop=AreaCrop(),
        normalise="channel",
        trivial_augment=True,
        erase=0.1,
        mixup=0.2,
        cutmix=1.0,
        repeats=4,
        label_smoothing=0.1,
        batch=1024,
        bn_batch=128,
        lr=0.5,
        schedule=Cosine(rise=5, start=0.01),
        weight_decay=2e-5,
        norm_decay=0.0,
        ema=Ema(decay=1 - (1 - 0.99998) * 1024 * 32 / 600, every=32, warm=5),  # scaled by batch * every / epochs
        epochs=600,
    ),
    "digits": Recipe(
        source="ours: a small default that runs anywhere; 8x8 digits, no flips, shifts by one pixel",
        data="digits",
        family="cifar",
        depth=20,
        size=8,
        val_size=8,
        resize=8,
        crop=PadCrop(1),
        flip=False,
        batch=64,
        lr=0.1,
        schedule=Cosine(rise=1, start=0.1),
        weight_decay=5e-4,
        epochs=20,
    ),
}
RECIPES["digits-depths"] = replace(
    RECIPES["digits"],
    source="ours: digits by section 4.2 in small, one lr at which residual nets of 20 to 110 layers start",
    lr=0.01,
    schedule=Steps((1_000, 1_500)),
    weight_decay=1e-4,
    epochs=None,
    iterations=2_000,
)


def lasting(recipe: Recipe, iterations: int) -> Recipe:
    """The recipe over so many iterations, with the milestones of `Steps` in proportion."""
    schedule = recipe.schedule
    if isinstance(schedule, Steps) and recipe.iterations is not None:
        milestones = tuple(milestone * iterations // recipe.iterations for milestone in schedule.milestones)
        schedule = replace(schedule, milestones=milestones)
    return replace(recipe, iterations=iterations, epochs=None, schedule=schedule)


@dataclass(frozen=True)
class Study:
    """What an experiment trains: nets of `depths`, each from the seeds 0 to `seeds` - 1.

    iterations: None for the recipe's. points: how often in a training both errors are taken.
    """

    depths: tuple[int, ...]
    seeds: int
    iterations: int | None = None
    points: int = 40


STUDY_RECIPES = {
    "digits": "digits-depths",
    "cifar10": "cifar-2015",
    "cifar100": "cifar-2015",
    "imagenet": "imagenet-2015",
    "folder": "imagenet-2015",
    "synthetic": "cifar-2015",
}

# By experiment and the family whose nets it trains.
STUDIES = {
    ("degradation", "cifar"): Study((20, 32, 44, 56, 110), seeds=3),
    ("degradation", "paper"): Study((18, 34), seeds=1),
    ("shortcuts", "paper"): Study((34,), seeds=3),
    ("responses", "cifar"): Study((20, 56, 110), seeds=1),
    ("responses", "paper"): Study((18, 34), seeds=1),
}

# On digits.
QUICK = {
    "degradation": Study((20, 32, 44, 56), seeds=3, iterations=400, points=10),
    "shortcuts": Study((18,), seeds=3, iterations=100, points=10),
    "responses": Study((20, 56), seeds=1, iterations=400, points=10),
}

RISE = 0.01  # a deeper net trains worse once its mean training error is this much above the shallowest net's
