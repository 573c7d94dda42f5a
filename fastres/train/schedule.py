"""The learning rate of an iteration, by a recipe's schedule and warm-up rule."""

from __future__ import annotations

import math
from typing import Any

from fastres.train.recipe import Cosine, Plateau, Recipe, Steps


class LearningRate:
    """`lr(iteration)`. What it has learnt of the errors so far is its state; everything else is the recipe's data."""

    def __init__(self, recipe: Recipe, depth: int, steps_per_epoch: int) -> None:
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.epochs = recipe.total(steps_per_epoch) / steps_per_epoch
        self.warming = recipe.warmup is not None and depth >= recipe.warmup.from_depth
        self.best = math.inf
        self.waited = 0
        self.drops = 0

    def __call__(self, iteration: int) -> float:
        warmup, schedule = self.recipe.warmup, self.recipe.schedule
        if self.warming and warmup is not None:
            return warmup.lr
        if isinstance(schedule, Steps):
            return self.recipe.lr * schedule.factor ** sum(iteration >= milestone for milestone in schedule.milestones)
        if isinstance(schedule, Plateau):
            return self.recipe.lr * schedule.factor**self.drops
        return self.recipe.lr * self._cosine(schedule, iteration // self.steps_per_epoch)

    def _cosine(self, schedule: Cosine, epoch: int) -> float:
        if epoch < schedule.rise:
            return schedule.start + (1 - schedule.start) * epoch / schedule.rise
        return (1 + math.cos(math.pi * (epoch - schedule.rise) / max(self.epochs - schedule.rise, 1))) / 2

    def training_error(self, error: float) -> None:
        """Mean error in [0, 1] over the warm-up rule's window: ends the warm-up once it is below the rule's bound."""
        if self.recipe.warmup is not None and error < self.recipe.warmup.error:
            self.warming = False

    def validation_error(self, error: float) -> None:
        """Error in [0, 1] of one evaluation, for the plateau rule."""
        schedule = self.recipe.schedule
        if not isinstance(schedule, Plateau):
            return
        if error < self.best - schedule.threshold:
            self.best, self.waited = error, 0
            return
        self.waited += 1
        if self.waited >= schedule.patience:
            self.drops, self.waited = self.drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("warming", "best", "waited", "drops")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
