"""A tree-structured Parzen estimator that chooses points near good ones: Optuna's, through Ray Tune's ``OptunaSearch``.

Knows both libraries, no trial and no Ray process. From the seed and the values it was told it always chooses the same points: a
search that goes on is replayed from the log. What was asked before stays asked, also where a library would choose otherwise now.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search.optuna import OptunaSearch

from pause_ray.core.spec import JsonObject, digest
from pause_ray.sweep.search_log import SearchLog
from pause_ray.sweep.search_space import (
    Domain,
    IntDomain,
    LogUniformDomain,
    QuantisedDomain,
    UniformDomain,
    check_enough,
    drawn_points,
    rounded,
)
from pause_ray.sweep.spec import SweepSpec, TpeAlgorithm, allows

SUGGESTIONS = 50
"""In a row that were asked for before or are not valid; then the next point is drawn at random. In a small space the estimator would
otherwise go on suggesting its best point."""
_VALUE = "value"


class TpeSearch:
    """As ``sweep.rounds.Search``."""

    def __init__(self, sweep: SweepSpec, algorithm: TpeAlgorithm, *, log: SearchLog) -> None:
        """Begin, or take up what ``log`` says was asked and told.

        Raises:
            SpecError: fewer valid points than are to be asked for.
            StorageError: a damaged log.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._algorithm, self._log = sweep, algorithm, log
        check_enough(sweep.search, self._allows, points=algorithm.points, origin=f"sweep {sweep.name}")
        sampler = optuna.samplers.TPESampler(
            seed=algorithm.seed, n_startup_trials=algorithm.random_points, multivariate=True, constant_liar=algorithm.at_a_time > 1
        )
        space = {path: _distribution(domain) for path, domain in sweep.search.items()}
        self._estimator = OptunaSearch(space, metric=_VALUE, mode=sweep.objective.mode, sampler=sampler)
        events = log.events()
        self._asked_before = {event["round"]: event["points"] for event in events if event["event"] == "asked"}
        self._told_before = {digest(event["point"]): event["value"] for event in events if event["event"] == "told"}
        self._round = 0
        self._suggestions = 0
        self._names: dict[str, str | None] = {}
        """Asked point → the suggestion that it was; None where it was none of the estimator's."""
        self._waiting: set[str] = set()
        """Asked points whose value is not told yet."""

    def ask(self) -> list[JsonObject] | None:
        """The next round's points; None after the last."""
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} points were asked for whose value was not told")
        wanted = min(self._algorithm.at_a_time, self._algorithm.points - len(self._names))
        if wanted == 0:
            return None
        points = [self._next() for _ in range(wanted)]
        before = self._asked_before.get(self._round)
        if before is None:
            self._log.append({"event": "asked", "round": self._round, "points": points})
        else:
            points = self._instead_of(points, before)
        self._round += 1
        self._waiting = {digest(point) for point in points}
        return points

    def tell(self, point: JsonObject, value: float | None) -> None:
        """Learn from a value of the objective; None for a trial that failed."""
        key = digest(point)
        self._waiting.remove(key)
        name = self._names[key]
        if name is not None:
            self._estimator.on_trial_complete(name, {_VALUE: value} if value is not None else None, error=value is None)
        elif value is not None:
            self._estimator.add_evaluated_point(self._as_suggested(point), value)
        if key not in self._told_before or self._told_before[key] != value:
            self._log.append({"event": "told", "point": point, "value": value})
            self._told_before[key] = value

    def _next(self) -> JsonObject:
        """A valid point that was not asked for yet; from now on it counts as asked."""
        for _ in range(SUGGESTIONS):
            name = str(self._suggestions)
            self._suggestions += 1
            suggested = self._estimator.suggest(name)
            point = {path: _value(domain, suggested[path]) for path, domain in self._sweep.search.items()}
            if digest(point) not in self._names and self._allows(point):
                self._names[digest(point)] = name
                return point
            self._estimator.on_trial_complete(name, error=True)
        point = drawn_points(
            self._sweep.search,
            lambda point: digest(point) not in self._names and self._allows(point),
            points=1,
            seed=self._algorithm.seed + self._suggestions,
            origin=f"sweep {self._sweep.name}",
        )[0]
        self._names[digest(point)] = None
        return point

    def _instead_of(self, points: list[JsonObject], before: list[JsonObject]) -> list[JsonObject]:
        """The points that were asked for before, where the estimator now chose others."""
        kept = {digest(point) for point in before}
        for key in [digest(point) for point in points if digest(point) not in kept]:
            name = self._names.pop(key)
            if name is not None:
                self._estimator.on_trial_complete(name, error=True)
        for key in kept:
            self._names.setdefault(key, None)
        return before

    def _allows(self, point: JsonObject) -> bool:
        return allows(self._sweep, point)

    def _as_suggested(self, point: JsonObject) -> JsonObject:
        """A point as the estimator would have suggested it."""
        return {path: _suggestion(domain, point[path]) for path, domain in self._sweep.search.items()}


def _distribution(domain: Domain) -> BaseDistribution:
    """A domain in Optuna's words; values that stand in no order by their place in the list."""
    if isinstance(domain, UniformDomain):
        return FloatDistribution(*domain.uniform)
    if isinstance(domain, LogUniformDomain):
        return FloatDistribution(*domain.loguniform, log=True)
    if isinstance(domain, IntDomain):
        return IntDistribution(*domain.int, step=domain.step, log=domain.log)
    if isinstance(domain, QuantisedDomain):
        return IntDistribution(0, len(domain.listed()) - 1)
    return CategoricalDistribution(range(len(domain.listed())))


def _value(domain: Domain, suggested: Any) -> Any:
    """The value that a suggestion means."""
    if isinstance(domain, IntDomain):
        return suggested
    if isinstance(domain, UniformDomain):
        return rounded(suggested, domain.uniform)
    if isinstance(domain, LogUniformDomain):
        return rounded(suggested, domain.loguniform)
    return domain.listed()[suggested]


def _suggestion(domain: Domain, value: Any) -> Any:
    """The inverse of ``_value``."""
    if isinstance(domain, IntDomain | UniformDomain | LogUniformDomain):
        return value
    return [digest([listed]) for listed in domain.listed()].index(digest([value]))
