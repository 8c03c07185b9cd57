"""A server that hangs, drops, refuses and lies costs what it must: a retry, a cell or the run; and never the key."""

from __future__ import annotations

import datetime
import email.utils
import logging
import threading
import time
import traceback
from pathlib import Path

import pytest

from pause_ray.core.errors import ModelError
from pause_ray.inference.endpoint import EndpointEngine
from pause_ray.inference.engine import EndpointSpec, LoadedAs
from tests.evaluation.tiny import make_tokenizer_folder
from tests.inference.endpoint_asking import GOOD, engine_for, failed, good, in_turn, only, step_of
from tests.inference.endpoint_server import Act, Asked, EndpointServer, completion, models

KEY = "sk-tiny-0123456789"
VARIABLE = "TINY_ENDPOINT_KEY"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("endpoint") / "model")


PASSING_TROUBLE = {
    "dropped connection": Act(drops=True),
    "body cut in the middle": Act(body=GOOD.body, cut_bytes=20),
    "JSON cut in the middle": Act(body=GOOD.body[:-20]),
    "500": Act(status=500, body="internal"),
    "503 with HTML": Act(status=503, body="<html>busy</html>"),
    "429": Act(status=429, body='{"error": {"message": "slow down"}}', headers={"Retry-After": "0"}),
    "429 under 200": Act(body='{"error": {"code": 429, "message": "slow down"}}'),
    "502 as text under 200": Act(body='{"error": {"code": "502", "message": "bad gateway"}}'),
}


@pytest.mark.parametrize("trouble", PASSING_TROUBLE.values(), ids=PASSING_TROUBLE.keys())
def test_what_passes_is_tried_again_and_then_answered(folder: Path, trouble: Act) -> None:
    with EndpointServer(in_turn(trouble, trouble, GOOD)) as server:
        assert good(only(engine_for(server, folder), step_of(folder, "Stone."))).text == "fine"
        assert len(server.prompts) == 3
        assert server.prompts[0].body == server.prompts[2].body


@pytest.mark.parametrize("trouble", PASSING_TROUBLE.values(), ids=PASSING_TROUBLE.keys())
def test_what_does_not_pass_leaves_one_cell_unscored_while_the_server_answers_others(folder: Path, trouble: Act) -> None:
    steps = [step_of(folder, "Stone."), step_of(folder, "Light.")]
    with EndpointServer(lambda asked: GOOD if asked.body["prompt"] == steps[1].prompt.ids.tolist() else trouble) as server:
        outcomes = dict(engine_for(server, folder, concurrency=1).answer(steps))
        assert len(server.prompts) == 3 + 1
    failed(outcomes[0], "attempt 3 of 3")
    assert good(outcomes[1]).text == "fine"


def test_a_server_that_hangs_costs_the_timeout_and_no_more(folder: Path) -> None:
    with EndpointServer(in_turn(Act(hangs=True))) as server:
        engine = engine_for(server, folder, timeout_seconds=1.0, retries=1)
        failed(only(engine, step_of(folder, "Stone.")), "no answer within 1 s .*attempt 2 of 2")
        assert len(server.prompts) == 2


def test_bytes_that_keep_trickling_in_do_not_stretch_the_timeout(folder: Path) -> None:
    with EndpointServer(in_turn(Act(body=GOOD.body, trickle_seconds=0.2))) as server:
        engine = engine_for(server, folder, timeout_seconds=1.0, retries=0)
        started = time.monotonic()
        failed(only(engine, step_of(folder, "Stone.")), "no answer within 1 s")
        assert time.monotonic() - started < 0.2 * len(GOOD.body) / 2


def test_a_slow_answer_within_the_timeout_is_an_answer(folder: Path) -> None:
    with EndpointServer(in_turn(Act(body=GOOD.body, trickle_seconds=0.002))) as server:
        answer = good(only(engine_for(server, folder), step_of(folder, "Stone.")))
    assert answer.text == "fine"
    assert answer.seconds >= 0.002 * (len(GOOD.body) - 1)


@pytest.mark.parametrize("as_date", [False, True])
def test_the_wait_that_the_server_asks_for_is_kept(folder: Path, as_date: bool) -> None:
    arrivals: list[datetime.datetime] = []
    may_come: list[datetime.datetime] = []

    def act(_: Asked) -> Act:
        arrivals.append(datetime.datetime.now(datetime.UTC))
        if len(arrivals) > 1:
            return GOOD
        may_come.append(arrivals[0] + datetime.timedelta(seconds=1))
        if not as_date:
            return Act(status=429, headers={"Retry-After": "1"})
        may_come[0] = (may_come[0] + datetime.timedelta(seconds=1)).replace(microsecond=0)
        return Act(status=429, headers={"Retry-After": email.utils.format_datetime(may_come[0], usegmt=True)})

    with EndpointServer(act) as server:
        good(only(engine_for(server, folder), step_of(folder, "Stone.")))
    assert len(arrivals) == 2
    assert arrivals[1] >= may_come[0]


def test_a_wait_beyond_the_timeout_is_not_begun(folder: Path) -> None:
    with EndpointServer(in_turn(Act(status=429, headers={"Retry-After": "3600"}))) as server:
        failed(only(engine_for(server, folder), step_of(folder, "Stone.")), "3600 s")
        assert len(server.prompts) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_is_not_repeated_and_costs_its_own_cell_only(folder: Path, status: int) -> None:
    refusal = Act(status=status, body='{"error": {"message": "the context is too long"}}')
    with EndpointServer(in_turn(refusal, GOOD)) as server:
        outcomes = dict(engine_for(server, folder, concurrency=1).answer([step_of(folder, "Stone."), step_of(folder, "Light.")]))
        assert len(server.prompts) == 2
    failed(outcomes[0], f"{status}: the context is too long")
    good(outcomes[1])


STOPPING = {
    401: "check the key in TINY_ENDPOINT_KEY",
    403: "check the key in TINY_ENDPOINT_KEY",
    402: "paid",
    404: "it serves tiny, other",
    307: "own address",
}


@pytest.mark.parametrize("status", STOPPING)
@pytest.mark.parametrize("at_once", [True, False], ids=["at first contact", "later"])
def test_what_holds_for_every_prompt_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int, at_once: bool) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    act = Act(status=status, body='{"error": {"message": "no"}}', headers={"Location": "/elsewhere"} if status == 307 else {})

    def greet(asked: Asked) -> Act:
        return models("tiny", "other") if asked.body is None else act if at_once else GOOD

    with EndpointServer(in_turn(act), greet=greet) as server:
        with pytest.raises(ModelError, match=STOPPING[status]):
            list(engine_for(server, folder, key_variable=VARIABLE, concurrency=1).answer([step_of(folder, "Stone.")] * 5))
        assert len(server.prompts) == (0 if at_once else 1)


def test_no_server_is_told_at_first_contact(folder: Path) -> None:
    with EndpointServer(in_turn(GOOD)) as server:
        url = server.url
    spec = EndpointSpec(kind="endpoint", url=url, model="tiny", retries=5)
    with pytest.raises(ModelError, match=f"{url}.*engine.url"):
        EndpointEngine(spec, first_pause_seconds=0.01).use(LoadedAs(model_dir=folder, dtype="float32"))


def test_a_server_that_goes_away_stops_the_run_instead_of_unscoring_every_cell(folder: Path) -> None:
    gone = threading.Event()

    def act(asked: Asked) -> Act:
        if not asked.is_greeting and len(server.prompts) > 3:
            gone.set()
        return Act(drops=True) if gone.is_set() else GOOD

    with EndpointServer(act, greet=act) as server:
        engine = engine_for(server, folder, concurrency=1)
        answered: list[int] = []
        with pytest.raises(ModelError, match="question of one token after"):
            answered.extend(index for index, _ in engine.answer([step_of(folder, "Stone.")] * 50))
        assert len(server.prompts) == 3 + 3


def test_the_key_goes_to_the_server_and_nowhere_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the server repeats it, as some do when they refuse it."""
    monkeypatch.setenv(VARIABLE, KEY)
    repeats = Act(status=500, body=f"Bearer {KEY} is not known", headers={"Location": f"/?key={KEY}"})
    acts = iter([completion("x", prompt_tokens=1), *[repeats] * 3, Act(status=400, body=KEY), Act(status=401, body=KEY)])
    with EndpointServer(lambda _: next(acts)) as server, caplog.at_level(logging.DEBUG):
        engine = engine_for(server, folder, key_variable=VARIABLE)
        outcomes = [only(engine, step_of(folder, "Stone.")) for _ in range(3)]
        with pytest.raises(ModelError) as caught:
            only(engine, step_of(folder, "Stone."))
        assert {asked.headers["Authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    failed(outcomes[1], r"\[key\]")
    failed(outcomes[2], r"\[key\]")
    written = [
        caplog.text,
        repr(outcomes),
        repr(vars(engine)),
        repr(vars(engine._connection)),
        "".join(traceback.format_exception(caught.value)),
    ]
    assert not any(KEY in text for text in written)


@pytest.mark.parametrize("placeholder", ["EMPTY", "none", "e"])
def test_a_word_in_place_of_a_key_changes_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch, placeholder: str) -> None:
    monkeypatch.setenv(VARIABLE, placeholder)
    with EndpointServer(in_turn(completion("The box is EMPTY, there is none."))) as server:
        engine = engine_for(server, folder, key_variable=VARIABLE)
        assert good(only(engine, step_of(folder, "Stone."))).text == "The box is EMPTY, there is none."


def test_without_a_key_variable_nothing_is_signed_whatever_netrc_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with EndpointServer(in_turn(GOOD)) as server:
        good(only(engine_for(server, folder), step_of(folder, "Stone.")))
        assert not any("Authorization" in asked.headers for asked in server.asked)


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines", "sch\u00f6n"])
def test_a_key_that_cannot_be_sent_is_told_by_its_variable(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    with EndpointServer(in_turn(GOOD)) as server:
        with pytest.raises(ModelError, match=VARIABLE) as caught:
            engine_for(server, folder, key_variable=VARIABLE)
        assert not server.asked
    assert "lines" not in str(caught.value)
