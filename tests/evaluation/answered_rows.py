"""Rows as a trial leaves them: answers about the stock needle, scored by keywords."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pause_ray.evaluation.ledger import CellResult, FactResult, Ledger
from pause_ray.evaluation.rescore import rescore
from tests.evaluation.tiny import STOCK

PARTS = STOCK.keywords


def row(number: int, response: str | None, **changes: Any) -> CellResult:
    fact = FactResult(text=STOCK.needle, references=PARTS, depth_percent=50.0, token=9, score=None)
    plain = {
        "cell_id": f"cell{number}",
        "task": "single",
        "arm": "baseline",
        "replicate": 0,
        "seed": 0,
        "model": "tiny",
        "adapter": None,
        "pauses": "none",
        "context_tokens": 1024,
        "prompt_tokens": 1024,
        "content_tokens": 1000,
        "num_pauses": 0,
        "rule": "newline",
        "depth_percent": 50.0,
        "needle_token": 9,
        "facts": (fact,),
        "question": STOCK.question,
        "references": PARTS,
        "response": response,
        "score": None,
        "rubric": None,
        "unscored_reason": "not scored yet" if response is not None else "out of memory",
        "scorer": "keywords",
        "engine": "hf",
        "prefilled_tokens": 1024,
        "decoded_tokens": 9,
        "seconds": 0.5,
    }
    made = CellResult(**plain | changes)
    return made if response is None or made.score is not None else rescore(made, scorer="keywords")


ROWS = (
    row(0, STOCK.needle),
    row(1, "Eat a sandwich."),
    row(2, "I don't know."),
    row(3, None),
    row(4, "Eat a sandwich and sit in Dolores Park."),
)


def ledger_of(path: Path, rows: Sequence[CellResult] = ROWS) -> Path:
    ledger = Ledger(path)
    for each in rows:
        ledger.append(each)
    return path
