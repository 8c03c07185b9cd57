import json
from pathlib import Path

import pytest

from pause_ray.core.errors import ModelError, TextError
from pause_ray.text.chat import ChatTemplate
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import PromptSpec
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from tests.text.conftest import CHATML, byte_level, write_model_folder


def load(folder: Path, template: str | None) -> ModelTokenizer:
    return ModelTokenizer.load(write_model_folder(folder, byte_level(), template=template))


def shown(tokenizer: ModelTokenizer, *frame: str | None) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in tokenizer.chat_frame(*frame)]  # type: ignore[arg-type]


def test_the_frame_is_the_rendered_template_split_at_the_context(byte_tokenizer):
    assert shown(byte_tokenizer, "Be brief.", "Read: ", "\n\nWhy?") == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRead: ",
        "\n\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert shown(byte_tokenizer, None, "", "Why?")[0] == "<|im_start|>user\n"


def test_control_tokens_of_the_template_are_control_tokens(byte_tokenizer):
    before, after = byte_tokenizer.chat_frame(None, "", "Why?")
    assert before[0] == byte_tokenizer.token_id("<|im_start|>")
    assert byte_tokenizer.answer_end_id in after


def test_control_tokens_in_a_question_are_refused(byte_tokenizer):
    with pytest.raises(TextError, match=r"contains the control token <\|im_end\|>"):
        byte_tokenizer.chat_frame(None, "", "Why?<|im_end|>")


@pytest.mark.parametrize("fields", [{"token": "added"}, {"token": "reserved", "marker": "<|reserved_0|>"}])
def test_an_instruction_names_the_marker_by_its_token(byte_tokenizer, fields):
    policy = PausePolicy(**fields)
    marker = resolve_marker(byte_tokenizer, policy).token
    assert marker is not None
    _, after = byte_tokenizer.chat_frame(None, "", f"At {policy.marker} stop. Why?", marker=marker)
    assert after.count(marker.token_id) == 1
    assert byte_tokenizer.decode(after).startswith("At  stop. Why?")


def test_a_model_without_template_gets_plain_text_after_its_beginning_token(tmp_path):
    from tokenizers import processors

    trained = byte_level()
    trained.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer = ModelTokenizer.load(write_model_folder(tmp_path, trained, template=None))
    assert shown(tokenizer, "Be brief.", "Read: ", "\nWhy?") == ["<|im_start|>Be brief.\n\nRead: ", "\nWhy?"]
    assert shown(tokenizer, None, "", "\nWhy?") == ["<|im_start|>", "\nWhy?"]
    assert tokenizer.answer_end_id == tokenizer.token_id("<|im_end|>")


def test_the_answer_ends_with_what_the_template_writes_after_it(tmp_path):
    folder = write_model_folder(tmp_path, byte_level())
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = ModelTokenizer.load(folder)
    assert tokenizer.answer_end_id == tokenizer.token_id("<|im_end|>")
    assert tokenizer.end_ids == (0, tokenizer.answer_end_id)


def test_end_tokens_come_from_the_generation_settings_first(tmp_path):
    folder = write_model_folder(tmp_path, byte_level(), template=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    assert ModelTokenizer.load(folder).end_ids == (1, 3)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").unlink()
    assert ModelTokenizer.load(folder).end_ids == (2,)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="eos_token_id"):
        _ = ModelTokenizer.load(folder).end_ids


@pytest.mark.parametrize("value", [CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]])
def test_a_template_may_stand_in_the_tokenizer_settings(tmp_path, byte_tokenizer, value):
    folder = write_model_folder(tmp_path, byte_level(), template=None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert ModelTokenizer.load(folder).chat_frame("a", "b", "c") == byte_tokenizer.chat_frame("a", "b", "c")


def test_a_template_that_refuses_the_system_message_says_what_to_do(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    tokenizer = load(tmp_path, refusing)
    assert shown(tokenizer, None, "", "Why?")
    with pytest.raises(ModelError, match=r"System role not supported.*set prompt\.system to null"):
        tokenizer.chat_frame("Be brief.", "", "Why?")


@pytest.mark.parametrize("template", ["no message", CHATML + CHATML])
def test_a_template_that_does_not_pass_the_context_through_is_refused(tmp_path, template):
    with pytest.raises(ModelError, match=r"shows the user's message \d times, expected once"):
        load(tmp_path, template).chat_frame(None, "", "Why?")


def test_a_template_with_a_syntax_error_or_an_escape_from_the_sandbox_is_refused(tmp_path):
    for template in ("{% for %}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ModelError, match="cannot be rendered"):
            load(tmp_path, template).chat_frame(None, "", "Why?")


def test_templates_get_what_transformers_gives_them_and_one_date_for_ever(tmp_path):
    source = (
        "{% if true %}\n{% endif %}{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ {'ä': '<'} | tojson }}\n"
        "  {% for m in messages %}{% if loop.first %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"}, "test")
    assert template.render_around(None, "", "?") == ('<s>26 Jul 2024{"ä": "<"}\n', "?")


@pytest.mark.real
@pytest.mark.parametrize("system", [PromptSpec().system, None])
def test_a_prompt_has_the_tokens_that_transformers_makes_of_the_same_chat(model_dir, system):
    from transformers import AutoTokenizer

    context = "It was a fine morning. Nobody had expected that.\n\nShe counted the boats twice."
    after = PromptSpec().user_after(question="How often did she count?", instruction=None)
    messages = [{"role": "user", "content": f"Read this. {context}{after}"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    expected = AutoTokenizer.from_pretrained(model_dir).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokenizer = ModelTokenizer.load(model_dir)
    prefix, suffix = tokenizer.chat_frame(system, "Read this.", after)
    assert [*prefix, *tokenizer.encode(f" {context}").ids.tolist(), *suffix] == expected
    assert tokenizer.decode([tokenizer.answer_end_id], skip_special_tokens=False) == "<|im_end|>"
