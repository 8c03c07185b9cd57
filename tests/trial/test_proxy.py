"""The proxy of a suite, and the lengths at which all trials can be asked it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import ModelError, SpecError, TextError
from pause_ray.evaluation.suite import proxy_suite
from pause_ray.trial.prepare import PreparedTrial, prepare, proxy_lengths
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
