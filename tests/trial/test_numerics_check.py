"""What the precision alone does to answers is counted over the cells that could be asked again, and over no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.scoring_actor import ScoringJob
from pause_ray.evaluation.suite import Cell
from pause_ray.text.tokenizer import Marker
from pause_ray.trial import run
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import TrialSpec
from tests.evaluation.answered_rows import row
from tests.evaluation.tiny import make_suite

OUT_OF_MEMORY = {"response": None, "score": None, "rubric": None, "unscored_reason": "out of memory"}


@dataclass
class Again:
    """A scorer whose second answers are the ledger's, with the changes in ``differs`` for the first ones."""

    ledger: Ledger
    differs: Sequence[JsonObject] = ()
    asked: int = 0

    def score(self, job: ScoringJob, sample: Sequence[Cell], *, on_result: Callable[[CellResult], None], on_wait: object) -> None:
        assert job.purpose == "numerics_check"
        self.asked = len(sample)
        rows = {its.cell_id: its for its in self.ledger.rows()}
        changes = [*self.differs, *({} for _ in sample)]
        for cell, change in zip(sample, changes, strict=False):
            on_result(dataclasses.replace(rows[cell.id], **change))


@pytest.fixture
def checked(tmp_path: Path) -> Callable[..., tuple[JsonObject | None, int]]:
    def found(*differs: JsonObject, model: JsonObject | None = None, engine: JsonObject | None = None) -> tuple[JsonObject | None, int]:
        suite = make_suite(None, noise="Grass is green.", context_tokens=[200, 300, 400, 500, 600])
        data: dict[str, Any] = {"model": {"source": "m", **(model or {})}, "engine": engine or {}, "eval": suite.resolved()}
        spec = TrialSpec.parse(data, origin="test")
        trial = PreparedTrial(spec=spec, digest="d", model_dir=tmp_path, base_digest="b", marker=Marker((), None), shards=None)
        grid = trial.cells
        ledger = Ledger(tmp_path / "cells.jsonl")
        for cell in grid:
            ledger.append(row(0, "Eat a sandwich.", cell_id=cell.id) if cell is not grid[0] else row(0, None, cell_id=cell.id))
        scorer = Again(ledger, differs)
        job = run.scoring_job(trial, arm="a", checkpoint=None, storage=Storage.open(str(tmp_path / "runs")))
        noise = run.check_numerics(trial, job, ledger=ledger, scorer=scorer, progress=lambda stage, done, total: None)
        return noise, scorer.asked

    return found


def test_float32_needs_none_and_every_other_precision_gets_a_sample(checked: Any, tmp_path: Path) -> None:
    for model, asked in (({}, 0), ({"dtype": "bfloat16"}, 12), ({"quantize": "nf4"}, 12), ({"dtype": "bfloat16", "quantize": "nf4"}, 12)):
        noise, count = checked(model=model)
        assert count == asked, model
        assert (noise is None) == (asked == 0)
        (tmp_path / "cells.jsonl").unlink()
    noise, count = checked(engine={"numerics_check_cells": 20})
    assert count == 14, "all that have a score"
    assert noise == {"cells": 14, "answers_changed": 0, "scores_changed": 0, "dtype": "float32"}


def test_changed_answers_and_scores_are_counted_and_cells_that_failed_are_not(checked: Any) -> None:
    other, better = {"response": "Eat the sandwich."}, {"response": "Sit in Dolores Park, sandwich in hand.", "score": 1.0}
    noise, _ = checked(other, better, OUT_OF_MEMORY, model={"dtype": "bfloat16"})
    assert noise == {"cells": 11, "answers_changed": 2, "scores_changed": 1, "dtype": "bfloat16"}


def test_a_sample_of_which_nothing_could_be_asked_again_says_nothing(checked: Any) -> None:
    assert checked(*[OUT_OF_MEMORY] * 12, model={"dtype": "bfloat16"}) == (None, 12)
