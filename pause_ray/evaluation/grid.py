"""Heatmaps and profiles of a ledger's scores over context length and needle depth. Pure: draws nothing and reads no file.

The rows of a heatmap are the asked depths in percent; on a lattice, the haystack tokens before the fact; for random samples,
tenths of the prompt by where the fact landed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, TypeVar

from pause_ray.core.spec import JsonObject
from pause_ray.evaluation.compare import summarize
from pause_ray.evaluation.ledger import UNKNOWN_TOKEN, CellResult
from pause_ray.evaluation.statistics import Interval, t_interval, wilson

NUM_BINS = 10
BIN_PERCENT = 100 / NUM_BINS
MOST_DEPTHS = 20
"""Most asked depths that a profile shows one by one; beyond it, it is drawn in tenths of the prompt."""
UNCERTAIN_WIDTH = 0.5
"""A mean score whose 95 % interval is this wide is marked as uncertain."""

Key = TypeVar("Key", int, float)
Place = tuple[int, float]
"""``context_tokens`` and the position on the grid's axis: column and row of a heatmap."""


@dataclass(frozen=True)
class Axis:
    """The vertical axis of a heatmap."""

    kind: Literal["percent", "lattice", "bins"]
    lattice_tokens: int = 0
    """Distance of a lattice's positions; 0 on other grids."""

    def position(self, row: CellResult, *, paired_with: CellResult | None = None) -> float:
        """Return a row's place on the axis: percent, tokens, or the lower edge of its bin; a pair counts half-way between its two."""
        if self.kind == "percent":
            return row.depth_percent
        if self.kind == "bins":
            return BIN_PERCENT * _bin(50 * (landed_share(row) + landed_share(paired_with or row)))
        if row.depth_percent >= 100:
            return float(math.ceil(row.context_tokens / self.lattice_tokens) * self.lattice_tokens)
        return float(round(row.depth_percent / 100 * row.context_tokens / self.lattice_tokens) * self.lattice_tokens)


@dataclass(frozen=True)
class Field:
    """One cell of a heatmap."""

    value: float | None
    """Mean score or difference, or None where nothing could be scored."""
    low: float
    high: float
    """Smallest and largest single value."""
    num_scored: int
    num_unscored: int
    uncertain: bool
    """Whether the answers disagree so much that the 95 % interval of a mean score is half the scale wide, or that of a mean
    difference contains zero."""


@dataclass(frozen=True)
class Point:
    """One mean of a profile."""

    mean: float
    interval: Interval | None


def axis_of(suites: Iterable[JsonObject]) -> Axis:
    """Return the axis that fits all of these resolved suites: their own where they agree, else bins."""
    kinds = {
        Axis("bins") if suite.get("samples") else Axis("lattice", lattice) if (lattice := suite.get("lattice_tokens")) else Axis("percent")
        for suite in suites
    }
    return kinds.pop() if len(kinds) == 1 else Axis("bins") if kinds else Axis("percent")


def drawn_in_tenths(rows: Iterable[CellResult], *, axis: Axis) -> bool:
    """Return whether a profile over depth needs bins."""
    return axis.kind != "percent" or len({row.depth_percent for row in rows}) > MOST_DEPTHS


def score_fields(rows: Sequence[CellResult], *, axis: Axis) -> dict[Place, Field]:
    """Return the mean score at every length and position, with the spread over replicates, samples and tasks."""
    found: defaultdict[Place, list[float | None]] = defaultdict(list)
    for row in rows:
        for fact in by_fact(row, axis=axis):
            found[row.context_tokens, axis.position(fact)].append(fact.score)
    return {place: _score_field(values) for place, values in found.items()}


def difference_fields(rows: Sequence[CellResult], reference: Sequence[CellResult], *, axis: Axis) -> dict[Place, Field]:
    """Return the mean paired difference at every length and position that both ledgers have."""
    other = {_question(row): row for row in reference}
    found: defaultdict[Place, list[float | None]] = defaultdict(list)
    for row in rows:
        if (against := other.get(_question(row))) is None:
            continue
        for a, b in zip(by_fact(row, axis=axis), by_fact(against, axis=axis), strict=False):
            place = axis.position(a, paired_with=b)
            found[row.context_tokens, place].append(None if a.score is None or b.score is None else a.score - b.score)
    return {place: _difference_field(values) for place, values in found.items()}


def length_profile(rows: Sequence[CellResult]) -> dict[int, Point]:
    """Return the mean score over all depths by ``context_tokens``, where anything was scored."""
    return _points((row.context_tokens, row) for row in rows)


def depth_profile(rows: Sequence[CellResult], *, axis: Axis, in_tenths: bool) -> dict[float, Point]:
    """Return the mean score over all lengths by depth in percent: at the asked depths, or in the middle of each tenth."""
    seen = [fact for row in rows for fact in by_fact(row, axis=axis)]
    if not in_tenths:
        return _points((fact.depth_percent, fact) for fact in seen)
    shares = [landed_share(fact) if axis.kind == "bins" else fact.depth_percent / 100 for fact in seen]
    return _points((BIN_PERCENT * (_bin(100 * share) + 0.5), fact) for share, fact in zip(shares, seen, strict=True))


def by_fact(row: CellResult, *, axis: Axis) -> list[CellResult]:
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
    """Return where the needle begins, from 0 to 1 of the prompt; the asked depth where the row does not say."""
    return row.depth_percent / 100 if row.needle_token == UNKNOWN_TOKEN else row.needle_token / row.prompt_tokens


def _bin(percent: float) -> int:
    return min(NUM_BINS - 1, int(percent / BIN_PERCENT))


def _points(rows: Iterable[tuple[Key, CellResult]]) -> dict[Key, Point]:
    groups: defaultdict[Key, list[CellResult]] = defaultdict(list)
    for key, row in rows:
        groups[key].append(row)
    summaries = {key: summarize(groups[key]) for key in sorted(groups)}
    return {key: Point(its.grand_mean, its.interval) for key, its in summaries.items() if its.grand_mean is not None}


def _question(row: CellResult) -> tuple[str, int, float, int, int]:
    return row.task, row.context_tokens, row.depth_percent, row.replicate, row.sample


def _score_field(values: Sequence[float | None]) -> Field:
    scored = [value for value in values if value is not None]
    interval = wilson(math.fsum(scored), len(scored)) if len(set(scored)) > 1 else None
    return _field(values, uncertain=interval is not None and interval.high - interval.low >= UNCERTAIN_WIDTH)


def _difference_field(values: Sequence[float | None]) -> Field:
    scored = [value for value in values if value is not None]
    interval = t_interval(scored, lower_bound=-1.0, unit="cells")
    return _field(values, uncertain=interval is not None and not interval.excludes_zero())


def _field(values: Sequence[float | None], *, uncertain: bool) -> Field:
    scored = [value for value in values if value is not None]
    return Field(
        value=fmean(scored) if scored else None,
        low=min(scored, default=0.0),
        high=max(scored, default=0.0),
        num_scored=len(scored),
        num_unscored=len(values) - len(scored),
        uncertain=uncertain,
    )
