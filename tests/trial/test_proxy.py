"""The proxy of a suite, lengths that suit all trials, and waiting for an adapter of a training that goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import ModelError, SpecError, TextError, TrainingError
from pause_ray.core.storage import building
from pause_ray.evaluation.proxy import proxy_suite
from pause_ray.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TRAINING_LOG,
    Checkpoint,
    copy_tokenizer,
    rung_folder,
    seal,
    training_folder,
)
from pause_ray.trial.early_stopping import TrainingInBackground, proxy_lengths
from pause_ray.trial.prepare import PreparedTrial, prepare
from pause_ray.trial.spec import TrialSpec
from tests.evaluation.tiny import make_haystack_folder, make_suite, make_tokenizer_folder


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_haystack_folder(tmp_path_factory.mktemp("texts") / "haystack")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("model") / "model", limit_tokens=4200)


def prepared(model: Path, haystack: Path, cache: Path, **changes: Any) -> PreparedTrial:
    data = {
        "model": {"source": str(model)},
        "eval": make_suite(haystack, context_tokens=[1024, 2048, 3072]).resolved(),
        "engine": {"kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "none"},
    }
    return prepare(TrialSpec.parse(data | changes, origin="test"), cache=cache)


def test_the_proxy_asks_in_the_suites_own_text_and_chat(haystack: Path) -> None:
    suite = make_suite(haystack, prompt={"system": None, "after": "\n{question}"}, repeat_haystack=True)
    proxy = proxy_suite(suite, facts=5, context_tokens=(2048,))
    assert proxy.depth_percent == (0, 25, 50, 75, 100)
    assert (proxy.haystack, proxy.prompt, proxy.repeat_haystack) == (suite.haystack, suite.prompt, True)
    assert proxy.name != suite.name


def test_a_suite_of_its_tasks_own_lines_has_no_proxy() -> None:
    with pytest.raises(SpecError, match="key_value"):
        proxy_suite(make_suite(None, task={"kind": "key_value"}), facts=4, context_tokens=(1024,))


def test_a_length_that_is_none_is_refused_in_one_line(haystack: Path) -> None:
    with pytest.raises(SpecError, match=r"scheduler\.proxy: .*context_tokens 0"):
        proxy_suite(make_suite(haystack), facts=4, context_tokens=(0,))
    with pytest.raises(SpecError, match=r"scheduler.proxy.facts 5000 .*lower it"):
        proxy_suite(make_suite(haystack), facts=5000, context_tokens=(2048,))


def test_the_longest_length_of_the_suite_is_taken(model: Path, haystack: Path, tmp_path: Path) -> None:
    assert proxy_lengths([prepared(model, haystack, tmp_path)], facts=4, context_tokens=None, cache=tmp_path) == (3072,)


def test_all_trials_are_asked_at_a_length_that_all_of_them_have_and_fit(model: Path, haystack: Path, tmp_path: Path) -> None:
    few = prepared(model, haystack, tmp_path, pauses={"unit": "paragraph", "token": "text"})
    short = make_suite(haystack, context_tokens=[1024, 2048]).resolved()
    many = prepared(model, haystack, tmp_path, pauses={"unit": "sentence", "token": "text"}, eval=short)
    assert proxy_lengths([few], facts=12, context_tokens=None, cache=tmp_path) == (3072,)
    assert proxy_lengths([few, many], facts=12, context_tokens=None, cache=tmp_path) == (2048,)
    with pytest.raises(ModelError, match="exceed"):
        proxy_lengths([few, many], facts=12, context_tokens=[3072], cache=tmp_path)


def test_more_facts_than_a_length_has_room_for_are_refused(model: Path, haystack: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="too short"):
        proxy_lengths([prepared(model, haystack, tmp_path)], facts=100, context_tokens=[256], cache=tmp_path)


def leave_rung(model: Path, checkpoint: Path, step: int) -> None:
    """What a training leaves after ``step`` steps."""
    with building(rung_folder(training_folder(checkpoint), step=step)) as scratch:
        copy_tokenizer(model, scratch, marker=None)
        (scratch / ADAPTER_CONFIG).write_text("{}")
        (scratch / ADAPTER_WEIGHTS).write_bytes(b"")
        (scratch / TRAINING_LOG).write_text('{"step": 1, "loss": 1.0}\n' * step)
        seal(scratch, base_digest="b", tokenizer_digest="t", marker=None, spec={}, document_digests=frozenset())


def background(checkpoint: Path, work: Callable[[threading.Event], Any]) -> TrainingInBackground:
    stop = threading.Event()
    return TrainingInBackground(lambda: work(stop), checkpoint=checkpoint, stop=stop)


def test_an_adapter_is_given_while_the_training_goes_on(model: Path, tmp_path: Path) -> None:
    asked = threading.Event()

    def train(stop: threading.Event) -> None:
        leave_rung(model, tmp_path / "c", 2)
        assert asked.wait(120), "the adapter was given only when the training had ended"

    training = background(tmp_path / "c", train)
    adapter = training.adapter_after(2)
    assert training.goes_on
    assert isinstance(adapter, Checkpoint)
    assert adapter.num_steps == 2
    asked.set()
    training.wait()
    assert not training.goes_on


def test_a_rung_below_the_last_checkpoint_is_not_waited_for(tmp_path: Path) -> None:
    folder = training_folder(tmp_path / "c") / "step-5"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    training = background(tmp_path / "c", lambda stop: stop.wait(120))
    assert training.adapter_after(5) is None
    assert training.goes_on
    training.end()
    assert not training.goes_on


def test_a_finished_training_has_no_rungs(tmp_path: Path) -> None:
    training = background(tmp_path / "c", lambda stop: None)
    assert training.adapter_after(2) is None
    training.wait()


def test_what_the_training_raises_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    def train(stop: threading.Event) -> None:
        raise TrainingError("loss is nan")

    training = background(tmp_path / "c", train)
    with pytest.raises(TrainingError, match="nan"):
        training.adapter_after(2)
    with pytest.raises(TrainingError, match="nan"):
        training.wait()
