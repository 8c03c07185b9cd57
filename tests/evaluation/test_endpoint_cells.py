"""A grid asked over HTTP gives the rows that the same answers give in this process, whatever order they come in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pause_ray.evaluation.answer import CellRunner, Provenance, answer_cells, plan_cells
from pause_ray.evaluation.haystack import load_haystack, prompt_builder
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.inference.endpoint import EndpointEngine
from pause_ray.inference.engine import EndpointSpec, Engine
from pause_ray.inference.scripted import UNKNOWN, ScriptedEngine
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from tests.evaluation.tiny import STOCK, base, make_suite
from tests.inference.endpoint_server import Act, Asked, EndpointServer, completion

PROVENANCE = Provenance(arm="baseline", model="tiny", adapter=None, pauses="none")


def rows_of(suite: SuiteSpec, engine: Engine, model_dir: Path) -> dict[str, CellResult]:
    tokenizer, policy = ModelTokenizer.load(model_dir), PausePolicy()
    marker = resolve_marker(tokenizer, policy)
    haystack = load_haystack(suite, cache=model_dir, seed=0, replicate=0)
    builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker, seed=0)
    runner = CellRunner(builder=builder, tokenizer=tokenizer, policy=policy, marker=marker, max_new_tokens=suite.max_new_tokens)
    engine.use(base(model_dir))
    asked = plan_cells(cells(suite, identity="i", replicate=0, seed=0), runner=runner, prefix_block_size=engine.prefix_block_size)
    rows = list(answer_cells(asked, engine=engine, runner=runner, provenance=PROVENANCE))
    assert len(rows) == len(asked)
    return {row.cell_id: dataclasses.replace(row, engine="", prefilled_tokens=0, decoded_tokens=0, seconds=0.0) for row in rows}


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_grid_over_http_is_the_grid_of_this_process(tokenizer_dir: Path, essays_dir: Path, api: str) -> None:
    suite, tokenizer = make_suite(essays_dir), ModelTokenizer.load(tokenizer_dir)

    def act(asked: Asked) -> Act:
        shown = tokenizer.decode(asked.body["prompt"]) if api == "completions" else asked.body["messages"][-1]["content"]
        # As the scripted engine: what lies in the first half of what is shown is missed.
        place = shown.find(STOCK.needle)
        return completion(STOCK.needle if 2 * place >= len(shown) else UNKNOWN, chat=api == "chat")

    scripted = rows_of(suite, ScriptedEngine(facts={STOCK.question: STOCK.needle}, blind_percent=(0, 50)), tokenizer_dir)
    with EndpointServer(act) as server:
        spec = EndpointSpec.parse({"kind": "endpoint", "url": server.url, "model": "tiny", "api": api, "concurrency": 4}, origin="test")
        over_http = rows_of(suite, EndpointEngine(spec), tokenizer_dir)
    kept = ("score", "response", "needle_token", "prompt_tokens", "num_pauses")
    assert over_http.keys() == scripted.keys()
    for cell_id, row in over_http.items():
        assert row.num_pauses > 0
        assert [getattr(row, name) for name in kept] == [getattr(scripted[cell_id], name) for name in kept]
    assert {row.score for row in over_http.values()} == {0.0, 1.0}


def test_a_cell_that_the_server_refuses_is_unscored_and_the_others_are_not(tokenizer_dir: Path, essays_dir: Path) -> None:
    suite = make_suite(essays_dir)
    too_long = Act(status=400, body='{"error": {"message": "maximum context length is 3000 tokens"}}')
    with EndpointServer(lambda asked: too_long if len(asked.body["prompt"]) > 3000 else completion(STOCK.needle)) as server:
        spec = EndpointSpec.parse({"kind": "endpoint", "url": server.url, "model": "tiny"}, origin="test")
        rows = rows_of(suite, EndpointEngine(spec), tokenizer_dir).values()
    for row in rows:
        assert (row.score is None) == (row.context_tokens == 4096)
        assert row.score is not None or "maximum context length is 3000" in str(row.unscored_reason)
