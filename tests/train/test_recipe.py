"""The recipes against the paper's text and torchvision's command line; the rules that set the learning rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from fastres.train.loop import micro_batches, sgd
from fastres.train.recipe import RECIPES, AreaCrop, Cosine, PadCrop, Plateau, Recipe, ScaleCrop, Steps, Warmup
from fastres.train.schedule import LearningRate

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
    """torchrun --nproc_per_node=8 train.py --model resnet50 --batch-size 128 --lr 0.5 ..."""
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
    with pytest.raises(ValueError, match=r"batch 128 .* micro-batches of 48 to 2"):
        micro_batches(CIFAR, 48, 2)
    with pytest.raises(ValueError, match="batch 0"):
        dataclasses.replace(CIFAR, batch=0)
    with pytest.raises(ValueError, match="lr nan"):
        dataclasses.replace(CIFAR, lr=math.nan)
    with pytest.raises(ValueError, match="iterations or"):
        dataclasses.replace(CIFAR, epochs=3)


def test_steps() -> None:
    lr = LearningRate(CIFAR, 20, 390)
    assert [lr(i) for i in (0, 31_999)] == [0.1, 0.1]
    assert [lr(i) for i in (32_000, 47_999)] == pytest.approx([0.01, 0.01])
    assert [lr(i) for i in (48_000, 63_999)] == pytest.approx([0.001, 0.001])


def test_warmup_of_110_layers_ends_below_80_percent_for_good() -> None:
    lr = LearningRate(CIFAR, 110, 390)
    assert lr(0) == 0.01
    lr.training_error(0.80)
    assert lr(50) == 0.01
    lr.training_error(0.79)
    assert lr(100) == 0.1
    lr.training_error(0.99)
    assert lr(150) == 0.1
    assert LearningRate(CIFAR, 56, 390)(0) == 0.1
    assert LearningRate(CIFAR, 1202, 390)(0) == 0.01


def test_plateau_is_torchs_but_for_the_patience_s_count() -> None:
    """torch lowers the rate after more than `patience` bad evaluations, we after `patience`."""
    rule = IMAGENET.schedule
    assert isinstance(rule, Plateau)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=IMAGENET.lr)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=rule.factor, patience=rule.patience - 1, threshold=rule.threshold, threshold_mode="abs"
    )
    ours = LearningRate(IMAGENET, 50, 5004)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for i in range(80):
        error = 0.3 + 0.5 * math.exp(-i / 8) + 0.02 * torch.rand((), generator=generator).item()
        theirs.step(error)
        ours.validation_error(error)
        assert ours(i) == pytest.approx(optimizer.param_groups[0]["lr"])
        seen.add(round(math.log10(ours(i))))
    assert len(seen) >= 3  # it did fall


def test_cosine_is_torchvisions_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=595),
    ]
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])
    ours = LearningRate(MODERN, 50, 1251)
    for epoch in range(600):
        expected = optimizer.param_groups[0]["lr"]
        assert ours(1251 * epoch) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert ours(1251 * epoch + 1250) == ours(1251 * epoch)
        optimizer.step()
        theirs.step()


def test_the_rate_s_memory_is_its_state() -> None:
    lr, again = (LearningRate(IMAGENET, 50, 10) for _ in range(2))
    for error in (0.5, 0.4, *[0.4] * 7):
        lr.validation_error(error)
    again.load_state_dict(lr.state_dict())
    for error in (0.4, 0.4, 0.4, 0.3):
        lr.validation_error(error)
        again.validation_error(error)
        assert again(0) == lr(0)
    assert lr.state_dict() == again.state_dict()


def test_weight_decay_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decays = {p: group["weight_decay"] for group in sgd(net, MODERN).param_groups for p in group["params"]}
    assert [decays[p] for p in net.parameters()] == [2e-5, 2e-5, 0.0, 0.0, 2e-5, 2e-5]
    (group,) = sgd(net, CIFAR).param_groups
    assert (group["weight_decay"], group["momentum"], len(group["params"])) == (1e-4, 0.9, 6)


def test_the_first_update_from_zero_momentum_is_torchs() -> None:
    nets = []
    for make in (lambda net: sgd(net, CIFAR), lambda net: torch.optim.SGD(net.parameters(), 0.1, 0.9, 0, 1e-4)):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = make(net)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        nets.append(net.weight.detach())
    torch.testing.assert_close(*nets)
