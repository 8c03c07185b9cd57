"""A sweep read back from storage: its conditions, how each scored, how each differs from the reference, and that in plain words.

The one place that reads sweep and trial folders for people; the report, the figures and MLflow are views of what is here.
Only finished trials count: a ledger that is still growing pairs with nothing yet. Draws nothing and writes nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pause_ray.compare import ENOUGH_REPLICATES, Comparison, Interval, Summary, compare_arms, holm, summarize
from pause_ray.needle.ledger import CellResult, Ledger
from pause_ray.spec import JsonObject
from pause_ray.storage import MANIFEST, Storage, is_complete, read_json

SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One finished trial."""

    digest: str
    arm: str
    point: JsonObject
    """Searched dotted paths and their values, those that apply to the arm."""
    replicate: int
    seed: int
    folder: Path
    spec: JsonObject
    """Resolved trial spec."""
    manifest: JsonObject
    rows: tuple[CellResult, ...]

    @property
    def training(self) -> list[JsonObject]:
        """One row per optimizer step, with at least ``step`` and ``loss``; empty for an untrained arm."""
        return list(self.manifest.get("training") or ())

    @property
    def overlaps(self) -> bool:
        """Whether it was trained on documents or facts that it is asked about."""
        return bool(self.manifest.get("evaluation_overlap"))

    @property
    def corpus_stats(self) -> JsonObject:
        """Statistics of the training corpus; empty for an untrained arm."""
        return dict(self.manifest.get("corpus_stats") or {})

    @property
    def seconds(self) -> dict[str, float]:
        """Stage → wall-clock seconds."""
        return dict(self.manifest.get("seconds") or {})


@dataclass(frozen=True, kw_only=True)
class Condition:
    """An arm at one point of the search: what the replicates have in common."""

    arm: str
    point: JsonObject
    label: str
    """For people: ``pause_tuned every=2 rank=16``."""
    num_planned: int
    """Trials: one per replicate."""
    trials: tuple[TrialResult, ...]
    """The finished ones."""
    summary: Summary | None
    """None until a trial has finished."""
    is_reference: bool
    """Belongs to the arm that the others are compared with."""
    compared_to: str | None
    """Label of the condition that this one is compared with."""
    comparison: Comparison | None
    corrected_p: float | None
    """``comparison.p`` after Holm's correction for the number of comparisons in the sweep."""

    @property
    def rows(self) -> list[CellResult]:
        """Of all finished replicates."""
        return [row for trial in self.trials for row in trial.rows]

    @property
    def differs(self) -> bool:
        """Whether the difference to the reference is more than chance would explain, by interval and by corrected p."""
        if self.comparison is None or self.comparison.interval is None or self.corrected_p is None:
            return False
        return self.comparison.interval.excludes_zero() and self.corrected_p < SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class SweepResults:
    """All of a sweep that is finished."""

    folder: Path
    name: str
    digest: str
    description: JsonObject
    """``sweep.json``."""
    reference_arm: str
    conditions: tuple[Condition, ...]

    @property
    def trials(self) -> list[TrialResult]:
        """Finished trials, condition by condition."""
        return [trial for condition in self.conditions for trial in condition.trials]

    @property
    def num_planned(self) -> int:
        """Trials of the sweep."""
        return sum(condition.num_planned for condition in self.conditions)

    @property
    def scored(self) -> list[Condition]:
        """Conditions with at least one finished trial."""
        return [condition for condition in self.conditions if condition.summary is not None]

    @property
    def compared(self) -> list[Condition]:
        """Conditions with a comparison."""
        return [condition for condition in self.conditions if condition.comparison is not None]

    @property
    def progress(self) -> str:
        """``7 of 7 trials finished``."""
        return f"{len(self.trials)} of {self.num_planned} trials finished"


def read_results(sweep_folder: Path, storage: Storage) -> SweepResults:
    """Read a sweep's folder and the folders of its finished trials.

    Raises:
        StorageError: a file is missing or damaged.
    """
    sweep = read_json(sweep_folder / "sweep.json")
    planned: dict[str, list[JsonObject]] = {}
    for entry in sweep["trials"]:
        planned.setdefault(_label(entry, sweep["trials"]), []).append(entry)
    finished = {
        label: tuple(_read_trial(entry, storage) for entry in entries if is_complete(storage.trials / entry["digest"]))
        for label, entries in planned.items()
    }
    references = {label: entries[0]["point"] for label, entries in planned.items() if entries[0]["arm"] == sweep["compare_to"]}
    comparisons: dict[str, tuple[str, Comparison]] = {}
    for label, entries in planned.items():
        counterpart = None if label in references else _counterpart(entries[0]["point"], references)
        comparison = compare_arms(_rows(finished[label]), _rows(finished[counterpart])) if counterpart else None
        if counterpart and comparison:
            comparisons[label] = (counterpart, comparison)
    corrected = dict(zip(comparisons, holm([comparison.p for _, comparison in comparisons.values()]), strict=True))
    conditions = tuple(
        Condition(
            arm=entries[0]["arm"],
            point=entries[0]["point"],
            label=label,
            num_planned=len(entries),
            trials=finished[label],
            summary=summarize(_rows(finished[label])) if finished[label] else None,
            is_reference=label in references,
            compared_to=comparisons[label][0] if label in comparisons else None,
            comparison=comparisons[label][1] if label in comparisons else None,
            corrected_p=corrected.get(label),
        )
        for label, entries in planned.items()
    )
    return SweepResults(
        folder=sweep_folder,
        name=sweep["name"],
        digest=sweep["digest"],
        description=sweep,
        reference_arm=sweep["compare_to"],
        conditions=conditions,
    )


def headline(results: SweepResults) -> str:
    """What came out, in one sentence that claims no more than the data hold."""
    if not results.scored:
        return "No trial has finished yet, so nothing can be said."
    if not results.compared:
        best = max(results.scored, key=_mean_score)
        return f"{best.label} has a mean score of {_mean_score(best):.2f}; there is nothing yet to compare it with."
    leader = max(results.compared, key=_difference)
    found = [condition for condition in results.compared if condition.differs]
    among = f", the best of {len(results.compared)} arms," if len(results.compared) > 1 else ""
    measured = _measured(leader)
    difference = _difference(leader)
    if leader.differs and difference > 0:
        return f"{leader.label}{among} scored {difference:.2f} higher than {leader.compared_to} {measured}: more than chance would explain."
    if difference <= 0:
        start = f"No arm scored higher than {leader.compared_to}: the closest, {leader.label}, differs by {difference:+.2f} {measured}"
    else:
        start = f"No arm is better than {leader.compared_to} beyond chance: {leader.label}{among} scored {difference:.2f} higher {measured}"
    if found:
        return f"{start}; {_listed([condition.label for condition in found])} scored lower than chance would explain."
    return f"{start}. This sweep cannot tell the arms apart."


def notes(results: SweepResults) -> list[str]:
    """What a reader must know before believing the numbers, most important first."""
    found: list[str] = []
    if len(results.trials) < results.num_planned:
        waiting = [condition.label for condition in results.conditions if len(condition.trials) < condition.num_planned]
        found.append(f"Unfinished: {results.progress}. Missing in whole or in part: {_listed(waiting)}.")
    for condition in results.compared:
        warnings = condition.comparison.warnings if condition.comparison else ()
        found += [f"{condition.label} against {condition.compared_to}: {text}." for text in warnings]
    found += _replicate_notes(results)
    if len(results.compared) > 1:
        found.append(
            f"{len(results.compared)} arms are compared with {results.reference_arm}. The best of many looks better than it is: "
            "read the corrected p, and test the winner again on fresh replicates."
        )
    found += _power_notes(results)
    found += _missing_notes(results)
    if any(condition.is_reference for condition in results.scored):
        alone = [condition.label for condition in results.scored if not condition.is_reference and condition.comparison is None]
        if alone:
            found.append(f"Without one counterpart in {results.reference_arm}, and so not compared: {_listed(alone)}.")
    overlapping = [condition.label for condition in results.scored if any(trial.overlaps for trial in condition.trials)]
    if overlapping:
        found.append(f"Training text overlaps with the evaluation, as the spec permits; not a fair test: {_listed(overlapping)}.")
    return found


def interval_words(interval: Interval, *, signed: bool = False) -> str:
    """``+0.02 to +0.31``."""
    return f"{interval.low:+.2f} to {interval.high:+.2f}" if signed else f"{interval.low:.2f} to {interval.high:.2f}"


def _replicate_notes(results: SweepResults) -> list[str]:
    replicates = max((condition.summary.num_replicates for condition in results.scored if condition.summary), default=0)
    if replicates == 1:
        return [
            "One replicate: one wording of the fact and one order of the haystack. Intervals and p values speak of other cells of "
            f"this haystack, not of other texts, wordings or training seeds; set replicates to {ENOUGH_REPLICATES} or more for that."
        ]
    if 1 < replicates < ENOUGH_REPLICATES:
        return [
            f"{replicates} replicates: intervals are Student's t over the replicates, and therefore wide. p values flip the signs of "
            f"cells averaged over the replicates: flipping {replicates} replicates could not give less than {2.0 ** (1 - replicates):.2g}. "
            f"From {ENOUGH_REPLICATES} replicates on, both resample replicates."
        ]
    return []


def _power_notes(results: SweepResults) -> list[str]:
    """Where the numbers cannot say what they seem to say."""
    found = []
    compared = [(condition.label, condition.comparison) for condition in results.compared if condition.comparison]
    blunt = {comparison.least_p for _, comparison in compared if comparison.least_p * len(compared) >= SIGNIFICANT}
    if blunt:
        found.append(
            f"With so few differences p cannot be less than {max(blunt):.2g}, and {min(1.0, max(blunt) * len(compared)):.2g} after "
            "correction: no effect, however large, could be shown. Take more lengths, depths and replicates, or fewer arms."
        )
    at_odds = [label for label, its in compared if its.interval and its.interval.excludes_zero() and its.p >= SIGNIFICANT]
    if at_odds:
        found.append(
            f"The interval excludes zero but p is {SIGNIFICANT} or more: {_listed(at_odds)}. With few data an interval comes out too "
            "narrow now and then; take the more cautious of the two."
        )
    flat = [
        condition.label
        for condition in results.scored
        if (interval := condition.summary and condition.summary.interval) and interval.low == interval.high
    ]
    if flat:
        found.append(
            f"All replicates have the same mean, so their spread says nothing: {_listed(flat)}. Read the interval of exact recall instead."
        )
    return found


def _missing_notes(results: SweepResults) -> list[str]:
    """Cells that are in no mean or in no comparison."""
    found = []
    unscored = [
        (condition.label, condition.summary) for condition in results.scored if condition.summary and condition.summary.num_unscored
    ]
    if unscored:
        listed = _listed([f"{label} {summary.num_unscored} of {summary.num_cells}" for label, summary in unscored])
        reasons = Counter(row.unscored_reason for condition in results.scored for row in condition.rows if row.score is None)
        why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        found.append(f"Cells that could not be scored are in no mean: {listed}. Reasons: {why}.")
    unpaired = [(condition.label, condition.comparison.num_unpaired) for condition in results.compared if condition.comparison]
    listed = _listed([f"{label} {count}" for label, count in unpaired if count])
    if listed:
        found.append(f"Cells of the two arms without a scored counterpart are not compared: {listed}.")
    return found


def _read_trial(entry: JsonObject, storage: Storage) -> TrialResult:
    folder = storage.trials / entry["digest"]
    return TrialResult(
        digest=entry["digest"],
        arm=entry["arm"],
        point=entry["point"],
        replicate=entry["replicate"],
        seed=entry["seed"],
        folder=folder,
        spec=read_json(folder / "spec.json"),
        manifest=read_json(folder / MANIFEST),
        rows=tuple(Ledger(folder / "cells.jsonl").rows()),
    )


def _rows(trials: tuple[TrialResult, ...]) -> list[CellResult]:
    return [row for trial in trials for row in trial.rows]


def _label(entry: JsonObject, entries: list[JsonObject]) -> str:
    """Arm and point; a path is shortened to its last part where that is unique among the sweep's paths."""
    leaves = Counter(path.rsplit(".", 1)[-1] for path in {path for other in entries for path in other["point"]})
    short = {path: leaf if leaves[leaf := path.rsplit(".", 1)[-1]] == 1 else path for path in entry["point"]}
    return " ".join([entry["arm"], *(f"{short[path]}={value}" for path, value in entry["point"].items())])


def _counterpart(point: JsonObject, references: dict[str, JsonObject]) -> str | None:
    """The reference condition that agrees with ``point`` on every path that both have, if it is the only one."""
    agreeing = [label for label, other in references.items() if all(other[path] == point[path] for path in other.keys() & point.keys())]
    return agreeing[0] if len(agreeing) == 1 else None


def _mean_score(condition: Condition) -> float:
    summary = condition.summary
    return -1.0 if summary is None or summary.grand_mean is None else summary.grand_mean


def _difference(condition: Condition) -> float:
    return -2.0 if condition.comparison is None else condition.comparison.difference


def _measured(condition: Condition) -> str:
    """``on the same 9 questions (95 % interval -0.10 to +0.30, p = 0.25, corrected 1.00)``."""
    comparison = condition.comparison
    if comparison is None:
        return ""
    details = [f"95 % interval {interval_words(comparison.interval, signed=True)}"] if comparison.interval else []
    details.append(f"p {p_words(comparison.p)}")
    if condition.corrected_p is not None and condition.corrected_p != comparison.p:
        details.append(f"corrected {p_words(condition.corrected_p).removeprefix('= ')}")
    return f"on the same {comparison.num_pairs} questions ({', '.join(details)})"


def p_words(p: float) -> str:
    """``= 0.031``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
