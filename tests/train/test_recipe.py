"""The recipes compared with the paper's text and torchvision's command line."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fastres.train.loop import micro_batches
from fastres.train.recipe import (
    RECIPES,
    AreaCrop,
    Cosine,
    PadCrop,
    Plateau,
    Recipe,
    ScaleCrop,
    Steps,
    Warmup,
    lasting,
)

IMAGENET, CIFAR, MODERN = (RECIPES[name] for name in ("imagenet-2015", "cifar-2015", "imagenet-modern"))


def test_imagenet_2015_is_section_3_4() -> None:
    assert (IMAGENET.crop, IMAGENET.size, IMAGENET.flip) == (ScaleCrop(256, 480), 224, True)
    assert (IMAGENET.normalise, IMAGENET.colour) == ("pixel", 0.1)
    assert (IMAGENET.batch, IMAGENET.lr, IMAGENET.iterations) == (256, 0.1, 60 * 10**4)
    assert (IMAGENET.weight_decay, IMAGENET.momentum, IMAGENET.norm_decay) == (0.0001, 0.9, None)
    assert isinstance(IMAGENET.schedule, Plateau)
    assert IMAGENET.schedule.factor == 0.1
    assert (IMAGENET.bn_batch, IMAGENET.warmup, IMAGENET.ema) == (32, None, None)
    assert (IMAGENET.resize, IMAGENET.val_size) == (256, 224)


def test_cifar_2015_is_section_4_2() -> None:
    assert (CIFAR.crop, CIFAR.size, CIFAR.flip) == (PadCrop(4), 32, True)
    assert (CIFAR.normalise, CIFAR.colour) == ("pixel", 0.0)
    assert (CIFAR.batch, CIFAR.bn_batch) == (128, 128 // 2)
    assert (CIFAR.lr, CIFAR.schedule, CIFAR.iterations) == (0.1, Steps((32_000, 48_000), 0.1), 64_000)
    assert (CIFAR.weight_decay, CIFAR.momentum) == (0.0001, 0.9)
    assert CIFAR.warmup == Warmup(lr=0.01, error=0.80, from_depth=110, window=50)


@pytest.mark.parametrize("recipe", [IMAGENET, CIFAR])
def test_2015_had_none_of_what_came_later(recipe: Recipe) -> None:
    later = ("label_smoothing", "trivial_augment", "erase", "mixup", "cutmix", "ema", "norm_decay")
    assert not any(getattr(recipe, name) for name in later)
    assert recipe.repeats == 1


def test_imagenet_modern_is_torchvisions_command_line() -> None:
    """The recipe has the settings of `torchrun --nproc_per_node=8 train.py --model resnet50 --batch-size 128 ...`."""
    assert (MODERN.family, MODERN.depth, MODERN.batch, MODERN.bn_batch, MODERN.lr) == (
        "torchvision",
        50,
        8 * 128,
        128,
        0.5,
    )
    assert (MODERN.schedule, MODERN.epochs) == (Cosine(rise=5, start=0.01), 600)
    assert (MODERN.weight_decay, MODERN.norm_decay, MODERN.momentum) == (0.00002, 0.0, 0.9)
    assert (MODERN.trivial_augment, MODERN.erase, MODERN.label_smoothing) == (True, 0.1, 0.1)
    assert (MODERN.mixup, MODERN.cutmix, MODERN.repeats) == (0.2, 1.0, 4)
    assert (MODERN.crop, MODERN.size, MODERN.resize, MODERN.val_size) == (AreaCrop(), 176, 232, 224)
    assert MODERN.ema is not None
    assert (MODERN.ema.every, MODERN.ema.warm) == (32, 5)
    assert 1 - MODERN.ema.decay == pytest.approx((1 - 0.99998) * (8 * 128 * 32 / 600))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_and_length_don_t_depend_on_the_processes(name: str, world: int) -> None:
    recipe = RECIPES[name]
    micro, accumulate = micro_batches(recipe, None, world)
    assert micro * accumulate * world == recipe.batch
    assert micro <= (recipe.bn_batch or recipe.batch)
    assert recipe.total(100) == (recipe.iterations or 100 * (recipe.epochs or 0))


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got batch 128, micro-batch 48, 2 process"):
        micro_batches(CIFAR, 48, 2)
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1: got 0"):
        dataclasses.replace(CIFAR, batch=0)
    with pytest.raises(ValueError, match="lr must be a finite number above 0: got nan"):
        dataclasses.replace(CIFAR, lr=math.nan)
    with pytest.raises(ValueError, match="either iterations or epochs"):
        dataclasses.replace(CIFAR, epochs=3)


def test_lasting_moves_milestones_in_proportion() -> None:
    short = lasting(RECIPES["cifar-2015"], 640)
    assert (short.iterations, short.schedule) == (640, Steps((320, 480)))
    assert lasting(RECIPES["digits"], 7).total(100) == 7
