"""A sweep read back and laid out: what the report says, what it refuses to say, and that it stands alone."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from pause_ray.errors import StorageError
from pause_ray.findings import headline, noise_words, notes
from pause_ray.report import arms_csv, page, table, write_report
from pause_ray.results import SweepResults, read_results
from pause_ray.storage import Storage
from pause_ray.words import duration, money, signed
from tests.stored_sweep import cell, grid, rows, several_facts, store_sweep, store_trial

LENGTHS, DEPTHS = (1024, 2048, 4096), (10.0, 50.0, 90.0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


def sweep_of(storage: Storage, arms: dict[str, float | None], *, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """One replicate per arm, all of whose cells have one score; None: not finished."""
    for arm, score in arms.items():
        if score is not None:
            scores = dict.fromkeys(itertools.product(lengths, DEPTHS), score)
            tuned = arm in ("pause_tuned", "tuned_without_pauses")
            store_trial(storage, f"{arm}-trial", rows(scores, trial=arm), trained=tuned, pauses=arm.startswith("pause"))
    return store_sweep(storage, [(f"{arm}-trial", arm, {}, 0) for arm in arms])


def results_of(storage: Storage, arms: dict[str, float | None], **changes: tuple[int, ...]) -> SweepResults:
    return read_results(sweep_of(storage, arms, **changes), storage)


def shown_of(folder: Path, storage: Storage) -> str:
    """What a reader sees of a sweep's report, figures and white space aside."""
    return text_of(page(read_results(folder, storage), {}))


def text_of(html: str) -> str:
    """What a reader sees of HTML, white space aside."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []
            self.hidden = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.hidden += tag in ("style", "script", "title")

        def handle_endtag(self, tag: str) -> None:
            self.hidden -= tag in ("style", "script", "title")

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                self.found.append(data)

    reader = Reader()
    reader.feed(html)
    return " ".join(" ".join(reader.found).split())


def test_conditions_are_arms_at_points_with_their_replicates(storage: Storage) -> None:
    planned = [("b0", "baseline", {}, 0), ("b1", "baseline", {}, 1)]
    planned += [(f"p{rank}{r}", "pause_tuned", {"train.lora.rank": rank, "pauses.every": 2}, r) for rank in (4, 16) for r in (0, 1)]
    for trial, _, _, replicate in planned:
        store_trial(storage, trial, rows({(1024, 50): 1.0}, trial=trial, replicate=replicate))
    results = read_results(store_sweep(storage, planned), storage)
    assert [condition.label for condition in results.conditions] == [
        "baseline",
        "pause_tuned rank=4 every=2",
        "pause_tuned rank=16 every=2",
    ]
    assert [len(condition.trials) for condition in results.conditions] == [2, 2, 2]
    assert [condition.compared_to for condition in results.conditions] == [None, "baseline", "baseline"]


def test_leaf_names_that_two_paths_share_are_written_in_full(storage: Storage) -> None:
    planned = [("t", "pause_tuned", {"corpus.rows": 64, "other.rows": 2}, 0)]
    assert read_results(store_sweep(storage, planned), storage).conditions[0].label == "pause_tuned corpus.rows=64 other.rows=2"


def test_a_searched_reference_is_compared_point_by_point(storage: Storage) -> None:
    planned = [(f"{arm}{rank}", arm, {"train.lora.rank": rank}, 0) for arm in ("plain", "paused") for rank in (4, 16)]
    planned.append(("u", "untuned", {}, 0))
    for trial, _, _, _ in planned:
        store_trial(storage, trial, rows({(1024, 50): 1.0}, trial=trial))
    results = read_results(store_sweep(storage, planned, compare_to="plain"), storage)
    compared = {condition.label: condition.compared_to for condition in results.conditions}
    assert compared == {
        "plain rank=4": None,
        "plain rank=16": None,
        "paused rank=4": "plain rank=4",
        "paused rank=16": "plain rank=16",
        "untuned": None,
    }
    assert any("Without one counterpart in plain, and so not compared: untuned." in note for note in notes(results))


def test_corrected_p_counts_the_arms_of_the_sweep(storage: Storage) -> None:
    results = results_of(storage, {"baseline": 0.0, "one": 1.0, "two": 1.0, "three": 0.0})
    # All nine differ one way: 2/512 each; Holm's factors for the sorted p are 3, 2, 1, and equal p share the largest.
    corrected = {condition.label: condition.corrected_p for condition in results.compared}
    assert corrected == {"one": pytest.approx(6 / 512), "two": pytest.approx(6 / 512), "three": 1.0}
    assert [condition.label for condition in results.conditions if condition.differs] == ["one", "two"]


def test_a_clear_difference_is_called_one(storage: Storage) -> None:
    said = headline(results_of(storage, {"baseline": 0.0, "pause_tuned": 0.5}))
    assert said.startswith("pause_tuned scored 0.50 higher than baseline on the same 9 questions")
    assert "more than chance would explain" in said


def test_a_difference_on_three_questions_is_not_called_one(storage: Storage) -> None:
    results = results_of(storage, {"baseline": 0.0, "pause_tuned": 1.0}, lengths=(1024,))
    assert "cannot tell the arms apart" in headline(results)
    assert any("p cannot be less than 0.25" in note for note in notes(results))


def test_worse_arms_are_called_worse(storage: Storage) -> None:
    said = headline(results_of(storage, {"baseline": 1.0, "pauses_untuned": 0.0, "pause_tuned": 1.0}))
    assert said.startswith("No arm scored higher than baseline: the closest, pause_tuned, differs by +0.00")
    assert said.endswith("pauses_untuned scored lower than chance would explain.")


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
    assert said.endswith("more than chance would explain; down scored lower than chance would explain.")


def test_one_replicate_claims_its_haystack_and_wording_only(storage: Storage) -> None:
    assert "9 questions, on this haystack and wording (" in headline(results_of(storage, {"baseline": 0.0, "pause_tuned": 0.5}))


def with_control(storage: Storage, scores: dict[str, float], *, control: str | None = "tuned_without_pauses") -> Path:
    sweep_of(storage, scores)
    return store_sweep(storage, [(f"{arm}-trial", arm, {}, 0) for arm in scores], control=control)


def test_what_tuning_did_is_not_called_an_effect_of_pauses(storage: Storage) -> None:
    folder = with_control(storage, {"baseline": 0.0, "tuned_without_pauses": 1.0, "pause_tuned": 1.0, "pauses_untuned": 0.0})
    results = read_results(folder, storage)
    said = headline(results)
    assert "1.00 higher than baseline" in said
    assert "Against tuned_without_pauses, which was tuned the same way on the same texts without pauses, pause_tuned differs" in said
    assert said.endswith("): nothing here is shown to be due to the pauses.")
    assert [(its.label, its.other) for its in results.control_contrasts] == [("pause_tuned", "tuned_without_pauses")]
    assert "Against tuned_without_pauses: what the pauses add beyond tuning" in shown_of(folder, storage)
    rows_of = {row["arm"]: row for row in csv.DictReader(io.StringIO(arms_csv(results)))}
    assert (rows_of["pause_tuned"]["control"], rows_of["pause_tuned"]["control_difference"]) == ("tuned_without_pauses", "0.0")
    assert rows_of["pauses_untuned"]["control"] == ""
    assert not any("confounded" in note for note in notes(results))


def test_what_pauses_add_and_cost_is_said(storage: Storage) -> None:
    better = headline(read_results(with_control(storage, {"baseline": 0.0, "tuned_without_pauses": 0.0, "pause_tuned": 1.0}), storage))
    assert better.endswith("more than chance would explain, and so an effect of the pauses.")
    other = Storage.open(storage.root / "other")
    worse = headline(read_results(with_control(other, {"baseline": 0.0, "tuned_without_pauses": 1.0, "pause_tuned": 0.0}), other))
    assert "pause_tuned differs by -1.00" in worse
    assert worse.endswith("with pauses pause_tuned scored lower than chance would explain.")
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
            spec = {"model": 1, "train": {"steps": steps, "lora": {"rank": rank}}, "pauses": pauses}
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
    spec.write_text(spec.read_text().replace('"steps": 3', '"steps": 4'))
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


def test_a_ledger_that_lost_cells_is_named_with_its_remedy(storage: Storage) -> None:
    folder = sweep_of(storage, {"baseline": 0.0})
    ledger = storage.trials / "baseline-trial" / "cells.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(StorageError, match=r"8 cells and manifest\.json says 9; remove manifest\.json") as caught:
        read_results(folder, storage)
    assert str(ledger.parent) in str(caught.value)


def test_costs_are_summed_over_interruptions(report: Path) -> None:
    shown = text_of(report.read_text(encoding="utf-8"))
    assert "Seconds are summed from the training logs and the ledgers" in shown
    assert "Whole trial" not in shown


def test_unfinished_sweeps_say_so(storage: Storage) -> None:
    folder = sweep_of(storage, {"baseline": None, "pause_tuned": 0.5, "pauses_untuned": None})
    results = read_results(folder, storage)
    assert "nothing yet to compare" in headline(results)
    assert notes(results)[0] == "Unfinished: 1 of 3 trials finished. Missing in whole or in part: baseline and pauses_untuned."
    assert "1 of 3 trials finished" in shown_of(folder, storage)


def test_a_sweep_without_a_finished_trial_has_a_report(storage: Storage) -> None:
    path = write_report(sweep_of(storage, {"baseline": None, "pause_tuned": None}), storage)
    html = path.read_text(encoding="utf-8")
    assert "No trial has finished yet" in text_of(html)
    assert "<img" not in html


def test_a_ledger_that_still_grows_is_not_counted(storage: Storage) -> None:
    store_trial(storage, "b", rows({(1024, 10): 1.0}, trial="b"))
    store_trial(storage, "p", rows({(1024, 10): 0.0}, trial="p"), finished=False)
    results = read_results(store_sweep(storage, [("b", "baseline", {}, 0), ("p", "pause_tuned", {}, 0)]), storage)
    assert (results.progress, len(results.compared)) == ("1 of 2 trials finished", 0)


def test_unscored_cells_are_reported_with_their_reasons(storage: Storage) -> None:
    store_trial(storage, "b", rows({(1024, 10): 1.0, (1024, 50): None}, trial="b"))
    results = read_results(store_sweep(storage, [("b", "baseline", {}, 0)]), storage)
    assert any("baseline 1 of 2. Reasons: 1 × engine: out of memory." in note for note in notes(results))


def test_the_noise_floor_is_summed_by_precision_and_said_beside_the_scores(storage: Storage) -> None:
    for trial, dtype, changed in (("b", "bfloat16", 3), ("p", "bfloat16", 1), ("q", "nf4", 0)):
        noise = {"dtype": dtype, "cells": 12, "answers_changed": changed, "scores_changed": 0}
        store_trial(storage, trial, rows({(1024, 10): 1.0}, trial=trial), noise=noise)
    folder = store_sweep(storage, [("b", "baseline", {}, 0), ("p", "paused", {}, 0), ("q", "quantized", {}, 0)])
    coarse, coarser = noise_words(read_results(folder, storage))
    assert coarse.startswith("In bfloat16, 24 answered questions")
    assert "4 of 24 (17 %, 95 % interval 7 to 36 %) of the answers" in coarse  # Wilson's: 0.167, 0.067 to 0.359
    assert "0 of 24 (0 %, 95 % interval 0 to 14 %) of the scores" in coarse
    assert "12 answered questions" in coarser
    assert coarse in shown_of(folder, storage)


def test_precision_that_was_not_rechecked_is_noted(storage: Storage) -> None:
    for trial, dtype, kind in (("a", "bfloat16", "hf"), ("b", "float32", "hf"), ("c", "bfloat16", "endpoint")):
        store_trial(storage, trial, rows({(1024, 10): 1.0}, trial=trial), spec={"model": {"dtype": dtype}, "engine": {"kind": kind}})
    found = notes(read_results(store_sweep(storage, [(trial, trial, {}, 0) for trial in "abc"]), storage))
    assert [note for note in found if "below float32" in note and note.endswith("(engine.recheck_cells): a.")]


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
    assert any("Scores of different scorers are averaged: baseline 1 keywords, 1 judge." in note for note in found)


def test_suites_of_random_samples_and_several_facts_are_reported(storage: Storage) -> None:
    for trial, found in (("b", 0.0), ("p", 1.0)):
        asked = [(length, sample) for length in (1024, 2048) for sample in range(4)]
        results = [
            several_facts(length, [(20.0 * sample, 1.0), (35.0 + sample, found)], trial=trial, sample=sample) for length, sample in asked
        ]
        store_trial(storage, trial, results, suite={"samples": 4})
    folder = store_sweep(storage, [("b", "baseline", {}, 0), ("p", "paused", {}, 0)])
    shown = text_of(write_report(folder, storage).read_text(encoding="utf-8"))
    assert "random, 4 per length" in shown
    assert "Facts per question 2" in shown
    assert "tenth of the prompt in which a fact landed, each fact with its own recall" in shown
    assert (folder / "figures" / "recall.png").is_file()
    [contrast] = read_results(folder, storage).contrasts
    assert (contrast.comparison.num_pairs, contrast.difference) == (8, 0.5)


def test_costs_say_what_reuse_saved_and_what_an_endpoint_took(storage: Storage) -> None:
    spec = {"engine": {"kind": "endpoint", "prices": {"currency": "EUR"}}}
    found = rows(grid((1000,), (10, 50, 90), lambda _, depth: None if depth == 90 else 1.0), trial="b", prefilled_tokens=250, cost=0.25)
    store_trial(storage, "b", found, spec=spec)
    shown = shown_of(store_sweep(storage, [("b", "baseline", {}, 0)]), storage)
    assert "2,000 500 75 % 24 3.0 s 0.75 EUR" in shown  # the cell without an answer cost seconds and money, and saved nothing
    assert "engine: out of memory 1 baseline 1" in shown


def test_the_middle_and_its_edges_are_compared_apart(storage: Storage) -> None:
    for trial, middle in (("b", 0.0), ("p", 1.0)):
        scores = grid(LENGTHS, DEPTHS, lambda _, depth, middle=middle: middle if depth == 50 else 0.5)
        store_trial(storage, trial, rows(scores, trial=trial))
    shown = shown_of(store_sweep(storage, [("b", "baseline", {}, 0), ("p", "paused", {}, 0)]), storage)
    row = shown[shown.index("Gain in the middle") :]
    assert re.search(r"baseline 0\.00 \S+ to \S+ 0\.50 \S+ to \S+ −0\.50 reference", row)
    assert re.search(r"paused 1\.00 \S+ to \S+ 0\.50 \S+ to \S+ \+0\.50 \+1\.00 \S+ to \S+ 0\.00 \S+ to \S+ \+1\.00", row)


def test_permitted_overlap_is_reported(storage: Storage) -> None:
    for trial, overlap in (("fair", None), ("unfair", {"documents": ["ab"], "rows": []})):
        store_trial(storage, trial, rows({(1024, 10): 1.0}, trial=trial), trained=True, evaluation_overlap=overlap)
    results = read_results(store_sweep(storage, [("fair", "one", {}, 0), ("unfair", "two", {}, 0)]), storage)
    assert [note for note in notes(results) if "overlaps with the evaluation" in note and note.endswith(": two.")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a baseline that scores 0.25 and a trained arm that scores 0.75, on nine questions."""
    storage = Storage.open(tmp_path_factory.mktemp("report"))
    return write_report(sweep_of(storage, {"baseline": 0.25, "pause_tuned": 0.75}), storage)


def test_the_report_needs_nothing_from_outside(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert references
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in references)
    assert "<script" not in html
    assert "@import" not in html
    for reference in references:
        figure = base64.b64decode(reference.partition(",")[2]).decode()
        assert all(inner.startswith(("#", "data:")) for inner in re.findall(r"""href="([^"]*)""", figure))
        assert all(inner.startswith("#") for inner in re.findall(r"""url\(([^)]*)""", figure))


def test_answers_of_a_model_cannot_become_markup(storage: Storage) -> None:
    store_trial(storage, "b", [cell(1024, 10, 0.0, trial="b", response="<script>alert(1)</script> & <PAUSE>")])
    html = page(read_results(store_sweep(storage, [("b", "baseline", {}, 0)]), storage), {})
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;PAUSE&gt;" in html


def test_the_report_shows_arms_training_corpus_and_how_it_was_made(report: Path) -> None:
    shown = text_of(report.read_text(encoding="utf-8"))
    for part in ("Where the fact is found", "Where the arms differ from baseline", "Training corpora", "How it was made"):
        assert part in shown
    assert "+0.50" in shown
    assert "0.750" in shown  # the last training loss
    assert "pause-ray sweep sweeps/demo.yaml" in shown
    assert "257 to 512 5" in shown  # a bin of the row lengths
    assert "11.2" in shown  # pauses per 1K tokens, three digits


def test_figures_for_papers_and_the_table_of_arms_lie_beside_it(report: Path) -> None:
    folder = report.parent
    for name in ("heatmaps", "differences", "profiles", "training"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    with (folder / "arms.csv").open(encoding="utf-8") as file:
        base, tuned = csv.DictReader(file)
    assert (base["arm"], base["score"], base["difference"]) == ("baseline", "0.25", "")
    assert (tuned["score"], tuned["difference"], tuned["score_2048_tokens"], tuned["pairs"]) == ("0.75", "0.5", "0.75", "9")
    assert (tuned["score_change_percent"], tuned["exact_recall_difference"], tuned["middle_gain"]) == ("200.0", "0.0", "0.0")


def test_the_same_storage_gives_the_same_report(report: Path) -> None:
    first = report.read_bytes()
    assert write_report(report.parent, Storage.open(report.parents[2])).read_bytes() == first


def test_the_terminal_table_fits_a_terminal(storage: Storage) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(sweep_of(storage, {"baseline": 0.0, "pause_tuned": 0.5, "pauses_untuned": None}), storage))
    shown = console.export_text()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("2 of 3 trials finished", "pause_tuned", "+0.50 [+0.08, +0.74]", "reference", "not finished"):
        assert words in shown


def test_a_damaged_ledger_is_named(storage: Storage) -> None:
    folder = sweep_of(storage, {"baseline": 0.0})
    ledger = storage.trials / "baseline-trial" / "cells.jsonl"
    ledger.write_text("no row\n" + ledger.read_text())
    with pytest.raises(StorageError, match=re.escape(str(ledger))):
        write_report(folder, storage)


def test_numbers_for_people() -> None:
    assert [signed(value) for value in (0.125, -0.5, 0.001, None)] == ["+0.12", "−0.50", "0.00", "–"]
    assert [duration(seconds) for seconds in (0.4, 41, 720, 9000)] == ["0.4 s", "41 s", "12 min", "2.5 h"]
    assert [money(amount) for amount in (1234.567, 0.000123)] == ["1,234.57", "0.00012"]


def test_reading_results_needs_no_plotting() -> None:
    program = (
        "import sys, pause_ray.report; sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2', 'mlflow', 'ray', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
