"""Scores the answers in ledgers again, with another deterministic scorer or a judge model, without answering any cell again.

The original ledgers are only read. For each of them a new ledger is written into an output folder, and a repeated call continues where
an interrupted one stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pause_ray.core.errors import SpecError, StorageError, TextError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import exclusive, read_json, write_json
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.prefix_plan import plan_prefixes
from pause_ray.evaluation.scorers import JudgeSpec, Score, Unscored, grade, judge_step, read_grade
from pause_ray.evaluation.suite import Scorer
from pause_ray.inference.endpoint import EndpointEngine
from pause_ray.inference.engine import EndpointSpec, Engine, EngineError, LoadedAs, PromptStep
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from rich.table import Table

SETTINGS = "rescore.json"
"""Name of the file in the output folder that records the scorer and the original ledgers."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge's instructions and the model that follows them."""

    spec: JudgeSpec
    engine: Engine
    """The engine of the judge's model, on which ``use`` was already called."""
    model: str
    """Name of the model, which becomes part of the ledger's ``scorer``."""
    tokenizer: ModelTokenizer | None
    """The tokenizer of the judge's model; None for a chat endpoint."""

    @property
    def scorer(self) -> str:
        """Return the name for the ledger, which differs between instructions and between models."""
        return f"judge:{self.spec.name}-{digest(self.spec)[:8]}:{self.model}"


def judge_at(endpoint: EndpointSpec, *, spec: JudgeSpec, model_dir: Path | None = None) -> Judge:
    """Return a judge behind an endpoint, after checking with a request for one token that the endpoint works.

    Only ``api: completions`` needs ``model_dir``, the folder with the tokenizer.

    Raises:
        SpecError: The endpoint has ``api: completions`` and there is no ``model_dir``.
        ModelError: There is no API key, no server, no such model, or no tokenizer in ``model_dir``.
    """
    tokenizer = None
    if endpoint.api == "completions":
        if model_dir is None:
            raise SpecError(f"judge {endpoint.model}: api: completions sends token ids and needs a model folder; use api: chat")
        tokenizer = ModelTokenizer.load(model_dir)
    engine = EndpointEngine(endpoint)
    engine.use(LoadedAs(model_dir=model_dir or Path(), dtype="float32"))
    return Judge(spec=spec, engine=engine, model=endpoint.model, tokenizer=tokenizer)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Comparison of two scorings of the same answers. Means and correlation cover the cells that have both scores."""

    num_cells: int
    scored_before: int
    scored_after: int
    mean_before: float | None
    mean_after: float | None
    """The mean of the new scores. Both means are None if no cell has both scores."""
    correlation: float | None
    """Pearson's correlation; None with fewer than two cells, or if one scoring gave all cells the same score."""
    changes: dict[str, tuple[float | None, float | None]]
    """The old and the new score of each cell whose score has changed, by the cell's id; None stands for unscored."""

    @classmethod
    def between(cls, before: Sequence[CellResult], after: Sequence[CellResult]) -> Agreement:
        """Compare the rows of the same cells; a cell that only one side has is left out."""
        later = {row.cell_id: row for row in after}
        pairs = [(row, later[row.cell_id]) for row in before if row.cell_id in later]
        scored = [(old.score, new.score) for old, new in pairs if old.score is not None and new.score is not None]
        olds, news = [old for old, _ in scored], [new for _, new in scored]
        varied = len(set(olds)) > 1 and len(set(news)) > 1
        return cls(
            num_cells=len(pairs),
            scored_before=sum(old.score is not None for old, _ in pairs),
            scored_after=sum(new.score is not None for _, new in pairs),
            mean_before=statistics.fmean(olds) if olds else None,
            mean_after=statistics.fmean(news) if news else None,
            correlation=statistics.correlation(olds, news) if varied else None,
            changes={old.cell_id: (old.score, new.score) for old, new in pairs if _is_changed(old.score, new.score)},
        )


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """Result of rescoring one ledger."""

    source: Path
    ledger: Path
    scorer: str
    agreement: Agreement
    judge_cost: float | None
    """Cost of the replies that the judge gave in this call, in the currency of its prices; None without prices."""


def rescore_ledgers(
    paths: Sequence[Path], *, scorer: Scorer | Judge, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Rescored]:
    """Score the answers in ledgers again and write the new rows to ledgers in ``out``.

    Cells without an answer are copied unchanged. Cells that ``out`` already has are not scored again, except those whose request to the
    judge failed. ``progress`` is called with the number of finished cells and the number of all cells.

    Raises:
        StorageError: A ledger is missing, empty or damaged, the disk is full, or another process writes to ``out``.
        SpecError: ``out`` has ledgers of another scorer, or an original ledger would be overwritten.
        ModelError: The judge's model cannot be used at all.
    """
    rows = {path: _read(path) for path in dict.fromkeys(path.absolute() for path in paths)}
    total, done = sum(map(len, rows.values())), 0
    rescored = []
    with exclusive(out / ".lock"):
        targets = _new_ledgers(list(rows), scorer=scorer, out=out)
        for source, old in rows.items():
            ledger, costs = Ledger(targets[source]), list[float]()
            pending = list(_pending(old, ledger, by_judge=isinstance(scorer, Judge)))
            new_rows = (
                judged(pending, judge=scorer) if isinstance(scorer, Judge) else ((rescore(row, scorer=scorer), None) for row in pending)
            )
            done += len(old) - len(pending)
            progress(done, total)
            for new, cost in new_rows:
                ledger.append(new)
                costs += [] if cost is None else [cost]
                done += 1
                progress(done, total)
            rescored.append(
                Rescored(
                    source=source,
                    ledger=ledger.path,
                    scorer=_name(scorer),
                    agreement=Agreement.between(old, ledger.rows()),
                    judge_cost=sum(costs) if costs else None,
                )
            )
    return rescored


def rescore(row: CellResult, *, scorer: Scorer) -> CellResult:
    """Return the row with the score from ``scorer``; a row without an answer is returned unchanged."""
    if row.response is None:
        return row
    verdict = grade(_answer(row), row.facts, scorer=scorer, labels=row.labels, question=row.question)
    if isinstance(verdict, Score):
        facts = tuple(dataclasses.replace(fact, score=score) for fact, score in zip(row.facts, verdict.fact_scores, strict=True))
        row = dataclasses.replace(row, facts=facts)
    return _with_verdict(row, verdict, scorer=scorer, transcript=None)


def judged(rows: Sequence[CellResult], *, judge: Judge) -> Iterator[tuple[CellResult, float | None]]:
    """Yield each row with the judge's score, and the cost of the reply, in the order in which the replies arrive.

    The scores of single facts stay as they are, because a judge grades the answer as a whole.

    Raises:
        ModelError: The judge's model cannot be used at all.
    """
    asked: list[tuple[CellResult, PromptStep]] = []
    for row in rows:
        if row.response is None:
            yield row, None
            continue
        facts = [fact.text for fact in row.facts if fact.references] or [fact.text for fact in row.facts]
        message = judge.spec.user_message(question=row.question, references=row.references, facts=facts, answer=_answer(row))
        try:
            asked.append((row, judge_step(message, spec=judge.spec, tokenizer=judge.tokenizer)))
        except TextError as error:
            yield _with_verdict(row, Unscored(reason=f"cannot be shown to the judge: {error}"), scorer=judge.scorer, transcript=None), None
    if judge.tokenizer is not None:
        planned = plan_prefixes([step.prompt.ids for _, step in asked], prefix_block_size=judge.engine.prefix_block_size)
        asked = [(asked[each.prompt][0], dataclasses.replace(asked[each.prompt][1], keep_tokens=each.keep_tokens)) for each in planned]
    for index, outcome in judge.engine.answer([step for _, step in asked]):
        row = asked[index][0]
        if isinstance(outcome, EngineError):
            yield _with_verdict(row, Unscored(reason=f"the judge did not answer: {outcome}"), scorer=judge.scorer, transcript=None), None
            continue
        # A truncated reply may end in the 1 of a 10, or before the judge corrects an earlier grade.
        if outcome.decoded_tokens >= judge.spec.max_new_tokens:
            found: int | Unscored = Unscored(reason=f"the judge's reply was cut after {outcome.decoded_tokens} tokens")
        else:
            found = read_grade(outcome.text, judge.spec)
        verdict = found if isinstance(found, Unscored) else Score(value=judge.spec.share(found), fact_scores=())
        yield _with_verdict(row, verdict, scorer=judge.scorer, transcript=outcome.text), outcome.cost


def agreement_table(rescored: Sequence[Rescored]) -> Table:
    """Return a table of old and new scores with one row per ledger, for a terminal."""
    from rich.table import Table

    table = Table(title="old and new scores")
    table.add_column("ledger")
    for heading in ("cells", "scored", "mean", "correlation", "changed"):
        table.add_column(heading, justify="right")
    for each in rescored:
        found = each.agreement
        scored, changed = f"{found.scored_before} → {found.scored_after}", str(len(found.changes))
        means = "–" if found.mean_before is None else f"{found.mean_before:.3f} → {found.mean_after:.3f}"
        correlation = "–" if found.correlation is None else f"{found.correlation:.3f}"
        table.add_row(each.ledger.stem, str(found.num_cells), scored, means, correlation, changed)
    return table


def _read(path: Path) -> list[CellResult]:
    if not path.is_file():
        raise StorageError(f"{path}: no such ledger; give the cells.jsonl of a trial")
    rows = Ledger(path).rows()
    if not rows:
        raise StorageError(f"{path}: has no rows, so there is nothing to score; give the ledger of a trial that answered cells")
    return rows


def _new_ledgers(sources: Sequence[Path], *, scorer: Scorer | Judge, out: Path) -> dict[Path, Path]:
    """Return the new ledger of each original, after recording them in ``out`` so that a later call finds the same ones."""
    settings: JsonObject = {"scorer": _name(scorer), "judge": scorer.spec.resolved() if isinstance(scorer, Judge) else None}
    known: dict[str, str] = {}
    if (out / SETTINGS).exists():
        before = read_json(out / SETTINGS)
        known = before.pop("ledgers", {})
        if before != settings:
            raise SpecError(f"--out {out}: has ledgers scored by {before.get('scorer')}, not by {_name(scorer)}; choose another folder")
    for source in sources:
        name = source.parent.name if source.name == "cells.jsonl" else source.stem
        if known.get(name, str(source)) != str(source):
            name = f"{name}-{digest(str(source))[:8]}"
        known[name] = str(source)
        if (out / f"{name}.jsonl").resolve() in {each.resolve() for each in sources}:
            raise SpecError(f"--out {out}: {name}.jsonl in it is one of the ledgers to be rescored; choose another folder")
    write_json(out / SETTINGS, settings | {"ledgers": known})
    return {Path(source): out / f"{name}.jsonl" for name, source in known.items()}


def _pending(old: Sequence[CellResult], ledger: Ledger, *, by_judge: bool) -> Iterator[CellResult]:
    """Yield the rows that ``ledger`` lacks, and those that must be scored again."""
    existing = {row.cell_id: row for row in ledger.rows()}
    for row in old:
        new = existing.get(row.cell_id)
        if new is None or new.response is None:
            if new is None or row.response is not None:
                yield row
        elif new.response != row.response:
            raise StorageError(f"{ledger.path}: has another answer to cell {row.cell_id}; choose another folder with --out")
        elif new.score is None and by_judge and new.transcript is None:
            yield row


def _with_verdict(row: CellResult, verdict: Score | Unscored, *, scorer: str, transcript: str | None) -> CellResult:
    value, rubric, reason = (None, None, verdict.reason) if isinstance(verdict, Unscored) else (verdict.value, verdict.rubric, None)
    return dataclasses.replace(row, scorer=scorer, transcript=transcript, score=value, rubric=rubric, unscored_reason=reason)


def _answer(row: CellResult) -> str:
    """Return the answer without pause markers that the model copied, because the trial scored it without them too."""
    response = row.response or ""
    if not row.pauses.startswith("{"):  # none, or unknown
        return response
    marker = json.loads(row.pauses).get("marker", PausePolicy.model_fields["marker"].default)
    return response.replace(marker.strip(), "")


def _name(scorer: Scorer | Judge) -> str:
    return scorer.scorer if isinstance(scorer, Judge) else scorer


def _is_changed(before: float | None, after: float | None) -> bool:
    if before is None or after is None:
        return before is not after
    return not math.isclose(before, after, abs_tol=1e-9)
