"""Arms given by name, each against the first: what ``pause-ray compare`` finds, as data, as JSON and as tables for a terminal.

Knows no sweep plan and no report; the numbers are those of ``compare``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pause_ray.compare import Comparison, Summary, compare_arms, explain_no_pairs, summarize
from pause_ray.errors import UserError
from pause_ray.ledger_files import ArmRows, find_arm
from pause_ray.places import Axis, difference_fields
from pause_ray.results import spent
from pause_ray.spec import JsonObject
from pause_ray.statistics import Estimate, Interval, holm
from pause_ray.storage import Storage
from pause_ray.words import count, number, p_value, signed, signed_percent, span

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES_WIDTH, ARM_WIDTH = 36, 20
"""Columns of a terminal: for the measures and the reference, and for each other arm."""


@dataclass(frozen=True)
class ComparedArm:
    """One arm, and how it differs from the reference."""

    letter: str
    arm: ArmRows
    summary: Summary
    comparison: Comparison | None
    """None for the reference, and where nothing pairs."""
    corrected_p: float | None
    """After Holm's correction for all arms that are compared."""
    problem: str | None
    """Why nothing pairs."""

    @property
    def label(self) -> str:
        """Letter, and the arm if its rows agree on one."""
        arms = {row.arm for row in self.arm.rows}
        return f"{self.letter} {arms.pop()}" if len(arms) == 1 else self.letter

    @property
    def differs(self) -> bool:
        """Whether the difference is more than chance would explain, by interval and by corrected p."""
        return self.comparison is not None and self.corrected_p is not None and self.comparison.is_beyond_chance(self.corrected_p)


@dataclass(frozen=True)
class LedgerComparison:
    """The reference and all others."""

    reference: ComparedArm
    others: tuple[ComparedArm, ...]

    @property
    def arms(self) -> tuple[ComparedArm, ...]:
        """The reference first."""
        return self.reference, *self.others

    @property
    def notes(self) -> list[str]:
        """What to know before believing the numbers."""
        found = [f"{its.letter} cannot be compared: {its.problem}" for its in self.others if its.problem]
        found += [f"{its.letter} against A: {text}" for its in self.others if its.comparison for text in its.comparison.warnings]
        for its in self.others:
            if its.comparison and its.comparison.num_unpaired:
                found.append(f"{its.letter} against A: {its.comparison.num_unpaired} cells have no scored counterpart and are left out")
        found += [
            f"{its.letter}: {its.summary.num_unscored} of {its.summary.num_cells} cells are unscored"
            for its in self.arms
            if its.summary.num_unscored
        ]
        compared = [its.comparison for its in self.others if its.comparison]
        if any(its.num_replicates == 1 for its in compared):
            found.append("with one replicate, intervals speak of other cells of the same haystack and not of other haystacks and wordings")
        return found


def compare_ledgers(names: Sequence[str], storage: Storage) -> LedgerComparison:
    """Find the arms and compare every one with the first.

    Args:
        names: At least two; see ``ledger_files.find_arm``.
        storage: Where sweeps are looked for.

    Raises:
        UserError: fewer than two names, or more than 26; a name that stands for nothing or for several things.
        StorageError: a ledger that cannot be read or has no rows.
    """
    if not 2 <= len(names) <= len(LETTERS):
        raise UserError(
            f"compare: takes 2 to {len(LETTERS)} arms, given {len(names)}; for example `pause-ray compare base.jsonl tuned.jsonl`"
        )
    first, *others = [find_arm(name, storage) for name in names]
    found = [compare_arms(arm.rows, first.rows, num_comparisons=len(others)) for arm in others]
    corrected = iter(holm([comparison.p for comparison in found if comparison]))
    return LedgerComparison(
        ComparedArm(LETTERS[0], first, summarize(first.rows), None, None, None),
        tuple(
            ComparedArm(
                letter,
                arm,
                summarize(arm.rows),
                comparison,
                next(corrected) if comparison else None,
                None if comparison else explain_no_pairs(arm.rows, first.rows),
            )
            for letter, arm, comparison in zip(LETTERS[1:], others, found, strict=False)
        ),
    )


def comparison_json(result: LedgerComparison) -> JsonObject:
    """Everything that was computed, for machines."""
    return {
        "arms": [
            {
                "letter": its.letter,
                "name": its.arm.name,
                "ledgers": [str(path) for path in its.arm.ledgers],
                "summary": dataclasses.asdict(its.summary),
                "spent": dataclasses.asdict(spent(its.arm.rows)),
                "comparison": dataclasses.asdict(its.comparison) if its.comparison else None,
                "cells": _cells(its, result.reference) if its.comparison else None,
                "corrected_p": its.corrected_p,
                "differs": its.differs,
                "problem": its.problem,
            }
            for its in result.arms
        ],
        "notes": result.notes,
    }


def _cells(its: ComparedArm, reference: ComparedArm) -> list[JsonObject]:
    """The paired difference at every length and depth."""
    fields = difference_fields(its.arm.rows, reference.arm.rows, axis=Axis("percent"))
    return [
        {"context_tokens": length, "depth_percent": depth, **dataclasses.asdict(field)} for (length, depth), field in sorted(fields.items())
    ]


def comparison_view(result: LedgerComparison, *, width: int = 80) -> RenderableType:
    """What was compared, measure by measure and length by length, and the notes.

    Args:
        result: Of ``compare_ledgers``.
        width: Columns of the terminal; arms that do not fit side by side go into further tables.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text("\n".join(_legend(its) for its in result.arms)), ""]
    abreast = max(1, (width - NAMES_WIDTH) // ARM_WIDTH)
    for start in range(0, len(result.others), abreast):
        shown = result.others[start : start + abreast]
        parts += [_measure_table(result.reference, shown), "", _length_table(result.reference, shown), ""]
    parts.append(Text("95 % intervals: r over replicates, c over cells of the same haystack. All are compared with A.", style="dim"))
    return Group(*parts, *(Text(f"note: {note}") for note in result.notes))


def _legend(its: ComparedArm) -> str:
    models = sorted({row.model for row in its.arm.rows})
    scorers = sorted({row.scorer for row in its.arm.rows})
    replicates = its.summary.num_replicates
    details = [", ".join(models), f"{replicates} replicate{'' if replicates == 1 else 's'}", f"scored by {', '.join(scorers)}"]
    return f"{its.letter}  {its.arm.name}: {'; '.join(details)}"


def _measure_table(reference: ComparedArm, others: Sequence[ComparedArm]) -> Table:
    table = _table("", reference, others)
    summaries = [its.summary for its in (reference, *others)]

    def of_arms(name: str, text: Callable[[Summary], str]) -> None:
        table.add_row(name, *(text(summary) for summary in summaries))

    def of_pairs(name: str, text: Callable[[Comparison], str], *, style: str | None = None) -> None:
        table.add_row(f"  {name}", "", *(text(its.comparison) if its.comparison else "–" for its in others), style=style)

    def estimate(name: str, of: Callable[[Comparison], Estimate | None], shown: Callable[[float | None], str], unit: str = "") -> None:
        of_pairs(name, lambda its: shown(found.value) if (found := of(its)) else "–")
        of_pairs("", lambda its: _interval_words(found.interval, unit) if (found := of(its)) else "", style="dim")

    of_arms("cells scored", lambda its: f"{count(its.num_scored)} of {count(its.num_cells)}")
    of_pairs("paired questions", lambda its: count(its.num_pairs))
    of_arms("mean score", lambda its: number(its.grand_mean))
    estimate("difference", lambda its: its.effects.difference, signed)
    of_pairs("p (sign flips)", lambda its: p_value(its.p))
    table.add_row("  p corrected", "", *(p_value(its.corrected_p) for its in others))
    table.add_row("  more than chance", "", *("yes" if its.differs else "no" if its.comparison else "–" for its in others), style="bold")
    of_pairs(
        "detectable from", lambda its: "–" if its.detectable is None else number(its.detectable) if its.detectable < 1 else "none there is"
    )
    estimate("paper's metric", lambda its: its.effects.relative, signed_percent, " %")
    estimate("change of mean rubric", lambda its: its.effects.rubric_change, signed_percent, " %")
    estimate("change of mean score", lambda its: its.effects.score_change, signed_percent, " %")
    of_arms("exact recall", lambda its: number(its.exact_recall))
    estimate("difference", lambda its: its.effects.exact_difference, signed)
    of_arms("middle", lambda its: number(its.middle_mean))
    of_arms("edges", lambda its: number(its.edge_mean))
    estimate("gain middle − edges", lambda its: its.effects.middle_gain, signed)
    return table


def _length_table(reference: ComparedArm, others: Sequence[ComparedArm]) -> Table:
    table = _table("context tokens", reference, others)
    arms = (reference, *others)
    for length in sorted({length for its in arms for length in its.summary.mean_by_length}):
        table.add_row(count(length), *_length_cells(length, arms))
    return table


def _length_cells(length: int, arms: Sequence[ComparedArm]) -> Iterator[str]:
    for its in arms:
        mean = number(its.summary.mean_by_length.get(length))
        difference = its.comparison.difference_by_length.get(length) if its.comparison else None
        yield mean if difference is None else f"{mean}  {signed(difference)}"


def _table(corner: str, reference: ComparedArm, others: Sequence[ComparedArm]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(corner, no_wrap=True)
    for its in (reference, *others):
        table.add_column(Text(its.label), justify="right", max_width=ARM_WIDTH)
    return table


def _interval_words(interval: Interval | None, unit: str) -> str:
    if interval is None:
        return "no interval"
    return f"{span(interval.low, interval.high, digits=1 if unit else 2, signs=True, unit=unit)} {interval.unit[0]}"
