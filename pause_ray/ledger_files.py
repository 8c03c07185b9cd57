"""Ledgers by what people call them: a file, a trial's folder, a folder of replicates, or SWEEP:ARM under the storage root.

Reads what trials, sweeps, imports and rescoring left; writes nothing and compares nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pause_ray.errors import StorageError, UserError
from pause_ray.needle.ledger import CellResult, Ledger
from pause_ray.results import Condition, read_results
from pause_ray.storage import Storage
from pause_ray.words import listed

LEDGER = "cells.jsonl"
"""Of a trial."""


@dataclass(frozen=True)
class ArmRows:
    """The rows of one arm, all its replicates."""

    name: str
    """As the user called it."""
    ledgers: tuple[Path, ...]
    """Where the rows are."""
    rows: tuple[CellResult, ...]


def find_arm(name: str, storage: Storage) -> ArmRows:
    """The rows that ``name`` stands for.

    Args:
        name: A ledger file; a folder with ``cells.jsonl``; a folder of ledgers or of trials, the replicates of one arm; or the
            name of a sweep or its beginning, a colon, and the label of an arm or its beginning.
        storage: Where sweeps are looked for.

    Raises:
        UserError: no such thing, or several; says what there is.
        StorageError: a ledger that cannot be read, or has no rows.
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
    """A sweep's folder, given by its path or by the beginning of its name.

    Raises:
        UserError: none or several; says which there are.
    """
    if (Path(name) / "sweep.json").is_file():
        return Path(name).absolute()
    found = _sweeps_named(name, storage)
    if len(found) == 1:
        return found[0]
    problem = "several sweeps begin so" if found else "no such sweep"
    raise UserError(f"{name}: {problem} under {storage.sweeps}; there are: {_known(storage)}")


def _sweeps_named(name: str, storage: Storage) -> list[Path]:
    """Those that begin so; one whose name is just that, its digest aside, stands for itself."""
    found = [path.parent for path in sorted(storage.sweeps.glob("*/sweep.json")) if path.parent.name.startswith(name)]
    exact = [folder for folder in found if name in (folder.name, folder.name.rpartition("-")[0])]
    return exact if len(exact) == 1 else found


def _known(storage: Storage) -> str:
    return ", ".join(path.parent.name for path in sorted(storage.sweeps.glob("*/sweep.json"))) or "none"


def _condition(label: str, conditions: Sequence[Condition], *, sweep: str) -> Condition:
    """The one that is called so, or begins so; at least one of its trials must be finished."""
    found = [its for its in conditions if its.label == label] or [its for its in conditions if label and its.label.startswith(label)]
    if len(found) != 1:
        problem = "names no arm" if not label else "several arms begin so" if found else "no such arm"
        listed = "; ".join(its.label for its in found or conditions)
        raise UserError(f"{sweep}:{label}: {problem}; write the sweep's name, a colon and one of: {listed}")
    if not found[0].trials:
        raise UserError(f"{sweep}:{found[0].label}: none of its {found[0].num_planned} trials has finished; run the sweep again")
    return found[0]


def _ledgers_in(folder: Path) -> list[Path]:
    """The folder's own ledger; or all of those in it, or in the trials in it."""
    if (folder / LEDGER).is_file():
        return [folder / LEDGER]
    found = sorted(path for path in folder.glob("*.jsonl") if not path.name.startswith(".")) or sorted(folder.glob(f"*/{LEDGER}"))
    if not found:
        raise UserError(f"{folder}: has no ledger ({LEDGER} or other .jsonl files), nor has a folder in it")
    return found


def _of_files(name: str, paths: Sequence[Path]) -> ArmRows:
    read = [(path, Ledger(path).rows()) for path in paths]
    empty = [str(path) for path, rows in read if not rows]
    if empty:
        raise StorageError(f"{empty[0]}: has no rows yet")
    arms = sorted({row.arm for _, rows in read for row in rows})
    if len(paths) > 1 and len(arms) > 1:
        raise UserError(f"{name}: holds ledgers of several arms ({', '.join(arms)}); name one of them, such as {paths[0]}")
    _refuse_doubles(read)
    for path, rows in read:
        question, answers = Counter((*_cell(row), row.replicate) for row in rows).most_common(1)[0]
        if answers > 1:
            task, length, depth, _, replicate = question
            raise UserError(
                f"{path}: has {answers} answers of replicate {replicate} for {task} at {length} tokens and {depth:g} %"
                f"{f' (arms: {listed(arms)})' if len(arms) > 1 else ''}; keep each arm and run in a ledger of its own"
            )
    return ArmRows(name, tuple(paths), tuple(row for rows in _numbered([rows for _, rows in read]) for row in rows))


def _refuse_doubles(read: Sequence[tuple[Path, Sequence[CellResult]]]) -> None:
    seen: dict[str, Path] = {}
    for path, rows in read:
        doubled = next((row.cell_id for row in rows if row.cell_id in seen), None)
        if doubled:
            raise UserError(f"{path} and {seen[doubled]} have the same rows (cell {doubled}); leave one of them out")
        seen |= {row.cell_id: path for row in rows}


def _numbered(ledgers: Sequence[Sequence[CellResult]]) -> list[list[CellResult]]:
    """The rows as they are; where two ledgers answer the same cell of the same replicate, their replicates are counted through."""
    cells = Counter((*_cell(row), row.replicate) for rows in ledgers for row in rows)
    if max(cells.values()) == 1:
        return [list(rows) for rows in ledgers]
    runs = sorted({(place, row.replicate) for place, rows in enumerate(ledgers) for row in rows})
    numbers = {run: number for number, run in enumerate(runs)}
    return [[replace(row, replicate=numbers[place, row.replicate]) for row in rows] for place, rows in enumerate(ledgers)]


def _cell(row: CellResult) -> tuple[str, int, float, int]:
    return row.task, row.context_tokens, row.depth_percent, row.sample
