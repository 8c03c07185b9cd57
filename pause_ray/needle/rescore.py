"""Ledgers scored again: by another deterministic scorer, or by a judge model. No cell is asked again.

The ledgers that are read are never written. What comes out is one ledger per ledger in a folder of its own, which goes on
where an interrupted run stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pause_ray.engines.engine import EndpointSpec, Engine, EngineError, LoadedAs, Step
from pause_ray.engines.openai_api import EndpointEngine
from pause_ray.errors import SpecError, StorageError, TextError
from pause_ray.needle.judge import JudgeSpec, judge_step, read_grade
from pause_ray.needle.ledger import CellResult, Ledger
from pause_ray.needle.score import Score, Unscored, grade
from pause_ray.needle.task import Scorer
from pause_ray.needle.walk import plan
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import exclusive, read_json, write_json
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokens import ModelTokenizer

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("pause_ray")

SETTINGS = "rescore.json"
"""In the output folder: how its ledgers were scored, and from which ledgers."""
_LEAST_CHANGE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge's instructions and the model that follows them."""

    spec: JudgeSpec
    engine: Engine
    """Already told by ``use`` what to be."""
    model: str
    """Its name, for the ledger's ``scorer``."""
    tokenizer: ModelTokenizer | None
    """The judge's; None for a chat endpoint."""

    @property
    def scorer(self) -> str:
        """For the ledger; changes with the instructions and the model."""
        return f"judge:{self.spec.name}-{digest(self.spec)[:8]}:{self.model}"


def judge_at(endpoint: EndpointSpec, *, spec: JudgeSpec, model_dir: Path | None = None) -> Judge:
    """A judge behind an endpoint, asked for a first token to see that it is there.

    Args:
        endpoint: Where it is.
        spec: Its instructions.
        model_dir: Folder of its tokenizer; needed for ``api: completions`` only.

    Raises:
        SpecError: ``completions`` without a tokenizer.
        ModelError: no key, no server, unknown model, or no tokenizer in ``model_dir``.
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
class Change:
    """A cell whose score is not what it was."""

    cell_id: str
    before: float | None
    after: float | None
    """None: unscored."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two scorings of the same answers compare. Means and correlation are over the cells that both scored."""

    num_cells: int
    scored_before: int
    scored_after: int
    mean_before: float | None
    mean_after: float | None
    """None if no cell was scored both times."""
    correlation: float | None
    """Pearson's; None with fewer than two cells, or where either scoring gave all the same."""
    changes: tuple[Change, ...]

    @classmethod
    def between(cls, before: Sequence[CellResult], after: Sequence[CellResult]) -> Agreement:
        """Compare rows of the same cells; those that only one side has are left out."""
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
            changes=tuple(
                Change(cell_id=old.cell_id, before=old.score, after=new.score) for old, new in pairs if _differ(old.score, new.score)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """One ledger and what became of it."""

    source: Path
    ledger: Path
    scorer: str
    agreement: Agreement
    judge_cost: float | None
    """What the judge's replies of this run cost, in the currency of its prices; None without prices."""


def rescore_ledgers(
    paths: Sequence[Path], *, scorer: Scorer | Judge, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Rescored]:
    """Score the answers in ledgers again and write them to ledgers in ``out``.

    Cells without an answer stay as they are. Cells that ``out`` already has are not scored again, except those whose judge
    could not be asked.

    Args:
        paths: Ledgers (``cells.jsonl``, or any name).
        scorer: A scorer's name, or a judge.
        out: Folder for the new ledgers, of one scorer only.
        progress: Called with cells done and cells in all.

    Raises:
        StorageError: a ledger is missing, empty or damaged; disk full; another process writes to ``out``.
        SpecError: ``out`` belongs to another scorer, or a ledger would be overwritten.
        ModelError: the judge cannot be asked at all.
    """
    rows = {path: _read(path) for path in dict.fromkeys(path.absolute() for path in paths)}
    total, done = sum(map(len, rows.values())), 0
    rescored = []
    with exclusive(out / ".lock"):
        targets = _targets(list(rows), scorer=scorer, out=out)
        for source, old in rows.items():
            ledger, costs = Ledger(targets[source]), list[float]()
            waiting = list(_waiting(old, ledger, by_judge=isinstance(scorer, Judge)))
            done += len(old) - len(waiting)
            progress(done, total)
            for new, cost in _scored(waiting, scorer):
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
    """The row with the score that ``scorer`` gives its answer; the row itself if there is no answer."""
    if row.response is None:
        return row
    verdict = grade(_said(row), row.facts, scorer=scorer, labels=row.labels, question=row.question)
    if isinstance(verdict, Score):
        facts = tuple(dataclasses.replace(fact, score=score) for fact, score in zip(row.facts, verdict.fact_scores, strict=True))
        row = dataclasses.replace(row, facts=facts)
    return _with(row, verdict, scorer=scorer, transcript=None)


def judged(rows: Sequence[CellResult], *, judge: Judge) -> Iterator[tuple[CellResult, float | None]]:
    """Each row with the judge's score, and what the reply cost, in the order in which replies come.

    Scores of single facts stay: a judge sees the answer as a whole.

    Raises:
        ModelError: the judge cannot be asked.
    """
    asked: list[tuple[CellResult, Step]] = []
    for row in rows:
        if row.response is None:
            yield row, None
            continue
        message = judge.spec.user_message(question=row.question, references=row.references, facts=_asked_for(row), answer=_said(row))
        try:
            asked.append((row, judge_step(message, spec=judge.spec, tokenizer=judge.tokenizer)))
        except TextError as error:
            yield _with(row, Unscored(reason=f"cannot be shown to the judge: {error}"), scorer=judge.scorer, transcript=None), None
    if judge.tokenizer is not None:
        walk = plan([step.prompt.ids for _, step in asked], grain_tokens=judge.engine.grain_tokens)
        asked = [
            (row, dataclasses.replace(step, keep_tokens=visit.keep_tokens)) for visit in walk.visits for row, step in [asked[visit.prompt]]
        ]
    for index, outcome in judge.engine.answer([step for _, step in asked]):
        row = asked[index][0]
        if isinstance(outcome, EngineError):
            yield _with(row, Unscored(reason=f"the judge did not answer: {outcome}"), scorer=judge.scorer, transcript=None), None
            continue
        # A reply that was cut may end in the 1 of a 10, or before the judge thought better of it.
        is_cut = outcome.decoded_tokens >= judge.spec.max_new_tokens
        given = (
            Unscored(reason=f"the judge came to no end in {outcome.decoded_tokens} tokens")
            if is_cut
            else read_grade(outcome.text, judge.spec)
        )
        verdict = given if isinstance(given, Unscored) else Score(value=judge.spec.share(given), fact_scores=())
        yield _with(row, verdict, scorer=judge.scorer, transcript=outcome.text), outcome.cost


def agreement_table(rescored: Sequence[Rescored]) -> Table:
    """Old scores against new ones, a line per ledger, for a terminal."""
    from rich.table import Table

    table = Table(title="old scores against new ones")
    for heading in ("ledger", "cells", "scored", "mean", "correlation", "changed"):
        table.add_column(heading, justify="left" if heading == "ledger" else "right")
    for each in rescored:
        found = each.agreement
        table.add_row(
            each.ledger.stem,
            str(found.num_cells),
            f"{found.scored_before} → {found.scored_after}",
            "–" if found.mean_before is None or found.mean_after is None else f"{found.mean_before:.3f} → {found.mean_after:.3f}",
            "–" if found.correlation is None else f"{found.correlation:.3f}",
            str(len(found.changes)),
        )
    return table


def _read(path: Path) -> list[CellResult]:
    if not path.is_file():
        raise StorageError(f"{path}: no such ledger; give the cells.jsonl of a trial")
    rows = Ledger(path).rows()
    if not rows:
        raise StorageError(f"{path}: has no rows; there is nothing to score")
    return rows


def _targets(sources: Sequence[Path], *, scorer: Scorer | Judge, out: Path) -> dict[Path, Path]:
    """Source → new ledger; written down in ``out``, so that a later run finds them again."""
    settings: JsonObject = {"scorer": _name(scorer), "judge": scorer.spec.resolved() if isinstance(scorer, Judge) else None}
    known: dict[str, str] = {}
    if (out / SETTINGS).exists():
        before = read_json(out / SETTINGS)
        known = before.pop("ledgers", {})
        if before != settings:
            raise SpecError(f"--out {out}: holds ledgers scored by {before.get('scorer')}, not by {_name(scorer)}; choose another folder")
    for source in sources:
        name = source.parent.name if source.name == "cells.jsonl" else source.stem
        if known.get(name, str(source)) != str(source):
            name = f"{name}-{digest(str(source))[:8]}"
        known[name] = str(source)
        if (out / f"{name}.jsonl").resolve() in {each.resolve() for each in sources}:
            raise SpecError(f"--out {out}: {name}.jsonl in it is one of the ledgers to be scored; choose another folder")
    write_json(out / SETTINGS, settings | {"ledgers": known})
    return {Path(source): out / f"{name}.jsonl" for name, source in known.items()}


def _waiting(old: Sequence[CellResult], ledger: Ledger, *, by_judge: bool) -> Iterator[CellResult]:
    """Rows that have no final place in ``ledger``."""
    there = {row.cell_id: row for row in ledger.rows()}
    for row in old:
        new = there.get(row.cell_id)
        if new is None or new.response is None:
            if new is None or row.response is not None:
                yield row
        elif new.response != row.response:
            raise StorageError(f"{ledger.path}: has another answer to cell {row.cell_id}; choose another folder with --out")
        elif new.score is None and by_judge and new.transcript is None:
            yield row


def _scored(rows: Sequence[CellResult], scorer: Scorer | Judge) -> Iterator[tuple[CellResult, float | None]]:
    if isinstance(scorer, Judge):
        return judged(rows, judge=scorer)
    return ((rescore(row, scorer=scorer), None) for row in rows)


def _with(row: CellResult, verdict: Score | Unscored, *, scorer: str, transcript: str | None) -> CellResult:
    changed = dataclasses.replace(row, scorer=scorer, transcript=transcript)
    if isinstance(verdict, Unscored):
        return dataclasses.replace(changed, score=None, rubric=None, unscored_reason=verdict.reason)
    return dataclasses.replace(changed, score=verdict.value, rubric=verdict.rubric, unscored_reason=None)


def _asked_for(row: CellResult) -> list[str]:
    """What was hidden and has something of the answer; all that was hidden where the row does not say."""
    return [fact.text for fact in row.facts if fact.references] or [fact.text for fact in row.facts]


def _said(row: CellResult) -> str:
    """The answer without the markers that it copied, as the trial scored it."""
    response = row.response or ""
    try:
        pauses = json.loads(row.pauses)
    except ValueError:
        return response
    if not isinstance(pauses, dict):
        return response
    marker = pauses.get("marker", PausePolicy.model_fields["marker"].default)
    return response.replace(str(marker).strip(), "")


def _name(scorer: Scorer | Judge) -> str:
    return scorer.scorer if isinstance(scorer, Judge) else scorer


def _differ(before: float | None, after: float | None) -> bool:
    if before is None or after is None:
        return before is not after
    return abs(before - after) > _LEAST_CHANGE
