"""What the endpoint engine sends and what it makes of the answers, against a server on loopback."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import ModelError
from pause_ray.inference.engine import Completion, LoadedAs, PromptStep
from pause_ray.text.tokenizer import MarkerToken, ModelTokenizer
from tests.evaluation.tiny import make_tokenizer_folder
from tests.inference.endpoint_asking import GOOD, engine_for, failed, good, in_turn, only, step_of
from tests.inference.endpoint_server import Act, Asked, EndpointServer, completion, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("endpoint") / "model")


def test_completions_sends_the_counted_ids_greedily_to_the_named_model(folder: Path) -> None:
    step = step_of(folder, "The river carries paint.", answer_prefix="It is", max_new_tokens=5)
    with EndpointServer(in_turn(completion(" paint", prompt_tokens=len(step.prompt.ids)))) as server:
        answer = good(only(engine_for(server, folder), step))
        [asked] = server.prompts
    assert asked.path == "/v1/completions"
    assert asked.body == {"model": "tiny", "prompt": step.prompt.ids.tolist(), "max_tokens": 5, "temperature": 0}
    assert answer.text == " paint"


@pytest.mark.parametrize("system", ["Be short.", None])
def test_chat_sends_messages_that_the_template_turns_into_the_counted_text(folder: Path, system: str | None) -> None:
    step = step_of(folder, "The river<PAUSE> carries  old paint.\n\nSlow engines.", system=system)
    with EndpointServer(in_turn(completion("paint", chat=True))) as server:
        assert good(only(engine_for(server, folder, api="chat"), step)).text == "paint"
        [asked] = server.prompts
    assert asked.path == "/v1/chat/completions"
    messages = asked.body["messages"]
    assert [message["role"] for message in messages] == (["system"] if system else []) + ["user"]
    tokenizer = ModelTokenizer.load(folder)
    before, after = tokenizer.chat_frame(system, messages[-1]["content"], "")
    shown = tokenizer.decode([*before, *after], skip_special_tokens=False)
    assert shown == tokenizer.decode(step.prompt.ids, skip_special_tokens=False)


def test_what_the_server_counted_is_what_the_ledger_gets(folder: Path) -> None:
    step = step_of(folder, "A stone.")
    count = len(step.prompt.ids)
    prices = {"input_per_million": 2.0, "cached_input_per_million": 0.5, "output_per_million": 10.0}
    act = completion("a stone", prompt_tokens=count, completion_tokens=4, prompt_tokens_details={"cached_tokens": 10})
    with EndpointServer(in_turn(act)) as server:
        answer = good(only(engine_for(server, folder, prices=prices), step))
    assert (answer.prefilled_tokens, answer.decoded_tokens) == (count - 10, 4)
    assert answer.cost == pytest.approx(((count - 10) * 2.0 + 10 * 0.5 + 4 * 10.0) / 1e6)
    assert 0 < answer.seconds < 20


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "many", "completion_tokens": -1, "prompt_tokens_details": 3}])
def test_without_a_usable_count_the_own_tokenizer_counts(folder: Path, usage: object) -> None:
    step = step_of(folder, "A stone.")
    counts = {"stop": len(ModelTokenizer.load(folder).encode("a stone").ids), "length": step.max_new_tokens}
    for finish_reason, expected in counts.items():
        act = Act(body=json.dumps({"choices": [{"text": "a stone", "finish_reason": finish_reason}], "usage": usage}))
        with EndpointServer(in_turn(act)) as server:
            answer = good(only(engine_for(server, folder), step))
        assert answer.prefilled_tokens == len(step.prompt.ids)
        assert answer.decoded_tokens == expected
        assert answer.cost is None


def test_a_server_with_another_tokenizer_is_told_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = [step_of(folder, f"Stone {number}.") for number in range(3)]
    with EndpointServer(in_turn(completion("x", prompt_tokens=len(steps[0].prompt.ids) + 5))) as server, caplog.at_level(logging.WARNING):
        outcomes = list(engine_for(server, folder, concurrency=1).answer(steps))
    assert all(isinstance(outcome, Completion) for _, outcome in outcomes)
    [record] = caplog.records
    assert str(len(steps[0].prompt.ids) + 5) in record.getMessage()
    assert str(len(steps[0].prompt.ids)) in record.getMessage()


@pytest.mark.parametrize(("more", "is_told"), [(3, False), (100, True)])
def test_over_chat_a_few_tokens_more_are_no_other_tokenizer(
    folder: Path, caplog: pytest.LogCaptureFixture, more: int, is_told: bool
) -> None:
    """Text at the edges of context and markers is tokenised anew there."""
    step = step_of(folder, "Stone.")
    act = completion("x", chat=True, prompt_tokens=len(step.prompt.ids) + more)
    with EndpointServer(in_turn(act)) as server, caplog.at_level(logging.WARNING):
        good(only(engine_for(server, folder, api="chat"), step))
    assert bool(caplog.records) == is_told


def test_equal_counts_are_passed_over_in_silence(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = step_of(folder, "Stone.")
    with EndpointServer(in_turn(completion("x", prompt_tokens=len(step.prompt.ids)))) as server, caplog.at_level(logging.WARNING):
        good(only(engine_for(server, folder), step))
    assert not caplog.records


def test_a_penalty_in_the_generation_settings_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_tokenizer_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    with EndpointServer(in_turn(completion("x"))) as server, caplog.at_level(logging.WARNING):
        engine_for(server, folder)
    assert "repetition_penalty 1.05" in caplog.text


NO_ANSWERS = {
    "error without a code": Act(body='{"error": "something broke"}'),
    "no choices": Act(body='{"choices": []}'),
    "not an object": Act(body='["fine"]'),
    "no text": Act(body='{"choices": [{"finish_reason": "stop"}]}'),
    "text of another kind": Act(body='{"choices": [{"text": 3}]}'),
}


@pytest.mark.parametrize("act", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_a_200_that_holds_no_answer_is_no_answer(folder: Path, act: Act) -> None:
    with EndpointServer(in_turn(act)) as server:
        failed(only(engine_for(server, folder), step_of(folder, "Stone.")), "sent no answer")
        assert len(server.prompts) == 1


def test_how_an_answer_ended_decides_whether_it_is_one(folder: Path) -> None:
    with EndpointServer(in_turn(completion("cut", finish_reason="length"), completion("", finish_reason="content_filter"))) as server:
        engine = engine_for(server, folder)
        assert good(only(engine, step_of(folder, "Stone."))).text == "cut"
        failed(only(engine, step_of(folder, "Stone.")), "content filter")


def test_an_answer_that_is_all_reasoning_is_empty(folder: Path) -> None:
    act = Act(body=json.dumps({"choices": [{"message": {"content": None, "reasoning_content": "Hm."}, "finish_reason": "length"}]}))
    with EndpointServer(in_turn(act)) as server:
        assert good(only(engine_for(server, folder, api="chat"), step_of(folder, "Stone."))).text == ""


def test_a_server_that_takes_no_ids_is_told_at_first_contact(folder: Path) -> None:
    with EndpointServer(in_turn(GOOD), greet=in_turn(Act(status=422, body='{"detail": "prompt must be a string"}'))) as server:
        with pytest.raises(ModelError, match=r"prompt must be a string.*engine\.api: chat"):
            engine_for(server, folder)


def numbered(folder: Path, count: int) -> list[PromptStep]:
    steps = [step_of(folder, f"Stone {number}.") for number in range(count)]
    assert len({tuple(step.prompt.ids.tolist()) for step in steps}) == count
    return steps


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_requests_as_allowed_run_at_once_and_begin_in_order(folder: Path, concurrency: int) -> None:
    steps = numbered(folder, 12)
    place = {tuple(step.prompt.ids.tolist()): index for index, step in enumerate(steps)}
    together = threading.Barrier(concurrency, timeout=20)

    def act(asked: Asked) -> Act:
        together.wait()
        return completion(str(place[tuple(asked.body["prompt"])]))

    with EndpointServer(act) as server:
        outcomes = dict(engine_for(server, folder, concurrency=concurrency).answer(steps))
        assert server.max_in_flight == concurrency
        arrived = [place[tuple(asked.body["prompt"])] for asked in server.prompts]
    assert sorted(arrived) == list(range(12))
    assert all(position >= index - (concurrency - 1) for position, index in enumerate(arrived))
    assert {index: good(outcome).text for index, outcome in outcomes.items()} == {index: str(index) for index in range(12)}


def test_a_run_that_is_left_asks_nothing_more(folder: Path) -> None:
    with EndpointServer(in_turn(GOOD)) as server:
        answers = engine_for(server, folder, concurrency=1).answer(numbered(folder, 10))
        assert not server.prompts
        next(answers)
        answers.close()
        threads = [thread for thread in threading.enumerate() if "work" in thread.name]
        for thread in threads:
            thread.join(timeout=20)
        assert len(server.prompts) < 10


def test_no_steps_are_no_requests(folder: Path) -> None:
    with EndpointServer(in_turn(GOOD)) as server:
        assert list(engine_for(server, folder).answer([])) == []
        assert not server.prompts


def adapter(folder: Path, weights: bytes = b"weights", **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4} | config))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def lora_server(loaded: list[str]) -> EndpointServer:
    """Loads adapters as vLLM does: plain text when it works, 400 for a name that it has."""

    def respond(asked: Asked) -> Act:
        body = asked.body or {}
        if asked.path == "/v1/load_lora_adapter":
            if body["lora_name"] in loaded:
                return Act(status=400, body='{"error": {"message": "has already been loaded"}}')
            loaded.append(body["lora_name"])
            return Act(body=f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
        return completion(body["model"])

    return EndpointServer(respond, greet=lambda asked: models("tiny", *loaded) if asked.body is None else GOOD)


def test_an_adapter_is_loaded_once_and_asked_by_a_name_of_its_own(folder: Path, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "a" / "final"), adapter(tmp_path / "b" / "final", b"others")
    loaded: list[str] = []
    with lora_server(loaded) as server:
        engine = engine_for(server, folder, adapter_dir=first, load_adapters=True)
        names = [good(only(engine, step_of(folder, "Stone."))).text]
        for adapter_dir in (second, None, first):
            engine.use(LoadedAs(model_dir=folder, dtype="float32", adapter_dir=adapter_dir))
            names.append(good(only(engine, step_of(folder, "Stone."))).text)
        loads = [asked.body for asked in server.prompts if asked.path == "/v1/load_lora_adapter"]
    assert [load["lora_path"] for load in loads] == [str(first), str(second)]
    assert names == [loads[0]["lora_name"], loads[1]["lora_name"], "tiny", loads[0]["lora_name"]]
    assert loads[0]["lora_name"] != loads[1]["lora_name"]


def test_an_adapter_that_another_process_loaded_meanwhile_is_used(folder: Path, tmp_path: Path) -> None:
    loaded: list[str] = []

    def respond(asked: Asked) -> Act:
        loaded.append(asked.body["lora_name"])
        return Act(status=400, body='{"error": {"message": "has already been loaded"}}')

    with EndpointServer(respond, greet=lambda asked: models(*loaded) if asked.body is None else GOOD) as server:
        engine_for(server, folder, adapter_dir=adapter(tmp_path / "final"), load_adapters=True)
        assert server.asked[-1].body["model"] == loaded[0]


def test_an_adapter_that_cannot_be_served_is_refused_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    plain, with_row = adapter(tmp_path / "plain"), adapter(tmp_path / "row", trainable_token_indices={"embed_tokens": [7]})
    with EndpointServer(in_turn(Act(status=404, body='{"detail": "Not Found"}'))) as server:
        with pytest.raises(ModelError, match="load_adapters: true"):
            engine_for(server, folder, adapter_dir=plain)
        with pytest.raises(ModelError, match="marker row"):
            engine_for(server, folder, adapter_dir=with_row, load_adapters=True)
        with pytest.raises(ModelError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            engine_for(server, folder, adapter_dir=plain, load_adapters=True)
        with pytest.raises(ModelError, match="no adapter can be read"):
            engine_for(server, folder, adapter_dir=tmp_path, load_adapters=True)


def test_what_an_endpoint_cannot_do_is_refused_with_a_remedy(folder: Path) -> None:
    marker = MarkerToken(text="<PAUSE>", token_id=400, added=True, initial_ids=(1,))
    with EndpointServer(in_turn(GOOD)) as server:
        engine = engine_for(server, folder, api="chat")
        with pytest.raises(ModelError, match="token: text"):
            engine.use(LoadedAs(model_dir=folder, dtype="float32", marker=marker))
        with pytest.raises(ModelError, match="api: completions"):
            only(engine, step_of(folder, "Stone.", answer_prefix="It is"))
        with pytest.raises(ModelError, match=r"<\|end\|>.*api: completions"):
            only(engine, step_of(folder, "Stone.<|end|>"))
        assert not server.prompts
