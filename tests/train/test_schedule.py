"""Learning rates by iteration, compared with the paper's, torch's and torchvision's."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import SCHEDULE, SCHEDULE_END
from torch import nn

from fastres.train.recipe import (
    RECIPES,
    Plateau,
)
from fastres.train.schedule import LearningRate

IMAGENET, CIFAR, MODERN = (RECIPES[name] for name in ("imagenet-2015", "cifar-2015", "imagenet-modern"))


def test_steps_are_taken_at_their_milestones() -> None:
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


def test_plateau_is_torchs_except_for_the_patience() -> None:
    """torch lowers the rate after patience + 1 evaluations without improvement, fastres after `patience`."""
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
    assert len(seen) >= 3  # the rate was lowered at least twice


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
        assert ours(1251 * epoch) == pytest.approx(expected, rel=SCHEDULE, abs=SCHEDULE_END)
        assert ours(1251 * epoch + 1250) == ours(1251 * epoch)
        optimizer.step()
        theirs.step()


def test_the_state_dict_restores_the_rate() -> None:
    lr, again = (LearningRate(IMAGENET, 50, 10) for _ in range(2))
    for error in (0.5, 0.4, *[0.4] * 7):
        lr.validation_error(error)
    again.load_state_dict(lr.state_dict())
    for error in (0.4, 0.4, 0.4, 0.3):
        lr.validation_error(error)
        again.validation_error(error)
        assert again(0) == lr(0)
    assert lr.state_dict() == again.state_dict()
