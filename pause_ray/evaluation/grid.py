"""Scores of a ledger on a grid of context length and needle depth, for heatmaps and profiles.

The rows of a heatmap are the asked depths in percent; on a lattice, the haystack tokens before the fact; for random samples, tenths of the
prompt by the real position of the fact.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, TypeVar

from pause_ray.core.spec import JsonObject
from pause_ray.evaluation.compare import question_key, summarize
from pause_ray.evaluation.ledger import UNKNOWN_TOKEN, CellResult
from pause_ray.evaluation.statistics import Estimate, t_interval, wilson

NUM_BINS = 10
BIN_PERCENT = 100 / NUM_BINS
MOST_DEPTHS = 20
"""The largest number of depths that a profile shows one by one; with more, it shows tenths of the prompt."""
UNCERTAIN_WIDTH = 0.5
"""A mean score whose 95 % interval is this wide is marked as uncertain."""

Key = TypeVar("Key", int, float)
GridPosition = tuple[int, float]
"""The column and row of a heatmap: ``context_tokens`` and the position on the depth axis."""


@dataclass(frozen=True)
class DepthAxis:
    """The vertical axis of a heatmap."""

    kind: Literal["percent", "lattice", "bins"]
    lattice_tokens: int = 0
    """The distance of positions on a lattice; 0 for other kinds."""

    def position(self, row: CellResult, *, paired_with: CellResult | None = None) -> float:
        """Return the position of a row: percent, tokens, or the lower edge of its bin. A pair stands half-way between its two rows."""
        if self.kind == "percent":
            return row.depth_percent
        if self.kind == "bins":
            return BIN_PERCENT * _bin(50 * (landed_share(row) + landed_share(paired_with or row)))
        if row.depth_percent >= 100:
            return float(math.ceil(row.context_tokens / self.lattice_tokens) * self.lattice_tokens)
        return float(round(row.depth_percent / 100 * row.context_tokens / self.lattice_tokens) * self.lattice_tokens)


@dataclass(frozen=True)
class GridCell:
    """One cell of a heatmap."""

    value: float | None
    """Mean score or difference; None where nothing was scored."""
    low: float
    high: float
    """Smallest and largest single value."""
    num_scored: int
    num_unscored: int
    uncertain: bool
    """Whether the answers disagree so much that the 95 % interval of a mean score is half the scale wide, or that of a mean
    difference contains zero."""


def depth_axis(suites: Iterable[JsonObject]) -> DepthAxis:
    """Return the axis of these resolved suites, or bins if they have different ones."""
    kinds = {
        DepthAxis("bins")
        if suite.get("samples")
        else DepthAxis("lattice", lattice)
        if (lattice := suite.get("lattice_tokens"))
        else DepthAxis("percent")
        for suite in suites
    }
    return kinds.pop() if len(kinds) == 1 else DepthAxis("bins") if kinds else DepthAxis("percent")


def needs_bins(rows: Iterable[CellResult], *, axis: DepthAxis) -> bool:
    """Return whether a profile over depth shows tenths of the prompt instead of single depths."""
    return axis.kind != "percent" or len({row.depth_percent for row in rows}) > MOST_DEPTHS


def score_grid(rows: Sequence[CellResult], *, axis: DepthAxis) -> dict[GridPosition, GridCell]:
    """Return the mean score at every length and position, with the spread over replicates, samples and tasks."""
    found: defaultdict[GridPosition, list[float | None]] = defaultdict(list)
    for row in rows:
        for fact in by_fact(row, axis=axis):
            found[row.context_tokens, axis.position(fact)].append(fact.score)
    return {place: _field(values, is_uncertain=_is_wide) for place, values in found.items()}


def difference_grid(rows: Sequence[CellResult], reference: Sequence[CellResult], *, axis: DepthAxis) -> dict[GridPosition, GridCell]:
    """Return the mean paired difference at every length and position that both ledgers have."""
    other = {question_key(row): row for row in reference}
    found: defaultdict[GridPosition, list[float | None]] = defaultdict(list)
    for row in rows:
        if (against := other.get(question_key(row))) is None:
            continue
        for a, b in zip(by_fact(row, axis=axis), by_fact(against, axis=axis), strict=False):
            place = axis.position(a, paired_with=b)
            found[row.context_tokens, place].append(None if a.score is None or b.score is None else a.score - b.score)
    return {place: _field(values, is_uncertain=_contains_zero) for place, values in found.items()}


def length_profile(rows: Sequence[CellResult]) -> dict[int, Estimate]:
    """Return the mean score over all depths by ``context_tokens``, where anything was scored."""
    return _estimates((row.context_tokens, row) for row in rows)


def depth_profile(rows: Sequence[CellResult], *, axis: DepthAxis, in_tenths: bool) -> dict[float, Estimate]:
    """Return the mean score over all lengths by depth in percent: at the asked depths, or in the middle of each tenth."""
    seen = [fact for row in rows for fact in by_fact(row, axis=axis)]
    if not in_tenths:
        return _estimates((fact.depth_percent, fact) for fact in seen)
    shares = [landed_share(fact) if axis.kind == "bins" else fact.depth_percent / 100 for fact in seen]
    return _estimates((BIN_PERCENT * (_bin(100 * share) + 0.5), fact) for share, fact in zip(shares, seen, strict=True))


def by_fact(row: CellResult, *, axis: DepthAxis) -> list[CellResult]:
    """Return the row once for each fact that was asked for where the axis shows landed facts; else the row itself."""
    asked = [fact for fact in row.facts if fact.references]
    if axis.kind != "bins" or not asked:
        return [row]
    return [
        dataclasses.replace(
            row,
            needle_token=fact.token,
            depth_percent=fact.depth_percent,
            score=row.score if row.score is None or fact.score is None or len(asked) == 1 else fact.score,
        )
        for fact in asked
    ]


def landed_share(row: CellResult) -> float:
    """Return where the needle begins, from 0 to 1 of the prompt; the asked depth where that is unknown."""
    return row.depth_percent / 100 if row.needle_token == UNKNOWN_TOKEN else row.needle_token / row.prompt_tokens


def _bin(percent: float) -> int:
    return min(NUM_BINS - 1, int(percent / BIN_PERCENT))


def _estimates(rows: Iterable[tuple[Key, CellResult]]) -> dict[Key, Estimate]:
    groups: defaultdict[Key, list[CellResult]] = defaultdict(list)
    for key, row in rows:
        groups[key].append(row)
    summaries = {key: summarize(groups[key]) for key in sorted(groups)}
    return {key: Estimate(each.grand_mean, each.interval) for key, each in summaries.items() if each.grand_mean is not None}


def _is_wide(scores: Sequence[float]) -> bool:
    interval = wilson(math.fsum(scores), len(scores)) if len(set(scores)) > 1 else None
    return interval is not None and interval.high - interval.low >= UNCERTAIN_WIDTH


def _contains_zero(differences: Sequence[float]) -> bool:
    interval = t_interval(differences, lower_bound=-1.0, unit="cells")
    return interval is not None and not interval.excludes_zero()


def _field(values: Sequence[float | None], *, is_uncertain: Callable[[Sequence[float]], bool]) -> GridCell:
    scored = [value for value in values if value is not None]
    return GridCell(
        value=fmean(scored) if scored else None,
        low=min(scored, default=0.0),
        high=max(scored, default=0.0),
        num_scored=len(scored),
        num_unscored=len(values) - len(scored),
        uncertain=is_uncertain(scored),
    )
