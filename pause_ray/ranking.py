"""Which trial of a sweep is the best, which arms are worth their price, and whether the proxy ranked trials as the full grid did.

Computed from results that were read back; draws, writes and loads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from pause_ray.compare import paired_difference
from pause_ray.objective import ObjectiveSpec, is_of_enough_cells
from pause_ray.pareto import Priced, beaten_by, front
from pause_ray.results import Condition, SweepResults, TrialResult
from pause_ray.search_record import Rung, Stop
from pause_ray.statistics import Estimate, Interval, kendall_tau

Currency = Literal["overhead", "training"]


def objective_of(results: SweepResults) -> ObjectiveSpec:
    """What the sweep is after; the highest score where it does not say.

    Raises:
        SpecError: it says what this version does not know.
    """
    return ObjectiveSpec.parse(results.description.get("spec", {}).get("objective") or {}, origin=str(results.folder / "sweep.json"))


def objective_words(objective: ObjectiveSpec) -> str:
    """``highest score_middle``."""
    return f"{'highest' if objective.mode == 'max' else 'lowest'} {objective.metric}"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best condition by the sweep's objective, and the best of its trials."""

    objective: ObjectiveSpec
    condition: Condition
    trial: TrialResult
    """The one of its replicates that did best, each on its own haystack and wordings."""
    value: float
    """The objective of the condition: over all its replicates."""
    trial_value: float


def best(results: SweepResults, *, tuned: bool = False) -> Best | None:
    """The best condition; of equal ones the one that was planned first. None while there is none.

    Conditions with missing replicates, or with too many of their cells unscored (``is_of_enough_cells``), compete only among
    themselves, where there is no other.

    Args:
        results: Of the sweep.
        tuned: Look only among conditions whose trials have an adapter.
    """
    objective = objective_of(results)
    candidates = [(its, value) for its in results.scored if (value := objective.value(its.rows)) is not None]
    candidates = [(its, value) for its, value in candidates if not tuned or all(trial.is_trained for trial in its.trials)]
    whole = [(its, value) for its, value in candidates if _is_whole(its)]
    if not candidates:
        return None
    condition, value = max(whole or candidates, key=lambda candidate: _merit(objective, candidate[1]))
    scores = [(trial, score) for trial in condition.trials if (score := objective.value(trial.rows)) is not None]
    trial, trial_value = max(scores, key=lambda scored: _merit(objective, scored[1]))
    return Best(objective=objective, condition=condition, trial=trial, value=value, trial_value=trial_value)


def _is_whole(condition: Condition) -> bool:
    is_scored = condition.summary is not None and is_of_enough_cells(condition.summary)
    return is_scored and condition.num_missing == 0 and condition.num_stopped == 0


def _merit(objective: ObjectiveSpec, value: float) -> float:
    """More is better."""
    return value if objective.mode == "max" else -value


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A condition as a choice: what it scores and what it costs."""

    condition: Condition
    score: float
    interval: Interval | None
    """Of the score."""
    cost: float
    beaten_by: Condition | None
    """One that scores at least as high and costs at most as much, and is better in one of them; None on the front."""
    next_cheaper: Condition | None
    """On the front: the best there that costs less; None for the cheapest, and for one that is beaten."""
    lead: Estimate | None
    """Mean paired difference of scores: of the one that beats it to it, or of it to the next cheaper; None where nothing pairs."""

    @property
    def is_on_front(self) -> bool:
        """Whether no other condition beats it."""
        return self.beaten_by is None

    @property
    def rival(self) -> Condition | None:
        """Whose score decides its place: the one that beats it, or the next cheaper on the front."""
        return self.beaten_by or self.next_cheaper

    @property
    def is_sure(self) -> bool:
        """Whether the lead that decides its place is more than chance would explain, by its interval alone."""
        if self.rival is None:
            return True
        return self.lead is not None and self.lead.interval is not None and self.lead.interval.low > 0


@dataclass(frozen=True, kw_only=True)
class Market:
    """All scored conditions against one kind of cost, cheapest first."""

    currency: Currency
    """``overhead``: prompt tokens beyond the asked length, in percent; ``training``: tokens of one trial's training, without padding."""
    offers: tuple[Offer, ...]

    @property
    def front(self) -> list[Offer]:
        """Those that no other beats."""
        return [offer for offer in self.offers if offer.is_on_front]


def markets(results: SweepResults) -> list[Market]:
    """Score against token overhead, and against training cost; without a cost that is the same for all, or that logs do not tell."""
    costs: dict[Currency, Callable[[Condition], float | None]] = {"overhead": _overhead, "training": trained_tokens}
    found = []
    for currency, cost in costs.items():
        priced = [(its, cost(its)) for its in results.scored if its.summary and its.summary.grand_mean is not None]
        if len({price for _, price in priced}) > 1 and all(price is not None for _, price in priced):
            found.append(Market(currency=currency, offers=_offers([(its, price or 0.0) for its, price in priced])))
    return found


def _offers(priced: Sequence[tuple[Condition, float]]) -> tuple[Offer, ...]:
    choices = [Priced(its.summary.grand_mean or 0.0 if its.summary else 0.0, cost) for its, cost in priced]
    on_front, beaten = front(choices), beaten_by(choices)
    offers = []
    for place, (its, cost) in enumerate(priced):
        by = beaten[place]
        cheaper = [other for other in on_front if choices[other].cost < cost] if by is None else []
        winner, loser = (place, cheaper[-1]) if cheaper else (by, place)
        offers.append(
            Offer(
                condition=its,
                score=choices[place].value,
                interval=its.summary.interval if its.summary else None,
                cost=cost,
                beaten_by=None if by is None else priced[by][0],
                next_cheaper=priced[cheaper[-1]][0] if cheaper else None,
                lead=None if winner is None else paired_difference(priced[winner][0].rows, priced[loser][0].rows),
            )
        )
    return tuple(sorted(offers, key=lambda offer: (offer.cost, -offer.score)))


def _overhead(condition: Condition) -> float | None:
    """To a tenth of a percent, so that arms whose pauses are the same in number cost the same."""
    return None if condition.summary is None else round(condition.summary.prompt_overhead_percent, 1) + 0.0


def trained_tokens(condition: Condition) -> float | None:
    """Of one trial's training, mean over replicates; None where its log does not tell."""
    logs = [trial.training for trial in condition.trials]
    if any("tokens" not in row for log in logs for row in log) or any(
        trial.is_trained and not trial.training for trial in condition.trials
    ):
        return None
    return fmean(sum(row["tokens"] for row in log) for log in logs) if logs else None


@dataclass(frozen=True, kw_only=True)
class Climb:
    """One trial on a scheduler's rungs."""

    trial: str
    label: str
    """Of its condition."""
    rungs: tuple[Rung, ...]
    """From the first to the last that it reached."""
    stop: Stop | None
    """None where it was not stopped."""
    result: TrialResult | None
    """None until its full grid is finished."""
    value: float | None
    """The sweep's objective on the full grid."""

    @property
    def proxy_scores(self) -> dict[int, float]:
        """Rung → score, those that have one."""
        return {rung.rung: rung.proxy_score for rung in self.rungs if rung.proxy_score is not None}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether a rung of the proxy ranks trials as the full grid does."""

    rung: int
    steps: tuple[int, ...]
    """At which the rung stands, ascending; one where all trials have as many steps."""
    num_trials: int
    """With a score on both."""
    num_stopped: int
    """With a score on the proxy only."""
    tau: Estimate | None
    """Kendall's tau-b; None with fewer than three trials, or where one ranking is all ties."""


def climbs(results: SweepResults) -> list[Climb]:
    """Every trial that a scheduler saw, in the sweep's order."""
    objective = objective_of(results)
    finished = {trial.digest: trial for trial in results.trials}
    by_trial: dict[str, list[Rung]] = {}
    for rung in results.search.rungs:
        by_trial.setdefault(rung.trial, []).append(rung)
    return [
        Climb(
            trial=key,
            label=label,
            rungs=tuple(sorted(by_trial.get(key, ()), key=lambda rung: rung.rung)),
            stop=results.search.stops.get(key),
            result=finished.get(key),
            value=objective.value(finished[key].rows) if key in finished else None,
        )
        for key, label in results.labels.items()
        if key in by_trial or key in results.search.stops
    ]


def agreements(results: SweepResults) -> list[Agreement]:
    """For each rung that was scored, on the trials that have their full grid: those that were not stopped.

    The scheduler takes the proxy in the objective's direction, so with either ``mode`` tau is above 0 where it tends to keep whom the
    objective prefers: two rankings agree as much when both are read backwards.
    """
    seen = climbs(results)
    found = []
    for number in sorted({rung.rung for climb in seen for rung in climb.rungs}):
        at_rung = [climb for climb in seen if number in climb.proxy_scores]
        both = [(climb.proxy_scores[number], climb.value) for climb in at_rung if climb.value is not None]
        steps = Counter(rung.step for climb in seen for rung in climb.rungs if rung.rung == number)
        found.append(
            Agreement(
                rung=number,
                steps=tuple(sorted(steps)),
                num_trials=len(both),
                num_stopped=sum(climb.stop is not None and climb.value is None for climb in at_rung),
                tau=kendall_tau([proxy for proxy, _ in both], [full for _, full in both]),
            )
        )
    return found
