"""Results of other testers as ledgers, so that they can be compared, reported and rescored like one's own.

What the files do not tell is not made up: prompt and content tokens are the asked length, pauses unknown and none counted, the
needle's place ``UNKNOWN_TOKEN``. Each run (a folder; within it a version or seed) becomes a replicate. A row's ``cell_id`` is a digest of
what was answered and when, so that a run that was copied has the same ids wherever it is imported.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_ray.errors import SourceError
from pause_ray.needle.ledger import CellResult, FactResult, Ledger
from pause_ray.needle.tester_results import TesterResult, read_tester_results
from pause_ray.spec import digest
from pause_ray.text.plain import plain


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How imported rows are named, where their files do not say."""

    arm: str | None = None
    """The ledger's ``arm``; None takes the folder's name, of several folders that of the one they are in."""
    task: str | None = None
    """None takes the tester's own name of the task."""
    model: str | None = None
    """Only the results of this model; None takes all, which must then be of one model."""
    replicate: int | None = None
    """Number of the first run; the others count on from there. None takes the file's version (1 is replicate 0), if there is one folder."""
    keep_repeats: bool = False
    """Results of one cell in one run are replicates; otherwise they are refused."""
    question: str = ""
    """What was asked, where files do not say."""
    references: tuple[str, ...] = ()
    """What a right answer contains, where files do not say, so that the ledger can be rescored."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import left."""

    ledger: Path
    arm: str
    model: str
    num_results: int
    num_added: int
    """Not in the ledger before."""
    num_unscored: int
    replicates: tuple[int, ...]
    num_lengths: int
    num_depths: int
    notes: tuple[str, ...]
    """What to know about the results; empty if they are as they should be."""


@dataclass(frozen=True)
class _Run:
    name: str
    results: Sequence[TesterResult]


def import_results(sources: Sequence[Path], *, out: Path, naming: Naming | None = None) -> Imported:
    """Add the results of one arm to the ledger ``out``; those that it has already are left as they are.

    Args:
        sources: Folders or files of the original tester, versions 0.1 and 2; see ``needle.tester_results``.
        out: Ledger; made if missing.
        naming: What the files do not say.

    Raises:
        SourceError: no results, broken ones, several of one cell, several models, a run twice, references in no needle.
        StorageError: the ledger cannot be read or written.
    """
    naming = naming or Naming()
    found = [(source, _of_one_model(read_tester_results(source), source, naming)) for source in sources]
    models = {result.model for _, results in found for result in results}
    if len(models) > 1:
        raise SourceError(f"the results are of several models: {', '.join(sorted(models))}; import them into ledgers of their own")
    runs = [run for source, results in found for run in _runs(results, source, keep_repeats=naming.keep_repeats)]
    _refuse_copies(runs)
    arm = naming.arm or _name(sources)
    rows = [
        _row(result, arm=arm, replicate=replicate, naming=naming)
        for replicate, run in zip(_numbers(runs, naming, num_sources=len(sources)), runs, strict=True)
        for result in run.results
    ]
    added = _add(rows, Ledger(out))
    return Imported(
        ledger=out,
        arm=arm,
        model=models.pop(),
        num_results=len(rows),
        num_added=added,
        num_unscored=sum(row.score is None for row in rows),
        replicates=tuple(sorted({row.replicate for row in rows})),
        num_lengths=len({row.context_tokens for row in rows}),
        num_depths=len({row.depth_percent for row in rows}),
        notes=tuple(_notes(rows)),
    )


def _of_one_model(results: Sequence[TesterResult], source: Path, naming: Naming) -> list[TesterResult]:
    counts = Counter(result.model for result in results)
    if naming.model is None and len(counts) > 1:
        listed = ", ".join(f"{model} ({count})" for model, count in counts.most_common())
        raise SourceError(f"{source}: has results of several models: {listed}; choose one with --model")
    kept = [result for result in results if naming.model in (None, result.model)]
    if not kept:
        raise SourceError(f"{source}: has no results of model {naming.model}; there are {', '.join(sorted(counts))}")
    return kept


def _runs(results: Sequence[TesterResult], source: Path, *, keep_repeats: bool) -> list[_Run]:
    """The results by version or seed, each cell once; further results of a cell make further runs."""
    repeats: defaultdict[tuple[int, str, int, float], list[TesterResult]] = defaultdict(list)
    for result in sorted(results, key=lambda result: (result.timestamp, result.origin)):
        repeats[result.version or result.seed or 0, result.task, result.context_tokens, result.depth_percent].append(result)
    for (_, _, length, depth), its in repeats.items():
        if len(its) > 1 and not keep_repeats:
            raise SourceError(
                f"{its[0].origin} and {its[1].origin} are both the cell of {length} tokens at {depth:g} %; "
                "remove one, or keep all as replicates with --keep-repeats"
            )
    runs: defaultdict[tuple[int, int], list[TesterResult]] = defaultdict(list)
    for (series, *_), its in repeats.items():
        for number, result in enumerate(its):
            runs[series, number].append(result)
    several = len(runs) > 1
    return [_Run(f"{source} run {place}" if several else str(source), its) for place, (_, its) in enumerate(sorted(runs.items()), start=1)]


def _refuse_copies(runs: Sequence[_Run]) -> None:
    seen: dict[str, _Run] = {}
    for run in runs:
        ids = [_identity(result) for result in run.results if _has_clock(result)]
        copied = Counter(seen[cell].name for cell in ids if cell in seen)
        if copied:
            other, count = copied.most_common(1)[0]
            raise SourceError(
                f"{run.name} and {other} are the same run: {count} of {len(run.results)} cells have the same answer, time and duration; "
                "leave one of them out"
            )
        seen |= dict.fromkeys(ids, run)


def _numbers(runs: Sequence[_Run], naming: Naming, *, num_sources: int) -> list[int]:
    versions = [run.results[0].version or 0 for run in runs]
    if naming.replicate is None and num_sources == 1 and min(versions) >= 1 and len(set(versions)) == len(runs):
        return [version - 1 for version in versions]
    first = naming.replicate or 0
    return list(range(first, first + len(runs)))


def _has_clock(result: TesterResult) -> bool:
    return bool(result.timestamp or result.seconds)


def _identity(result: TesterResult, *parts: object) -> str:
    """Of what was answered and when; a later grade of the same answer changes nothing."""
    asked = [result.model, result.task, result.context_tokens, result.depth_percent, [fact.text for fact in result.facts]]
    return digest([*asked, result.response, result.timestamp, result.seconds, *(str(part) for part in parts)])


def _row(result: TesterResult, *, arm: str, replicate: int, naming: Naming) -> CellResult:
    facts, references = result.facts, result.references
    if not references and naming.references:
        facts, references = _with_references(result, naming.references), naming.references
    return CellResult(
        cell_id=_identity(result) if _has_clock(result) else _identity(result, arm, replicate),
        task=naming.task or result.task,
        arm=arm,
        replicate=replicate,
        seed=result.seed or 0,
        model=result.model,
        adapter=None,
        pauses="unknown (imported)",
        context_tokens=result.context_tokens,
        prompt_tokens=result.context_tokens,
        content_tokens=result.content_tokens,
        num_pauses=0,
        rule="unknown (imported)",
        depth_percent=result.depth_percent,
        needle_token=result.needle_token,
        facts=facts,
        question=result.question or naming.question,
        references=references,
        labels=result.labels,
        response=result.response,
        score=result.score,
        rubric=result.rubric,
        unscored_reason=result.unscored_reason,
        scorer=result.scorer,
        engine="imported",
        prefilled_tokens=result.prefilled_tokens,
        decoded_tokens=result.decoded_tokens,
        seconds=result.seconds,
        cost=result.cost,
    )


def _with_references(result: TesterResult, references: Sequence[str]) -> tuple[FactResult, ...]:
    """The facts, each with those references that it holds."""
    held = [tuple(reference for reference in references if plain(reference) in plain(fact.text)) for fact in result.facts]
    lost = [reference for reference in references if not any(reference in its for its in held)]
    if lost:
        texts = " | ".join(fact.text for fact in result.facts) or "no needle"
        raise SourceError(f"{result.origin}: reference {lost[0]!r} does not occur in what was hidden ({texts})")
    return tuple(
        FactResult(text=fact.text, references=its, depth_percent=fact.depth_percent, token=fact.token, score=None)
        for fact, its in zip(result.facts, held, strict=True)
    )


def _add(rows: Sequence[CellResult], ledger: Ledger) -> int:
    """Append the rows that the ledger does not have; nothing is written where one of them cannot be."""
    there = {row.cell_id: row for row in ledger.rows()}
    taken = {_place(row): row for row in there.values()}
    free = 1 + max((row.replicate for row in there.values()), default=-1)
    new = [row for row in rows if there.get(row.cell_id) != row]
    for row in new:
        before = there.get(row.cell_id)
        if before is not None:
            raise SourceError(
                f"{ledger.path}: has this run already as replicate {before.replicate} of {before.arm}, there named or graded otherwise; "
                "import into a new ledger"
            )
        if _place(row) in taken:
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
    cells = {(row.task, row.context_tokens, row.depth_percent) for row in rows}
    counts = Counter(row.replicate for row in rows)
    notes = [
        f"replicate {replicate} has {count} of {len(cells)} cells" for replicate, count in sorted(counts.items()) if count < len(cells)
    ]
    reasons = Counter(row.unscored_reason for row in rows if row.unscored_reason)
    notes += [f"{count} cells are unscored ({reason})" for reason, count in reasons.most_common()]
    if len({row.task for row in rows}) > 1:
        notes.append(f"the results are of several tasks: {', '.join(sorted({row.task for row in rows}))}")
    return notes


def _name(sources: Sequence[Path]) -> str:
    """Of an arm: the file's or folder's name, of several the name of the folder that they are in; a mere ``results`` is passed over."""
    resolved = [source.resolve() for source in sources]
    if len(resolved) == 1 and resolved[0].is_file():
        return resolved[0].stem
    shared = Path(os.path.commonpath(resolved))
    return shared.parent.name if shared.name == "results" else shared.name
