"""Rows of a benchmark as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rich.table import Table

Row = TypeVar("Row")


def as_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str | None]], *, title: str) -> Table:
    """Heading → what a row says there, None where it says nothing. Names, which come first, stand left, figures right."""
    table = Table(title=title)
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(told(row) or "–" for told in columns.values()))
    return table
