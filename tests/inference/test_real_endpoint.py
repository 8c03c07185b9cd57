"""The endpoint engine and the judge against ``transformers serve`` with the real small model.

That server takes prompts only as text, so it answers the ``chat`` tests; sending token ids is tested against the loopback
server, and here as the refusal that it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pause_ray.core.errors import ModelError
from pause_ray.core.spec import read_yaml
from pause_ray.evaluation.ledger import Ledger
from pause_ray.evaluation.rescore import Judge, rescore_ledgers
from pause_ray.evaluation.scorers import JudgeSpec, Unscored, read_grade
from pause_ray.inference.endpoint import EndpointEngine
from pause_ray.inference.engine import EndpointSpec, LoadedAs
from pause_ray.text.tokenizer import ModelTokenizer
from tests.evaluation.answered_rows import ROWS, ledger_of
from tests.inference.endpoint_asking import good, step_of

pytestmark = pytest.mark.slow

JUDGES = Path(__file__).resolve().parents[2] / "eval" / "judges"


@pytest.fixture(scope="module")
def served_url(model_dir: Path) -> Iterator[str]:
    """``transformers serve`` with the real small model."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model_dir), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if "Uvicorn running" in line:
                break
        else:
            pytest.fail("".join(said))
        reading = threading.Thread(target=process.stderr.read, daemon=True)
        reading.start()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


REAL_CONTEXTS = (
    "The library opens at nine. The secret word of the baker is marmalade.<PAUSE> Rain is expected.",
    "The train to Lyon leaves from platform four.<PAUSE>\n\nTickets are cheap in spring.",
)


@pytest.mark.real
def test_a_real_server_gives_the_models_own_greedy_answers(served_url: str, model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    import transformers

    steps = [step_of(model_dir, context, max_new_tokens=16) for context in REAL_CONTEXTS]
    spec = EndpointSpec(kind="endpoint", url=served_url, model=str(model_dir), api="chat", concurrency=2, retries=0)
    engine = EndpointEngine(spec)
    with caplog.at_level(logging.WARNING, logger="pause_ray"):
        engine.use(LoadedAs(model_dir=model_dir, dtype="float32"))
        outcomes = dict(engine.answer(steps))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = ModelTokenizer.load(model_dir)
    for index, step in enumerate(steps):
        ids = torch.tensor(step.prompt.ids.tolist())[None]
        written = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
        answer = good(outcomes[index])
        assert answer.text == tokenizer.decode(written)
        assert answer.prefilled_tokens == len(step.prompt.ids)
        assert answer.decoded_tokens == len(written)
    assert not caplog.records


@pytest.mark.real
def test_a_real_server_that_takes_only_text_is_told_apart(served_url: str, model_dir: Path) -> None:
    spec = EndpointSpec(kind="endpoint", url=served_url, model=str(model_dir), retries=0)
    with pytest.raises(ModelError, match=r"engine\.api: chat"):
        EndpointEngine(spec).use(LoadedAs(model_dir=model_dir, dtype="float32"))


@pytest.mark.real
def test_a_real_server_without_the_model_is_told_at_first_contact(served_url: str, model_dir: Path) -> None:
    spec = EndpointSpec(kind="endpoint", url=served_url, model="another", api="chat", retries=0)
    with pytest.raises(ModelError, match="model another refuses"):
        EndpointEngine(spec).use(LoadedAs(model_dir=model_dir, dtype="float32"))


@pytest.mark.real
def test_a_real_model_judges_over_the_endpoint(served_url: str, model_dir: Path, tmp_path: Path) -> None:
    """A model of this size grades badly, and writes prose where it should grade: each reply is a grade that it wrote, or unscored."""
    shipped = JudgeSpec.parse(read_yaml(JUDGES / "single.yaml"), origin="single.yaml")
    prose = JudgeSpec(name="prose", prompt="Is this a place: {references}? {answer} Tell a story about it.", max_new_tokens=8)
    engine = EndpointEngine(EndpointSpec(kind="endpoint", url=served_url, model=str(model_dir), api="chat", concurrency=1, retries=0))
    engine.use(LoadedAs(model_dir=model_dir, dtype="float32"))
    path = ledger_of(tmp_path / "abc" / "cells.jsonl", ROWS[:2])
    for spec in (shipped.model_copy(update={"max_new_tokens": 24}), prose):
        judge = Judge(spec=spec, engine=engine, model="small", tokenizer=ModelTokenizer.load(model_dir))
        [rescored] = rescore_ledgers([path], scorer=judge, out=tmp_path / spec.name)
        rows = Ledger(rescored.ledger).rows()
        assert len(rows) == 2
        for row in rows:
            assert row.transcript
            given = read_grade(row.transcript, spec)
            assert (row.score is None) == isinstance(given, Unscored)
            assert isinstance(given, Unscored) or row.score == spec.share(given)
    assert all(row.score is None for row in rows)
