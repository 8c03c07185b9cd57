"""Summaries of how well an arm answers, comparisons of two arms, and the objective of a sweep, all computed from ledger rows.

Intervals and p values answer one of two questions. Over cells: would other cells of the same kind show the difference too? Over
replicates: would other haystacks, wordings and training seeds? From two replicates on, intervals answer the second question. A sign-flip
test over R replicates returns no p below 2^(1-R), so the signs of replicates are flipped only where that, corrected for the number of
comparisons, can be significant; otherwise the signs of cells, averaged over replicates, are flipped.
Unscored cells are counted and never averaged; cells that are one and the same prompt count once.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal, NamedTuple, TypeVar

from pause_ray.core.spec import Spec
from pause_ray.evaluation.ledger import UNKNOWN_TOKEN, CellResult
from pause_ray.evaluation.statistics import (
    SIGNIFICANT,
    Effects,
    Estimate,
    Interval,
    ScoredPair,
    Unit,
    clustered_interval,
    group_means,
    grouped,
    mean_difference,
    measure_effects,
    min_replicates,
    sign_flip_p,
    smallest_p,
    wilson,
)
from pause_ray.evaluation.suite import SuiteSpec, cells

MIDDLE_PERCENT = (25.0, 75.0)
"""The depths in percent, both included, between which a needle is in the middle of the context; elsewhere it is at the edges."""
MAX_UNSCORED_SHARE = 0.1
"""The largest share of unscored cells at which a mean still compares with other trials' means: unscored cells are seldom the easiest."""

Key = TypeVar("Key", int, float)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How well one arm answers. Scores are between 0 and 1; means are None where nothing was scored."""

    num_cells: int
    num_scored: int
    num_repeated: int
    """The number of scored cells whose prompt equals another cell's (depths so close that the needle lands at one sentence)."""
    num_replicates: int
    grand_mean: float | None
    interval: Interval | None
    """The interval of the grand mean."""
    mean_by_length: dict[int, float]
    """The mean score by ``context_tokens``."""
    mean_by_depth: dict[float, float]
    """The mean score by ``depth_percent``."""
    middle_mean: float | None
    edge_mean: float | None
    exact_recall: float | None
    """The share of scored prompts whose answer has all keywords (score 1)."""
    exact_interval: Interval | None
    """Wilson's interval, which assumes that prompts are independent."""
    prompt_overhead_percent: float
    """The prompt tokens beyond the requested context lengths, in percent of those: the cost of pauses under ``budget: content``."""
    pauses_per_prompt: float

    @property
    def num_unscored(self) -> int:
        """The number of cells without a score."""
        return self.num_cells - self.num_scored

    @property
    def unscored_share(self) -> float:
        """The share of unscored cells among all cells."""
        return self.num_unscored / self.num_cells


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arm A minus arm B on the questions that both answered."""

    num_pairs: int
    """The number of questions that both arms answered; the same prompt at several depths is one."""
    num_unpaired: int
    """The number of cells of either arm without a scored counterpart, which are left out."""
    num_replicates: int
    effects: Effects
    """The difference in every measure, each with its interval."""
    p: float
    """The two-sided p of the sign-flip test of no difference."""
    p_unit: Unit
    """The units whose signs are flipped."""
    smallest_p: float
    """The smallest p that the test can return for this many differences."""
    difference_by_length: dict[int, float]
    warnings: tuple[str, ...]
    """Evidence that the two arms are the same data, or were asked or scored differently, one sentence each."""

    @property
    def difference(self) -> float:
        """The mean of the paired differences of scores."""
        return self.effects.difference.value

    @property
    def interval(self) -> Interval | None:
        """The interval of the difference, never of zero width; None with fewer than two pairs."""
        return self.effects.difference.interval

    @property
    def replicates_agree(self) -> bool:
        """Whether all of several replicates have the same difference, so that the interval is over cells."""
        return self.effects.replicates_agree

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that this design finds with power 0.8; None with fewer than two pairs."""
        return self.effects.detectable

    def is_beyond_chance(self, corrected_p: float) -> bool:
        """Return whether the difference is significant, both by its interval and by p after correction."""
        return self.interval is not None and self.interval.excludes_zero() and corrected_p < SIGNIFICANT


def summarize(rows: Sequence[CellResult]) -> Summary:
    """Return the means and intervals of one arm.

    The interval of the grand mean is Student's t over replicates. With one replicate, or where all replicates have the same mean, it is
    Wilson's over cells (averaged over replicates).
    """
    scored = [(row, row.score) for row in rows if row.score is not None]
    prompts = grouped((_prompt(row), (row, score)) for row, score in scored)
    exact = math.fsum(fmean(score == 1 for _, score in same) for same in prompts)
    scores = [(same[0][0], fmean(score for _, score in same)) for same in prompts]
    middle, edge = (
        group_means((_prompt(row), score) for row, score in scored if is_middle(row.depth_percent) is inside) for inside in (True, False)
    )
    asked = sum(row.context_tokens for row in rows)
    return Summary(
        num_cells=len(rows),
        num_scored=len(scored),
        num_repeated=len(scored) - len(prompts),
        num_replicates=len({row.replicate for row in rows}),
        grand_mean=_mean([score for _, score in scores]),
        interval=_mean_interval(scores),
        mean_by_length=_means((row.context_tokens, score) for row, score in scores),
        mean_by_depth=_means((row.depth_percent, score) for row, score in scored),
        middle_mean=_mean(middle),
        edge_mean=_mean(edge),
        exact_recall=exact / len(prompts) if prompts else None,
        exact_interval=wilson(exact, len(prompts)) if prompts else None,
        prompt_overhead_percent=100 * (sum(row.prompt_tokens for row in rows) / asked - 1),
        pauses_per_prompt=fmean(row.num_pauses for row in rows),
    )


def compare_arms(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult], *, num_comparisons: int = 1) -> Comparison | None:
    """Return the comparison of arm A with arm B, paired by task, context length, depth, sample and replicate.

    p is a sign-flip test of the replicates' mean differences where there are ``min_replicates`` or more, otherwise of the cells'
    differences averaged over replicates; it is not corrected, but ``num_comparisons`` determines how many replicates are enough.
    ``measure_effects`` describes the intervals. The comparison is None where no pair of cells has two scores.
    """
    pairs = _pairs(rows_a, rows_b)
    prompts = _scored_pairs(pairs)
    if not prompts:
        return None
    by_replicate = group_means((pair.replicate, pair.difference) for pair in prompts)
    by_cell = group_means((pair.cell, pair.difference) for pair in prompts)
    unit: Unit = "replicates" if len(by_replicate) >= min_replicates(num_comparisons) else "cells"
    flipped = by_replicate if unit == "replicates" else by_cell
    return Comparison(
        num_pairs=len(prompts),
        num_unpaired=len(rows_a) + len(rows_b) - 2 * sum(pair.difference is not None for pair in pairs),
        num_replicates=len(by_replicate),
        effects=measure_effects(prompts, num_comparisons=num_comparisons),
        p=sign_flip_p(flipped),
        p_unit=unit,
        smallest_p=smallest_p(len(flipped)),
        difference_by_length=_means((pair.context_tokens, pair.difference) for pair in prompts),
        warnings=tuple(_warnings(rows_a, rows_b, pairs)),
    )


def paired_difference(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> Estimate | None:
    """Return only the mean difference of scores that ``compare_arms`` computes, with its interval; None where nothing pairs."""
    pairs = _scored_pairs(_pairs(rows_a, rows_b))
    return mean_difference(pairs, [pair.difference for pair in pairs])[0] if pairs else None


def middle_gap(rows: Sequence[CellResult]) -> Estimate | None:
    """Return an arm's mean score in the middle of the context minus its mean at the edges, with its interval; None without both.

    The interval joins those of the two means as if they were independent (Newcombe 1998, method 10; Zou and Donner 2008).
    Measured coverage for 3 lengths × 9 depths: 94 % with one replicate, 98 to 99 % with three and with eight (150 to 400 grids each).
    """
    middle, edges = (summarize(part) if part else None for part in split_by_place(rows))
    if middle is None or edges is None or middle.grand_mean is None or edges.grand_mean is None:
        return None
    gap = middle.grand_mean - edges.grand_mean
    if middle.interval is None or edges.interval is None:
        return Estimate(gap, None)
    below = math.hypot(middle.grand_mean - middle.interval.low, edges.interval.high - edges.grand_mean)
    above = math.hypot(middle.interval.high - middle.grand_mean, edges.grand_mean - edges.interval.low)
    units = {middle.interval.unit, edges.interval.unit}
    return Estimate(gap, Interval(gap - below, gap + above, "cells" if "cells" in units else "replicates"))


def split_by_place(rows: Sequence[CellResult]) -> tuple[list[CellResult], list[CellResult]]:
    """Return the rows whose first fact is in the middle of the context, and those at the edges."""
    middle = [row for row in rows if is_middle(row.depth_percent)]
    return middle, [row for row in rows if not is_middle(row.depth_percent)]


def explain_no_pairs(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> str:
    """Return the reason why ``compare_arms`` returns None for these rows, as a clause for a message."""
    if _pairs(rows_a, rows_b):
        return "no question was scored in both arms"
    axes: dict[str, Callable[[CellResult], Hashable]] = {
        "tasks": lambda row: row.task,
        "context lengths": lambda row: row.context_tokens,
        "depths": lambda row: row.depth_percent,
        "replicates": lambda row: row.replicate,
        "samples": lambda row: row.sample,
    }
    for name, coordinate in axes.items():
        a, b = ({coordinate(row) for row in rows} for rows in (rows_a, rows_b))
        if not a & b:
            return f"the arms have no {name} in common: {_list_some(a)} against {_list_some(b)}"
    return "the arms have no task, length, depth, sample and replicate in common at one cell"


def recall_by_depth(rows: Sequence[CellResult]) -> dict[float, Estimate]:
    """Return the share of facts recalled by the middle of each tenth of requested depths in percent, for tenths that hold a fact.

    Facts without a score do not count. Wilson's interval assumes that facts are independent; those of one prompt are not quite.
    """
    prompts = grouped((_prompt(row), row) for row in rows if row.score is not None)
    facts = [(fact.depth_percent, fact.score) for same in prompts for fact in same[0].facts if fact.score is not None]
    tenths = [(tenth, [score for depth, score in facts if min(9, depth // 10) == tenth]) for tenth in range(10)]
    return {10 * tenth + 5.0: Estimate(fmean(scores), wilson(math.fsum(scores), len(scores))) for tenth, scores in tenths if scores}


def question_key(row: CellResult) -> tuple[Hashable, ...]:
    """Return the key by which the cells of two arms are paired."""
    return *_cell(row), row.replicate


def is_middle(depth_percent: float) -> bool:
    """Return whether a depth counts as the middle of the context."""
    return MIDDLE_PERCENT[0] <= depth_percent <= MIDDLE_PERCENT[1]


def has_enough_scored_cells(summary: Summary) -> bool:
    """Return whether so few cells are unscored that the means compare with those of other trials."""
    return summary.unscored_share <= MAX_UNSCORED_SHARE


Metric = Literal["score", "score_middle", "score_edges", "exact_recall"]
_METRICS: Final[Mapping[Metric, Callable[[Summary], float | None]]] = {
    "score": lambda summary: summary.grand_mean,
    "score_middle": lambda summary: summary.middle_mean,
    "score_edges": lambda summary: summary.edge_mean,
    "exact_recall": lambda summary: summary.exact_recall,
}


class ObjectiveSpec(Spec):
    """The number that a sweep optimizes: a search learns from it, and the best trial is the best by it."""

    metric: Metric = "score"
    """``score``: mean of all cells; ``score_middle``, ``score_edges``: mean of the cells whose first fact is in the middle half of the
    context, or outside it; ``exact_recall``: share of the prompts that were answered with all keywords."""
    mode: Literal["max", "min"] = "max"
    """``max`` where a higher value is better, ``min`` where a lower one is."""

    def value(self, rows: Sequence[CellResult]) -> float | None:
        """Return the metric of a trial's rows, or of all replicates' rows, 0 to 1; None where no cell that counts was scored."""
        return _METRICS[self.metric](summarize(rows)) if rows else None

    def interval(self, rows: Sequence[CellResult]) -> Interval | None:
        """Return the interval of ``value``."""
        if self.metric in ("score_middle", "score_edges"):
            rows = split_by_place(rows)[self.metric == "score_edges"]
        summary = summarize(rows) if rows else None
        return None if summary is None else summary.exact_interval if self.metric == "exact_recall" else summary.interval

    def comparable_value(self, rows: Sequence[CellResult]) -> float | None:
        """Return ``value`` if enough cells are scored for a search to learn from it, else None."""
        return self.value(rows) if rows and has_enough_scored_cells(summarize(rows)) else None

    def better(self, one: float, other: float) -> bool:
        """Return whether ``one`` is better than ``other``."""
        return one > other if self.mode == "max" else one < other

    def is_measured_by(self, suite: SuiteSpec, *, replicate: int, seed: int) -> bool:
        """Return whether the suite has cells that count for the metric; ``replicate`` and ``seed`` determine random depths."""
        if self.metric in ("score", "exact_recall"):
            return True
        wants_middle = self.metric == "score_middle"
        return any(is_middle(cell.depth_percent) is wants_middle for cell in cells(suite, identity="", replicate=replicate, seed=seed))


class _Pair(NamedTuple):
    a: CellResult
    b: CellResult

    @property
    def difference(self) -> float | None:
        return None if self.a.score is None or self.b.score is None else self.a.score - self.b.score


def _pairs(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> list[_Pair]:
    rows_by_question = {question_key(row): row for row in rows_b}
    return [_Pair(row, rows_by_question[question_key(row)]) for row in rows_a if question_key(row) in rows_by_question]


def _scored_pairs(pairs: Iterable[_Pair]) -> list[ScoredPair]:
    """Return one pair for each prompt with two scores."""
    scored = (pair for pair in pairs if pair.difference is not None)
    return [_scored_pair(same) for same in grouped(((_prompt(pair.a), _prompt(pair.b)), pair) for pair in scored)]


def _scored_pair(same: Sequence[_Pair]) -> ScoredPair:
    """Return the pairs of one prompt as one pair."""
    first = same[0].a
    rubrics_a, rubrics_b = ([row.rubric for row in rows if row.rubric is not None] for rows in zip(*same, strict=True))
    return ScoredPair(
        cell=_cell(first),
        replicate=first.replicate,
        context_tokens=first.context_tokens,
        middle=any(is_middle(pair.a.depth_percent) for pair in same),
        edge=not all(is_middle(pair.a.depth_percent) for pair in same),
        score_a=fmean(pair.a.score or 0.0 for pair in same),
        score_b=fmean(pair.b.score or 0.0 for pair in same),
        rubric_a=_mean(rubrics_a),
        rubric_b=_mean(rubrics_b),
        exact_a=fmean(pair.a.score == 1 for pair in same),
        exact_b=fmean(pair.b.score == 1 for pair in same),
    )


def _warnings(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult], pairs: Sequence[_Pair]) -> Iterable[str]:
    yield from _same_data(rows_a, rows_b, pairs)
    different = sum(_differ(a.question, b.question) or _differ(a.references, b.references) for a, b in pairs)
    if different:
        yield f"{different} of {len(pairs)} pairs were asked about different facts"
    elif any(a.seed != b.seed for a, b in pairs):
        yield "the two arms read different haystacks (their seeds differ)"
    unequal = sum(a.content_tokens != b.content_tokens for a, b in pairs)
    if unequal:
        yield f"the arms did not read the same amount of text in {unequal} of {len(pairs)} pairs (their content_tokens differ)"
    scorers = sum(a.scorer != b.scorer for a, b in pairs)
    if scorers:
        names = [_list_some({getattr(pair, side).scorer for pair in pairs}) for side in "ab"]
        yield f"{scorers} of {len(pairs)} pairs were scored in different ways ({names[0]} against {names[1]}): rescore one of them"
    models = [{getattr(pair, side).model for pair in pairs} for side in "ab"]
    if models[0] != models[1]:
        yield f"the arms are answers of different models ({_list_some(models[0])} against {_list_some(models[1])})"


def _differ(a: Sized, b: Sized) -> bool:
    """Return whether both are known and differ; imported rows may lack the question."""
    return bool(a) and bool(b) and a != b


def _same_data(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult], pairs: Sequence[_Pair]) -> Iterable[str]:
    """Yield warnings about one run under two names: as both arms, as replicates of both, or as replicates of one arm."""
    answered = [pair for pair in pairs if pair.difference is not None and pair.a.response is not None]
    shared = {row.cell_id for row in rows_a} & {row.cell_id for row in rows_b}
    if shared:
        yield f"{len(shared)} cells are the same rows in both arms: part of this compares data with itself"
    elif answered and all(a.response == b.response and a.seconds == b.seconds > 0 for a, b in answered):
        yield "every answer and its duration are the same in both arms: this looks like one run under two names"
    elif answered and all(a.response == b.response for a, b in answered):
        yield "every answer is word for word the same in both arms"
    runs = [(arm, number, run) for arm, rows in (("first", rows_a), ("second", rows_b)) for number, run in _runs(rows).items()]
    for (arm, number, run), (other_arm, other_number, other) in itertools.combinations(runs, 2):
        if _is_same_run(run, other) and (len(runs) > 2 or arm == other_arm) and not shared:
            names = f"replicate {number} of the {arm} arm and replicate {other_number} of the {other_arm}"
            yield f"{names} have the same answers and durations: this looks like one run under two names"


def _runs(rows: Sequence[CellResult]) -> dict[int, dict[Hashable, tuple[str, float]]]:
    """Return the answer at each cell and its duration in seconds, by replicate."""
    runs: defaultdict[int, dict[Hashable, tuple[str, float]]] = defaultdict(dict)
    for row in rows:
        if row.response is not None and row.seconds > 0:
            runs[row.replicate][_cell(row)] = row.response, row.seconds
    return runs


def _is_same_run(one: Mapping[Hashable, tuple[str, float]], other: Mapping[Hashable, tuple[str, float]]) -> bool:
    common = one.keys() & other.keys()
    return len(common) > 1 and all(one[cell] == other[cell] for cell in common)


def _mean_interval(scores: Sequence[tuple[CellResult, float]]) -> Interval | None:
    """Return the interval of the mean score; Wilson's where replicates do not differ, because an arm without errors is not certain."""
    if not scores:
        return None
    by_replicate = grouped((row.replicate, score) for row, score in scores)
    by_cell = group_means((_cell(row), score) for row, score in scores)
    return clustered_interval(by_replicate, lower_bound=0.0, unit="replicates") or wilson(math.fsum(by_cell), len(by_cell))


def _cell(row: CellResult) -> tuple[Hashable, ...]:
    """Return the question of a row without its replicate."""
    return row.task, row.context_tokens, row.depth_percent, row.sample


def _prompt(row: CellResult) -> tuple[Hashable, ...]:
    """Return a key that is equal for rows of one arm whose prompts are the same, whatever depths were requested."""
    needle_tokens = tuple(fact.token for fact in row.facts) or (row.needle_token,)
    position: Hashable = row.depth_percent if UNKNOWN_TOKEN in needle_tokens else needle_tokens
    return row.replicate, row.task, row.context_tokens, row.sample, position


def _list_some(values: Iterable[Hashable]) -> str:
    """Return up to four of the values, sorted, as text."""
    ordered = sorted(values, key=lambda value: (value, "") if isinstance(value, int | float) else (0, str(value)))
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in ordered]
    return ", ".join(texts[:4]) + (" …" if len(texts) > 4 else "")


def _means(items: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    groups: defaultdict[Key, list[float]] = defaultdict(list)
    for key, value in items:
        groups[key].append(value)
    return {key: fmean(groups[key]) for key in sorted(groups)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
