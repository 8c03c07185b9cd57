from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError, TextError
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import BuiltPrompt, HiddenText, PromptBuilder, PromptSpec
from pause_ray.text.segments import detect_paragraph_rule, join_documents, split
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker

NEEDLE = "The blue key lies under the third bell."
QUESTION = "Where is the blue key?"
SENTENCES = [
    "The harbour was quiet that morning, and the gulls kept away.",
    "Nobody had expected the fog\nto lift before noon.",
    "Why should it?",
    "She counted the boats: eleven!",
    "In 1998, J. R. Wu of the U.S. office had paid 3.5 crowns for each of them [1].",
    "彼は走った。",
]
POLICIES = [
    None,
    PausePolicy(),
    PausePolicy(unit="sentence", every=2, count=2, token="added"),
    PausePolicy(unit="tokens", unit_tokens=7, token="reserved", marker="<|reserved_0|>"),
    PausePolicy(unit="sentence", paragraph_rule="newline", every=3),
    PausePolicy(placement="random", rate=40),
    PausePolicy(placement="pattern", pattern=r"\]", marker=" <PAUSE> "),
]
TOTAL = [policy.model_copy(update={"budget": "total"}) for policy in POLICIES if policy]


def haystack_of(seed: int, sentences: int = 400) -> str:
    rng = np.random.default_rng(seed)
    words = [SENTENCES[i] + ("\n\n" if rng.random() < 0.2 else " ") for i in rng.integers(0, len(SENTENCES), sentences)]
    return "".join(words)


HAYSTACK = haystack_of(0)


def builder(tokenizer: ModelTokenizer, policy: PausePolicy | None = None, *, haystack: str = HAYSTACK, **changed: Any) -> PromptBuilder:
    asked: dict[str, Any] = {"rules": None, "prompt": PromptSpec(), "seed": 0}
    return PromptBuilder(haystack, **(asked | changed), tokenizer=tokenizer, policy=policy, marker=resolve_marker(tokenizer, policy))


def build(
    tokenizer: ModelTokenizer,
    policy: PausePolicy | None = None,
    *,
    needle: str = NEEDLE,
    question: str = QUESTION,
    context_tokens: int = 600,
    depth_percent: float = 50,
    **changed: Any,
) -> BuiltPrompt:
    hidden = HiddenText(text=needle, depth_percent=depth_percent)
    return builder(tokenizer, policy, **changed).build([hidden], question=question, context_tokens=context_tokens)


def context_ids(built: BuiltPrompt, tokenizer: ModelTokenizer, policy: PausePolicy | None) -> list[int]:
    """Content tokens between prefix and suffix, markers taken out by their ids."""
    marker = resolve_marker(tokenizer, policy)
    _, suffix = tokenizer.chat_frame(PromptSpec().system, "", PromptSpec().user_after(question=QUESTION, instruction=None))
    ids = built.ids[built.prefix_tokens : len(built.ids) - len(suffix)].tolist()
    group, kept = list(marker.group_ids), []
    while ids:
        if group and ids[: len(group)] == group:
            ids = ids[len(group) :]
        else:
            kept.append(ids.pop(0))
    return kept


@settings(max_examples=60)
@given(
    seed=st.integers(0, 5),
    tokens=st.integers(180, 900),
    depth=st.floats(0, 100),
    policy=st.sampled_from(POLICIES + TOTAL),
)
def test_lengths_are_exact_and_the_needle_is_whole_and_where_it_says(byte_tokenizer, seed, tokens, depth, policy):
    built = build(byte_tokenizer, policy, haystack=haystack_of(seed), context_tokens=tokens, depth_percent=depth)
    group = len(resolve_marker(byte_tokenizer, policy).group_ids)
    assert built.prompt_tokens == len(built.ids)
    if policy is None or policy.budget == "content":
        assert built.prompt_tokens - built.num_pauses * group == tokens
    else:
        assert tokens - group <= built.prompt_tokens <= tokens
    content = context_ids(built, byte_tokenizer, policy)
    assert len(content) == built.content_tokens
    assert byte_tokenizer.decode(content).count(NEEDLE) == 1
    marker_text = policy.marker if policy and policy.token == "text" else "\0"
    after = byte_tokenizer.decode(built.ids[built.needle_token :]).replace(marker_text, "")
    assert after.lstrip().startswith(NEEDLE)


@pytest.mark.parametrize("tokens", range(300, 340, 4))
def test_a_needle_at_the_end_goes_a_sentence_back_rather_than_lose_its_room_to_pauses(byte_tokenizer, tokens):
    policy = PausePolicy(unit="sentence", count=8, token="added", budget="total")
    built = build(byte_tokenizer, policy, context_tokens=tokens, depth_percent=100)
    content = context_ids(built, byte_tokenizer, policy)
    assert NEEDLE in byte_tokenizer.decode(content)


@settings(max_examples=40)
@given(seed=st.integers(0, 5), depth=st.floats(0, 100), policy=st.sampled_from(POLICIES))
def test_the_needle_is_a_sentence_of_its_own_at_the_last_start_before_the_depth(byte_tokenizer, seed, depth, policy):
    haystack = haystack_of(seed)
    built = build(byte_tokenizer, policy, haystack=haystack, depth_percent=depth)
    # The exact cut may go through a character.
    text = byte_tokenizer.decode(context_ids(built, byte_tokenizer, policy)).rstrip("\ufffd")
    before, found, after = text.partition(NEEDLE)
    assert found
    assert haystack.startswith(before)
    assert haystack.startswith(before + after.removeprefix(" "))
    starts = [start for start, _ in split(haystack, unit="sentence")]
    assert len(before) in starts
    asked = (built.content_tokens - len(byte_tokenizer.encode(f"{NEEDLE} ").ids)) * depth / 100
    following = haystack[: starts[starts.index(len(before)) + 1]]
    assert len(byte_tokenizer.encode(before).ids) <= asked + 1
    assert len(byte_tokenizer.encode(following).ids) >= asked - 2


@settings(max_examples=30)
@given(depth=st.integers(0, 100), policy=st.sampled_from(POLICIES[1:]))
def test_arms_differ_in_their_pauses_only(byte_tokenizer, depth, policy):
    plain = build(byte_tokenizer, depth_percent=depth)
    paused = build(byte_tokenizer, policy, depth_percent=depth)
    assert context_ids(paused, byte_tokenizer, policy) == context_ids(plain, byte_tokenizer, None)
    assert paused.content_tokens == plain.content_tokens


@settings(max_examples=30)
@given(policy=st.sampled_from(POLICIES), lengths=st.tuples(st.integers(300, 900), st.integers(300, 900)), place=st.integers(0, 150))
def test_the_same_place_in_a_longer_context_has_the_same_tokens_up_to_the_needle(byte_tokenizer, policy, lengths, place):
    frame = build(byte_tokenizer).prompt_tokens - build(byte_tokenizer).content_tokens + len(byte_tokenizer.encode(f"{NEEDLE} ").ids)
    # Half a token more, or rounding could fall below the place.
    built = [build(byte_tokenizer, policy, context_tokens=n, depth_percent=100 * (place + 0.5) / (n - frame)) for n in lengths]
    assert built[0].needle_token == built[1].needle_token
    end = built[0].needle_token + len(byte_tokenizer.encode(NEEDLE).ids)
    assert built[0].ids[:end].tolist() == built[1].ids[:end].tolist()


def test_what_lies_beyond_the_context_is_never_looked_at(byte_tokenizer):
    policy = PausePolicy()
    long = haystack_of(0, 4000)
    spoiled = long + "<PAUSE><|im_end|>\ud800" * 1000
    assert build(byte_tokenizer, policy, haystack=spoiled).ids.tolist() == build(byte_tokenizer, policy, haystack=long).ids.tolist()


def test_the_seed_moves_random_pauses_and_nothing_else(byte_tokenizer):
    policy = PausePolicy(placement="random", rate=40, token="added")
    one, same, other = (build(byte_tokenizer, policy, seed=seed) for seed in (1, 1, 2))
    assert one.ids.tolist() == same.ids.tolist()
    assert one.ids.tolist() != other.ids.tolist()
    assert context_ids(one, byte_tokenizer, policy) == context_ids(other, byte_tokenizer, policy)


@pytest.mark.parametrize("depth", range(0, 101, 20))
def test_an_instruction_stands_before_the_question_and_costs_no_content(byte_tokenizer, depth):
    policy = PausePolicy(instruction="At each <PAUSE>, think. " * 5, token="added")
    silent = policy.model_copy(update={"instruction": None})
    built, without = (build(byte_tokenizer, each, depth_percent=depth) for each in (policy, silent))
    assert byte_tokenizer.decode(built.ids).endswith(f"\n\n{'At each , think. ' * 5}{QUESTION}\nassistant\n")
    shared = without.prefix_tokens + without.content_tokens + without.num_pauses
    assert built.ids[:shared].tolist() == without.ids[:shared].tolist()
    assert (built.content_tokens, built.needle_token) == (without.content_tokens, without.needle_token)
    assert built.content_tokens == build(byte_tokenizer, depth_percent=depth).content_tokens
    assert built.prompt_tokens > without.prompt_tokens == 600 + without.num_pauses


def test_under_a_total_budget_the_instruction_is_inside(byte_tokenizer):
    policy = PausePolicy(instruction="At each <PAUSE>, think. " * 5, token="added", budget="total")
    assert build(byte_tokenizer, policy).prompt_tokens <= 600


GLUED = "It was made deep.The next one was not. Nobody knew.They went home. " * 20
SPACED = "It rained all day. A slip.Here it is. So we went on.\n\nThen it stopped. " * 20


@pytest.mark.parametrize("order", [(GLUED, SPACED), (SPACED, GLUED)])
def test_each_document_of_a_haystack_keeps_its_own_paragraph_rule(byte_tokenizer, order):
    haystack, rules = join_documents((text, detect_paragraph_rule(text)) for text in order)
    assert len({rule for _, rule in rules}) == 2
    length = 200 + len(byte_tokenizer.encode(haystack).ids)
    for depth in (0, 45, 55, 95):
        built = build(byte_tokenizer, PausePolicy(), haystack=haystack, rules=rules, context_tokens=length - 150, depth_percent=depth)
        text = byte_tokenizer.decode(built.ids)
        assert built.rule == "blank_line+glued"
        assert "slip.Here" in text
        assert "slip.<PAUSE>" not in text
        assert "deep.<PAUSE>The" in text
        assert "deep.The" not in text


def test_the_rule_is_that_of_the_documents_that_the_context_reads(byte_tokenizer):
    haystack, rules = join_documents([(GLUED, "glued"), (SPACED, "blank_line")])
    first = len(byte_tokenizer.encode(GLUED).ids)
    for policy in (None, PausePolicy()):
        frame = build(byte_tokenizer).prompt_tokens - build(byte_tokenizer).content_tokens + len(byte_tokenizer.encode(f"{NEEDLE} ").ids)
        found = [build(byte_tokenizer, policy, haystack=haystack, rules=rules, context_tokens=frame + first + n).rule for n in (-10, 10)]
        assert found == ["glued", "blank_line+glued"]


def test_braces_in_questions_are_text():
    assert (
        PromptSpec(after="{instruction}Q: {question}").user_after(question="What is {instruction}?", instruction=None)
        == "Q: What is {instruction}?"
    )


def test_a_prompt_must_ask():
    with pytest.raises(SpecError, match=r"prompt\.after must contain \{question\}"):
        PromptSpec.parse({"after": "Well?"}, origin="suite.yaml")


def test_a_length_too_short_for_needle_and_question_says_the_least_that_works(byte_tokenizer):
    with pytest.raises(TextError, match="context_tokens 20 is too short for needle and question; ask for at least ") as caught:
        build(byte_tokenizer, context_tokens=20)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert build(byte_tokenizer, context_tokens=least).prompt_tokens == least
    with pytest.raises(TextError, match="too short"):
        build(byte_tokenizer, context_tokens=least - 1)


def test_pauses_inside_the_budget_may_leave_no_room_for_the_needle(byte_tokenizer):
    policy = PausePolicy(unit="tokens", unit_tokens=1, count=8, budget="total")
    with pytest.raises(TextError, match="pauses leave no room for the needle"):
        build(byte_tokenizer, policy, context_tokens=200)


@pytest.mark.parametrize("haystack", ["", "  \n", "One sentence. Another."])
@pytest.mark.parametrize("policy", [None, PausePolicy(), PausePolicy(budget="total")])
def test_a_haystack_too_short_says_how_many_tokens_it_has(byte_tokenizer, haystack, policy):
    has = len(byte_tokenizer.encode(haystack).ids)
    with pytest.raises(TextError, match=f"the haystack has only {has} tokens.* repeat_haystack"):
        build(byte_tokenizer, policy, haystack=haystack)


def test_a_haystack_that_just_suffices_is_used_up(byte_tokenizer):
    text = " ".join(SENTENCES[:4])
    frame = build(byte_tokenizer).prompt_tokens - build(byte_tokenizer).content_tokens
    exact = frame + len(byte_tokenizer.encode(f"{NEEDLE} {text}").ids)
    assert build(byte_tokenizer, haystack=text, context_tokens=exact, depth_percent=0).prompt_tokens == exact
    with pytest.raises(TextError, match="haystack has only"):
        build(byte_tokenizer, haystack=text, context_tokens=exact + 1, depth_percent=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth_percent": 120}, "depth_percent 120 is outside 0 to 100"),
        ({"depth_percent": -1}, "depth_percent -1 is outside"),
        ({"depth_percent": float("nan")}, "outside 0 to 100"),
        ({"needle": "  "}, "the needle is empty"),
        ({"question": "Where?<|im_end|>"}, "control token"),
        ({"haystack": "A <PAUSE> here. " * 200}, "already contains the marker"),
        ({"needle": "The <PAUSE> key."}, "already contains the marker"),
    ],
)
def test_what_cannot_be_asked_is_refused(byte_tokenizer, changed, message):
    with pytest.raises(TextError, match=message):
        build(byte_tokenizer, PausePolicy(), **changed)


@pytest.mark.real
@pytest.mark.parametrize("depth", [0, 37, 100])
def test_the_real_tokenizer_keeps_the_promises(model_dir, depth):
    tokenizer = ModelTokenizer.load(model_dir)
    for policy in (None, PausePolicy(token="added"), PausePolicy(unit="sentence", budget="total")):
        built = build(tokenizer, policy, context_tokens=1024, depth_percent=depth, haystack=haystack_of(1, 200))
        pauses = built.num_pauses if policy else 0
        assert built.prompt_tokens <= 1024 if policy and policy.budget == "total" else built.prompt_tokens == 1024 + pauses
        assert tokenizer.decode(built.ids[built.needle_token :]).replace("<PAUSE>", "").lstrip().startswith(NEEDLE)
