"""Compute the learning rate of an iteration from a recipe's schedule and warm-up rule."""

from __future__ import annotations

import math
from typing import Any

from fastres.train.recipe import Cosine, Plateau, Recipe, Steps


class LearningRate:
    """A function of the iteration: an instance `lr` returns the learning rate of an iteration as `lr(iteration)`.

    The plateau and warm-up rules also depend on the errors reported so far. `state_dict` contains that state;
    everything else follows from the recipe.
    """

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
        """Report a mean training error in [0, 1]; the warm-up ends if it is below the warm-up rule's `error`.

        The caller averages over the rule's `window` of iterations.
        """
        if self.recipe.warmup is not None and error < self.recipe.warmup.error:
            self.warming = False

    def validation_error(self, error: float) -> None:
        """Report the validation error of an evaluation, in [0, 1], to the plateau rule; no effect without that rule."""
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
