"""The append-only record of answered cells, from which MLflow's runs and the report are made.

Each line is a JSON object. One process writes, which the trial's lock ensures; others may read at the same time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_ray.core.errors import StorageError
from pause_ray.core.storage import space_errors

log = logging.getLogger("pause_ray")

UNKNOWN_TOKEN = -1
"""Place of a fact in the prompt that a row does not know, such as an imported one."""


@dataclass(frozen=True, kw_only=True)
class FactResult:
    """One hidden fact of an answered cell."""

    text: str
    references: tuple[str, ...]
    """Empty for a distractor."""
    depth_percent: float
    """Asked depth in percent."""
    token: int
    """Index in the prompt of its first token, or ``UNKNOWN_TOKEN``."""
    score: float | None
    """Share of the fact's references that the answer contains; None without references or answer."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One answered cell. It has either ``score`` and ``rubric``, or ``unscored_reason``."""

    cell_id: str
    task: str
    arm: str
    replicate: int
    sample: int = 0
    """Index of the random sample of a length; 0 where depths are given."""
    seed: int
    model: str
    adapter: str | None
    pauses: str
    context_tokens: int
    prompt_tokens: int
    content_tokens: int
    num_pauses: int
    rule: str
    """Paragraph rules of the documents that the context reads, joined by ``+``."""
    depth_percent: float
    """Asked depth of the first fact in percent."""
    needle_token: int
    """Index in the prompt of the first fact's first token, or ``UNKNOWN_TOKEN``."""
    facts: tuple[FactResult, ...]
    """All hidden facts, the first one first."""
    question: str
    references: tuple[str, ...]
    """The references of all facts."""
    labels: tuple[str, ...] = ()
    """All answers that the task knows, where the scorer needs them."""
    response: str | None
    score: float | None
    rubric: int | None
    unscored_reason: str | None
    scorer: str
    engine: str
    prefilled_tokens: int
    decoded_tokens: int
    seconds: float
    margin: float | None = None
    """Smallest gap between the best and the second-best logit over the answer: how near it was to another answer."""
    reference_margin: float | None = None
    """Gap between the chosen token's logit and the reference's where the answer first leaves it; None if it never does."""
    cost: float | None = None
    """Price of an endpoint's answer in the price list's currency; None where no prices were given."""
    transcript: str | None = None
    """Reply of the judge that scored the answer; None without a judge."""

    def __post_init__(self) -> None:
        if (self.score is None) == (self.unscored_reason is None):
            raise ValueError(f"cell {self.cell_id}: needs either a score or the reason why there is none")
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"cell {self.cell_id}: score {self.score} is outside 0 to 1")

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> CellResult:
        """Return the result that a line of a ledger, or a row of its table, has as JSON data.

        Raises:
            TypeError: a column is missing or unknown.
            ValueError: neither or both of score and reason.
        """
        if not isinstance(row, dict):
            raise TypeError("not a mapping of columns")
        facts = tuple(FactResult(**{**fact, "references": tuple(fact.get("references", ()))}) for fact in row.get("facts", ()))
        lists: dict[str, Any] = {name: tuple(row[name]) for name in ("references", "labels") if name in row}
        return cls(**{**row, **lists, "facts": facts})


class Ledger:
    """``cells.jsonl`` of one trial.

    A process that dies while appending leaves at most an incomplete last line. Readers ignore it, the next append removes it, and
    its cell is asked again. So is a cell that could not be scored when its trial is resumed; its later row replaces the earlier.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scored: set[str] | None = None

    def rows(self) -> list[CellResult]:
        """Return the last complete row of every cell, oldest first; none if there is no file yet.

        Raises:
            StorageError: a line that is no row, which no interrupted run leaves behind, or a second row of a cell that was scored.
        """
        lines, half = self._lines()
        if half:
            log.warning("%s: the last line was not written to its end (%d bytes); its cell is asked again", self.path, len(half))
        rows: dict[str, CellResult] = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = CellResult.from_row(json.loads(line))
            except (ValueError, TypeError) as error:
                raise StorageError(
                    f"{self.path}: line {number} is no cell result ({error}); remove the line and run again, its cell is asked again"
                ) from error
            before = rows.pop(row.cell_id, None)
            if before is not None and before.score is not None:
                raise StorageError(f"{self.path}: line {number} has cell {row.cell_id} for the second time; remove one of the two lines")
            rows[row.cell_id] = row
        return list(rows.values())

    def done_ids(self) -> frozenset[str]:
        """Return the ids of the cells that have a score, which are not asked again."""
        return frozenset(row.cell_id for row in self.rows() if row.score is not None)

    def append(self, result: CellResult) -> None:
        """Add one row, which is on disk on return.

        Raises:
            StorageError: disk full or not writable; the ledger is then as it was before.
            ValueError: the cell is already there with a score.
        """
        if self._scored is None:
            self._scored = set(self.done_ids())
            if half := self._lines()[1]:
                with space_errors(self.path):
                    os.truncate(self.path, self.path.stat().st_size - len(half))
        if result.cell_id in self._scored:
            raise ValueError(f"cell {result.cell_id} is already in {self.path}")
        self._write((json.dumps(dataclasses.asdict(result), ensure_ascii=False, allow_nan=False) + "\n").encode())
        if result.score is not None:
            self._scored.add(result.cell_id)

    def _write(self, line: bytes) -> None:
        with space_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
        with file:
            size = os.fstat(file.fileno()).st_size
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                raise StorageError(
                    f"{self.path}: a row could not be written ({error.strerror}); free space and run again, answered cells are kept"
                ) from error

    def _lines(self) -> tuple[list[bytes], bytes]:
        """Return the complete lines, and the bytes after the last line's end."""
        *lines, half = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        return lines, half


def to_parquet(rows: Sequence[CellResult], path: Path) -> None:
    """Write the rows as one table in the ledger's order.

    Raises:
        StorageError: disk full or not writable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"int": pa.int64(), "float": pa.float64(), "str": pa.string(), "tuple[str, ...]": pa.list_(pa.string())}

    def columns(row: type[FactResult] | type[CellResult]) -> list[tuple[str, pa.DataType]]:
        return [(field.name, kinds[str(field.type).removesuffix(" | None")]) for field in dataclasses.fields(row)]

    kinds["tuple[FactResult, ...]"] = pa.list_(pa.struct(columns(FactResult)))
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=pa.schema(columns(CellResult)))
    with space_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
