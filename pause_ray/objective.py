"""What a sweep is after: one number per trial, from the rows of its ledger. Knows no sweep and reads no file.

A search learns from it, and the best trial of a sweep is the best by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from pause_ray.compare import Summary, is_middle, summarize
from pause_ray.needle.ledger import CellResult
from pause_ray.needle.task import SuiteSpec, cells
from pause_ray.spec import Spec

Metric = Literal["score", "score_middle", "score_edges", "exact_recall"]
_MEASURES: Final[Mapping[Metric, Callable[[Summary], float | None]]] = {
    "score": lambda summary: summary.grand_mean,
    "score_middle": lambda summary: summary.middle_mean,
    "score_edges": lambda summary: summary.edge_mean,
    "exact_recall": lambda summary: summary.exact_recall,
}
MOST_UNSCORED_SHARE = 0.1
"""A mean that leaves out more of the cells than this is one of other questions; what cannot be answered is seldom the easiest."""


def is_of_enough_cells(summary: Summary) -> bool:
    """Whether so few cells are unscored that means over the others compare with those of other trials."""
    return summary.unscored_share <= MOST_UNSCORED_SHARE


class ObjectiveSpec(Spec):
    """Which number says how good a trial is."""

    metric: Metric = "score"
    """``score``: mean of all cells; ``score_middle``, ``score_edges``: of those whose first fact is in the middle half of the context,
    or outside it; ``exact_recall``: share of the prompts that were answered with all keywords."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""

    def value(self, rows: Sequence[CellResult]) -> float | None:
        """Of one trial's rows, or of its replicates' together; 0 to 1, or None where nothing that counts was scored."""
        return _MEASURES[self.metric](summarize(rows)) if rows else None

    def learned(self, rows: Sequence[CellResult]) -> float | None:
        """As ``value``, and None where too few cells are scored for it to compare: what a search may learn from."""
        return self.value(rows) if rows and is_of_enough_cells(summarize(rows)) else None

    def better(self, one: float, other: float) -> bool:
        """Whether ``one`` is better than ``other``."""
        return one > other if self.mode == "max" else one < other

    def is_produced_by(self, suite: SuiteSpec, *, replicate: int, seed: int) -> bool:
        """Whether the suite asks cells that the metric is a mean of; ``replicate`` and ``seed`` decide random depths."""
        if self.metric in ("score", "exact_recall"):
            return True
        wanted = self.metric == "score_middle"
        return any(is_middle(cell.depth_percent) is wanted for cell in cells(suite, identity="", replicate=replicate, seed=seed))
