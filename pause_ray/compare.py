"""How well an arm answers and how two arms differ, with the uncertainty. Works on ledger rows; knows no file and no model.

Two questions are kept apart. *On these questions*: would other cells of the same kind show the difference too? *On new
haystacks and wordings*: would other replicates? From two replicates on, intervals answer the second (``effects``, ``statistics``).
A sign-flip test over R replicates cannot give less than p = 2^(1-R), so it flips them only where that, corrected for the
number of comparisons, can be significant; else it flips cells averaged over replicates.
Unscored cells are counted and never averaged; cells that are one and the same prompt count once.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple, TypeVar

from pause_ray.effects import Effects, ScoredPair, averaged, grouped, mean_difference, measure_effects
from pause_ray.needle.ledger import UNKNOWN_TOKEN, CellResult
from pause_ray.statistics import SIGNIFICANT, Estimate, Interval, Unit, clustered_interval, enough_replicates, least_p, sign_flip_p, wilson

MIDDLE_PERCENT = (25.0, 75.0)
"""Depths that count as the middle of a context, ends included; all others are its edges."""
RECALL_EDGES = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)
"""Depths in percent between which the recall of facts is counted, unless others are asked for."""

Key = TypeVar("Key", int, float)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How well one arm answers. Scores are 0 to 1; means are None where nothing was scored."""

    num_cells: int
    num_scored: int
    num_repeated: int
    """Scored cells that are the same prompt as another (depths so close that the needle lands at one sentence): in no mean twice."""
    num_replicates: int
    grand_mean: float | None
    interval: Interval | None
    """Of the grand mean."""
    mean_by_length: dict[int, float]
    """``context_tokens`` → mean score."""
    mean_by_depth: dict[float, float]
    """``depth_percent`` → mean score."""
    middle_mean: float | None
    edge_mean: float | None
    exact_recall: float | None
    """Share of the scored prompts with all keywords (score 1)."""
    exact_interval: Interval | None
    """Wilson's; takes the prompts as independent."""
    prompt_overhead_percent: float
    """Prompt tokens beyond the asked context lengths, in percent of those: what pauses cost under ``budget: content``."""
    pauses_per_prompt: float

    @property
    def num_unscored(self) -> int:
        """Cells without a score."""
        return self.num_cells - self.num_scored

    @property
    def unscored_share(self) -> float:
        """Of all cells."""
        return self.num_unscored / self.num_cells


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arm A minus arm B on the questions that both answered."""

    num_pairs: int
    """Questions that both answered; the same prompt at several depths is one."""
    num_unpaired: int
    """Cells of either arm without a scored counterpart; left out."""
    num_replicates: int
    effects: Effects
    """In every measure, each with its interval."""
    p: float
    """Two-sided sign-flip test of no difference."""
    p_unit: Unit
    """What the signs are flipped of."""
    least_p: float
    """The smallest p that this many differences can give."""
    difference_by_length: dict[int, float]
    warnings: tuple[str, ...]
    """Signs that the two arms are the same data, or were asked or scored in different ways."""

    @property
    def difference(self) -> float:
        """Mean of the paired differences."""
        return self.effects.difference.value

    @property
    def interval(self) -> Interval | None:
        """Of the difference; None with fewer than two pairs. Never of zero width."""
        return self.effects.difference.interval

    @property
    def flat(self) -> bool:
        """All replicates differ by the same, so their spread says nothing and the interval speaks of cells."""
        return self.effects.flat

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that this design would have found four times of five; None with fewer than two pairs."""
        return self.effects.detectable

    def is_beyond_chance(self, corrected_p: float) -> bool:
        """Whether the difference is more than chance would explain: by its interval, and by p after correction."""
        return self.interval is not None and self.interval.excludes_zero() and corrected_p < SIGNIFICANT


@dataclass(frozen=True)
class DepthRecall:
    """How many of the facts in one stretch of the context were recalled."""

    low: float
    """Percent; the stretch begins here."""
    high: float
    """Percent; the stretch ends before here, the last one with it."""
    num_facts: int
    recall: float
    interval: Interval
    """Wilson's; takes the facts as independent, which those of one prompt are not quite."""


def summarize(rows: Sequence[CellResult]) -> Summary:
    """Means and intervals of one arm's rows (at least one).

    The interval of the mean is Wilson's with one replicate, or where all replicates have the same mean (then over cells
    averaged over replicates), else Student's t over replicates.
    """
    scored = [(row, row.score) for row in rows if row.score is not None]
    prompts = grouped((_prompt(row), (row, score)) for row, score in scored)
    exact = math.fsum(fmean(score == 1 for _, score in its) for its in prompts)
    scores = [(its[0][0], fmean(score for _, score in its)) for its in prompts]
    middle, edge = (
        averaged((_prompt(row), score) for row, score in scored if is_middle(row.depth_percent) is inside) for inside in (True, False)
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
    """Arm A minus arm B, paired by task, context length, depth, sample and replicate; None when nothing pairs.

    Of the intervals see ``effects.measure_effects``. p is a sign-flip test (Fisher 1935; exact up to 2^12 patterns, else Monte
    Carlo with the observed pattern counted, Phipson & Smyth 2010): of the replicates' mean differences from
    ``enough_replicates`` on, below it of the cells' differences averaged over replicates.

    Args:
        rows_a: One row per cell.
        rows_b: One row per cell.
        num_comparisons: In how many comparisons p will be corrected for.
    """
    pairs = _pairs(rows_a, rows_b)
    scored = [pair for pair in pairs if pair.difference is not None]
    if not scored:
        return None
    prompts = [_scored_pair(its) for its in grouped(((_prompt(pair.a), _prompt(pair.b)), pair) for pair in scored)]
    by_replicate = averaged((pair.replicate, pair.difference) for pair in prompts)
    by_cell = averaged((pair.place, pair.difference) for pair in prompts)
    unit: Unit = "replicates" if len(by_replicate) >= enough_replicates(num_comparisons) else "cells"
    flipped = by_replicate if unit == "replicates" else by_cell
    return Comparison(
        num_pairs=len(prompts),
        num_unpaired=len(rows_a) + len(rows_b) - 2 * len(scored),
        num_replicates=len(by_replicate),
        effects=measure_effects(prompts, num_comparisons=num_comparisons),
        p=sign_flip_p(flipped),
        p_unit=unit,
        least_p=least_p(len(flipped)),
        difference_by_length=_means((pair.context_tokens, pair.difference) for pair in prompts),
        warnings=tuple(_warnings(rows_a, rows_b, pairs)),
    )


def paired_difference(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> Estimate | None:
    """The mean difference that ``compare_arms`` finds, with its interval and nothing else of it; None when nothing pairs."""
    scored = [pair for pair in _pairs(rows_a, rows_b) if pair.difference is not None]
    pairs = [_scored_pair(its) for its in grouped(((_prompt(pair.a), _prompt(pair.b)), pair) for pair in scored)]
    return mean_difference(pairs, [pair.difference for pair in pairs])[0] if pairs else None


def why_nothing_pairs(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> str:
    """What keeps two arms from being compared, for rows of which ``compare_arms`` makes nothing."""
    if _pairs(rows_a, rows_b):
        return "no question was scored in both arms"
    axes: dict[str, Callable[[CellResult], Hashable]] = {
        "tasks": lambda row: row.task,
        "context lengths": lambda row: row.context_tokens,
        "depths": lambda row: row.depth_percent,
        "replicates": lambda row: row.replicate,
        "samples": lambda row: row.sample,
    }
    for name, of in axes.items():
        a, b = ({of(row) for row in rows} for rows in (rows_a, rows_b))
        if not a & b:
            return f"the arms have no {name} in common: {_some(a)} against {_some(b)}"
    return "the arms have no task, length, depth, sample and replicate in common at one cell"


def recall_by_depth(rows: Sequence[CellResult], *, edges: Sequence[float] = RECALL_EDGES) -> list[DepthRecall]:
    """Share of the facts recalled, by where they were to stand; stretches without facts are left out.

    Args:
        rows: Of tasks with one fact or several; facts without a score do not count.
        edges: Ascending depths in percent, from the beginning of the first stretch to the end of the last.
    """
    prompts = grouped((_prompt(row), row) for row in rows if row.score is not None)
    facts = [(fact.depth_percent, fact.score) for its in prompts for fact in its[0].facts if fact.score is not None]
    found = []
    for low, high in itertools.pairwise(edges):
        scores = [score for depth, score in facts if low <= depth < high or depth == high == edges[-1]]
        if scores:
            recalled = math.fsum(scores)
            found.append(DepthRecall(low, high, len(scores), recalled / len(scores), wilson(recalled, len(scores))))
    return found


def is_middle(depth_percent: float) -> bool:
    """Whether a depth counts as the middle of the context."""
    return MIDDLE_PERCENT[0] <= depth_percent <= MIDDLE_PERCENT[1]


class _Pair(NamedTuple):
    a: CellResult
    b: CellResult

    @property
    def difference(self) -> float | None:
        return None if self.a.score is None or self.b.score is None else self.a.score - self.b.score


def _pairs(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> list[_Pair]:
    def key(row: CellResult) -> tuple[Hashable, ...]:
        return *_place(row), row.replicate

    other = {key(row): row for row in rows_b}
    return [_Pair(row, other[key(row)]) for row in rows_a if key(row) in other]


def _scored_pair(same: Sequence[_Pair]) -> ScoredPair:
    """Pairs of one prompt as one."""
    first = same[0].a
    rubrics_a, rubrics_b = ([row.rubric for row in rows if row.rubric is not None] for rows in zip(*same, strict=True))
    return ScoredPair(
        place=_place(first),
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
        names = [_some({getattr(pair, side).scorer for pair in pairs}) for side in "ab"]
        yield f"{scorers} of {len(pairs)} pairs were scored in different ways ({names[0]} against {names[1]}): rescore one of them"
    models = [{getattr(pair, side).model for pair in pairs} for side in "ab"]
    if models[0] != models[1]:
        yield f"the arms are answers of different models ({_some(models[0])} against {_some(models[1])})"


def _differ(a: Sized, b: Sized) -> bool:
    """Whether both are told and not the same; imported rows may not tell what was asked."""
    return bool(a) and bool(b) and a != b


def _same_data(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult], pairs: Sequence[_Pair]) -> Iterable[str]:
    """One run under two names: as the two arms, as replicates of different arms, or as replicates of one."""
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
    """Replicate → what was answered at each place, and how long it took."""
    runs: defaultdict[int, dict[Hashable, tuple[str, float]]] = defaultdict(dict)
    for row in rows:
        if row.response is not None and row.seconds > 0:
            runs[row.replicate][_place(row)] = row.response, row.seconds
    return runs


def _is_same_run(one: Mapping[Hashable, tuple[str, float]], other: Mapping[Hashable, tuple[str, float]]) -> bool:
    common = one.keys() & other.keys()
    return len(common) > 1 and all(one[place] == other[place] for place in common)


def _mean_interval(scores: Sequence[tuple[CellResult, float]]) -> Interval | None:
    """Of scores from 0 to 1. Wilson where replicates show no spread: resampling sees no doubt in an arm that is always right."""
    if not scores:
        return None
    by_replicate = grouped((row.replicate, score) for row, score in scores)
    by_cell = averaged((_place(row), score) for row, score in scores)
    return clustered_interval(by_replicate, least=0.0, unit="replicates") or wilson(math.fsum(by_cell), len(by_cell))


def _place(row: CellResult) -> tuple[Hashable, ...]:
    """The cell that a row's replicates have in common."""
    return row.task, row.context_tokens, row.depth_percent, row.sample


def _prompt(row: CellResult) -> tuple[Hashable, ...]:
    """What rows of one arm have in common that are the same prompt, whatever depths they were asked under."""
    landed = tuple(fact.token for fact in row.facts) or (row.needle_token,)
    where: Hashable = row.depth_percent if UNKNOWN_TOKEN in landed else landed
    return row.replicate, row.task, row.context_tokens, row.sample, where


def _some(values: Iterable[Hashable]) -> str:
    """A few of them, numbers in order."""
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
