"""Imports results of other needle-in-a-haystack testers into ledgers, so that they can be compared, reported and rescored.

Two formats of github.com/gkamradt/needle-in-a-haystack are known. Version 0.1, in which the pause-tuning paper's answers were released,
leaves a folder with one JSON object per cell, graded by a judge from 1 to 10. Version 2 leaves JSONL files, scored from 0 to 1. A column
that a file does not state is not guessed: prompt and content tokens are the requested length, pauses and needle tokens are unknown.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, AliasPath, ConfigDict, Field

from pause_ray.core.errors import SourceError, SpecError
from pause_ray.core.spec import Spec, digest
from pause_ray.evaluation.ledger import UNKNOWN_TOKEN, CellResult, FactResult, Ledger
from pause_ray.evaluation.scorers import Score, grade
from pause_ray.text.segments import plain


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Values for the columns of a ledger that result files leave open."""

    arm: str | None = None
    """Name of the arm; None takes the folder's name, and for several folders the name of the folder that contains them."""
    task: str | None = None
    """Name of the task; None takes the tester's name."""
    model: str | None = None
    """Name of the only model whose results are imported; None requires that all results are of one model."""
    replicate: int = 0
    """Number of the first run; further runs count on from there."""
    question: str = ""
    """The question, for files that do not state it."""
    references: tuple[str, ...] = ()
    """The texts that a right answer contains, for files that do not state them. Rescoring needs them."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Summary of an import."""

    arm: str
    model: str
    num_results: int
    num_added: int
    """Number of results that the ledger did not have before."""
    num_unscored: int
    replicates: tuple[int, ...]
    num_lengths: int
    num_depths: int
    notes: tuple[str, ...]
    """Irregularities of the results, such as cells that a replicate lacks."""


class _Needle(Spec):
    """One hidden text."""

    model_config = ConfigDict(extra="ignore")
    text: str
    token: int = Field(default=UNKNOWN_TOKEN, alias="insertion_token_index")
    depth_percent: float = Field(alias="actual_depth_percent", ge=0, le=100)


class _TesterResult(Spec):
    """One result in either format. An alias is the field's name in version 0.1, then in version 2; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")
    schema_version: Literal[2] | None = None
    model: str = Field(validation_alias=AliasChoices("model", "model_id"))
    task_type: str = ""
    context_length: int = Field(ge=1)
    depth_percent: float = Field(ge=0, le=100, validation_alias=AliasChoices("depth_percent", "target_depth_percent"))
    run: int = Field(default=0, validation_alias=AliasChoices("version", "seed"))
    """Version or seed; results of one file or folder with different ones are different runs."""
    seed: int = 0
    needle: str | tuple[str, ...] = ()
    needles: tuple[_Needle, ...] = Field(default=(), validation_alias=AliasPath("recipe", "needle_placements"))
    content_tokens: int | None = Field(default=None, validation_alias=AliasPath("recipe", "final_context_token_count"))
    question: str = Field(default="", validation_alias=AliasChoices("question", "prompt_question"))
    expected_answer: str | None = None
    expected: tuple[str, ...] = Field(default=(), validation_alias=AliasPath("needle_metadata", "expected_fragments"))
    chain: tuple[str, ...] = Field(default=(), validation_alias=AliasPath("needle_metadata", "chain"))
    response: str | dict[str, Any] | None = Field(default=None, validation_alias=AliasChoices("model_response", "response"))
    """The answer, or an object of a Hugging Face client that has the answer as its ``text``."""
    score: Any = None
    error: str | None = None
    input_tokens: int = Field(default=0, validation_alias=AliasPath("usage", "input_tokens"))
    output_tokens: int = Field(default=0, validation_alias=AliasPath("usage", "output_tokens"))
    cost_usd: float | None = None
    seconds: float = Field(default=0.0, ge=0, validation_alias=AliasChoices("test_duration_seconds", "duration_seconds"))
    timestamp: str = Field(default="", validation_alias=AliasChoices("test_timestamp_utc", "timestamp_utc"))


def import_results(sources: Sequence[Path], *, out: Path, naming: Naming | None = None) -> Imported:
    """Add the results of one arm to the ledger ``out``; results that it already has are left as they are.

    Each version or seed in one of ``sources``, folders or files, is a run, which becomes a replicate.

    Raises:
        SourceError: A source has no results or broken ones, a run has a cell twice, the results are of several models, two runs are
            copies, or a reference occurs in no needle.
        StorageError: The ledger cannot be read or written.
    """
    naming = naming or Naming()
    arm = naming.arm or _folder_name(sources)
    results = [(number, *each) for number, source in enumerate(sources) for each in _read(source, model=naming.model)]
    models = Counter(result.model for _, _, result in results)
    if len(models) > 1:
        listed = ", ".join(f"{model} ({count})" for model, count in models.most_common())
        raise SourceError(f"{sources[0]}: the results are of several models: {listed}; choose one with --model")
    runs = sorted({(number, result.run) for number, _, result in results})
    origins: dict[object, str] = {}
    rows = list[CellResult]()
    for number, origin, result in results:
        row = _row(result, origin, arm=arm, replicate=naming.replicate + runs.index((number, result.run)), naming=naming)
        if other := origins.get(_place(row)):
            raise SourceError(f"{other} and {origin} answer one cell ({row.context_tokens} tokens, {row.depth_percent:g} %); remove one")
        if other := origins.get(row.cell_id):
            raise SourceError(f"{other} and {origin} have the same answer, time and duration; leave out one of the two runs")
        origins |= dict.fromkeys((_place(row), row.cell_id), origin)
        rows.append(row)
    return Imported(
        arm=arm,
        model=rows[0].model,
        num_results=len(rows),
        num_added=_add(rows, Ledger(out)),
        num_unscored=sum(row.score is None for row in rows),
        replicates=tuple(sorted({row.replicate for row in rows})),
        num_lengths=len({row.context_tokens for row in rows}),
        num_depths=len({row.depth_percent for row in rows}),
        notes=tuple(_notes(rows)),
    )


def _folder_name(sources: Sequence[Path]) -> str:
    """Return the name of the file or folder, or of the folder that contains several; the name ``results`` gives way to the parent's."""
    resolved = [source.resolve() for source in sources]
    if len(resolved) == 1 and resolved[0].is_file():
        return resolved[0].stem
    shared = Path(os.path.commonpath(resolved))
    return shared.parent.name if shared.name == "results" else shared.name


def _read(source: Path, *, model: str | None) -> list[tuple[str, _TesterResult]]:
    """Return the results of ``model`` (None: of every model), each with its file and line."""
    if not source.exists():
        raise SourceError(f"{source}: no such file or folder; give a folder of result files, or a .jsonl file")
    files = [source] if source.is_file() else _result_files(source) or _result_files(source / "results")
    results = [each for path in files for each in _read_file(path)]
    if not results:
        folders = sorted({str(path.parent.relative_to(source)) for path in source.rglob("*.json*")} - {"."})
        remedy = f"give one of the folders in it: {', '.join(folders[:5])}" if folders else "no folder in it has any either"
        raise SourceError(f"{source}: has no results (*.json or *.jsonl); {remedy}")
    kept = [(origin, result) for origin, result in results if model in (None, result.model)]
    if not kept:
        raise SourceError(f"{source}: has no results of model {model}; choose from {', '.join({result.model for _, result in results})}")
    return kept


def _result_files(folder: Path) -> list[Path]:
    """Return the JSONL files of a folder, or its JSON files if it has none; hidden files are no results."""
    return sorted(folder.glob("[!.]*.jsonl")) or sorted(folder.glob("[!.]*.json"))


def _read_file(path: Path) -> list[tuple[str, _TesterResult]]:
    data = path.read_bytes()
    if path.suffix != ".jsonl":
        return [(str(path), _parse(data, str(path)))]
    lines = enumerate(data.split(b"\n"), start=1)
    return [(origin := f"{path} line {number}", _parse(line, origin)) for number, line in lines if line.strip()]


def _parse(data: bytes, origin: str) -> _TesterResult:
    try:
        # Nulls are removed so that a field without value and a missing field mean the same.
        stated = json.loads(data, object_hook=lambda items: {key: value for key, value in items.items() if value is not None})
        return _TesterResult.parse(stated, origin="its fields")
    except (ValueError, SpecError) as error:
        raise SourceError(f"{origin}: is no result ({error}); repair or remove it") from error


def _row(result: _TesterResult, origin: str, *, arm: str, replicate: int, naming: Naming) -> CellResult:
    response = result.response.get("text") if isinstance(result.response, dict) else result.response
    stated = result.expected or ((result.expected_answer,) if result.expected_answer else ())
    facts = _facts(result, stated or naming.references, response)
    for reference in () if stated else naming.references:
        if not any(reference in fact.references for fact in facts):
            texts = " | ".join(fact.text for fact in facts) or "no needle"
            raise SourceError(f"{origin}: reference {reference!r} does not occur in what was hidden ({texts}); correct --reference")
    score, reason = _score(result, response)
    task = f"needlehaystack_{result.task_type}".strip("_")
    # The id does not depend on the grade or the arm, so a copied run has the same ids; without a time, equal answers are no copies.
    asked = [result.model, task, result.context_length, result.depth_percent, [fact.text for fact in facts]]
    run = [] if result.timestamp or result.seconds else [arm, str(replicate)]
    return CellResult(
        cell_id=digest([*asked, response, result.timestamp, result.seconds, *run]),
        task=naming.task or task,
        arm=arm,
        replicate=replicate,
        seed=result.seed,
        model=result.model,
        adapter=None,
        pauses="unknown (imported)",
        context_tokens=result.context_length,
        prompt_tokens=result.context_length,
        content_tokens=result.content_tokens or result.context_length,
        num_pauses=0,
        rule="unknown (imported)",
        depth_percent=result.depth_percent,
        needle_token=facts[0].token if facts else UNKNOWN_TOKEN,
        facts=facts,
        question=result.question or naming.question,
        references=stated or naming.references,
        labels=result.chain[1:],  # the question names the first link
        response=response,
        score=score,
        rubric=None if score is None else Score(value=score, fact_scores=()).rubric,
        unscored_reason=reason,
        scorer=f"{'judge' if not result.schema_version else 'chain_match' if result.chain else 'exact_match'} (imported)",
        engine="imported",
        prefilled_tokens=result.input_tokens,
        decoded_tokens=result.output_tokens,
        seconds=result.seconds,
        cost=result.cost_usd,
    )


def _facts(result: _TesterResult, references: Sequence[str], response: str | None) -> tuple[FactResult, ...]:
    """Return the needles, each with the references that it contains and the share of them that the answer contains."""
    texts = (result.needle,) if isinstance(result.needle, str) else result.needle
    needles = [(text.strip(), UNKNOWN_TOKEN, result.depth_percent) for text in texts if text.strip()]
    needles += [(needle.text, needle.token, needle.depth_percent) for needle in result.needles]
    facts = []
    for text, token, depth in needles:
        contained = tuple(reference for reference in references if plain(reference) in plain(text))
        facts.append(FactResult(text=text, references=contained, depth_percent=depth, token=token, score=None))
    graded = grade(response or "", facts, scorer="string_match")
    if response is None or not isinstance(graded, Score):
        return tuple(facts)
    return tuple(dataclasses.replace(fact, score=share) for fact, share in zip(facts, graded.fact_scores, strict=True))


def _score(result: _TesterResult, response: str | None) -> tuple[float | None, str | None]:
    """Return the score from 0 to 1, or the reason why there is none."""
    score = result.score.get("value") if isinstance(result.score, dict) else result.score
    if response is None or score is None:
        return None, f"imported: {result.error or ('the file has no answer' if response is None else 'the file has no score')}"
    is_graded = result.schema_version is None
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if is_number and (score in range(1, 11) if is_graded else 0 <= score <= 1):
        return (score - 1) / 9 if is_graded else float(score), None
    return None, f"imported: {score!r} is no {'grade from 1 to 10' if is_graded else 'score from 0 to 1'}"


def _add(rows: Sequence[CellResult], ledger: Ledger) -> int:
    """Append the rows that the ledger lacks and return their number; if one row conflicts with the ledger, nothing is written."""
    existing = {row.cell_id: row for row in ledger.rows()}
    taken = {_place(row) for row in existing.values()}
    new = [row for row in rows if existing.get(row.cell_id) != row]
    for row in new:
        if before := existing.get(row.cell_id):
            raise SourceError(
                f"{ledger.path}: already has this run as replicate {before.replicate} of {before.arm}, with other names or grades; "
                "import into a new ledger"
            )
        if _place(row) in taken:
            free = 1 + max(each.replicate for each in existing.values())
            raise SourceError(
                f"{ledger.path}: has another result for {row.context_tokens} tokens at {row.depth_percent:g} % in replicate "
                f"{row.replicate}; import as another replicate, for example --replicate {free}, or into a new ledger"
            )
    for row in new:
        ledger.append(row)
    return len(new)


def _place(row: CellResult) -> tuple[str, int, float, int]:
    return row.task, row.context_tokens, row.depth_percent, row.replicate


def _notes(rows: Sequence[CellResult]) -> list[str]:
    num_cells = len({(row.task, row.context_tokens, row.depth_percent) for row in rows})
    counts = sorted(Counter(row.replicate for row in rows).items())
    notes = [f"replicate {replicate} has {count} of {num_cells} cells" for replicate, count in counts if count < num_cells]
    reasons = Counter(row.unscored_reason for row in rows if row.unscored_reason)
    notes += [f"{count} cells are unscored ({reason})" for reason, count in reasons.most_common()]
    if len(tasks := sorted({row.task for row in rows})) > 1:
        notes.append(f"the results are of several tasks: {', '.join(tasks)}")
    return notes
