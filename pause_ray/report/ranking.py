"""The best trial of a sweep, the Pareto fronts of score and cost, and the rank correlation of the proxy with the full grid.

The functions compute from results that were read from storage; they neither read nor write files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from pause_ray.evaluation.compare import ObjectiveSpec, has_enough_scored_cells, paired_difference
from pause_ray.evaluation.statistics import Choice, Estimate, Interval, dominated_by, kendall_tau, pareto_front
from pause_ray.report.results import ArmResult, SweepResults, TrialResult
from pause_ray.sweep.search import RungScore, Stop

CostKind = Literal["overhead", "training"]


def objective_of(results: SweepResults) -> ObjectiveSpec:
    """Return the objective of the sweep; the highest score where its spec has none.

    Raises:
        SpecError: The stored spec has an objective that this version does not know.
    """
    return ObjectiveSpec.parse(results.description.get("spec", {}).get("objective") or {}, origin=str(results.folder / "sweep.json"))


def format_objective(objective: ObjectiveSpec) -> str:
    """Return the objective as words, such as ``highest score_middle``."""
    return f"{'highest' if objective.mode == 'max' else 'lowest'} {objective.metric}"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best condition by the sweep's objective, and the best of its trials."""

    objective: ObjectiveSpec
    condition: ArmResult
    trial: TrialResult
    """The best of the condition's replicates; each has a haystack and wordings of its own."""
    value: float
    """The objective of the condition over all replicates, 0 to 1."""
    trial_value: float
    """The objective of ``trial``, 0 to 1."""


def best(results: SweepResults, *, tuned: bool = False) -> Best | None:
    """Return the best condition, of equal ones the first in the plan; None while no condition has a value.

    Conditions with missing replicates or with too many unscored cells (``has_enough_scored_cells``) are candidates only where no
    other condition is.

    Args:
        results: The results of the sweep.
        tuned: Whether to consider only conditions whose trials have an adapter.
    """
    objective = objective_of(results)
    eligible = [condition for condition in results.scored if not tuned or all(trial.is_trained for trial in condition.trials)]
    candidates = [(condition, value) for condition in eligible if (value := objective.value(condition.rows)) is not None]
    complete = [(condition, value) for condition, value in candidates if _is_complete(condition)]
    if not candidates:
        return None
    condition, value = max(complete or candidates, key=lambda candidate: _sort_key(objective, candidate[1]))
    scores = [(trial, score) for trial in condition.trials if (score := objective.value(trial.rows)) is not None]
    trial, trial_value = max(scores, key=lambda scored: _sort_key(objective, scored[1]))
    return Best(objective=objective, condition=condition, trial=trial, value=value, trial_value=trial_value)


def _is_complete(condition: ArmResult) -> bool:
    is_scored = condition.summary is not None and has_enough_scored_cells(condition.summary)
    return is_scored and condition.num_missing == 0 and condition.num_stopped == 0


def _sort_key(objective: ObjectiveSpec, value: float) -> float:
    """Return a number that is higher for better values."""
    return value if objective.mode == "max" else -value


@dataclass(frozen=True, kw_only=True)
class PricedArm:
    """A condition with its score and its cost."""

    condition: ArmResult
    score: float
    """The mean score, 0 to 1."""
    interval: Interval | None
    """The interval of the score."""
    cost: float
    """The cost in the unit of the axis (see ``CostAxis.kind``)."""
    dominated_by: ArmResult | None
    """The best condition that scores at least as high, costs at most as much and is better in one of them; None on the front."""
    next_cheaper: ArmResult | None
    """The next cheaper condition on the front; None for the cheapest one and for a dominated one."""
    lead: Estimate | None
    """The mean paired difference of scores: of the dominating condition over this one, or, on the front, of this one over the next
    cheaper; None where no cells pair."""

    @property
    def is_on_front(self) -> bool:
        """Whether no other condition dominates this one."""
        return self.dominated_by is None

    @property
    def compared_with(self) -> ArmResult | None:
        """The condition whose score decides the position: the dominating one, or the next cheaper on the front."""
        return self.dominated_by or self.next_cheaper

    @property
    def is_significant(self) -> bool:
        """Whether the lead that decides the position is above zero by its interval, without correction for multiple comparisons."""
        if self.compared_with is None:
            return True
        return self.lead is not None and self.lead.interval is not None and self.lead.interval.low > 0


@dataclass(frozen=True, kw_only=True)
class CostAxis:
    """All scored conditions against one kind of cost."""

    kind: CostKind
    """``overhead``: prompt tokens beyond the requested length, in percent; ``training``: unpadded tokens that one trial is trained on."""
    arms: tuple[PricedArm, ...]
    """The conditions, cheapest first."""

    @property
    def front(self) -> list[PricedArm]:
        """The conditions on the Pareto front, cheapest first."""
        return [arm for arm in self.arms if arm.is_on_front]


def cost_axes(results: SweepResults) -> list[CostAxis]:
    """Return score against token overhead and against training cost, without costs that are equal for all or missing in a log."""
    costs: dict[CostKind, Callable[[ArmResult], float | None]] = {"overhead": _overhead, "training": trained_tokens}
    axes = []
    for kind, cost in costs.items():
        priced = [
            (condition, cost(condition)) for condition in results.scored if condition.summary and condition.summary.grand_mean is not None
        ]
        if len({price for _, price in priced}) > 1 and all(price is not None for _, price in priced):
            axes.append(CostAxis(kind=kind, arms=_priced_arms([(condition, price or 0.0) for condition, price in priced])))
    return axes


def _priced_arms(priced: Sequence[tuple[ArmResult, float]]) -> tuple[PricedArm, ...]:
    choices = [Choice(condition.summary.grand_mean or 0.0 if condition.summary else 0.0, cost) for condition, cost in priced]
    front, dominating = pareto_front(choices), dominated_by(choices)
    arms = []
    for index, (condition, cost) in enumerate(priced):
        better = dominating[index]
        cheaper = [other for other in front if choices[other].cost < cost] if better is None else []
        winner, loser = (index, cheaper[-1]) if cheaper else (better, index)
        arms.append(
            PricedArm(
                condition=condition,
                score=choices[index].value,
                interval=condition.summary.interval if condition.summary else None,
                cost=cost,
                dominated_by=None if better is None else priced[better][0],
                next_cheaper=priced[cheaper[-1]][0] if cheaper else None,
                lead=None if winner is None else paired_difference(priced[winner][0].rows, priced[loser][0].rows),
            )
        )
    return tuple(sorted(arms, key=lambda arm: (arm.cost, -arm.score)))


def _overhead(condition: ArmResult) -> float | None:
    """Return the prompt overhead rounded to a tenth of a percent, so that arms with equally many pauses cost the same."""
    return None if condition.summary is None else round(condition.summary.prompt_overhead_percent, 1) + 0.0


def trained_tokens(condition: ArmResult) -> float | None:
    """Return the number of tokens that one trial was trained on, mean over replicates; None where a log does not count them."""
    logs = [trial.training for trial in condition.trials]
    if any("tokens" not in row for log in logs for row in log) or any(
        trial.is_trained and not trial.training for trial in condition.trials
    ):
        return None
    return fmean(sum(row["tokens"] for row in log) for log in logs) if logs else None


@dataclass(frozen=True, kw_only=True)
class RungHistory:
    """The proxy scores of one trial under a scheduler, and the trial's end."""

    trial: str
    """The digest of the trial."""
    label: str
    """The label of the trial's condition."""
    rungs: tuple[RungScore, ...]
    """The rungs that the trial reached, in order."""
    stop: Stop | None
    """The record of its early stop; None where it was not stopped."""
    result: TrialResult | None
    """The result of the full grid; None until that is finished."""
    value: float | None
    """The sweep's objective on the full grid."""

    @property
    def proxy_scores(self) -> dict[int, float]:
        """The proxy score by rung, without the rungs that have none."""
        return {rung.rung: rung.proxy_score for rung in self.rungs if rung.proxy_score is not None}


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """The agreement of one rung's proxy scores with the full grid in the order of trials."""

    rung: int
    steps: tuple[int, ...]
    """The training steps at which the rung is scored, ascending; one where all trials have equally many steps."""
    num_trials: int
    """The number of trials with both scores."""
    num_stopped: int
    """The number of trials with a proxy score that were stopped before the full grid."""
    tau: float | None
    """Kendall's tau-b, -1 to 1; None with fewer than three trials, or where all values of one ranking are tied."""


def rung_histories(results: SweepResults) -> list[RungHistory]:
    """Return the history of every trial that a scheduler judged, in the sweep's order."""
    objective = objective_of(results)
    finished = {trial.digest: trial for trial in results.trials}
    rungs_of: dict[str, list[RungScore]] = {}
    for rung in results.search.rungs:
        rungs_of.setdefault(rung.trial, []).append(rung)
    return [
        RungHistory(
            trial=digest,
            label=label,
            rungs=tuple(sorted(rungs_of.get(digest, ()), key=lambda rung: rung.rung)),
            stop=results.search.stops.get(digest),
            result=finished.get(digest),
            value=objective.value(finished[digest].rows) if digest in finished else None,
        )
        for digest, label in results.labels.items()
        if digest in rungs_of or digest in results.search.stops
    ]


def rank_correlations(results: SweepResults) -> list[RankCorrelation]:
    """Return the correlation at each rung with a proxy score, over the trials that have a full grid, which are those not stopped.

    The scheduler applies the objective's ``mode`` to the proxy. So with either mode tau is positive where the proxy tends to prefer
    the trials that the objective prefers: reversing both rankings leaves tau unchanged.
    """
    histories = rung_histories(results)
    correlations = []
    for number in sorted({rung.rung for history in histories for rung in history.rungs}):
        at_rung = [history for history in histories if number in history.proxy_scores]
        both = [(history.proxy_scores[number], history.value) for history in at_rung if history.value is not None]
        steps = {rung.step for history in histories for rung in history.rungs if rung.rung == number}
        correlations.append(
            RankCorrelation(
                rung=number,
                steps=tuple(sorted(steps)),
                num_trials=len(both),
                num_stopped=sum(history.stop is not None and history.value is None for history in at_rung),
                tau=kendall_tau([proxy for proxy, _ in both], [full for _, full in both]),
            )
        )
    return correlations
