"""What the shipped needles, facts, suites and sweeps promise to the training and evaluation that use them."""

import itertools
import math
import re
import string
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.spec import inline_files, read_yaml
from pause_ray.data.spec import FactFile, FactSpec, shared_with_evaluation
from pause_ray.evaluation.haystack import ask, load_haystack, prompt_builder
from pause_ray.evaluation.suite import SuiteSpec, ask_for, cells, known_facts
from pause_ray.evaluation.tasks.needle_files import NeedleFile, NeedleGroupFile
from pause_ray.sweep.spec import expand, read_sweep
from pause_ray.text.segments import plain
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker

EVAL = Path(__file__).resolve().parents[2] / "eval"
STOCK = NeedleFile.parse(read_yaml(EVAL / "needles" / "stock.yaml"), origin="stock.yaml")
GROUPS = NeedleGroupFile.parse(read_yaml(EVAL / "needles" / "multi.yaml"), origin="multi.yaml").groups
FACTS = FactFile.parse(read_yaml(EVAL / "needles" / "training_facts.yaml"), origin="training_facts.yaml").facts
SUITES = sorted((EVAL / "suites").glob("*.yaml"))
SWEEPS = sorted((EVAL.parent / "sweeps").glob("*.yaml"))
OWN_PROTOCOLS = ("single", "quickstart", "lattice", "long", "laptop_single", "laptop_multi")
PAPER_LENGTHS = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
RULER_NIAH = {  # as in its synthetic.yaml: keys, values, queries, kind of key, kind of value, haystack
    "single_1": (1, 1, 1, "words", "numbers", "noise"),
    "single_2": (1, 1, 1, "words", "numbers", "essays"),
    "single_3": (1, 1, 1, "words", "uuids", "essays"),
    "multikey_1": (4, 1, 1, "words", "numbers", "essays"),
    "multikey_2": (1, 1, 1, "words", "numbers", "needles"),
    "multikey_3": (1, 1, 1, "uuids", "uuids", "needles"),
    "multivalue": (1, 4, 1, "words", "numbers", "essays"),
    "multiquery": (4, 1, 4, "words", "numbers", "essays"),
}


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.casefold()))


def slots_in(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def all_text(fact: FactSpec) -> str:
    return " ".join([fact.needle, fact.question, *itertools.chain.from_iterable(fact.slots.values())])


def parse_suite(path: Path, **changes: Any) -> SuiteSpec:
    data = inline_files(read_yaml(path), ("task.needles", "task.groups"), origin=path)
    return SuiteSpec.parse(data | changes, origin=str(path))


def suite(name: str) -> SuiteSpec:
    return parse_suite(EVAL / "suites" / f"{name}.yaml")


def fact_id(fact: FactSpec) -> str:
    return fact.needle[:40]


every_suite = pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)


@every_suite
def test_a_suite_is_named_as_its_file_and_says_what_it_is(path):
    assert parse_suite(path).name == path.stem
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()))
    assert comment
    own = path.stem in OWN_PROTOCOLS
    assert own or {"# What differs:"} <= set(comment)
    assert own or any("arXiv" in line or "github.com" in line for line in comment)
    assert own or any(line.startswith("# Metric:") for line in comment)


@every_suite
def test_a_suite_keeps_half_of_the_essays_for_training(path):
    for source in parse_suite(path).haystack:
        assert source.from_percent == 50
        assert source.sha256 is not None


@every_suite
def test_a_suite_leaves_a_place_for_a_pause_policys_instruction(path):
    assert "{instruction}" in parse_suite(path).prompt.after


@every_suite
def test_a_suite_fits_a_model_of_128k_tokens_answer_included(path):
    spec = parse_suite(path)
    assert max(spec.context_tokens) + spec.max_new_tokens <= 131_072
    # half of the essays has 64,941 tokens of SmolLM2
    assert spec.repeat_haystack == (bool(spec.haystack) and max(spec.context_tokens) > 60_000)


@pytest.mark.parametrize("name", ["single", "quickstart"])
def test_the_stock_protocol_asks_near_the_beginning_in_the_middle_and_near_the_end(name):
    spec = suite(name)
    assert len(spec.context_tokens) >= 3
    assert max(spec.context_tokens) == 4096
    assert min(spec.depth_percent) <= 10
    assert 50 in spec.depth_percent
    assert max(spec.depth_percent) >= 90


def test_the_papers_grid():
    spec = suite("paper")
    assert spec.context_tokens == PAPER_LENGTHS
    assert len(spec.depth_percent) == 15
    assert (min(spec.depth_percent), max(spec.depth_percent)) == (10, 100)
    for replicate in range(3):
        found = cells(spec, identity="", replicate=replicate, seed=0)
        assert len(found) == 120
        assert {cell.facts[0].text for cell in found} == {STOCK.needles[0].needle}


@pytest.mark.parametrize("name", ["original_35x35", "original_35x35_sigmoid"])
def test_the_originals_grid(name):
    spec = suite(name)
    assert len(cells(spec, identity="", replicate=0, seed=0)) == 35 * 35
    assert (min(spec.context_tokens), max(spec.context_tokens)) == (1000, 16000)
    assert (min(spec.depth_percent), max(spec.depth_percent)) == (0, 100)
    steps = {round(later - earlier, 1) for earlier, later in itertools.pairwise(spec.depth_percent)}
    assert (len(steps) == 1) == (name == "original_35x35")


def test_multi_needle_suites_hide_three_facts():
    spec = suite("multi_random")
    assert (spec.context_tokens, spec.samples) == (PAPER_LENGTHS, 15)
    for name in ("multi_random", "multi_spaced"):
        for replicate in range(len(GROUPS)):
            assert len(ask_for(suite(name), seed=0, replicate=replicate, sample=0).facts) == 3
    first = cells(suite("multi_spaced"), identity="", replicate=0, seed=0)[0]
    assert [round(fact.depth_percent) for fact in first.facts] == [0, 33, 67]


def haystack_kind(spec: SuiteSpec) -> str:
    if spec.task.has_filler:
        return "needles"
    return "essays" if spec.haystack else "noise"


@pytest.mark.parametrize("name", RULER_NIAH)
def test_rulers_needle_family_has_its_counts_and_kinds(name):
    spec = suite(f"ruler_niah_{name}")
    task = spec.task
    assert (task.keys, task.values, task.queries, task.key_kind, task.value_kind, haystack_kind(spec)) == RULER_NIAH[name]
    asked = ask_for(spec, seed=0, replicate=0, sample=0)
    assert len(asked.facts) == task.keys * task.values
    assert len(asked.references) == task.values * task.queries


@pytest.mark.parametrize("name", [*(f"niah_{name}" for name in RULER_NIAH), "variable_tracking"])
def test_rulers_lengths_metric_and_random_depths(name):
    spec = suite(f"ruler_{name}")
    assert [2 ** math.ceil(math.log2(tokens)) for tokens in spec.context_tokens] == list(RULER_LENGTHS)
    assert spec.scorer == "string_match"
    assert spec.samples
    assert spec.max_new_tokens == (64 if name == "variable_tracking" else 128)


def test_rulers_variable_tracking_is_one_chain_of_four_hops():
    spec = suite("ruler_variable_tracking")
    assert (spec.task.chains, spec.task.hops, haystack_kind(spec)) == (1, 4, "noise")
    assert len(ask_for(spec, seed=0, replicate=0, sample=0).references) == 5


def test_uuid_chains_have_the_originals_length():
    spec = suite("uuid_chain")
    assert (spec.task.chain_length, spec.scorer) == (5, "chain_progress")


@pytest.mark.parametrize("supporting", [1, 2, 3])
def test_facts_to_combine_are_scored_by_babilongs_rule(supporting):
    spec = suite(f"combine_{supporting}")
    assert (spec.task.supporting, spec.scorer) == (supporting, "label")
    assert len(ask_for(spec, seed=0, replicate=0, sample=0).labels) == 6


@every_suite
def test_no_question_or_prompt_tells_an_answer(path):
    spec = parse_suite(path)
    for replicate, sample in itertools.product(range(5), range(spec.samples or 1)):
        asked = ask_for(spec, seed=7, replicate=replicate, sample=sample)
        told = f"{spec.prompt.system} {spec.prompt.before} {spec.prompt.after} {asked.question} {asked.answer_prefix} {spec.noise}"
        assert asked.references
        assert not [reference for reference in asked.references if reference.casefold() in told.casefold()]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_expands_to_trials_whose_control_is_tuned_without_pauses(path):
    sweep = read_sweep(path, {})
    trials = expand(sweep)
    assert sweep.name == path.stem
    assert sweep.control is not None
    assert {trial.arm for trial in trials} == {sweep.arm, *sweep.arms}


def test_the_papers_sweep_has_its_arms_and_training_for_both_models():
    planned = [trial for trial in expand(read_sweep(EVAL.parent / "sweeps" / "paper.yaml", {})) if trial.spec.replicate == 2]
    by_size = {size: {trial.arm: trial.spec for trial in planned if size in trial.spec.model.source} for size in ("-3B-", "-8B-")}
    assert by_size["-3B-"].keys() == by_size["-8B-"].keys()
    assert sum(map(len, by_size.values())) == len(planned)
    trials = by_size["-3B-"]
    assert set(trials) == {"baseline", "pauses_untuned", "tag_instruction", "pauses_instruction", "tuned_without_pauses", "pause_tuned"}
    assert {arm for arm, spec in trials.items() if spec.train} == {"pause_tuned", "tuned_without_pauses"}
    assert {arm for arm, spec in trials.items() if spec.pauses} == set(trials) - {"baseline", "tuned_without_pauses"}
    train = trials["pause_tuned"].train
    assert (train.max_steps, train.micro_batch_size, train.gradient_accumulation_steps, train.learning_rate, train.warmup_steps) == (
        60,
        2,
        4,
        2e-4,
        6,
    )
    assert (train.lora.rank, train.lora.alpha, train.lora.dropout, train.lora.targets) == (16, 16, 0, None), "all of attention and MLP"
    markers = {arm: spec.pauses.marker for arm, spec in trials.items() if spec.pauses}
    assert {markers[arm] for arm in ("pauses_untuned", "pauses_instruction", "pause_tuned")} == {" <PAUSE> "}
    assert re.fullmatch(r" <PAUSE .{20,}> ", markers["tag_instruction"])
    assert {arm for arm, spec in trials.items() if spec.pauses and spec.pauses.instruction} == {"pauses_instruction"}
    assert all(spec.pauses.pattern == r"\]" and spec.pauses.token == "text" for spec in trials.values() if spec.pauses)


def test_the_first_needle_is_the_stock_one():
    first = STOCK.needles[0]
    assert "San Francisco" in first.question
    assert {word.casefold() for word in first.keywords} == {"sandwich", "dolores park", "sunny day"}


def test_needles_differ_in_place_and_share_no_keyword():
    assert len(STOCK.needles) >= 5
    for one, other in itertools.combinations(STOCK.needles, 2):
        assert one.question != other.question
        for keyword in one.keywords:
            assert keyword.casefold() not in other.needle.casefold()


def test_every_needle_is_one_sentence_with_as_many_keywords_as_the_others():
    for needle in STOCK.needles:
        assert re.fullmatch(r"[A-Z][^.!?]*\.", needle.needle)
        assert needle.question.endswith("?")
        assert len(needle.keywords) == len(STOCK.needles[0].keywords)


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_a_fact_uses_its_slots_and_its_question_leaves_some_of_them_to_answer(fact):
    assert slots_in(fact.needle) == set(fact.slots)
    assert slots_in(fact.question) < set(fact.slots)
    assert slots_in(fact.question), "nothing says which fact is asked for"
    for choices in fact.slots.values():
        assert len(set(choices)) == len(choices) >= 5


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_no_question_contains_a_word_of_its_answer(fact):
    identifying = slots_in(fact.question)
    asked = words(fact.question.translate(str.maketrans("{}", "  ")))
    asked = (asked - identifying) | {word for slot in identifying for choice in fact.slots[slot] for word in words(choice)}
    function_words = {"a", "an", "the", "of", "on", "to", "o"}
    for slot in set(fact.slots) - identifying:
        for choice in fact.slots[slot]:
            assert not (words(choice) - function_words) & asked, (slot, choice)


def test_there_are_enough_different_training_facts():
    assert len({fact.needle for fact in FACTS}) >= 8
    assert len({fact.question for fact in FACTS}) == len(FACTS)
    assert sum(math.prod(len(choices) for choices in fact.slots.values()) for fact in FACTS) >= 5_000
    # no template may be so small that a few hundred rows repeat it word for word
    assert min(math.prod(len(choices) for choices in fact.slots.values()) for fact in FACTS) >= 1_000


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_no_training_fact_shares_a_keyword_or_place_with_the_evaluation(fact):
    taught = all_text(fact)
    hidden = {needle.needle: needle.keywords for needle in STOCK.needles}
    for group in GROUPS:
        hidden |= group.needles
    for needle, keywords in hidden.items():
        for keyword in keywords:
            assert keyword.casefold() not in taught.casefold()
            assert not words(keyword) & words(taught), keyword
        places = set(re.findall(r"(?<!^)\b[A-Z][a-z]+", needle))
        assert not places & set(re.findall(r"[A-Z][a-z]+", taught))
    assert "best thing to do" not in taught.casefold()


@every_suite
def test_every_suite_can_score_what_was_trained_on_the_shipped_facts(path):
    hidden = [fact for replicate in range(5) for fact in known_facts(parse_suite(path), seed=0, replicate=replicate)]
    references = {reference for fact in hidden for reference in fact.references}
    # the texts of one replicate will do: a template makes all of a task's sentences or none
    assert references
    assert shared_with_evaluation(FactFile(facts=FACTS), needles=[fact.text for fact in hidden[:50]], keywords=list(references)) == []


def test_a_groups_facts_are_sentences_of_one_form():
    for group in GROUPS:
        assert group.question.endswith("?")
        begins = {needle.split(" is ")[0] for needle in group.needles}
        assert len(begins) == 1
        assert len(group.needles) == 3
        assert all(len(keywords) == 1 for keywords in group.needles.values())


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_the_first_and_last_combination_fill_to_sentences(fact):
    for pick in (0, -1):
        chosen = {slot: choices[pick] for slot, choices in fact.slots.items()}
        needle, question = fact.needle.format(**chosen), fact.question.format(**chosen)
        assert re.fullmatch(r"[A-Z][^{}!?]*\.", needle)
        assert re.fullmatch(r"[A-Z][^{}]*\?", question)


@pytest.mark.real
def test_the_essays_tell_no_answer_and_know_nobody_of_a_story(cache):
    essays = plain(load_haystack(suite("single"), cache=cache, seed=0, replicate=0).text)
    for path in SUITES:
        spec = parse_suite(path)
        for replicate, sample in itertools.product(range(6), range(spec.samples or 1)):
            asked = ask_for(spec, seed=7, replicate=replicate, sample=sample)
            assert not [reference for reference in asked.references if plain(reference) in essays]
            if spec.task.kind == "combine":
                assert not {fact.text.split()[0].casefold() for fact in asked.facts} & set(essays.split())


@pytest.mark.real
@every_suite
def test_a_prompt_of_every_suite_holds_its_facts_and_its_question(path, model_dir, cache):
    spec = parse_suite(path, context_tokens=[1000], **({"lattice_tokens": 250} if "lattice_tokens" in read_yaml(path) else {}))
    tokenizer = ModelTokenizer.load(model_dir)
    haystack = load_haystack(spec, cache=cache, seed=0, replicate=0)
    builder = prompt_builder(haystack, suite=spec, tokenizer=tokenizer, policy=None, marker=resolve_marker(tokenizer, None), seed=0)
    found = cells(spec, identity="", replicate=0, seed=0)
    for cell in found[:: max(1, len(found) // 5)]:
        prompt = ask(cell, builder)
        text = tokenizer.decode(prompt.ids, skip_special_tokens=False)
        assert len(prompt.ids) == 1000
        for fact, token in zip(cell.facts, prompt.needle_tokens, strict=True):
            assert text.count(fact.text) == 1 or spec.task.kind == "combine"
            assert tokenizer.decode(prompt.ids[token : token + 300]).lstrip().startswith(fact.text)
        assert text.endswith(cell.answer_prefix)
        assert cell.question in text
        context = tokenizer.decode(prompt.ids[prompt.prefix_tokens : len(prompt.ids) - prompt.suffix_tokens])
        for fact in cell.facts:
            context = context.replace(fact.text, "", 1)
        assert not [reference for reference in cell.references if reference.casefold() in context.casefold()]
        answer = len(tokenizer.encode(cell.draft).ids)
        assert answer < spec.max_new_tokens, "the answer would be cut short"


def test_the_overview_names_every_suite_with_its_size():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) × .*\| (\d+) \| (\w+) \|$", (EVAL / "README.md").read_text(encoding="utf-8"), flags=re.M)
    told = {name: (int(lengths), int(size), scorer) for name, lengths, size, scorer in rows}
    specs = [parse_suite(path) for path in SUITES]
    assert told == {spec.name: (len(spec.context_tokens), sum(spec.num_positions.values()), spec.scorer) for spec in specs}
