"""Training recipes and experiment settings as plain data, each recipe with its source.

Batch size, learning rate and iterations are global: they don't depend on the number of processes or on gradient
accumulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DATA = {
    "digits": "the 1797 handwritten digits, 8x8, that come with scikit-learn; every fifth is held out",
    "cifar10": "CIFAR-10, 32x32, stored by torchvision under --root",
    "cifar100": "CIFAR-100, 32x32, stored by torchvision under --root",
    "imagenet": "ImageNet; --root must contain train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
    "folder": "any photographs; --root must contain train/<class>/* and val/<class>/*",
    "synthetic": "smooth random images of the recipe's size, to measure speed",
}

LOADERS = {
    "auto": "dali on a GPU if it is installed and supports the recipe's augmentation, else torch",
    "torch": "Pillow in workers",
    "dali": "NVIDIA DALI",
}

GRAPHS = {
    "auto": "on for a single process on a GPU without --compile, else off",
    "on": "run forward and backward as one CUDA graph (several processes average gradients after it)",
    "off": "launch every kernel from the host",
}


@dataclass(frozen=True)
class ScaleCrop:
    """Resize the shorter side to a whole number drawn uniformly from [low, high], then crop a square anywhere."""

    low: int
    high: int


@dataclass(frozen=True)
class AreaCrop:
    """torchvision's RandomResizedCrop: 8 to 100 % of the area, aspect ratio 3/4 to 4/3, resized to a square."""


@dataclass(frozen=True)
class PadCrop:
    """Pad each side with `pad` zeros after normalisation, then crop the image's original size anywhere."""

    pad: int


@dataclass(frozen=True)
class Steps:
    """Multiply the learning rate by `factor` at each of `milestones` (iterations)."""

    milestones: tuple[int, ...]
    factor: float = 0.1


@dataclass(frozen=True)
class Plateau:
    """Multiply the learning rate by `factor` when the validation error plateaus.

    It plateaus when `patience` evaluations in a row don't improve on the best error, in [0, 1], by more than
    `threshold`. The paper says only "when the error plateaus"; patience and threshold are our choice.
    """

    factor: float = 0.1
    patience: int = 5
    threshold: float = 0.001


@dataclass(frozen=True)
class Cosine:
    """Change the learning rate per epoch: linear warm-up, then half a cosine that would reach 0 after the last epoch.

    The warm-up rises from `start` times the recipe's learning rate to that rate over `rise` epochs.
    """

    rise: int = 0
    start: float = 0.01


@dataclass(frozen=True)
class Warmup:
    """Start nets of at least `from_depth` layers with the learning rate `lr` until the training error is below `error`.

    The error is in [0, 1], the mean over `window` iterations. The window is our choice: the paper only says that the
    warm-up took about 400 iterations (section 4.2).
    """

    lr: float
    error: float
    from_depth: int
    window: int = 50


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of the weights, updated every `every` iterations.

    An update computes averaged = decay * averaged + (1 - decay) * trained. During the first `warm` epochs it copies the
    trained weights instead.
    """

    decay: float
    every: int
    warm: int = 0


@dataclass(frozen=True)
class Recipe:
    """How to train a net: data set, default net, augmentation, optimizer, schedule and length.

    source: where the settings come from. data: a key of `DATA`. family, depth: the default net. size: side of the
    training images. resize, val_size: for validation, the shorter side before cropping and the side of the centre crop.
    normalise: "pixel" subtracts the mean image of the training set; "channel" subtracts ImageNet's channel means and
    divides by the channel deviations. Pixels are in [0, 1]; the BatchNorm after conv1 cancels that scale. colour:
    standard deviation of the coefficients of the PCA colour shift, 0 for none. bn_batch: images that BatchNorm
    normalises together, which is the batch of one forward pass; None for all images of a process. norm_decay: weight
    decay of BatchNorm's parameters, None for `weight_decay`. erase: probability of random erasing. mixup, cutmix: alpha
    of MixUp and CutMix, 0 for none. repeats: how often in a row an image is shown, see `data.Stream`. Exactly one of
    epochs and iterations is set, as in the source.

    Raises ValueError for a count below 1, a learning rate that isn't positive and finite, and for both or neither of
    epochs and iterations.
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
                raise ValueError(f"{name} must be a whole number of at least 1: got {value}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a finite number above 0: got {self.lr}")
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("a recipe must set either iterations or epochs, and not both")

    def total(self, steps_per_epoch: int) -> int:
        """Return the number of iterations of the whole training."""
        return self.iterations if self.iterations is not None else (self.epochs or 0) * steps_per_epoch

    def micro_batch(self, world: int) -> int:
        """Return the default number of images per forward pass of each of `world` processes."""
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
        source="ours: a small default that runs anywhere; 8x8 digits, shifted by up to one pixel, no flips",
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
    source="ours: section 4.2 scaled down to digits; at this lr residual nets of 20 to 110 layers start to learn",
    lr=0.01,
    schedule=Steps((1_000, 1_500)),
    weight_decay=1e-4,
    epochs=None,
    iterations=2_000,
)


def lasting(recipe: Recipe, iterations: int) -> Recipe:
    """Return the recipe with another number of iterations, and the milestones of `Steps` scaled in proportion."""
    schedule = recipe.schedule
    if isinstance(schedule, Steps) and recipe.iterations is not None:
        milestones = tuple(milestone * iterations // recipe.iterations for milestone in schedule.milestones)
        schedule = replace(schedule, milestones=milestones)
    return replace(recipe, iterations=iterations, epochs=None, schedule=schedule)


@dataclass(frozen=True)
class Study:
    """The trainings of an experiment: nets of each of `depths`, with the seeds 0 to `seeds` - 1.

    iterations: the length of each training, None for the recipe's. points: how many times per training the training and
    validation errors are recorded.
    """

    depths: tuple[int, ...]
    seeds: int
    iterations: int | None = None
    points: int = 40


# Data set -> recipe of its trainings in an experiment.
STUDY_RECIPES = {
    "digits": "digits-depths",
    "cifar10": "cifar-2015",
    "cifar100": "cifar-2015",
    "imagenet": "imagenet-2015",
    "folder": "imagenet-2015",
    "synthetic": "cifar-2015",
}

# Keys: (experiment, family of its residual nets).
STUDIES = {
    ("degradation", "cifar"): Study((20, 32, 44, 56, 110), seeds=3),
    ("degradation", "paper"): Study((18, 34), seeds=1),
    ("shortcuts", "paper"): Study((34,), seeds=3),
    ("responses", "cifar"): Study((20, 56, 110), seeds=1),
    ("responses", "paper"): Study((18, 34), seeds=1),
}

# Studies for `experiment --quick`, on digits.
QUICK = {
    "degradation": Study((20, 32, 44, 56), seeds=3, iterations=400, points=10),
    "shortcuts": Study((18,), seeds=3, iterations=100, points=10),
    "responses": Study((20, 56), seeds=1, iterations=400, points=10),
}

RISE = 0.01  # a deeper net trains worse if its mean training error exceeds the shallowest net's by more than this
