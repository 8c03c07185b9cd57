"""Specs cannot lie: unknown keys, wrong types and broken files are errors that say where and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import Spec, check_path, digest, find_file, inline_files, parse_assignments, parse_yaml, read_yaml, with_overrides
from pause_ray.data.spec import CorpusSpec
from pause_ray.training.spec import TrainSpec
from pause_ray.trial.spec import TrialSpec

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def test_a_misspelt_key_is_an_error_that_names_the_file_and_the_nearest_field() -> None:
    with pytest.raises(SpecError, match=r"my\.yaml: learning_rat: unknown field; did you mean learning_rate\?"):
        TrainSpec.parse({"learning_rat": 1e-4}, origin="my.yaml")


def test_a_misspelt_key_deep_inside_names_its_whole_path() -> None:
    with pytest.raises(SpecError, match=r"lora\.rnk: unknown field; did you mean rank\?"):
        TrainSpec.parse({"lora": {"rnk": 4}}, origin="my.yaml")


@pytest.mark.parametrize("value", ["16", True, 1.5, None, [16]])
def test_a_value_of_the_wrong_type_is_refused_even_when_it_could_be_converted(value: object) -> None:
    with pytest.raises(SpecError, match=r"max_steps"):
        TrainSpec.parse({"max_steps": value}, origin="my.yaml")


def test_a_bad_value_is_shown_with_the_rule() -> None:
    with pytest.raises(SpecError, match=r"zero\.stage = 4"):
        TrainSpec.parse({"zero": {"stage": 4}}, origin="my.yaml")


def test_every_broken_field_is_named_at_once() -> None:
    with pytest.raises(SpecError, match=r"max_steps.*micro_batch_size"):
        TrainSpec.parse({"max_steps": 0, "micro_batch_size": 0}, origin="my.yaml")


@pytest.mark.parametrize(
    ("schema", "written", "meant"),
    [
        (TrainSpec, "steps", "did you mean max_steps"),
        (TrainSpec, "batch_size", "did you mean micro_batch_size"),
        (TrainSpec, "accumulation", "did you mean gradient_accumulation_steps"),
        (CorpusSpec, "sequence_tokens", "did you mean sequence_len"),
        (CorpusSpec, "rows", r"did you mean num_sequences\?"),
    ],
)
def test_a_field_of_another_name_is_refused_with_the_right_name(schema: type[Spec], written: str, meant: str) -> None:
    with pytest.raises(SpecError, match=f"my.yaml: .*{written}: unknown field; {meant}") as refused:
        schema.parse({written: 1}, origin="my.yaml")
    assert "\n" not in str(refused.value)


def test_a_resolved_spec_parses_back_to_itself() -> None:
    spec = TrainSpec.parse({"max_steps": 7, "lora": {"rank": 3}}, origin="my.yaml")
    assert TrainSpec.parse(json.loads(json.dumps(spec.resolved())), origin="again") == spec


@given(plain)
def test_the_digest_does_not_depend_on_the_order_of_keys(value: object) -> None:
    def reordered(item: object) -> object:
        if isinstance(item, dict):
            return {key: reordered(item[key]) for key in reversed(list(item))}
        return [reordered(part) for part in item] if isinstance(item, list) else item

    assert digest({"v": value}) == digest({"v": reordered(value)})


@given(plain, plain)
def test_different_data_have_different_digests(one: object, other: object) -> None:
    assert (digest([one]) == digest([other])) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_numbers_with_an_exponent_are_numbers() -> None:
    assert parse_yaml("[2e-4, 1E5, 0x10]", origin="") == [2e-4, 1e5, 16]


def test_a_key_written_twice_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"'steps' is written twice"):
        parse_yaml("steps: 1\nsteps: 2\n", origin="my.yaml")


@pytest.mark.parametrize(
    ("content", "message"), [("a: [1", "not valid YAML"), ("- a", "expected a mapping"), ("!!python/name:os.system", "not valid")]
)
def test_a_file_that_is_no_mapping_is_an_error_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(SpecError, match=rf"bad\.yaml.*{message}"):
        read_yaml(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_overrides_reach_into_branches_that_are_missing_or_null_and_leave_the_original_alone() -> None:
    data = {"train": None, "seed": 1}
    assert with_overrides(data, {"train.lora.rank": 4, "seed": 2}) == {"train": {"lora": {"rank": 4}}, "seed": 2}
    assert data == {"train": None, "seed": 1}


def test_a_key_that_is_itself_dotted_can_be_reached() -> None:
    data = {"search": {"pauses.every": {"grid": [1]}}}
    assert with_overrides(data, {"search.pauses.every.grid": [1, 2]}) == {"search": {"pauses.every": {"grid": [1, 2]}}}


def test_null_replaces_a_whole_branch() -> None:
    assert with_overrides({"train": {"max_steps": 3}}, {"train": None}) == {"train": None}


def test_assignments_are_yaml_on_the_right() -> None:
    assert parse_assignments(["a.b=[1, 2]", "c=null", "d=x=y"]) == {"a.b": [1, 2], "c": None, "d": "x=y"}


def test_an_assignment_without_equals_says_what_is_expected() -> None:
    with pytest.raises(SpecError, match=r"expected dotted\.path=value"):
        parse_assignments(["steps"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train.lora.rnk", r"did you mean train\.lora\.rank\?"),
        ("pauses.evry", r"did you mean pauses\.every\?"),
        ("train.max_steps.more", r"train\.max_steps is a plain value"),
        ("zzz", r"fields there: model, pauses"),
    ],
)
def test_an_unknown_path_is_refused_with_the_nearest_known_one(path: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_path(TrialSpec, path, origin="search")


def test_a_named_file_is_found_beside_or_above_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "deep").mkdir(parents=True)
    (tmp_path / "suite.yaml").write_text("name: above\ntask: {needles: needles.yaml}\n")
    (tmp_path / "needles.yaml").write_text("needles: []\n")
    origin = tmp_path / "sweeps" / "deep" / "x.yaml"
    assert find_file("suite.yaml", beside=origin) == tmp_path / "suite.yaml"
    inlined = inline_files({"eval": "suite.yaml"}, ("eval", "eval.task.needles"), origin=origin)
    assert inlined == {"eval": {"name": "above", "task": {"needles": {"needles": []}}}}


def test_a_named_file_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"names the file gone\.yaml"):
        find_file("gone.yaml", beside=tmp_path / "x.yaml")
