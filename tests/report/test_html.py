"""A sweep read back and laid out: what the report says, what it refuses to say, and that it stands alone."""

from __future__ import annotations

import base64
import csv
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from pause_ray.core.errors import StorageError
from pause_ray.core.format import format_duration, format_money, format_signed
from pause_ray.core.storage import Storage
from pause_ray.evaluation.statistics import BOOTSTRAP_UNITS
from pause_ray.report.findings import format_noise, headline, notes
from pause_ray.report.html import arms_csv, page, table, write_report
from pause_ray.report.results import SweepResults, read_results
from tests.stored_sweep import DEPTHS, LENGTHS, cell, grid, rows, several_facts, store_sweep, store_trial, sweep_of, with_control


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


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
    assert [condition.against_reference and condition.against_reference.other for condition in results.conditions] == [
        None,
        "baseline",
        "baseline",
    ]


def test_leaf_names_that_two_paths_share_are_written_in_full(storage: Storage) -> None:
    planned = [("t", "pause_tuned", {"corpus.num_sequences": 64, "other.num_sequences": 2}, 0)]
    assert (
        read_results(store_sweep(storage, planned), storage).conditions[0].label
        == "pause_tuned corpus.num_sequences=64 other.num_sequences=2"
    )


def test_a_searched_reference_is_compared_point_by_point(storage: Storage) -> None:
    planned = [(f"{arm}{rank}", arm, {"train.lora.rank": rank}, 0) for arm in ("plain", "paused") for rank in (4, 16)]
    planned.append(("u", "untuned", {}, 0))
    for trial, _, _, _ in planned:
        store_trial(storage, trial, rows({(1024, 50): 1.0}, trial=trial))
    results = read_results(store_sweep(storage, planned, compare_to="plain"), storage)
    compared = {condition.label: condition.against_reference and condition.against_reference.other for condition in results.conditions}
    assert compared == {
        "plain rank=4": None,
        "plain rank=16": None,
        "paused rank=4": "plain rank=4",
        "paused rank=16": "plain rank=16",
        "untuned": None,
    }
    assert any("Not compared, because plain has no single counterpart: untuned." in note for note in notes(results))


def test_corrected_p_counts_the_arms_of_the_sweep(storage: Storage) -> None:
    results = results_of(storage, {"baseline": 0.0, "one": 1.0, "two": 1.0, "three": 0.0})
    # All nine differ one way: 2/512 each; Holm's factors for the sorted p are 3, 2, 1, and equal p share the largest.
    corrected = {contrast.label: contrast.corrected_p for contrast in results.contrasts}
    assert corrected == {"one": pytest.approx(6 / 512), "two": pytest.approx(6 / 512), "three": 1.0}
    assert [condition.label for condition in results.conditions if condition.differs] == ["one", "two"]


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


def test_a_training_says_its_speed_memory_and_loss_on_held_out_rows(storage: Storage) -> None:
    def step(number: int, **more: float) -> dict[str, float]:
        measured = {"tokens": 900, "seconds": 1.0 * number, "padding_share": 0.1, "peak_memory_bytes": number * 2**30}
        return {"step": number, "loss": 1.0, **measured, **more}

    its = rows({(1024, 50.0): 1.0}, trial="t")
    store_trial(storage, "t", its, trained=True, training=[step(1, mfu=0.2), step(2, mfu=0.5, validation_loss=1.625)])
    store_trial(storage, "u", its, trained=True)
    folder = store_sweep(storage, [("t", "tuned", {}, 0), ("u", "without", {}, 0)], compare_to="tuned")
    drawn = {"training": "<svg></svg>"}
    shown = text_of(page(read_results(folder, storage), drawn))
    assert "tuned 1,800 600 10 % 40 % 2.0 GiB 1.625" in shown  # 1,800 tokens in 3 s; (0.2 + 2 × 0.5) / 3
    assert shown.count("Peak memory of a worker") == 1
    _, table = shown.split("Tokens per second")
    assert not table.split("Over all steps")[0].count("without"), "a log without these columns has no line"
    store_trial(storage, "v", its, trained=True)
    older = store_sweep(storage, [("v", "tuned", {}, 0)], compare_to="tuned", name="older")
    assert "Tokens per second" not in text_of(page(read_results(older, storage), drawn))


def test_unfinished_sweeps_say_so(storage: Storage) -> None:
    folder = sweep_of(storage, {"baseline": None, "pause_tuned": 0.5, "pauses_untuned": None})
    results = read_results(folder, storage)
    assert "nothing yet to compare" in headline(results)
    assert notes(results)[0] == "Unfinished: 1 of 3 trials finished. Missing in whole or in part: baseline and pauses_untuned."
    assert "1 of 3 trials finished" in shown_of(folder, storage)


def test_a_sweep_without_a_finished_trial_has_a_report(storage: Storage) -> None:
    path = write_report(read_results(sweep_of(storage, {"baseline": None, "pause_tuned": None}), storage))
    html = path.read_text(encoding="utf-8")
    assert "No trial has finished yet" in text_of(html)
    assert "<img" not in html


def test_a_ledger_that_still_grows_is_not_counted(storage: Storage) -> None:
    store_trial(storage, "b", rows({(1024, 10): 1.0}, trial="b"))
    store_trial(storage, "p", rows({(1024, 10): 0.0}, trial="p"), finished=False)
    results = read_results(store_sweep(storage, [("b", "baseline", {}, 0), ("p", "pause_tuned", {}, 0)]), storage)
    assert (results.progress, len(results.contrasts)) == ("1 of 2 trials finished", 0)


def test_unscored_cells_are_reported_with_their_reasons(storage: Storage) -> None:
    store_trial(storage, "b", rows({(1024, 10): 1.0, (1024, 50): None}, trial="b"))
    results = read_results(store_sweep(storage, [("b", "baseline", {}, 0)]), storage)
    assert any("baseline 1 of 2. Reasons: 1 × engine: out of memory." in note for note in notes(results))


def test_the_noise_floor_is_summed_by_precision_and_said_beside_the_scores(storage: Storage) -> None:
    for trial, dtype, changed in (("b", "bfloat16", 3), ("p", "bfloat16", 1), ("q", "nf4", 0)):
        noise = {"dtype": dtype, "cells": 12, "answers_changed": changed, "scores_changed": 0}
        store_trial(storage, trial, rows({(1024, 10): 1.0}, trial=trial), noise=noise)
    folder = store_sweep(storage, [("b", "baseline", {}, 0), ("p", "paused", {}, 0), ("q", "quantized", {}, 0)])
    coarse, coarser = format_noise(read_results(folder, storage))
    assert coarse.startswith("In bfloat16, 24 answered questions")
    assert "4 of 24 (17 %, 95 % interval 7 to 36 %) of the answers" in coarse  # Wilson's: 0.167, 0.067 to 0.359
    assert "0 of 24 (0 %, 95 % interval 0 to 14 %) of the scores" in coarse
    assert "12 answered questions" in coarser
    assert coarse in shown_of(folder, storage)


@pytest.mark.seconds
def test_suites_of_random_samples_and_several_facts_are_reported(storage: Storage) -> None:
    for trial, found in (("b", 0.0), ("p", 1.0)):
        asked = [(length, sample) for length in (1024, 2048) for sample in range(4)]
        results = [
            several_facts(length, [(20.0 * sample, 1.0), (35.0 + sample, found)], trial=trial, sample=sample) for length, sample in asked
        ]
        store_trial(storage, trial, results, suite={"samples": 4})
    folder = store_sweep(storage, [("b", "baseline", {}, 0), ("p", "paused", {}, 0)])
    shown = text_of(write_report(read_results(folder, storage)).read_text(encoding="utf-8"))
    assert "random, 4 per length" in shown
    assert "Facts per question 2" in shown
    assert "tenth of the prompt in which a fact landed, each fact with its own recall" in shown
    assert "Middle: questions whose first fact is at depths of 25 to 75 %" in shown
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
    assert re.search(r"baseline 0\.00 \S+ to \S+ 0\.50 \S+ to \S+ −0\.50 −0\.\S+ to \S+ reference", row)
    assert re.search(r"paused 1\.00 \S+ to \S+ 0\.50 \S+ to \S+ \+0\.50 \S+ to \S+ \+1\.00 \S+ to \S+ 0\.00 \S+ to \S+ \+1\.00", row)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a baseline that scores 0.25 and a trained arm that scores 0.75, on nine questions."""
    storage = Storage.open(tmp_path_factory.mktemp("report"))
    return write_report(read_results(sweep_of(storage, {"baseline": 0.25, "pause_tuned": 0.75}), storage))


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
    for part in ("Where the fact is found", "Where the arms differ from baseline", "Training corpora", "Provenance"):
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


def test_the_report_says_when_it_resamples(report: Path) -> None:
    assert f"from {BOOTSTRAP_UNITS} replicates on the replicate-clustered bootstrap" in text_of(report.read_text(encoding="utf-8"))


@pytest.mark.seconds
def test_the_same_storage_gives_the_same_report(report: Path) -> None:
    first = report.read_bytes()
    assert write_report(read_results(report.parent, Storage.open(report.parents[2]))).read_bytes() == first


def test_the_terminal_table_fits_a_terminal(storage: Storage) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(read_results(sweep_of(storage, {"baseline": 0.0, "pause_tuned": 0.5, "pauses_untuned": None}), storage)))
    shown = console.export_text()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("2 of 3 trials finished", "pause_tuned", "+0.50 [+0.08, +0.74]", "reference", "not finished"):
        assert words in shown


@pytest.mark.seconds
def test_markers_that_are_markup_elsewhere_are_shown_as_they_are(storage: Storage) -> None:
    # A tag of rich, a cell's end of Markdown, and mathematics that matplotlib could not parse.
    planned = [("b", "baseline", {}, 0), ("p", "paused", {"pauses.marker": "[pause]<|&|>$\\no{$"}, 0)]
    for trial, arm, _, _ in planned:
        store_trial(storage, trial, rows({(1024, 10): 1.0, (1024, 50): 0.0}, trial=trial, arm=arm))
    folder = store_sweep(storage, planned)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(read_results(folder, storage)))
    assert "paused marker=[pause]<|&|>$" in console.export_text()
    shown = write_report(read_results(folder, storage)).read_text(encoding="utf-8")
    assert "marker=[pause]&lt;|&amp;|&gt;$" in shown
    assert "<|&|>" not in shown


def test_the_p_of_the_terminal_is_the_corrected_one(storage: Storage) -> None:
    # Nine questions, all one way: 2/512, which Holm doubles for two arms.
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(read_results(sweep_of(storage, {"baseline": 0.0, "one": 1.0, "two": 1.0}), storage)))
    [line] = [line for line in console.export_text().splitlines() if line.strip().startswith("one ")]
    assert "0.008" in line


def test_a_damaged_ledger_is_named(storage: Storage) -> None:
    folder = sweep_of(storage, {"baseline": 0.0})
    ledger = storage.trials / "baseline-trial" / "cells.jsonl"
    ledger.write_text("no row\n" + ledger.read_text())
    with pytest.raises(StorageError, match=re.escape(str(ledger))):
        write_report(read_results(folder, storage))


def test_numbers_for_people() -> None:
    assert [format_signed(value) for value in (0.125, -0.5, 0.001, None)] == ["+0.12", "−0.50", "0.00", "–"]
    assert [format_duration(seconds) for seconds in (0.4, 41, 720, 9000)] == ["0.4 s", "41 s", "12 min", "2.5 h"]
    assert [format_money(amount) for amount in (1234.567, 0.000123)] == ["1,234.57", "0.00012"]


def test_reading_results_needs_no_plotting() -> None:
    names = ("matplotlib", "jinja2", "mlflow", "ray", "torch")
    program = f"import sys, pause_ray.report.html; sys.exit(any(name in sys.modules for name in {names}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
