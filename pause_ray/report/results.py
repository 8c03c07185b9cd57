"""The results of a sweep, read from storage: its conditions, their scores, and their differences to the reference and the control.

The reference is the arm that all others are compared with. The control is an arm that was tuned without pauses: only the difference of
a pause-tuned arm to the control shows an effect of pauses and not of tuning. Only finished trials count. Findings, figures, the report
and MLflow show these results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pause_ray.core.errors import StorageError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import MANIFEST, Storage, is_complete, read_json
from pause_ray.evaluation.compare import Comparison, Summary, compare_arms, summarize
from pause_ray.evaluation.grid import DepthAxis, depth_axis
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.statistics import grouped, holm
from pause_ray.sweep.search import SearchRecord
from pause_ray.sweep.spec import condition_labels


@dataclass(frozen=True, kw_only=True)
class AnswerCost:
    """Tokens, time and money of answers."""

    prompt_tokens: int
    """Tokens of all prompts that were answered."""
    prefilled_tokens: int
    """Prompt tokens that went through the model; the others were reused from an earlier prompt."""
    decoded_tokens: int
    seconds: float
    money: float | None
    """Price of the answers; None if no prices were given."""

    @property
    def reused_share(self) -> float:
        """Share of the prompt tokens that were reused, 0 to 1."""
        return 1 - self.prefilled_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def answer_cost(rows: Sequence[CellResult]) -> AnswerCost:
    """Return the cost of the answers of these rows; a cell without an answer counts with its seconds and money only."""
    answered = [row for row in rows if row.response is not None]
    prices = [row.cost for row in rows if row.cost is not None]
    return AnswerCost(
        prompt_tokens=sum(row.prompt_tokens for row in answered),
        prefilled_tokens=sum(row.prefilled_tokens for row in answered),
        decoded_tokens=sum(row.decoded_tokens for row in answered),
        seconds=math.fsum(row.seconds for row in rows),
        money=math.fsum(prices) if prices else None,
    )


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
    def suite(self) -> JsonObject:
        """Resolved suite spec."""
        return self.spec.get("eval") or {}

    @property
    def training(self) -> list[JsonObject]:
        """One row per optimizer step, with at least ``step`` and ``loss``; empty for an untrained arm."""
        return list(self.manifest.get("training") or ())

    @property
    def is_trained(self) -> bool:
        """Whether an adapter answers, not the base model alone."""
        return bool(self.spec.get("train") or self.spec.get("adapter"))

    @property
    def has_pauses(self) -> bool:
        """Whether the trial's texts have pauses."""
        return self.spec.get("pauses") is not None

    @property
    def is_pause_tuned(self) -> bool:
        """Whether an adapter answers, and its texts have pauses."""
        return self.is_trained and self.has_pauses

    @property
    def num_cut_off(self) -> int:
        """Number of answers that reached ``max_new_tokens`` without an end."""
        most = self.suite.get("max_new_tokens")
        return 0 if most is None else sum(row.decoded_tokens >= most for row in self.rows)

    @property
    def corpus_stats(self) -> JsonObject:
        """Statistics of the training corpus; empty for an untrained arm."""
        return dict(self.manifest.get("corpus_stats") or {})

    @property
    def noise(self) -> JsonObject | None:
        """The numerics check: ``dtype`` and the numbers of ``cells``, ``answers_changed`` and ``scores_changed``; None without one."""
        return self.manifest.get("noise") or None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The difference of one condition to another."""

    label: str
    """Label of the condition."""
    other: str
    """Label of the condition that it is compared with."""
    comparison: Comparison
    corrected_p: float
    """``comparison.p`` after Holm's correction for the contrasts of its kind: with the reference, or with the control."""

    @property
    def name(self) -> str:
        """A text such as ``pause_tuned against baseline``."""
        return f"{self.label} against {self.other}"

    @property
    def difference(self) -> float:
        """Difference of mean scores; above zero if the condition is better than the other."""
        return self.comparison.difference

    @property
    def differs(self) -> bool:
        """Whether the difference is more than chance would explain, by interval and by corrected p."""
        return self.comparison.is_beyond_chance(self.corrected_p)


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The results of an arm at one point of the search, over its replicates."""

    arm: str
    point: JsonObject
    label: str
    """A name such as ``pause_tuned every=2 rank=16``."""
    num_planned: int
    """Number of planned trials, one for each replicate."""
    num_stopped: int
    """Number of trials that were stopped early, or not started because their point was stopped."""
    trials: tuple[TrialResult, ...]
    """The finished trials."""
    summary: Summary | None
    """None until a trial has finished."""
    is_reference: bool
    """Whether the condition belongs to the arm that the others are compared with."""
    against_reference: Contrast | None = None
    """None for the reference itself, and until both have finished trials."""
    against_control: Contrast | None = None
    """The difference that pauses make beyond tuning; None for conditions that are not tuned with pauses."""

    @property
    def num_missing(self) -> int:
        """Number of trials that are still to come."""
        return self.num_planned - self.num_stopped - len(self.trials)

    @property
    def rows(self) -> list[CellResult]:
        """The rows of all finished replicates."""
        return [row for trial in self.trials for row in trial.rows]

    @property
    def comparison(self) -> Comparison | None:
        """The comparison with the reference."""
        return self.against_reference.comparison if self.against_reference else None

    @property
    def differs(self) -> bool:
        """Whether the difference to the reference is more than chance would explain."""
        return self.against_reference is not None and self.against_reference.differs

    @property
    def is_pause_tuned(self) -> bool:
        """Whether the condition was trained and its texts have pauses; False until a trial has finished."""
        return any(trial.is_pause_tuned for trial in self.trials)


@dataclass(frozen=True, kw_only=True)
class SweepResults:
    """The finished results of a sweep."""

    folder: Path
    name: str
    digest: str
    description: JsonObject
    """The content of ``sweep.json``."""
    reference_arm: str
    control_arm: str | None
    """The arm tuned without pauses that pause-tuned ones are compared with; None where the sweep names none."""
    conditions: tuple[ArmResult, ...]
    labels: Mapping[str, str]
    """Label of the condition of every planned trial, by digest."""
    search: SearchRecord
    """The rungs and stops of early stopping."""

    @property
    def trials(self) -> list[TrialResult]:
        """Finished trials, condition by condition."""
        return [trial for condition in self.conditions for trial in condition.trials]

    @property
    def axis(self) -> DepthAxis:
        """The axis of needle positions that fits all finished trials."""
        return depth_axis(trial.suite for trial in self.trials)

    @property
    def num_planned(self) -> int:
        """Number of planned trials."""
        return sum(condition.num_planned for condition in self.conditions)

    @property
    def scored(self) -> list[ArmResult]:
        """Conditions with at least one finished trial."""
        return [condition for condition in self.conditions if condition.summary is not None]

    @property
    def contrasts(self) -> list[Contrast]:
        """The differences of all conditions to the reference."""
        return [condition.against_reference for condition in self.conditions if condition.against_reference]

    @property
    def control_contrasts(self) -> list[Contrast]:
        """The differences of pause-tuned conditions to the control."""
        return [condition.against_control for condition in self.conditions if condition.against_control]

    @property
    def all_contrasts(self) -> list[Contrast]:
        """The differences to the reference, then those to the control."""
        return [*self.contrasts, *self.control_contrasts]

    @property
    def num_stopped(self) -> int:
        """Number of trials that were stopped early, or not started because their point was stopped."""
        return sum(condition.num_stopped for condition in self.conditions)

    @property
    def is_finished(self) -> bool:
        """Whether no trial is to come."""
        return all(condition.num_missing == 0 for condition in self.conditions)

    @property
    def progress(self) -> str:
        """A text such as ``5 of 9 trials finished, 4 stopped early``."""
        stopped = f", {self.num_stopped} stopped early" if self.num_stopped else ""
        return f"{len(self.trials)} of {self.num_planned} trials finished{stopped}"


def read_results(sweep_folder: Path, storage: Storage) -> SweepResults:
    """Read a sweep's folder and the folders of its finished trials.

    Raises:
        StorageError: a file is missing or damaged, or a ledger does not have the cells that its manifest says.
    """
    sweep = read_json(sweep_folder / "sweep.json")
    search = SearchRecord.read(sweep_folder)
    left_out = search.left_out(sweep)
    labels = condition_labels(sweep["trials"])
    planned = grouped((labels[entry["digest"]], entry) for entry in sweep["trials"])
    read = [_read_condition(labels[entries[0]["digest"]], entries, storage, left_out, reference=sweep["compare_to"]) for entries in planned]
    rows = {condition.label: condition.rows for condition in read}
    references, control = [condition for condition in read if condition.is_reference], sweep.get("control")
    controls = [condition for condition in read if condition.arm == control and not condition.is_reference]
    compared = [condition for condition in read if not condition.is_reference]
    paused = [condition for condition in read if condition.arm != control and condition.is_pause_tuned]
    with_reference = contrasts(_counterparts(compared, references), rows)
    with_control = contrasts(_counterparts(paused, controls), rows)
    return SweepResults(
        folder=sweep_folder,
        name=sweep["name"],
        digest=sweep["digest"],
        description=sweep,
        reference_arm=sweep["compare_to"],
        control_arm=control,
        conditions=tuple(
            replace(condition, against_reference=with_reference.get(condition.label), against_control=with_control.get(condition.label))
            for condition in read
        ),
        labels=labels,
        search=search,
    )


def _read_condition(label: str, entries: Sequence[JsonObject], storage: Storage, left_out: set[str], *, reference: str) -> ArmResult:
    """Read the finished trials of a condition, which is not compared yet."""
    trials = tuple(read_trial(entry, storage) for entry in entries if is_complete(storage.trials / entry["digest"]))
    rows = [row for trial in trials for row in trial.rows]
    return ArmResult(
        arm=entries[0]["arm"],
        point=entries[0]["point"],
        label=label,
        num_planned=len(entries),
        num_stopped=len(left_out.intersection(entry["digest"] for entry in entries) - {trial.digest for trial in trials}),
        trials=trials,
        summary=summarize(rows) if rows else None,
        is_reference=entries[0]["arm"] == reference,
    )


def _counterparts(conditions: Sequence[ArmResult], others: Sequence[ArmResult]) -> dict[str, str]:
    """Return the label of each condition's counterpart, by label, where both have rows.

    The counterpart is the only one of ``others`` that has the condition's value at every path of the search that both have.
    """
    found = {}
    for condition in conditions:
        point = condition.point
        agreeing = [item for item in others if all(item.point[path] == point[path] for path in item.point.keys() & point.keys())]
        if len(agreeing) == 1 and condition.trials and agreeing[0].trials:
            found[condition.label] = agreeing[0].label
    return found


def contrasts(others: Mapping[str, str], rows: Mapping[str, Sequence[CellResult]]) -> dict[str, Contrast]:
    """Return the contrast of each label with its other one, by label and with corrected p, without those that have no pairs."""
    found = {label: compare_arms(rows[label], rows[other], num_comparisons=len(others)) for label, other in others.items()}
    comparisons = {label: comparison for label, comparison in found.items() if comparison is not None}
    corrected = holm([comparison.p for comparison in comparisons.values()])
    return {
        label: Contrast(label=label, other=others[label], comparison=comparison, corrected_p=p)
        for (label, comparison), p in zip(comparisons.items(), corrected, strict=True)
    }


def read_trial(entry: JsonObject, storage: Storage) -> TrialResult:
    """Read a finished trial from its folder; ``entry`` is its entry in ``sweep.json``.

    Raises:
        StorageError: A file is missing or damaged, or the ledger does not have the cells that its manifest says.
    """
    folder = storage.trials / entry["digest"]
    trial = TrialResult(
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
    found, expected = len(trial.rows), trial.manifest["num_cells"]
    if found != expected:
        remedy = (
            f"remove {MANIFEST} and run the sweep again: only the missing cells are asked"
            if found < expected
            else "remove the folder and run the sweep again: its cells are asked anew"
        )
        raise StorageError(f"{folder}: cells.jsonl has {found} cells and {MANIFEST} says {expected}; {remedy}")
    return trial
