"""Answers are scored again without being asked again; what was read stays as it was."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import ModelError, SpecError, StorageError
from pause_ray.evaluation.ledger import CellResult, FactResult, Ledger
from pause_ray.evaluation.rescore import Agreement, Judge, agreement_table, judge_at, judged, rescore, rescore_ledgers
from pause_ray.evaluation.scorers import JudgeSpec
from pause_ray.inference.engine import Completion, EndpointSpec, EngineError, LoadedAs, PromptStep
from pause_ray.text.tokenizer import ModelTokenizer
from tests.evaluation.answered_rows import PARTS, ROWS, ledger_of, row
from tests.inference.endpoint_server import Act, EndpointServer, completion

SPEC = JudgeSpec(name="tiny", prompt="Grade this.\n{question}\n{references}\n<<{answer}>>")


@dataclass
class ReplyingEngine:
    """A judge by rule: replies with what ``reply`` makes of the answer between the marks of ``SPEC``."""

    tokenizer: ModelTokenizer
    reply: Callable[[str], str | EngineError]
    name: str = "replying"
    decoded_tokens: int = 1
    prefix_block_size: int = 1
    steps: list[PromptStep] = field(default_factory=list)

    def use(self, wanted: LoadedAs) -> None:
        """Nothing to load."""

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        # From the last to the first: an engine may answer in any order.
        for index, step in reversed(list(enumerate(steps))):
            self.steps.append(step)
            text = self.tokenizer.decode(step.prompt.ids)
            reply = self.reply(text[text.rindex("<<") + 2 : text.rindex(">>")])
            if isinstance(reply, EngineError):
                yield index, reply
            else:
                yield index, Completion(text=reply, ids=(), prefilled_tokens=1, decoded_tokens=self.decoded_tokens, seconds=0.0, cost=0.25)


def judge_with(tokenizer_dir: Path, reply: Callable[[str], str | EngineError], spec: JudgeSpec = SPEC) -> tuple[Judge, ReplyingEngine]:
    tokenizer = ModelTokenizer.load(tokenizer_dir)
    engine = ReplyingEngine(tokenizer, reply)
    return Judge(spec=spec, engine=engine, model="replying", tokenizer=tokenizer), engine


def by_words(answer: str) -> str:
    """One grade per reference, and prose for an answer without any."""
    found = sum(part in answer for part in PARTS)
    return f"Grade: {1 + 3 * found}" if found else "That is a fine answer."


def test_the_scorer_of_the_trial_gives_the_scores_of_the_trial() -> None:
    assert [rescore(each, scorer="keywords") for each in ROWS] == list(ROWS)


def test_another_scorer_changes_the_scores_and_nothing_else() -> None:
    again = [rescore(each, scorer="all") for each in ROWS]
    assert [each.score for each in again] == [1.0, 0.0, 0.0, None, 0.0]
    assert [each.rubric for each in again] == [10, 1, 1, None, 1]
    for old, new in zip(ROWS, again, strict=True):
        assert dataclasses.replace(new, score=old.score, rubric=old.rubric, scorer=old.scorer) == old
    assert again[3] is ROWS[3]


def test_a_scorer_without_what_it_goes_by_leaves_the_cell_unscored() -> None:
    again = rescore(ROWS[0], scorer="label")
    assert again.score is None
    assert "labels" in str(again.unscored_reason)


@pytest.mark.parametrize(
    ("pauses", "marker"), [("{}", "<PAUSE>"), ('{"every": 2, "marker": " [wait]"}', "[wait]"), ('{"unit": "sentence"}', "<PAUSE>")]
)
def test_a_copied_marker_is_no_part_of_what_was_said(pauses: str, marker: str) -> None:
    broken = f"Eat a sand{marker}wich in Dolores{marker} Park."
    assert row(0, broken, pauses=pauses).score == pytest.approx(2 / 3)
    assert row(0, broken, pauses="imported from elsewhere").score == 0
    assert row(0, broken, pauses=pauses).response == broken


def test_a_judges_grades_become_scores_and_prose_does_not(tokenizer_dir: Path) -> None:
    judge, _ = judge_with(tokenizer_dir, by_words)
    again = {new.cell_id: new for new, _ in judged(ROWS, judge=judge)}
    assert again["cell3"] == ROWS[3]
    assert [again[f"cell{number}"].score for number in (0, 1, 2, 4)] == [1.0, pytest.approx(1 / 3), None, pytest.approx(2 / 3)]
    assert [again[f"cell{number}"].rubric for number in (0, 1, 2, 4)] == [10, 4, None, 7]
    assert "no grade: 'That is a fine answer.'" in str(again["cell2"].unscored_reason)
    assert again["cell1"].transcript == "Grade: 4"
    assert again["cell2"].transcript == "That is a fine answer."
    assert {again[f"cell{number}"].scorer for number in (0, 1, 2, 4)} == {judge.scorer}
    assert again["cell1"].facts == ROWS[1].facts


def test_a_reply_that_was_cut_is_no_verdict(tokenizer_dir: Path) -> None:
    # cut between the digits of 10, or before the judge thought better of it
    judge, engine = judge_with(tokenizer_dir, lambda _: "Grade: 1")
    engine.decoded_tokens = SPEC.max_new_tokens
    for new, cost in judged(ROWS[:2], judge=judge):
        assert (new.score, new.rubric, new.transcript, cost) == (None, None, "Grade: 1", 0.25)
        assert str(SPEC.max_new_tokens) in str(new.unscored_reason)
    engine.decoded_tokens -= 1
    assert {new.score for new, _ in judged(ROWS[:2], judge=judge)} == {0.0}


def test_a_judge_sees_what_was_asked_for_and_no_distractors(tokenizer_dir: Path) -> None:
    spec = JudgeSpec(name="facts", prompt="{facts}\n<<{answer}>>")
    judge, engine = judge_with(tokenizer_dir, lambda _: "Grade: 10", spec)
    distractor = FactResult(text="The worst thing to do is stand in the rain.", references=(), depth_percent=10.0, token=3, score=None)

    def shown(facts: tuple[FactResult, ...]) -> str:
        list(judged([dataclasses.replace(ROWS[0], facts=facts)], judge=judge))
        return judge.tokenizer.decode(engine.steps[-1].prompt.ids) if judge.tokenizer else ""

    asked = shown((distractor, *ROWS[0].facts))
    assert ROWS[0].facts[0].text in asked
    assert distractor.text not in asked
    assert distractor.text in shown((distractor,))


def test_a_judge_that_reuses_prefixes_is_told_only_what_is_common(tokenizer_dir: Path) -> None:
    judge, engine = judge_with(tokenizer_dir, by_words)
    list(judged(ROWS, judge=judge))
    steps = engine.steps[::-1]
    assert steps[0].keep_tokens == 0
    for before, step in itertools.pairwise(steps):
        assert step.keep_tokens > 0
        assert step.prompt.ids[: step.keep_tokens].tolist() == before.prompt.ids[: step.keep_tokens].tolist()


def test_another_instruction_or_model_is_another_scorer(tokenizer_dir: Path) -> None:
    judge, _ = judge_with(tokenizer_dir, by_words)
    other = JudgeSpec(name="tiny", prompt=SPEC.prompt + " Be strict.")
    scorers = {judge.scorer, dataclasses.replace(judge, model="other").scorer, dataclasses.replace(judge, spec=other).scorer}
    assert len(scorers) == 3


def test_ledgers_come_out_beside_untouched_originals(tmp_path: Path) -> None:
    first, second = ledger_of(tmp_path / "abc" / "cells.jsonl"), ledger_of(tmp_path / "def" / "cells.jsonl", ROWS[:2])
    before = [path.read_bytes() for path in (first, second)]
    seen: list[tuple[int, int]] = []
    rescored = rescore_ledgers([first, second], scorer="all", out=tmp_path / "out", progress=lambda *counts: seen.append(counts))
    assert [path.read_bytes() for path in (first, second)] == before
    assert [each.ledger for each in rescored] == [tmp_path / "out" / "abc.jsonl", tmp_path / "out" / "def.jsonl"]
    assert Ledger(rescored[0].ledger).rows() == [rescore(each, scorer="all") for each in ROWS]
    assert seen[-1] == (7, 7)
    assert seen == sorted(seen)
    agreement = rescored[0].agreement
    assert (agreement.num_cells, agreement.scored_before, agreement.scored_after) == (5, 4, 4)
    assert agreement.mean_before == pytest.approx((1 + 1 / 3 + 0 + 2 / 3) / 4)
    assert agreement.mean_after == pytest.approx(1 / 4)
    assert agreement.changes == {
        "cell1": (pytest.approx(1 / 3), 0.0),
        "cell4": (pytest.approx(2 / 3), 0.0),
    }


def test_ledgers_of_one_name_stay_apart_in_every_run(tmp_path: Path) -> None:
    paths = [ledger_of(tmp_path / part / "abc" / "cells.jsonl", ROWS[: count + 1]) for count, part in enumerate(("one", "two"))]
    runs = [[each.ledger for each in rescore_ledgers(order, scorer="all", out=tmp_path / "out")] for order in (paths, paths[::-1])]
    assert len(set(runs[0])) == 2
    assert runs[1] == runs[0][::-1]
    assert [len(Ledger(path).rows()) for path in runs[0]] == [1, 2]


def test_an_interrupted_judgement_goes_on_where_it_stopped(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = ledger_of(tmp_path / "abc" / "cells.jsonl")

    def stops(answer: str) -> str:
        if answer == ROWS[0].response:
            raise ModelError("the server is gone")
        return by_words(answer)

    judge, _ = judge_with(tokenizer_dir, stops)
    with pytest.raises(ModelError):
        rescore_ledgers([path], scorer=judge, out=tmp_path / "out")
    begun = Ledger(tmp_path / "out" / "abc.jsonl").rows()
    assert 0 < len(begun) < len(ROWS)
    judge, engine = judge_with(tokenizer_dir, by_words)
    [rescored] = rescore_ledgers([path], scorer=judge, out=tmp_path / "out")
    assert len(engine.steps) == len(ROWS) - len(begun)
    assert {each.cell_id for each in Ledger(rescored.ledger).rows()} == {each.cell_id for each in ROWS}
    assert rescored.judge_cost == 0.25 * len(engine.steps)
    judge, engine = judge_with(tokenizer_dir, by_words)
    [rescored] = rescore_ledgers([path], scorer=judge, out=tmp_path / "out")
    assert not engine.steps
    assert rescored.judge_cost is None
    assert (rescored.agreement.scored_before, rescored.agreement.scored_after) == (4, 3)


def test_a_judge_that_could_not_be_asked_is_asked_again(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = ledger_of(tmp_path / "cells.jsonl", ROWS[:2])
    judge, _ = judge_with(tokenizer_dir, lambda _: EngineError("no answer within 1 s"))
    [rescored] = rescore_ledgers([path], scorer=judge, out=tmp_path / "out")
    assert [each.unscored_reason for each in Ledger(rescored.ledger).rows()] == ["the judge did not answer: no answer within 1 s"] * 2
    judge, engine = judge_with(tokenizer_dir, by_words)
    [rescored] = rescore_ledgers([path], scorer=judge, out=tmp_path / "out")
    assert len(engine.steps) == 2
    assert rescored.agreement.scored_after == 2


def test_cells_that_the_trial_answered_meanwhile_are_scored_too(tmp_path: Path) -> None:
    path = ledger_of(tmp_path / "abc" / "cells.jsonl", [ROWS[0], ROWS[3]])
    rescore_ledgers([path], scorer="all", out=tmp_path / "out")
    ledger_of(path, [row(3, "Eat a sandwich."), ROWS[4]])
    [rescored] = rescore_ledgers([path], scorer="all", out=tmp_path / "out")
    assert {each.cell_id: each.score for each in Ledger(rescored.ledger).rows()} == {"cell0": 1.0, "cell3": 0.0, "cell4": 0.0}


def test_one_folder_takes_one_scorer_and_one_set_of_answers(tmp_path: Path, tokenizer_dir: Path) -> None:
    path, out = ledger_of(tmp_path / "abc" / "cells.jsonl"), tmp_path / "out"
    rescore_ledgers([path], scorer="all", out=out)
    with pytest.raises(SpecError, match="scored by all, not by exact"):
        rescore_ledgers([path], scorer="exact", out=out)
    with pytest.raises(SpecError, match="scored by all"):
        rescore_ledgers([path], scorer=judge_with(tokenizer_dir, by_words)[0], out=out)
    path.unlink()
    ledger_of(path, [row(0, "Something else.")])
    with pytest.raises(StorageError, match="another answer to cell cell0"):
        rescore_ledgers([path], scorer="all", out=out)


def test_a_ledger_is_never_its_own_target(tmp_path: Path) -> None:
    path = ledger_of(tmp_path / "abc.jsonl")
    before = path.read_bytes()
    with pytest.raises(SpecError, match="choose another folder"):
        rescore_ledgers([path], scorer="all", out=tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, ""])
def test_a_ledger_without_rows_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "abc" / "cells.jsonl"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    with pytest.raises(StorageError, match="abc"):
        rescore_ledgers([path], scorer="all", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


scores = st.one_of(st.none(), st.integers(0, 12).map(lambda part: part / 12))


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=8))
def test_agreement_counts_every_cell_and_averages_only_scored_ones(pairs: list[tuple[float | None, float | None]]) -> None:
    def scored(number: int, score: float | None) -> CellResult:
        reason = None if score is not None else "no grade"
        return dataclasses.replace(ROWS[0], cell_id=str(number), score=score, unscored_reason=reason)

    before, after = ([scored(number, pair[side]) for number, pair in enumerate(pairs)] for side in (0, 1))
    found = Agreement.between(before, after)
    both = [pair for pair in pairs if None not in pair]
    assert found.num_cells == len(pairs)
    assert found.scored_before == sum(old is not None for old, _ in pairs)
    assert (found.mean_before is None) == (not both)
    assert found.mean_after is None or min(new for _, new in both) - 1e-9 <= found.mean_after <= max(new for _, new in both) + 1e-9
    assert found.correlation is None or -1 - 1e-9 <= found.correlation <= 1 + 1e-9
    unchanged = {
        str(number) for number, (old, new) in enumerate(pairs) if old is new or (None not in (old, new) and abs(old - new) <= 1e-9)
    }
    assert found.changes.keys() == {str(number) for number in range(len(pairs))} - unchanged


def test_the_table_has_a_line_for_each_ledger(tmp_path: Path) -> None:
    from rich.console import Console

    rescored = rescore_ledgers([ledger_of(tmp_path / "abc" / "cells.jsonl")], scorer="all", out=tmp_path / "out")
    shown = io.StringIO()
    Console(width=120, file=shown).print(agreement_table(rescored))
    [line] = [line for line in shown.getvalue().splitlines() if "abc" in line]
    assert "0.500 → 0.250" in line


def test_a_chat_endpoint_judges_without_its_tokenizer(tmp_path: Path, tokenizer_dir: Path) -> None:
    def grade(asked: Any) -> Any:
        said = asked.body["messages"][-1]["content"]
        return completion(by_words(said[said.rindex("<<") :]), chat=True)

    path = ledger_of(tmp_path / "abc" / "cells.jsonl")
    with EndpointServer(grade) as server:
        prices = {"input_per_million": 1.0, "output_per_million": 1.0}
        spec = EndpointSpec.parse({"kind": "endpoint", "url": server.url, "model": "big", "api": "chat", "prices": prices}, origin="test")
        judge = judge_at(spec, spec=SPEC)
        [rescored] = rescore_ledgers([path], scorer=judge, out=tmp_path / "out")
    found = {each.cell_id: each.score for each in Ledger(rescored.ledger).rows()}
    assert found == {"cell0": 1.0, "cell1": pytest.approx(1 / 3), "cell2": None, "cell3": None, "cell4": pytest.approx(2 / 3)}
    assert rescored.judge_cost == pytest.approx(4 * (7 + 3) / 1e6)
    with pytest.raises(SpecError, match="api: chat"):
        judge_at(spec.model_copy(update={"api": "completions"}), spec=SPEC)
    assert json.loads((tmp_path / "out" / "rescore.json").read_text())["scorer"] == judge.scorer


def test_a_chat_judge_whose_server_counts_nothing_is_heard(tmp_path: Path) -> None:
    path = ledger_of(tmp_path / "abc" / "cells.jsonl")
    reply = {"choices": [{"message": {"content": "Grade: 10"}, "finish_reason": "stop"}]}
    with EndpointServer(lambda asked: Act(body=json.dumps(reply))) as server:
        spec = EndpointSpec.parse({"kind": "endpoint", "url": server.url, "model": "big", "api": "chat"}, origin="test")
        [rescored] = rescore_ledgers([path], scorer=judge_at(spec, spec=SPEC), out=tmp_path / "out")
    assert {row.score for row in Ledger(rescored.ledger).rows() if row.response is not None} == {1.0}
