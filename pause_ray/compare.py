"""How well an arm answers and how two arms differ, with the uncertainty. Pure numpy on ledger rows; knows no file and no model.

Two questions are kept apart. *On these questions*: would other cells of the same kind show the difference too? *On new
haystacks and wordings*: would other replicates? The second needs replicates, and six of them before resampling them can
say anything at 95 %: over R replicates a percentile interval reaches at most from the smallest to the largest, which
covers the middle with probability 1 - 2^(1-R) (75 % for three), and a sign-flip test cannot give less than p = 2^(1-R).
Unscored cells are counted and never averaged.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pause_ray.needle.ledger import CellResult

LEVEL = 0.95
BOOTSTRAP_DRAWS = 10_000
FLIP_DRAWS = 10_000
EXACT_FLIPS = 12
"""Up to this many differences all 2^n sign patterns are tried; beyond it, ``FLIP_DRAWS`` random ones."""
ENOUGH_REPLICATES = 6
"""Replicates from which on replicates are resampled; see above."""
SEED = 20250228
MIDDLE_PERCENT = (25.0, 75.0)
"""Depths that count as the middle of a context, ends included; all others are its edges."""
Z_95 = 1.959964
T_95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom, for two to five replicates."""

Unit = Literal["cells", "replicates"]
Key = TypeVar("Key", int, float)


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
    """Share of the scored cells with all keywords (score 1)."""
    exact_interval: Interval | None
    """Wilson's; takes the cells as independent."""
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
    num_unpaired: int
    """Cells of either arm without a scored counterpart; left out."""
    num_replicates: int
    difference: float
    """Mean of the paired differences."""
    interval: Interval | None
    """Of the difference; None with fewer than two pairs."""
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

    The interval of the mean is Wilson's with one replicate, Student's t over the replicates' means with two to five, and a
    percentile bootstrap (Efron & Tibshirani 1993, ch. 13) over replicates with six or more.
    """
    scored = [(row, row.score) for row in rows if row.score is not None]
    scores = [score for _, score in scored]
    exact = sum(score == 1 for score in scores)
    asked = sum(row.context_tokens for row in rows)
    return Summary(
        num_cells=len(rows),
        num_scored=len(scored),
        num_replicates=len({row.replicate for row in rows}),
        grand_mean=_mean(scores),
        interval=_mean_interval(_grouped((row.replicate, score) for row, score in scored)),
        mean_by_length=_means((row.context_tokens, score) for row, score in scored),
        mean_by_depth=_means((row.depth_percent, score) for row, score in scored),
        middle_mean=_mean([score for row, score in scored if is_middle(row.depth_percent)]),
        edge_mean=_mean([score for row, score in scored if not is_middle(row.depth_percent)]),
        exact_recall=exact / len(scored) if scored else None,
        exact_interval=wilson(exact, len(scored)) if scored else None,
        prompt_overhead_percent=100 * (sum(row.prompt_tokens for row in rows) / asked - 1),
        pauses_per_prompt=fmean(row.num_pauses for row in rows),
        prefilled_tokens=sum(row.prefilled_tokens for row in rows),
        decoded_tokens=sum(row.decoded_tokens for row in rows),
        seconds=math.fsum(row.seconds for row in rows),
    )


def compare_arms(rows_a: Sequence[CellResult], rows_b: Sequence[CellResult]) -> Comparison | None:
    """Arm A minus arm B, paired by task, context length, depth and replicate; None when nothing pairs.

    The interval of the paired differences is a percentile bootstrap over cells with one replicate, else as in ``summarize``.
    p is a sign-flip test (Fisher 1935; exact up to 2^12 patterns, else Monte Carlo with the observed pattern counted, Phipson &
    Smyth 2010): of the cells' differences, averaged over replicates, below six replicates; of the replicates' mean differences
    from six on.
    """
    pairs = _pairs(rows_a, rows_b)
    scored = [(pair, pair.difference) for pair in pairs if pair.difference is not None]
    if not scored:
        return None
    by_replicate = _grouped((pair.a.replicate, difference) for pair, difference in scored)
    unit: Unit = "replicates" if len(by_replicate) >= ENOUGH_REPLICATES else "cells"
    by_cell = _grouped(((pair.a.task, pair.a.context_tokens, pair.a.depth_percent), difference) for pair, difference in scored)
    flipped = [fmean(values) for values in (by_replicate if unit == "replicates" else by_cell).values()]
    return Comparison(
        num_pairs=len(scored),
        num_unpaired=len(rows_a) + len(rows_b) - 2 * len(scored),
        num_replicates=len(by_replicate),
        difference=fmean(difference for _, difference in scored),
        interval=_interval(by_replicate, least=-1.0),
        p=sign_flip_p(flipped),
        p_unit=unit,
        least_p=least_p(len(flipped)),
        relative_percent=_relative_percent([pair for pair, _ in scored]),
        difference_by_length=_means((pair.a.context_tokens, difference) for pair, difference in scored),
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


def _mean_interval(groups: Mapping[Hashable, Sequence[float]]) -> Interval | None:
    """Of scores from 0 to 1; ``groups``: replicate → scores. Resampling cells would see no doubt in an arm that is always right."""
    if len(groups) == 1:
        [scores] = groups.values()
        return wilson(math.fsum(scores), len(scores))
    return _interval(groups, least=0.0)


def _interval(groups: Mapping[Hashable, Sequence[float]], *, least: float) -> Interval | None:
    """95 % interval of the mean over all values, clipped to ``least`` to 1; ``groups``: replicate → values."""
    values = [np.asarray(group, dtype=np.float64) for group in groups.values()]
    if sum(map(len, values)) < 2:
        return None
    unit: Unit = "replicates" if len(values) > 1 else "cells"
    if 1 < len(values) < ENOUGH_REPLICATES:
        means = [float(group.mean()) for group in values]
        half = T_95[len(means) - 1] * stdev(means) / math.sqrt(len(means))
        low, high = fmean(means) - half, fmean(means) + half
    else:
        means_drawn = _draw_replicates(values) if len(values) > 1 else _draw_cells(values[0])
        low, high = (float(edge) for edge in np.quantile(means_drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Interval(max(least, low), min(1.0, high), unit)


def _draw_cells(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of ``BOOTSTRAP_DRAWS`` samples with replacement, in blocks so that long ledgers need little memory."""
    random = np.random.default_rng(SEED)
    return np.concatenate(
        [values[random.integers(len(values), size=(500, len(values)))].mean(axis=1) for _ in range(BOOTSTRAP_DRAWS // 500)]
    )


def _draw_replicates(groups: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Means over all cells of as many replicates, drawn with replacement."""
    drawn = np.random.default_rng(SEED).integers(len(groups), size=(BOOTSTRAP_DRAWS, len(groups)))
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    means: NDArray[np.float64] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def _grouped(items: Iterable[tuple[Hashable, float]]) -> dict[Hashable, list[float]]:
    groups: defaultdict[Hashable, list[float]] = defaultdict(list)
    for key, value in items:
        groups[key].append(value)
    return dict(groups)


def _means(items: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    groups: defaultdict[Key, list[float]] = defaultdict(list)
    for key, value in items:
        groups[key].append(value)
    return {key: fmean(groups[key]) for key in sorted(groups)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
