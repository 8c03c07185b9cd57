"""Comparisons of arms given by name, each with the first, as data, as JSON and as tables for a terminal (``pause-ray compare``)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pause_ray.core.errors import StorageError, UserError
from pause_ray.core.format import (
    format_count,
    format_interval,
    format_list,
    format_number,
    format_p_value,
    format_signed,
    format_signed_percent,
)
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage
from pause_ray.evaluation.compare import Comparison, Summary, explain_no_pairs, summarize
from pause_ray.evaluation.grid import DepthAxis, difference_grid
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.statistics import Estimate, Interval
from pause_ray.report.results import ArmResult, Contrast, answer_cost, contrasts, read_results

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


LEDGER = "cells.jsonl"
"""Name of a trial's ledger in its folder."""


@dataclass(frozen=True)
class ArmRows:
    """The rows of one arm, all its replicates."""

    name: str
    """The name that the user gave."""
    ledgers: tuple[Path, ...]
    """The files with the rows."""
    rows: tuple[CellResult, ...]


def find_arm(name: str, storage: Storage) -> ArmRows:
    """Return the rows that ``name`` stands for.

    Args:
        name: A ledger file; a folder with ``cells.jsonl``; a folder of ledgers or of trials, the replicates of one arm; or the
            name of a sweep or its beginning, a colon, and the label of an arm or its beginning.
        storage: The storage root with the sweeps.

    Raises:
        UserError: The name stands for nothing or for several things; the message lists what exists.
        StorageError: A ledger cannot be read, or has no rows.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "sweep.json").is_file():
        return _of_files(name, _ledgers_in(path))
    if path.is_file():
        return _of_files(name, [path])
    sweep, colon, label = name.partition(":")
    folder = find_sweep(sweep, storage) if colon or path.is_dir() or _sweeps_named(sweep, storage) else None
    if folder is None:
        raise UserError(
            f"{name}: no such ledger file, trial folder or folder of ledgers, and not SWEEP:ARM; "
            f"sweeps under {storage.sweeps}: {_known(storage)}"
        )
    condition = _condition(label, read_results(folder, storage).conditions, sweep=folder.name)
    return ArmRows(name, tuple(trial.folder / LEDGER for trial in condition.trials), tuple(condition.rows))


def find_sweep(name: str, storage: Storage) -> Path:
    """Return the folder of a sweep, which is given by its path or by the beginning of its name.

    Raises:
        UserError: No sweep or several have this name; the message lists all sweeps.
    """
    if (Path(name) / "sweep.json").is_file():
        return Path(name).absolute()
    found = _sweeps_named(name, storage)
    if len(found) == 1:
        return found[0]
    problem = "several sweeps have names that begin with this" if found else "no such sweep"
    raise UserError(f"{name}: {problem} under {storage.sweeps}; there are: {_known(storage)}")


def _sweeps_named(name: str, storage: Storage) -> list[Path]:
    """Return the sweeps whose names begin with ``name``, or only the one whose name without its digest is ``name``."""
    found = [path.parent for path in sorted(storage.sweeps.glob("*/sweep.json")) if path.parent.name.startswith(name)]
    exact = [folder for folder in found if name in (folder.name, folder.name.rpartition("-")[0])]
    return exact if len(exact) == 1 else found


def _known(storage: Storage) -> str:
    return ", ".join(path.parent.name for path in sorted(storage.sweeps.glob("*/sweep.json"))) or "none"


def _condition(label: str, conditions: Sequence[ArmResult], *, sweep: str) -> ArmResult:
    """Return the condition with this label, or whose label begins with it; at least one of its trials must be finished."""
    found = [item for item in conditions if item.label == label] or [item for item in conditions if label and item.label.startswith(label)]
    if len(found) != 1:
        problem = "names no arm" if not label else "several arms have labels that begin with this" if found else "no such arm"
        listed = "; ".join(item.label for item in found or conditions)
        raise UserError(f"{sweep}:{label}: {problem}; write the sweep's name, a colon and one of: {listed}")
    if not found[0].trials:
        raise UserError(f"{sweep}:{found[0].label}: none of its {found[0].num_planned} trials has finished; run the sweep again")
    return found[0]


def _ledgers_in(folder: Path) -> list[Path]:
    """Return the ledger of a trial's folder, else all ledgers in the folder, else those of the trials in it."""
    if (folder / LEDGER).is_file():
        return [folder / LEDGER]
    found = sorted(path for path in folder.glob("*.jsonl") if not path.name.startswith(".")) or sorted(folder.glob(f"*/{LEDGER}"))
    if not found:
        raise UserError(
            f"{folder}: has no ledger ({LEDGER} or other .jsonl files), and no folder with one; name a ledger or the folder of a trial"
        )
    return found


def _of_files(name: str, paths: Sequence[Path]) -> ArmRows:
    read = [(path, Ledger(path).rows()) for path in paths]
    empty = [str(path) for path, rows in read if not rows]
    if empty:
        raise StorageError(f"{empty[0]}: has no rows yet; wait until the trial has answered a cell")
    arms = sorted({row.arm for _, rows in read for row in rows})
    if len(paths) > 1 and len(arms) > 1:
        raise UserError(f"{name}: holds ledgers of several arms ({', '.join(arms)}); name one of them, such as {paths[0]}")
    seen: dict[str, Path] = {}
    for path, rows in read:
        doubled = next((row.cell_id for row in rows if row.cell_id in seen), None)
        if doubled:
            raise UserError(f"{path} and {seen[doubled]} have the same rows (cell {doubled}); leave one of them out")
        seen |= {row.cell_id: path for row in rows}
    for path, rows in read:
        question, answers = Counter((*_cell(row), row.replicate) for row in rows).most_common(1)[0]
        if answers > 1:
            task, length, depth, _, replicate = question
            raise UserError(
                f"{path}: has {answers} answers of replicate {replicate} for {task} at {length} tokens and {depth:g} %"
                f"{f' (arms: {format_list(arms)})' if len(arms) > 1 else ''}; keep each arm and run in a ledger of its own"
            )
    return ArmRows(name, tuple(paths), tuple(row for rows in _numbered([rows for _, rows in read]) for row in rows))


def _numbered(ledgers: Sequence[Sequence[CellResult]]) -> list[list[CellResult]]:
    """Return the rows; replicates get new numbers if two ledgers answer the same cell of the same replicate."""
    cells = Counter((*_cell(row), row.replicate) for rows in ledgers for row in rows)
    if max(cells.values()) == 1:
        return [list(rows) for rows in ledgers]
    runs = sorted({(place, row.replicate) for place, rows in enumerate(ledgers) for row in rows})
    numbers = {run: number for number, run in enumerate(runs)}
    return [[replace(row, replicate=numbers[place, row.replicate]) for row in rows] for place, rows in enumerate(ledgers)]


def _cell(row: CellResult) -> tuple[str, int, float, int]:
    return row.task, row.context_tokens, row.depth_percent, row.sample


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES_WIDTH, ARM_WIDTH = 36, 20
"""Columns of the terminal: for the measures with the reference, and for each other arm."""


@dataclass(frozen=True)
class ComparedArm:
    """One arm, and how it differs from the reference, whose letter is A."""

    letter: str
    arm: ArmRows
    summary: Summary
    contrast: Contrast | None
    """The difference to the reference; None for the reference itself, and where nothing pairs."""
    problem: str | None
    """The reason why no cells pair; None if some do."""

    @property
    def label(self) -> str:
        """The letter, with the arm's name if all rows have the same."""
        arms = {row.arm for row in self.arm.rows}
        return f"{self.letter} {arms.pop()}" if len(arms) == 1 else self.letter

    @property
    def comparison(self) -> Comparison | None:
        """The comparison with the reference."""
        return self.contrast.comparison if self.contrast else None


def compare_ledgers(names: Sequence[str], storage: Storage) -> list[ComparedArm]:
    """Return the arms with these names (see ``find_arm``), every one but the first compared with the first.

    Raises:
        UserError: There are fewer than two names or more than 26, or a name stands for nothing or for several things.
        StorageError: A ledger cannot be read, or has no rows.
    """
    if not 2 <= len(names) <= len(LETTERS):
        raise UserError(
            f"compare: takes 2 to {len(LETTERS)} arms, given {len(names)}; for example `pause-ray compare base.jsonl tuned.jsonl`"
        )
    found = {letter: find_arm(name, storage) for letter, name in zip(LETTERS, names, strict=False)}
    rows = {letter: arm.rows for letter, arm in found.items()}
    compared = contrasts({letter: "A" for letter in found if letter != "A"}, rows)
    return [
        ComparedArm(
            letter=letter,
            arm=arm,
            summary=summarize(arm.rows),
            contrast=compared.get(letter),
            problem=None if letter == "A" or letter in compared else explain_no_pairs(arm.rows, rows["A"]),
        )
        for letter, arm in found.items()
    ]


def comparison_notes(arms: Sequence[ComparedArm]) -> list[str]:
    """Return sentences that limit what the numbers show."""
    found = [f"{item.letter} cannot be compared with A: {item.problem}" for item in arms if item.problem]
    compared = [item.contrast for item in arms if item.contrast]
    found += [f"{item.name}: {text}" for item in compared for text in item.comparison.warnings]
    found += [
        f"{item.name}: {item.comparison.num_unpaired} cells have no scored counterpart and are left out"
        for item in compared
        if item.comparison.num_unpaired
    ]
    summaries = [(item.letter, item.summary) for item in arms]
    found += [f"{letter}: {item.num_unscored} of {item.num_cells} cells are unscored" for letter, item in summaries if item.num_unscored]
    if any(item.comparison.num_replicates == 1 for item in compared):
        found.append("with one replicate, intervals cover other cells of the same haystack, not other haystacks and wordings")
    return found


def comparison_json(arms: Sequence[ComparedArm]) -> JsonObject:
    """Return the comparison as plain data, with all numbers."""
    return {
        "arms": [
            {
                "letter": item.letter,
                "name": item.arm.name,
                "ledgers": [str(path) for path in item.arm.ledgers],
                "summary": dataclasses.asdict(item.summary),
                "spent": dataclasses.asdict(answer_cost(item.arm.rows)),
                "comparison": dataclasses.asdict(item.comparison) if item.comparison else None,
                "cells": _cells(item, arms[0]) if item.comparison else None,
                "corrected_p": item.contrast.corrected_p if item.contrast else None,
                "differs": item.contrast is not None and item.contrast.differs,
                "problem": item.problem,
            }
            for item in arms
        ],
        "notes": comparison_notes(arms),
    }


def _cells(item: ComparedArm, reference: ComparedArm) -> list[JsonObject]:
    """Return the paired difference at every length and depth."""
    fields = difference_grid(item.arm.rows, reference.arm.rows, axis=DepthAxis("percent"))
    return [
        {"context_tokens": length, "depth_percent": depth, **dataclasses.asdict(field)} for (length, depth), field in sorted(fields.items())
    ]


def comparison_view(arms: Sequence[ComparedArm], *, width: int = 80) -> RenderableType:
    """Return tables of the comparison by measure and by context length, and the notes, for a terminal with ``width`` columns.

    Arms that do not fit side by side get further tables.
    """
    from rich.console import Group
    from rich.text import Text

    reference, *others = arms
    parts: list[RenderableType] = [Text("\n".join(map(_legend, arms))), ""]
    abreast = max(1, (width - NAMES_WIDTH) // ARM_WIDTH)
    for start in range(0, len(others), abreast):
        shown = others[start : start + abreast]
        parts += [_measure_table(reference, shown), "", _length_table([reference, *shown]), ""]
    parts.append(Text("95 % intervals: r over replicates, c over cells of the same haystack. All arms are compared with A.", style="dim"))
    return Group(*parts, *(Text(f"note: {note}") for note in comparison_notes(arms)))


def _legend(item: ComparedArm) -> str:
    models = sorted({row.model for row in item.arm.rows})
    scorers = sorted({row.scorer for row in item.arm.rows})
    replicates = item.summary.num_replicates
    details = [", ".join(models), f"{replicates} replicate{'' if replicates == 1 else 's'}", f"scored by {', '.join(scorers)}"]
    return f"{item.letter}  {item.arm.name}: {'; '.join(details)}"


def _measure_table(reference: ComparedArm, others: Sequence[ComparedArm]) -> Table:
    table = _table("", [reference, *others])
    summaries = [item.summary for item in (reference, *others)]

    def of_arms(name: str, text: Callable[[Summary], str]) -> None:
        table.add_row(name, *(text(summary) for summary in summaries))

    def of_pairs(name: str, text: Callable[[Comparison], str], *, style: str | None = None) -> None:
        table.add_row(f"  {name}", "", *(text(item.comparison) if item.comparison else "–" for item in others), style=style)

    def estimate(name: str, of: Callable[[Comparison], Estimate | None], shown: Callable[[float | None], str], unit: str = "") -> None:
        of_pairs(name, lambda item: shown(found.value) if (found := of(item)) else "–")
        of_pairs("", lambda item: _format_interval(found.interval, unit) if (found := of(item)) else "", style="dim")

    of_arms("cells scored", lambda item: f"{format_count(item.num_scored)} of {format_count(item.num_cells)}")
    of_pairs("paired questions", lambda item: format_count(item.num_pairs))
    of_arms("mean score", lambda item: format_number(item.grand_mean))
    estimate("difference", lambda item: item.effects.difference, format_signed)
    of_pairs("p (sign flips)", lambda item: format_p_value(item.p))
    table.add_row("  p corrected", "", *(format_p_value(item.contrast.corrected_p if item.contrast else None) for item in others))
    verdicts = [("yes" if item.contrast.differs else "no") if item.contrast else "–" for item in others]
    table.add_row("  more than chance", "", *verdicts, style="bold")
    of_pairs(
        "detectable from", lambda item: "none" if item.detectable is not None and item.detectable >= 1 else format_number(item.detectable)
    )
    estimate("paper's metric", lambda item: item.effects.relative, format_signed_percent, " %")
    estimate("change of mean rubric", lambda item: item.effects.rubric_change, format_signed_percent, " %")
    estimate("change of mean score", lambda item: item.effects.score_change, format_signed_percent, " %")
    of_arms("exact recall", lambda item: format_number(item.exact_recall))
    estimate("difference", lambda item: item.effects.exact_difference, format_signed)
    of_arms("middle", lambda item: format_number(item.middle_mean))
    of_arms("edges", lambda item: format_number(item.edge_mean))
    estimate("gain middle − edges", lambda item: item.effects.middle_gain, format_signed)
    return table


def _length_table(arms: Sequence[ComparedArm]) -> Table:
    table = _table("context tokens", arms)
    for length in sorted({length for item in arms for length in item.summary.mean_by_length}):
        cells = []
        for item in arms:
            mean = format_number(item.summary.mean_by_length.get(length))
            difference = item.comparison.difference_by_length.get(length) if item.comparison else None
            cells.append(mean if difference is None else f"{mean}  {format_signed(difference)}")
        table.add_row(format_count(length), *cells)
    return table


def _table(corner: str, arms: Sequence[ComparedArm]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(corner, no_wrap=True)
    for item in arms:
        table.add_column(Text(item.label), justify="right", max_width=ARM_WIDTH)
    return table


def _format_interval(interval: Interval | None, unit: str) -> str:
    if interval is None:
        return "no interval"
    return f"{format_interval(interval.low, interval.high, digits=1 if unit else 2, signs=True, unit=unit)} {interval.unit[0]}"
