"""Generated results in both formats of the original tester become ledgers, and mistakes in them are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SourceError
from pause_ray.evaluation.compare import compare_arms
from pause_ray.evaluation.imported import Naming, import_results
from pause_ray.evaluation.ledger import UNKNOWN_TOKEN, Ledger
from pause_ray.evaluation.rescore import rescore

LENGTHS, DEPTHS = (1000, 2000, 4000), (10.0, 16.0, 50.0, 74.0, 100.0)
NEEDLE = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"


def write_folder(folder: Path, grade: Callable[[int, float], object], *, second: int = 0, **changes: Any) -> Path:
    """Write one run in the format of version 0.1: a file per cell, named after model, length and depth × 100."""
    folder.mkdir(parents=True)
    for number, (length, depth) in enumerate((length, depth) for length in LENGTHS for depth in DEPTHS):
        result = {
            "model": "meta-llama/Llama-3.2-3B-Instruct",
            "context_length": length,
            "depth_percent": depth,
            "version": 1,
            "needle": NEEDLE,
            "model_response": f"Answer {number} of {folder.parent.name} {folder.name}",
            "score": grade(length, depth),
            "test_duration_seconds": 1.5 + number / 7 + second / 90,
            "test_timestamp_utc": f"2025-01-10 04:{number:02}:{second:02}+0000",
        } | changes
        name = f"Llama-3_2-3B-Instruct_len_{length}_depth_{int(depth * 100)}_results.json"
        (folder / name).write_text(json.dumps({key: value for key, value in result.items() if value is not ...}))
    return folder


def some_file(folder: Path) -> Path:
    return sorted(folder.glob("*.json"))[0]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def version_2(length: int, depth: float, *, seed: int | None = None, score: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """Return one line of a multi-needle run of version 2."""
    words = ["figs", "goat cheese"][: None if score in (None, 1.0) else 1]
    result = {
        "schema_version": 2,
        "run_name": "pizza",
        "model_id": "some-model",
        "model_request_name": "some-model-2026",
        "task_type": "multi",
        "context_length": length,
        "target_depth_percent": depth,
        "recipe": {
            "haystack": {"type": "files"},
            "inserter": "even_spread",
            "needle_placements": [
                {"text": "Figs are one of them.", "insertion_token_index": 120, "actual_depth_percent": depth},
                {"text": "Goat cheese is one of them.", "insertion_token_index": 640, "actual_depth_percent": 70.5},
            ],
            "final_context_token_count": length + 14,
        },
        "needle_metadata": {"expected_fragments": ["figs", "goat cheese"]},
        "expected_answer": "figs / goat cheese",
        "prompt_question": "What are the secret ingredients?",
        "response": None if score is None else f"They are {' and '.join(words)}.",
        "score": None if score is None else {"value": score, "details": {"matches": len(words), "total": 2}},
        "usage": None if score is None else {"input_tokens": length + 40, "output_tokens": 12},
        "cost_usd": None if score is None else 0.0125,
        "duration_seconds": 2.5 + length / 1000 + depth,
        "status": "error" if score is None else "ok",
        "error": "timeout" if score is None else None,
        "timestamp_utc": f"2026-06-08T10:00:00.{length}{int(depth):03}{seed or 0}+00:00",
        "seed": seed,
    }
    return result | changes


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_cell_becomes_a_row_with_its_grade(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "3B base", lambda length, depth: 10 if depth == 100 else 1 if length > 1000 else 7)
    done = import_results([folder], out=tmp_path / "base.jsonl")
    rows = Ledger(tmp_path / "base.jsonl").rows()
    assert {(row.context_tokens, row.depth_percent) for row in rows} == {(length, depth) for length in LENGTHS for depth in DEPTHS}
    assert {(row.rubric, row.score) for row in rows} == {(10, 1.0), (1, 0.0), (7, 6 / 9)}
    assert {row.arm for row in rows} == {"3B base"}
    assert {(row.scorer, row.engine, row.replicate, row.needle_token) for row in rows} == {
        ("judge (imported)", "imported", 0, UNKNOWN_TOKEN)
    }
    assert {(row.facts[0].text, row.pauses, row.prompt_tokens == row.context_tokens) for row in rows} == {
        (NEEDLE.strip(), "unknown (imported)", True)
    }
    assert (done.num_results, done.num_added, done.num_unscored, done.num_lengths, done.num_depths, done.notes) == (15, 15, 0, 3, 5, ())
    assert (done.arm, done.model) == ("3B base", "meta-llama/Llama-3.2-3B-Instruct")


def test_two_imported_arms_show_the_effect_that_was_put_into_them(tmp_path: Path) -> None:
    # Base: 4 everywhere, three runs. Tuned: 4, 6 and 8 at the three lengths: mean of 0 %, 50 % and 100 %. (0 + 2 + 4)/9/3 = 2/9.
    tuned = {1000: 4, 2000: 6, 4000: 8}
    for arm, grade in (("base", lambda length, depth: 4), ("tuned", lambda length, depth: tuned[length])):
        runs = [write_folder(tmp_path / arm / f"r{run}", grade, second=10 * run + len(arm)) for run in range(3)]
        import_results(runs, out=tmp_path / f"{arm}.jsonl", naming=Naming(arm=arm))
    comparison = compare_arms(Ledger(tmp_path / "tuned.jsonl").rows(), Ledger(tmp_path / "base.jsonl").rows())
    assert comparison is not None
    assert (comparison.num_pairs, comparison.num_unpaired, comparison.num_replicates) == (45, 0, 3)
    assert comparison.effects.relative is not None
    assert comparison.effects.relative.value == pytest.approx(50)
    assert comparison.difference == pytest.approx(2 / 9)
    assert comparison.difference_by_length == {1000: pytest.approx(0), 2000: pytest.approx(2 / 9), 4000: pytest.approx(4 / 9)}
    assert comparison.warnings == ()


def test_importing_again_adds_nothing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", lambda length, depth: None if depth == 50 else 3)
    first = import_results([folder], out=tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    again = import_results([folder], out=tmp_path / "a.jsonl")
    assert (first.num_added, again.num_added, first.num_unscored) == (15, 0, 3)
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_folder_without_results_says_where_there_are_some(tmp_path: Path) -> None:
    write_folder(tmp_path / "all" / "r1" / "results", lambda *_: 3)
    with pytest.raises(SourceError, match=r"has no results.*r1/results"):
        import_results([tmp_path / "all"], out=tmp_path / "a.jsonl")
    with pytest.raises(SourceError, match="no such file or folder"):
        import_results([tmp_path / "nowhere"], out=tmp_path / "a.jsonl")


def test_the_arm_is_named_after_the_folder_but_not_after_one_called_results(tmp_path: Path) -> None:
    runs = [write_folder(tmp_path / "tuned" / f"r{run}" / "results", lambda *_: 10, second=run) for run in range(2)]
    assert import_results([runs[0].parent], out=tmp_path / "1.jsonl").arm == "r0"
    assert import_results([runs[0]], out=tmp_path / "2.jsonl").arm == "r0"
    assert import_results(runs, out=tmp_path / "3.jsonl").arm == "tuned"


@pytest.mark.parametrize(("answer", "response"), [({"text": "Eat a sandwich."}, "Eat a sandwich."), (None, None)])
def test_the_answer_may_be_an_object_or_missing(tmp_path: Path, answer: object, response: str | None) -> None:
    folder = write_folder(tmp_path / "a", lambda *_: 5, model_response=answer)
    done = import_results([folder], out=tmp_path / "a.jsonl")
    assert {row.response for row in Ledger(tmp_path / "a.jsonl").rows()} == {response}
    assert done.num_unscored == (15 if response is None else 0)


@pytest.mark.parametrize(
    ("score", "reason"), [(..., "no score"), (None, "no score"), (0, "no grade"), (7.5, "no grade"), ("8", "no grade"), (True, "no grade")]
)
def test_a_cell_without_a_grade_is_unscored_and_not_zero(tmp_path: Path, score: object, reason: str) -> None:
    folder = write_folder(tmp_path / "a", lambda length, depth: score if depth == 50 else 3)
    done = import_results([folder], out=tmp_path / "a.jsonl")
    unscored = [row for row in Ledger(tmp_path / "a.jsonl").rows() if row.score is None]
    assert {row.depth_percent for row in unscored} == {50.0}
    assert all(reason in str(row.unscored_reason) for row in unscored)
    assert any("3 cells are unscored" in note for note in done.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model: required, and missing"),
        ({"depth_percent": 250.0}, "depth_percent = 250.0: .*less than or equal to 100"),
        ({"context_length": "1000"}, 'context_length = "1000": .*valid integer'),
        ({"context_length": 0}, "context_length = 0"),
        ({"model_response": 7}, "model_response.* = 7"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_folder(tmp_path / "a", lambda *_: 3)
    path = some_file(folder)
    edit(path, **changes)
    with pytest.raises(SourceError, match=rf"{path.name}: is no result .*{message}"):
        import_results([folder], out=tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("content", [b"{not json", b"[1, 2]", b"\xff\xfe\xfa"])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_folder(tmp_path / "a", lambda *_: 3)
    (folder / "notes.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"notes.json: is no result .*remove it"):
        import_results([folder], out=tmp_path / "a.jsonl")


def test_two_results_of_one_cell_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", lambda *_: 3)
    second = folder / "z_again.json"
    second.write_text(some_file(folder).read_text())
    edit(second, score=9, test_timestamp_utc="2025-01-21 00:00:00+0000")
    with pytest.raises(SourceError, match=rf"{some_file(folder).name} and .*{second.name} answer one cell \(1000 tokens, 100 %\)"):
        import_results([folder], out=tmp_path / "a.jsonl")
    edit(second, version=2)
    assert import_results([folder], out=tmp_path / "a.jsonl").notes == ("replicate 1 has 1 of 15 cells",)


def test_a_copied_folder_is_no_second_run(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "base r3", lambda *_: 3)
    second = tmp_path / "test2 r2"
    shutil.copytree(first, second)
    with pytest.raises(SourceError, match=r"base r3.* and .*test2 r2.* have the same answer, time and duration"):
        import_results([first, second], out=tmp_path / "a.jsonl")
    import_results([first], out=tmp_path / "a.jsonl")
    with pytest.raises(SourceError, match="already has this run as replicate 0 of base r3"):
        import_results([second], out=tmp_path / "a.jsonl", naming=Naming(replicate=1))
    import_results([second], out=tmp_path / "b.jsonl")
    comparison = compare_arms(Ledger(tmp_path / "a.jsonl").rows(), Ledger(tmp_path / "b.jsonl").rows())
    assert comparison is not None
    assert "15 cells are the same rows in both arms" in comparison.warnings[0]


def test_equal_answers_without_times_are_no_copies(tmp_path: Path) -> None:
    timeless = {"test_duration_seconds": ..., "test_timestamp_utc": ..., "model_response": "Eat a sandwich."}
    folders = [write_folder(tmp_path / f"r{run}", lambda *_: 3, **timeless) for run in range(2)]
    assert import_results(folders, out=tmp_path / "a.jsonl").num_added == 30


def test_replicates_count_on_from_the_given_number_and_overwrite_nothing(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / f"r{run}", lambda *_: 3, second=run) for run in range(2)]
    assert import_results(folders, out=tmp_path / "both.jsonl", naming=Naming(replicate=2)).replicates == (2, 3)
    import_results([folders[0]], out=tmp_path / "one.jsonl", naming=Naming(replicate=5))
    with pytest.raises(SourceError, match=r"another result for 1000 tokens at 10.* in replicate 5.*--replicate 6"):
        import_results([folders[1]], out=tmp_path / "one.jsonl", naming=Naming(replicate=5))
    assert len(Ledger(tmp_path / "one.jsonl").rows()) == 15


def test_mixed_models_are_refused_unless_one_is_chosen(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", lambda *_: 3)
    edit(some_file(folder), model="unsloth/Llama-3.2-3B-Instruct-bnb-4bit")
    with pytest.raises(SourceError, match=r"Llama-3.2-3B-Instruct \(14\), unsloth/.*\(1\); choose one with --model"):
        import_results([folder], out=tmp_path / "a.jsonl")
    chosen = Naming(model="meta-llama/Llama-3.2-3B-Instruct")
    assert import_results([folder], out=tmp_path / "a.jsonl", naming=chosen).num_results == 14
    with pytest.raises(SourceError, match="no results of model gpt-4"):
        import_results([folder], out=tmp_path / "b.jsonl", naming=Naming(model="gpt-4"))


def test_given_references_go_to_the_needles_that_contain_them(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", lambda *_: 3, needle=["Eat a sandwich.", "Sit in Dolores Park."], model_response="A sandwich!")
    naming = Naming(references=("sandwich", "dolores park"), question="What is the best thing to do in San Francisco?")
    import_results([folder], out=tmp_path / "a.jsonl", naming=naming)
    row = Ledger(tmp_path / "a.jsonl").rows()[0]
    assert (row.references, row.question) == (naming.references, naming.question)
    assert [(fact.references, fact.score) for fact in row.facts] == [(("sandwich",), 1.0), (("dolores park",), 0.0)]
    assert rescore(row, scorer="keywords").score == 0.5
    with pytest.raises(SourceError, match="reference 'tram 28' does not occur"):
        import_results([folder], out=tmp_path / "b.jsonl", naming=Naming(references=("tram 28",)))


def test_lines_of_version_2_keep_needles_tokens_and_costs(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "run.jsonl", [version_2(1000, 10.0), version_2(1000, 50.0, score=0.5), version_2(2000, 10.0, score=None)])
    done = import_results([path], out=tmp_path / "a.jsonl")
    right, half, failed = Ledger(tmp_path / "a.jsonl").rows()
    assert (right.score, right.rubric, right.task, right.arm) == (1.0, 10, "needlehaystack_multi", "run")
    assert (right.references, right.question) == (("figs", "goat cheese"), "What are the secret ingredients?")
    assert [(fact.references, fact.token, fact.score) for fact in half.facts] == [(("figs",), 120, 1.0), (("goat cheese",), 640, 0.0)]
    counted = (right.needle_token, right.content_tokens, right.prefilled_tokens, right.decoded_tokens, right.cost)
    assert counted == (120, 1014, 1040, 12, 0.0125)
    assert (half.score, half.rubric, half.scorer) == (0.5, 6, "exact_match (imported)")
    assert (failed.score, failed.response, failed.unscored_reason) == (None, None, "imported: timeout")
    assert (done.num_unscored, done.model) == (1, "some-model")


def test_seeds_of_version_2_are_replicates(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "run.jsonl", [version_2(1000, 10.0, seed=seed) for seed in (42, 7)])
    assert import_results([tmp_path], out=tmp_path / "out" / "a.jsonl").replicates == (0, 1)
    assert {row.replicate: row.seed for row in Ledger(tmp_path / "out" / "a.jsonl").rows()} == {0: 7, 1: 42}
    write_lines(path, [version_2(1000, 10.0), version_2(1000, 10.0, duration_seconds=9.0)])
    with pytest.raises(SourceError, match=r"run.jsonl line 1 and .*run.jsonl line 2 answer one cell"):
        import_results([path], out=tmp_path / "b.jsonl")


def test_a_chain_can_be_scored_by_how_far_the_answer_got(tmp_path: Path) -> None:
    codes = ["code-a", "code-b", "code-c", "code-d", "code-e"]
    chain = version_2(1000, 10.0, task_type="uuid_chain", needle_metadata={"chain": codes}, expected_answer="code-e", response="CODE-C.")
    chain["recipe"]["needle_placements"][1]["text"] = "code-d maps to code-e."
    import_results([write_lines(tmp_path / "run.jsonl", [chain])], out=tmp_path / "a.jsonl")
    [row] = Ledger(tmp_path / "a.jsonl").rows()
    assert row.scorer == "chain_match (imported)"
    assert rescore(row, scorer="chain_progress").score == 2 / 4


def test_a_score_outside_its_scale_is_no_score(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "run.jsonl", [version_2(1000, 10.0) | {"score": {"value": 7}}])
    import_results([path], out=tmp_path / "a.jsonl")
    [row] = Ledger(tmp_path / "a.jsonl").rows()
    assert (row.score, row.unscored_reason) == (None, "imported: 7 is no score from 0 to 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema_version = 3"),
        ({"needle_metadata": {"expected_fragments": "figs"}}, 'expected_fragments = "figs"'),
        ({"target_depth_percent": None}, "depth_percent: required, and missing"),
    ],
)
def test_a_broken_line_is_refused_with_its_number_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "run.jsonl", [version_2(1000, 10.0) | changes])
    with pytest.raises(SourceError, match=f"line 1: is no result .*{message}"):
        import_results([path], out=tmp_path / "a.jsonl")
    path.write_text(json.dumps(version_2(1000, 10.0)) + "\n" + json.dumps(version_2(2000, 10.0))[:50])
    with pytest.raises(SourceError, match="line 2: is no result"):
        import_results([path], out=tmp_path / "a.jsonl")
