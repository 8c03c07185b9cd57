"""How a sweep chooses its points, and how it stops trials that will not win. Only specs; draws nothing and starts nothing."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pause_ray.spec import Spec


class GridAlgorithm(Spec):
    """Every combination of the listed values."""

    kind: Literal["grid"] = "grid"


class RandomAlgorithm(Spec):
    """Points drawn independently of each other, none twice; all are known before anything runs."""

    kind: Literal["random"]
    points: int = Field(ge=1)
    """How many."""
    seed: int = Field(default=0, ge=0)
    """Of the draws; no trial's own."""


class TpeAlgorithm(Spec):
    """Points near those that did well: a tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS), Optuna's through Ray Tune."""

    kind: Literal["tpe"]
    points: int = Field(ge=2)
    """How many in all."""
    seed: int = Field(default=0, ge=0)
    """Of the draws; no trial's own."""
    random_points: int = Field(default=8, ge=1)
    """How many are drawn at random before anything is learned from their values."""
    at_a_time: int = Field(default=1, ge=1)
    """How many are asked for, and run, before the next are chosen: as many trials can run side by side."""

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.random_points >= self.points:
            raise ValueError(
                f"random_points {self.random_points} of points {self.points}: nothing is left to choose by what was learned; "
                "lower random_points, or use kind: random"
            )
        if self.at_a_time >= self.points:
            raise ValueError(
                f"at_a_time {self.at_a_time} of points {self.points}: all are asked for before the first value is known; "
                "lower at_a_time, or use kind: random"
            )
        return self


AlgorithmSpec = Annotated[GridAlgorithm | RandomAlgorithm | TpeAlgorithm, Field(discriminator="kind")]


class ProxySpec(Spec):
    """The cheap look at an adapter that is still being trained: keyed facts in one context, each asked for."""

    facts: int = Field(default=16, ge=2)
    """Facts in the context, evenly spaced; one question for each."""
    context_tokens: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Lengths of the context; null: the suite's longest that fits."""


class SchedulerSpec(Spec):
    """Ends trainings early whose intermediate adapters answer worse than others' did after as many steps."""

    kind: Literal["asha", "hyperband", "median"]
    """``asha``: goes on with the best 1/``reduction`` at each rung (Li et al. 2020, arXiv 1810.05934); ``hyperband``: the same in
    brackets that wait for each other (Li et al. 2018, arXiv 1603.06560); ``median``: ends what is below the median of the others'
    running means (Golovin et al. 2017)."""
    rungs: int = Field(default=3, ge=1)
    """How often a training is looked at."""
    reduction: int = Field(default=3, ge=2)
    """How many times as many steps lie before a rung as before the one below it."""
    proxy: ProxySpec = ProxySpec()
    """What is asked at a rung."""

    def steps(self, total: int) -> tuple[int, ...]:
        """The steps of a training of ``total`` steps after which it is looked at, ascending; the end is none of them."""
        return tuple(math.ceil(total / self.reduction ** (self.rungs - rung)) for rung in range(self.rungs))
