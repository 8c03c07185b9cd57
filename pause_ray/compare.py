"""How well an arm answers and how two arms differ, with the uncertainty. Pure numpy on ledger rows; knows no file and no model.

Two questions are kept apart. *On these questions*: would other cells of the same kind show the difference too? *On new
haystacks and wordings*: would other replicates? From two replicates on, intervals answer the second, by Student's t over
the replicates' means: resampling R replicates reaches at most from the smallest to the largest and covers too little
below some thirty. A sign-flip test over R replicates cannot give less than p = 2^(1-R), so it flips them only where that,
corrected for the number of comparisons, can be significant; else it flips cells averaged over replicates.
Unscored cells are counted and never averaged; cells that are one and the same prompt count once.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from pause_ray.needle.ledger import CellResult

SIGNIFICANT = 0.05
"""A p below this, after correction, counts as more than chance."""
FLIP_DRAWS = 10_000
EXACT_FLIPS = 12
"""Up to this many differences all 2^n sign patterns are tried; beyond it, ``FLIP_DRAWS`` random ones."""
SEED = 20250228
MIDDLE_PERCENT = (25.0, 75.0)
"""Depths that count as the middle of a context, ends included; all others are its edges."""
Z_95 = 1.959964
T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom."""
EQUAL = 1e-12
"""Means closer than this differ by rounding only."""

Unit = Literal["cells", "replicates"]
Key = TypeVar("Key", int, float)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float
    unit: Unit
    """What would be drawn anew: other cells of the same haystack, or other replicates (haystack, wording, seed)."""

    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of zero."""
        return self.low > 0 or self.high < 0


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
    prefilled_tokens: int
    decoded_tokens: int
    seconds: float
    """Answering, all cells."""

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
    difference: float
    """Mean of the paired differences."""
    interval: Interval | None
    """Of the difference; None with fewer than two pairs. Never of zero width."""
    flat: bool
    """All replicates differ by the same, so their spread says nothing and the interval speaks of cells."""
    p: float
    """Two-sided sign-flip test of no difference."""
    p_unit: Unit
    """What the signs are flipped of."""
    least_p: float
    """The smallest p that this many differences can give."""
    relative_percent: float | None
    """Mean over context lengths of the relative change of the 1-10 rubric: the paper's headline metric. None where nothing pairs."""
    difference_by_length: dict[int, float]
    warnings: tuple[str, ...]
    """Signs that the two arms are the same data, or were asked different things."""


def summarize(rows: Sequence[CellResult]) -> Summary:
    """Means, intervals and costs of one arm's rows (at least one).

    The interval of the mean is Wilson's with one replicate, or where all replicates have the same mean (then over cells
    averaged over replicates), else Student's t over the replicates' means.
    """
    scored = [(row, row.score) for row in rows if row.score is not None]
    prompts = _merged((row.replicate, row.task, row.context_tokens, row.needle_token, (row, score)) for row, score in scored)
    exact = math.fsum(fmean(score == 1 for _, score in its) for its in prompts)
    scores = [(its[0][0], fmean(score for _, score in its)) for its in prompts]
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
        middle_mean=_mean([score for row, score in scored if is_middle(row.depth_percent)]),
        edge_mean=_mean([score for row, score in scored if not is_middle(row.depth_percent)]),
        exact_recall=exact / len(prompts) if prompts else None,
        exact_interval=wilson(exact, len(prompts)) if prompts else None,
        prompt_overhead_percent=100 * (sum(row.prompt_tokens for row in rows) / asked - 1),
        pauses_per_prompt=fmean(row.num_pauses for row in rows),
        prefilled_tokens=sum(row.prefilled_tokens for row in rows),
        decoded_tokens=sum(row.decoded_tokens for row in rows),
        seconds=math.fsum(row.seconds for row in rows),
    )


def compare_arms(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult], *, num_comparisons: int = 1) -> Comparison | None:
    """Arm A minus arm B, paired by task, context length, depth and replicate; None when nothing pairs.

    The interval is Student's t: over the replicates' mean differences; with one replicate, or where all replicates differ by
    the same, over the cells' differences (averaged over replicates) and one imagined pair each way, as Bonett & Price (2012)
    do for paired proportions, so that few cells, or cells that all agree, claim no certainty that they do not have.
    p is a sign-flip test (Fisher 1935; exact up to 2^12 patterns, else Monte Carlo with the observed pattern counted, Phipson &
    Smyth 2010): of the replicates' mean differences from ``enough_replicates`` on, below it of the cells' differences
    averaged over replicates.

    Args:
        rows_a: One row per cell.
        rows_b: One row per cell.
        num_comparisons: In how many comparisons p will be corrected for.
    """
    pairs = _pairs(rows_a, rows_b)
    scored = [pair for pair in pairs if pair.difference is not None]
    if not scored:
        return None
    prompts = _merged((its.a.replicate, its.a.task, its.a.context_tokens, (its.a.needle_token, its.b.needle_token), its) for its in scored)
    differences = [(its[0].a, fmean(pair.difference or 0.0 for pair in its)) for its in prompts]
    by_replicate = _averaged((row.replicate, difference) for row, difference in differences)
    by_cell = _averaged((_place(row), difference) for row, difference in differences)
    unit: Unit = "replicates" if len(by_replicate) >= enough_replicates(num_comparisons) else "cells"
    flipped = by_replicate if unit == "replicates" else by_cell
    over_replicates = _t_interval(by_replicate, least=-1.0, unit="replicates")
    return Comparison(
        num_pairs=len(prompts),
        num_unpaired=len(rows_a) + len(rows_b) - 2 * len(scored),
        num_replicates=len(by_replicate),
        difference=fmean(difference for _, difference in differences),
        interval=None if len(prompts) < 2 else over_replicates or _t_interval([*by_cell, -1.0, 1.0], least=-1.0, unit="cells"),
        flat=len(by_replicate) > 1 and over_replicates is None,
        p=sign_flip_p(flipped),
        p_unit=unit,
        least_p=least_p(len(flipped)),
        relative_percent=_relative_percent([its[0] for its in prompts]),
        difference_by_length=_means((row.context_tokens, difference) for row, difference in differences),
        warnings=tuple(_warnings(rows_a, rows_b, pairs)),
    )


def is_middle(depth_percent: float) -> bool:
    """Whether a depth counts as the middle of the context."""
    return MIDDLE_PERCENT[0] <= depth_percent <= MIDDLE_PERCENT[1]


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), right at 0 and at all successes too.

    ``successes`` may be a sum of partial scores: the interval is then wider than it need be, since no score between 0 and 1
    varies more than a coin with the same mean.
    """
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half, "cells")


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences when each sign is as likely as its opposite."""
    values = np.asarray(differences, dtype=np.float64)
    observed = abs(values.sum()) * (1 - 1e-12) - 1e-12
    if len(values) <= EXACT_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float(np.mean(np.abs(signs @ values) >= observed))
    signs = np.random.default_rng(SEED).choice((-1.0, 1.0), size=(FLIP_DRAWS, len(values)))
    return float((1 + np.count_nonzero(np.abs(signs @ values) >= observed)) / (1 + FLIP_DRAWS))


def least_p(num_differences: int) -> float:
    """The smallest p that ``sign_flip_p`` can give: all differences have one sign."""
    return 2.0 ** (1 - num_differences) if num_differences <= EXACT_FLIPS else 1 / (1 + FLIP_DRAWS)


def enough_replicates(num_comparisons: int) -> int:
    """From how many replicates on flipping their signs can be significant after correction for ``num_comparisons``."""
    return next((count for count in range(2, EXACT_FLIPS + 1) if least_p(count) * num_comparisons < SIGNIFICANT), EXACT_FLIPS + 1)


def t_95(degrees_of_freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; above 30 by the Cornish-Fisher expansion, right to four digits there."""
    if degrees_of_freedom <= len(T_95):
        return T_95[degrees_of_freedom - 1]
    z, df = Z_95, degrees_of_freedom
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm 1979): the chance of one false find among all stays below the corrected p."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = highest
    return corrected


class _Pair(NamedTuple):
    a: CellResult
    b: CellResult

    @property
    def difference(self) -> float | None:
        return None if self.a.score is None or self.b.score is None else self.a.score - self.b.score


def _pairs(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> list[_Pair]:
    def key(row: CellResult) -> tuple[Hashable, ...]:
        return row.task, row.context_tokens, row.depth_percent, row.replicate

    other = {key(row): row for row in rows_b}
    return [_Pair(row, other[key(row)]) for row in rows_a if key(row) in other]


def _relative_percent(pairs: Sequence[_Pair]) -> float | None:
    """The metric behind the paper's "+10.61 %": the mean over lengths of (mean rubric of A / mean rubric of B - 1)."""
    by_length: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for a, b in pairs:
        if a.rubric is not None and b.rubric is not None:
            by_length[a.context_tokens].append((a.rubric, b.rubric))
    if not by_length:
        return None
    return 100 * (fmean(sum(a for a, _ in values) / sum(b for _, b in values) for values in by_length.values()) - 1)


def _warnings(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult], pairs: Sequence[_Pair]) -> Iterable[str]:
    answered = [pair for pair in pairs if pair.difference is not None]
    shared = {row.cell_id for row in rows_a} & {row.cell_id for row in rows_b}
    if shared:
        yield f"{len(shared)} cells are the same rows in both arms: part of this compares data with itself"
    elif all(a.response == b.response and a.seconds == b.seconds for a, b in answered):
        yield "every answer and its duration are the same in both arms: this looks like one run under two names"
    elif all(a.response == b.response for a, b in answered):
        yield "every answer is word for word the same in both arms"
    different = sum(a.question != b.question or a.references != b.references for a, b in pairs)
    if different:
        yield f"{different} of {len(pairs)} pairs were asked about different facts"
    elif any(a.seed != b.seed for a, b in pairs):
        yield "the two arms read different haystacks (their seeds differ)"
    unequal = sum(a.content_tokens != b.content_tokens for a, b in pairs)
    if unequal:
        yield f"the arms did not read the same amount of text in {unequal} of {len(pairs)} pairs (their content_tokens differ)"


def _mean_interval(scores: Sequence[tuple[CellResult, float]]) -> Interval | None:
    """Of scores from 0 to 1. Wilson where replicates show no spread: resampling sees no doubt in an arm that is always right."""
    if not scores:
        return None
    by_replicate = _averaged((row.replicate, score) for row, score in scores)
    by_cell = _averaged((_place(row), score) for row, score in scores)
    return _t_interval(by_replicate, least=0.0, unit="replicates") or wilson(math.fsum(by_cell), len(by_cell))


def _t_interval(values: Sequence[float], *, least: float, unit: Unit) -> Interval | None:
    """Student's 95 % interval of the mean, clipped to ``least`` to 1; None where the values show no spread."""
    if len(values) < 2 or max(values) - min(values) < EQUAL:
        return None
    half = t_95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(max(least, fmean(values) - half), min(1.0, fmean(values) + half), unit)


def _place(row: CellResult) -> Hashable:
    """The cell that a row's replicates have in common."""
    return row.task, row.context_tokens, row.depth_percent


def _merged(items: Iterable[tuple[Hashable, Hashable, Hashable, Hashable, Item]]) -> list[list[Item]]:
    """Items that agree in all but the last place: the same prompt asked under several depths."""
    groups: defaultdict[Hashable, list[Item]] = defaultdict(list)
    for *key, item in items:
        groups[tuple(key)].append(item)
    return list(groups.values())


def _averaged(items: Iterable[tuple[Hashable, float]]) -> list[float]:
    """The mean of the values under each key."""
    groups: defaultdict[Hashable, list[float]] = defaultdict(list)
    for key, value in items:
        groups[key].append(value)
    return [fmean(values) for values in groups.values()]


def _means(items: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    groups: defaultdict[Key, list[float]] = defaultdict(list)
    for key, value in items:
        groups[key].append(value)
    return {key: fmean(groups[key]) for key in sorted(groups)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
