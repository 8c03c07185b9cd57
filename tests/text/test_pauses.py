import itertools
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError, TextError
from pause_ray.text.pauses import PausePolicy, insert, pause_offsets, strip
from pause_ray.text.segments import detect_paragraph_rule
from tests.text.texts import policies, texts


def word_starts(text: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\S+", text)]


def pause(text: str, policy: PausePolicy, *, seed: int = 0):
    return pause_offsets(text, policy, token_starts=word_starts(text), seed=seed)


def paused(text: str, policy: PausePolicy) -> str:
    return insert(text, pause(text, policy), policy)


@given(text=texts, policy=policies)
def test_stripping_gives_the_text_back_and_a_marker_in_it_is_refused(text, policy):
    if policy.marker.strip() in text:
        with pytest.raises(TextError, match="already contains the marker"):
            pause(text, policy)
        return
    offsets = pause(text, policy)
    rendered = insert(text, offsets, policy)
    assert strip(rendered, policy) == text
    assert len(rendered) == len(text) + len(offsets) * len(policy.marker) * policy.count
    assert all(0 <= before < after <= len(text) for before, after in itertools.pairwise(offsets))
    assert all(rendered[offset + i * len(policy.group) :].startswith(policy.group) for i, offset in enumerate(offsets))


@given(text=texts, policy=policies, seed=st.integers(0, 3), data=st.data())
def test_pauses_inside_a_beginning_are_those_of_the_whole(text, policy, seed, data):
    text = text.replace(policy.marker.strip(), "")
    assume(policy.marker.strip() not in text)
    # "auto" may choose another rule for a beginning; which rule was chosen is recorded.
    policy = policy.model_copy(update={"paragraph_rule": detect_paragraph_rule(text)} if policy.paragraph_rule == "auto" else {})
    length = data.draw(st.integers(0, len(text)))
    starts = word_starts(text)
    whole = pause_offsets(text, policy, token_starts=starts, seed=seed)
    beginning = pause_offsets(text[:length], policy, token_starts=[start for start in starts if start < length], seed=seed)
    assert [offset for offset in beginning if offset < length] == [offset for offset in whole if offset < length]


@given(text=texts, every=st.integers(1, 5), unit=st.sampled_from(["paragraph", "sentence"]))
def test_frequency_k_keeps_every_kth_pause_of_frequency_1(text, every, unit):
    text = text.replace("<PAUS", "")
    all_of_them = pause(text, PausePolicy(unit=unit))
    assert pause(text, PausePolicy(unit=unit, every=every)) == all_of_them[every - 1 :: every]


def test_a_pause_stands_after_each_unit_and_the_last_one_too():
    policy = PausePolicy(unit="sentence", count=2, marker="<P>")
    assert paused("One. Two.\n\nThree", policy) == "One. <P><P>Two.\n\n<P><P>Three<P><P>"


def test_nothing_gets_no_pause():
    for policy in (PausePolicy(), PausePolicy(unit="tokens"), PausePolicy(placement="random", rate=500)):
        for text in ("", " \n\n\t\r\n"):
            assert pause(text, policy) == ()


def test_a_giant_paragraph_is_one_unit():
    text = "a long paragraph without any end " * 1000
    assert pause(text, PausePolicy()) == (len(text),)


def test_the_pattern_placement_is_what_the_released_script_does():
    text = "A claim [1] and [23]\nanother[4]. None here."
    policy = PausePolicy(placement="pattern", pattern=r"\]", marker=" <PAUSE> ")
    assert paused(text, policy) == text.replace("]", "] <PAUSE> ")


def test_fixed_tokens():
    policy = PausePolicy(unit="tokens", unit_tokens=2, marker="|")
    assert paused("a b c d e", policy) == "a b |c d |e|"


@pytest.mark.parametrize("rate", [2, 20, 200])
def test_random_pauses_come_at_the_asked_rate_at_word_starts_and_repeat_with_the_seed(rate):
    text = "The harbour was (quiet) that morning, twice. " * 5000
    policy = PausePolicy(placement="random", rate=rate)
    offsets = pause(text, policy, seed=7)
    expected = len(word_starts(text)) * rate / 1000
    assert abs(len(offsets) - expected) < 4 * expected**0.5
    assert all(text[offset].isalnum() and not text[offset - 1].isalnum() for offset in offsets)
    assert offsets == pause(text, policy, seed=7)
    assert offsets != pause(text, policy, seed=8)


def test_two_draws_in_one_word_make_two_pauses():
    text = "extraordinarily " * 2000
    offsets = pause_offsets(text, PausePolicy(placement="random", rate=50), token_starts=range(len(text)), seed=7)
    expected = len(text) * 50 / 1000
    assert abs(len(set(offsets)) - expected) < 4 * expected**0.5


def test_random_pauses_reach_scripts_without_spaces():
    text = "彼は走った彼女は待ってと言った" * 100
    offsets = pause_offsets(text, PausePolicy(placement="random", rate=100), token_starts=range(len(text)))
    assert 100 < len(offsets) < 200


def test_tokens_must_be_given_where_they_are_counted():
    for policy in (PausePolicy(unit="tokens"), PausePolicy(placement="random", rate=5)):
        with pytest.raises(TextError, match="token_starts"):
            pause_offsets("text", policy)


def test_a_marker_that_runs_into_the_text_is_refused():
    with pytest.raises(TextError, match="runs into the text"):
        pause_offsets("aX", PausePolicy(marker="aXa"))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"placement": "random"}, "needs rate"),
        ({"placement": "pattern"}, "needs pattern"),
        ({"rate": 5}, "rate = 5.0 has an effect only with placement: random"),
        ({"pattern": "]"}, "pattern = ']' has an effect only with placement: pattern"),
        ({"placement": "random", "rate": 5, "every": 2}, "every = 2 has an effect only with placement: every"),
        ({"placement": "random", "rate": 5, "unit": "sentence"}, "unit = 'sentence' has an effect only with placement: every"),
        ({"placement": "pattern", "pattern": "]", "paragraph_rule": "glued"}, "paragraph_rule = 'glued' has an effect only with"),
        ({"unit": "tokens", "paragraph_rule": "newline"}, "paragraph_rule = 'newline' has an effect only with"),
        ({"unit_tokens": 100}, "unit_tokens = 100 has an effect only with unit: tokens"),
        ({"placement": "pattern", "pattern": "["}, "no regular expression"),
        ({"placement": "pattern", "pattern": "x*"}, "matches the empty text"),
        ({"marker": "  \n"}, "only white space"),
        ({"marker": "<PAUSE> ", "token": "added"}, "remove the spaces"),
        ({"marker": " <PAUSE>", "token": "reserved"}, "remove the spaces"),
        ({"marker": ""}, "marker"),
        ({"instruction": " "}, "instruction is empty"),
        ({"every": 0}, "every"),
        ({"count": 65}, "count"),
        ({"placement": "random", "rate": 501}, "rate"),
        ({"evry": 2}, "did you mean every"),
    ],
)
def test_a_policy_whose_fields_do_not_fit_is_refused_in_one_line(fields, rule):
    with pytest.raises(SpecError, match=re.escape(rule)) as caught:
        PausePolicy.parse(fields, origin="sweep.yaml")
    assert str(caught.value).startswith("sweep.yaml: ")
    assert "\n" not in str(caught.value)


@given(policies)
def test_a_policy_survives_its_resolved_form(policy):
    assert PausePolicy.parse(policy.resolved(), origin="resolved") == policy
