"""What is said of a sweep: claims that the data hold, and warnings where a reader would believe too much."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pause_ray.core.storage import Storage
from pause_ray.report.findings import headline, notes
from pause_ray.report.results import SweepResults, read_results
from tests.stored_sweep import DEPTHS, LENGTHS, cell, rows, store_sweep, store_trial, sweep_of, with_control


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


def results_of(storage: Storage, arms: dict[str, float | None], **changes: tuple[int, ...]) -> SweepResults:
    return read_results(sweep_of(storage, arms, **changes), storage)


def test_a_clear_difference_is_called_one(storage: Storage) -> None:
    said = headline(results_of(storage, {"baseline": 0.0, "pause_tuned": 0.5}))
    assert said.startswith("pause_tuned scored 0.50 higher than baseline on the same 9 questions")
    assert "more than chance would explain" in said


def test_a_difference_on_three_questions_is_not_called_one(storage: Storage) -> None:
    results = results_of(storage, {"baseline": 0.0, "pause_tuned": 1.0}, lengths=(1024,))
    assert "shows no difference between the arms" in headline(results)
    assert any("p cannot be less than 0.25" in note for note in notes(results))


def test_worse_arms_are_called_worse(storage: Storage) -> None:
    said = headline(results_of(storage, {"baseline": 1.0, "pauses_untuned": 0.0, "pause_tuned": 1.0}))
    assert said.startswith("No arm scored higher than baseline: the closest, pause_tuned, differs by 0.00")
    assert said.endswith("pauses_untuned scored lower by more than chance would explain.")


def test_the_headline_is_about_an_arm_that_differs(storage: Storage) -> None:
    # "luck" is right on four of nine and has the higher mean, 0.44 with p = 2/16; "steady" has 0.42 everywhere, p = 2/512.
    scores = {
        "baseline": [0.0] * 9,
        "luck": [1.0] * 4 + [0.0] * 5,
        "steady": [0.42] * 9,
    }
    for arm, values in scores.items():
        store_trial(storage, arm, rows(dict(zip(itertools.product(LENGTHS, DEPTHS), values, strict=True)), trial=arm))
    said = headline(read_results(store_sweep(storage, [(arm, arm, {}, 0) for arm in scores]), storage))
    assert said.startswith("steady, one of 2 arms, scored 0.42 higher than baseline")
    assert "lower" not in said
    assert "No arm" not in said


def test_better_and_worse_arms_are_both_named(storage: Storage) -> None:
    said = headline(results_of(storage, {"baseline": 0.5, "up": 1.0, "down": 0.0}))
    assert said.startswith("up, the best of 2 arms, scored 0.50 higher than baseline")
    assert said.endswith("more than chance would explain; down scored lower by more than chance would explain.")


def test_one_replicate_claims_its_haystack_and_wording_only(storage: Storage) -> None:
    assert "9 questions, on this haystack and wording (" in headline(results_of(storage, {"baseline": 0.0, "pause_tuned": 0.5}))


def test_what_pauses_add_and_cost_is_said(storage: Storage) -> None:
    scores = {"baseline": 0.0, "tuned_without_pauses": 0.0, "pause_tuned": 1.0}
    better = headline(read_results(with_control(storage, scores), storage))
    assert better.endswith("more than chance would explain, by the pauses or by the luck of one training run each.")
    for arm, score in scores.items():
        again = rows({(length, depth): score for length in LENGTHS for depth in DEPTHS}, trial=f"{arm}-1", replicate=1)
        store_trial(storage, f"{arm}-1", again, trained="tuned" in arm, pauses="pause_" in arm)
    planned = [(f"{arm}-{trial}", arm, {}, number) for arm in scores for number, trial in enumerate(("trial", "1"))]
    twice = headline(read_results(store_sweep(storage, planned, control="tuned_without_pauses"), storage))
    assert twice.endswith("more than chance would explain, and so an effect of the pauses.")
    other = Storage.open(storage.root / "other")
    worse = headline(read_results(with_control(other, {"baseline": 0.0, "tuned_without_pauses": 1.0, "pause_tuned": 0.0}), other))
    assert "pause_tuned differs by −1.00" in worse
    assert worse.endswith("with pauses pause_tuned scored lower by more than chance would explain.")
    assert "effect of the pauses" not in worse


def test_without_a_control_tuning_and_pauses_are_confounded(storage: Storage) -> None:
    scores = {"baseline": 0.0, "tuned_without_pauses": 1.0, "pause_tuned": 1.0}
    results = read_results(with_control(storage, scores, control=None), storage)
    [note] = [note for note in notes(results) if "confounded" in note]
    assert note.endswith("To tell them apart, set control: tuned_without_pauses.")
    assert "Against" not in headline(results)


def test_a_control_is_chosen_point_by_point_and_must_be_tuned_alike(storage: Storage) -> None:
    planned = [("b", "baseline", {}, 0)]
    for arm, pauses in (("plain", None), ("paused", {"every": 2})):
        for rank in (4, 16):
            planned.append((f"{arm}{rank}", arm, {"train.lora.rank": rank}, 0))
            steps = 3 if (arm, rank) != ("paused", 16) else 9
            spec = {"model": 1, "train": {"max_steps": steps, "lora": {"rank": rank}}, "pauses": pauses}
            store_trial(storage, f"{arm}{rank}", rows({(1024, 50): 1.0}, trial=f"{arm}{rank}"), spec=spec)
    store_trial(storage, "b", rows({(1024, 50): 1.0}, trial="b"))
    results = read_results(store_sweep(storage, planned, control="plain"), storage)
    assert {its.label: its.other for its in results.control_contrasts} == {
        "paused rank=4": "plain rank=4",
        "paused rank=16": "plain rank=16",
    }
    assert [note for note in notes(results) if "differ in more than pauses" in note] == [
        "paused rank=16 and its control plain rank=16 differ in more than pauses: train."
    ]


def test_a_control_that_was_tuned_otherwise_proves_no_effect_of_pauses(storage: Storage) -> None:
    folder = with_control(storage, {"baseline": 0.0, "tuned_without_pauses": 0.0, "pause_tuned": 1.0})
    spec = storage.trials / "tuned_without_pauses-trial" / "spec.json"
    spec.write_text(spec.read_text().replace('"max_steps": 3', '"max_steps": 4'))
    said = headline(read_results(folder, storage))
    assert "Against tuned_without_pauses, which differs in train too" in said
    assert said.endswith("more than chance would explain, by the pauses or by that.")


def test_notes_say_how_many_replicates_the_compared_arms_need(storage: Storage) -> None:
    arms = ("baseline", "one", "two", "three", "four")
    for arm, replicate in itertools.product(arms, range(6)):
        scores = dict.fromkeys(itertools.product(LENGTHS, DEPTHS), 0.1 * replicate if arm != "baseline" else 0.0)
        store_trial(storage, f"{arm}{replicate}", rows(scores, trial=f"{arm}{replicate}", replicate=replicate))
    planned = [(f"{arm}{replicate}", arm, {}, replicate) for arm in arms for replicate in range(6)]
    results = read_results(store_sweep(storage, planned), storage)
    assert any("With 4 compared arms that takes 8 replicates." in note for note in notes(results))  # 4 × 2^-7 = 0.031
    assert results.conditions[1].differs  # at six replicates an effect in every cell can still be shown


def test_answers_that_were_cut_off_are_counted_where_arms_differ(storage: Storage) -> None:
    store_trial(storage, "b", rows({(1024, 10): 1.0, (1024, 50): 1.0}, trial="b", decoded_tokens=48))
    store_trial(storage, "p", [cell(1024, 10, 1.0, trial="p", decoded_tokens=48), cell(1024, 50, 1.0, trial="p")])
    both = notes(read_results(store_sweep(storage, [("b", "baseline", {}, 0), ("p", "paused", {}, 0)]), storage))
    assert any("max_new_tokens without an end" in note and note.endswith("baseline 2 of 2 and paused 1 of 2.") for note in both)
    one = notes(read_results(store_sweep(storage, [("b", "baseline", {}, 0)]), storage))
    assert not any("max_new_tokens" in note for note in one)


def test_repeated_prompts_are_noted(storage: Storage) -> None:
    store_trial(storage, "b", rows({(1024, 10): 1.0, (1024, 11): 1.0, (1024, 50): 0.0}, trial="b", needle_token=9))
    found = notes(read_results(store_sweep(storage, [("b", "baseline", {}, 0)]), storage))
    assert any(note.endswith("repeated cells: baseline 2 of 3.") for note in found)


def test_precision_that_was_not_rechecked_is_noted(storage: Storage) -> None:
    for trial, dtype, kind in (("a", "bfloat16", "hf"), ("b", "float32", "hf"), ("c", "bfloat16", "endpoint")):
        store_trial(storage, trial, rows({(1024, 10): 1.0}, trial=trial), spec={"model": {"dtype": dtype}, "engine": {"kind": kind}})
    found = notes(read_results(store_sweep(storage, [(trial, trial, {}, 0) for trial in "abc"]), storage))
    assert [note for note in found if "below float32" in note and note.endswith("(engine.numerics_check_cells): a.")]


def test_near_ties_are_noted_where_they_are_many(storage: Storage) -> None:
    def told(near: int) -> list[str]:
        found = [cell(1024, depth, 1.0, trial="b", margin=0.01 if depth < near else 2.0) for depth in range(50)]
        place = Storage.open(storage.root / str(near))
        store_trial(place, "b", found)
        return [note for note in notes(read_results(store_sweep(place, [("b", "baseline", {}, 0)]), place)) if "near-ties" in note]

    assert told(0) == told(1) == []
    assert told(2)[0].endswith("baseline 2 of 50.")


def test_what_the_design_could_not_have_seen_is_said_only_where_nothing_was_seen(storage: Storage) -> None:
    scores = {"baseline": [0.0] * 9 + [1.0], "same": [1.0] + [0.0] * 9, "better": [1.0] * 10}
    for arm, values in scores.items():
        store_trial(storage, arm, [cell(1024, 10 * place, value, trial=arm) for place, value in enumerate(values)])
    results = read_results(store_sweep(storage, [(arm, arm, {}, 0) for arm in scores]), storage)
    [missed, seen] = results.contrasts
    assert seen.differs
    [note] = [note for note in notes(results) if "four times of five" in note]
    assert f"four times of five: same against baseline {missed.comparison.detectable:.2f}." in note


def test_arms_that_read_unequal_text_are_named_with_how_much(storage: Storage) -> None:
    store_trial(storage, "b", rows({(1000, 10): 1.0, (1000, 50): 1.0}, trial="b", content_tokens=1000))
    store_trial(storage, "p", rows({(1000, 10): 1.0, (1000, 50): 1.0}, trial="p", content_tokens=800))
    found = notes(read_results(store_sweep(storage, [("b", "baseline", {}, 0), ("p", "paused", {}, 0)]), storage))
    assert any(note.startswith("paused read 20 % less text per asked token than baseline") for note in found)


def test_scores_of_different_scorers_are_not_averaged_in_silence(storage: Storage) -> None:
    store_trial(storage, "b", [cell(1024, 10, 1.0, trial="b"), cell(1024, 50, 1.0, trial="b", scorer="judge")])
    found = notes(read_results(store_sweep(storage, [("b", "baseline", {}, 0)]), storage))
    assert any("Means mix scores of different scorers: baseline 1 keywords, 1 judge." in note for note in found)


def test_permitted_overlap_is_reported(storage: Storage) -> None:
    for trial, overlap in (("fair", None), ("unfair", {"documents": ["ab"], "rows": []})):
        store_trial(storage, trial, rows({(1024, 10): 1.0}, trial=trial), trained=True, evaluation_overlap=overlap)
    results = read_results(store_sweep(storage, [("fair", "one", {}, 0), ("unfair", "two", {}, 0)]), storage)
    assert [note for note in notes(results) if "overlaps with the evaluation" in note and note.endswith(": two.")]
