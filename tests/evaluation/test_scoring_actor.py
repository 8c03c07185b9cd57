"""What a scoring actor logs says of which trial and, where it is about one, of which cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.evaluation.answer import Provenance
from pause_ray.evaluation.scoring_actor import ScoringActor, ScoringJob
from pause_ray.evaluation.suite import cells
from pause_ray.inference.engine import HfEngineSpec
from pause_ray.inference.scripted import ScriptedEngine
from tests.evaluation.tiny import STOCK, base, make_suite


def test_a_cell_that_could_not_be_scored_is_named_with_its_trial(
    tokenizer_dir: Path, essays_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suite = make_suite(essays_dir, context_tokens=[512, 700], depth_percent=[50])
    job = ScoringJob(
        suite=suite,
        policy=None,
        replicate=0,
        seed=0,
        data_seed=0,
        engine=HfEngineSpec(),
        loaded=base(tokenizer_dir),
        provenance=Provenance(arm="baseline", model="tiny", adapter=None, pauses="none"),
        cache=tokenizer_dir,
        trial="trial baseline (0123abcd)",
    )
    asked = cells(suite, identity="i", replicate=0, seed=0)
    engine = ScriptedEngine(facts={STOCK.question: STOCK.needle}, fails_from_tokens=600)
    actor = ScoringActor(engine, threads=1, num_neighbors=1)
    caplog.set_level("INFO", logger="pause_ray")
    assert len(list(actor.answer(0, job, asked))) == 1 + 2, "their order, then the results"
    assert caplog.messages[0] == "trial baseline (0123abcd): answering 2 cells (grid)"
    [failed] = [cell for cell in asked if cell.context_tokens == 700]
    told = f"trial baseline (0123abcd): cell of 700 tokens at depth 50 % ({failed.id[:8]}): not scored: out of memory"
    assert [message for message in caplog.messages[1:] if message.startswith(told)] == caplog.messages[1:]
    assert len(caplog.messages) == 2
