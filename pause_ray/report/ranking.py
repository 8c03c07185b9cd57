"""The best trial of a sweep and its export, the Pareto fronts of score and cost, and the rank correlation of proxy and full grid.

The export, ``<sweep folder>/best/``, holds ``trial.json``, ``adapter/`` (a whole checkpoint), ``README.md``, which says how to use them,
and ``manifest.json``, which is written last. It is the best trained trial, or the spec alone of the best one where nothing is trained.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from pause_ray.core.errors import CheckpointError
from pause_ray.core.format import format_interval
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import (
    MANIFEST,
    Storage,
    building,
    exclusive,
    is_complete,
    lock_of,
    read_json,
    space_errors,
    write_json,
    write_text,
)
from pause_ray.evaluation.compare import ObjectiveSpec, has_enough_scored_cells, paired_difference
from pause_ray.evaluation.statistics import Choice, Estimate, Interval, dominated_by, grouped, kendall_tau, pareto_front
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.report.results import ArmResult, SweepResults, TrialResult
from pause_ray.sweep.search import RungScore, Stop
from pause_ray.trial.ask import ADAPTER, MODEL_VARIABLE, TRIAL

EXPORT = "best"
"""Name of the export's folder in the sweep's folder."""
GROWN = """
if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # the marker is an entry of its own
    base.resize_token_embeddings(len(tokenizer))"""
log = logging.getLogger("pause_ray")

CostKind = Literal["overhead", "training"]


def objective_of(results: SweepResults) -> ObjectiveSpec:
    """Return the objective of the sweep; the highest score where its spec has none.

    Raises:
        SpecError: The stored spec has an objective that this version does not know.
    """
    return ObjectiveSpec.parse(results.description.get("spec", {}).get("objective") or {}, origin=str(results.folder / "sweep.json"))


def format_objective(objective: ObjectiveSpec) -> str:
    """Return the objective as words, such as ``highest score_middle``."""
    return f"{'highest' if objective.mode == 'max' else 'lowest'} {objective.metric}"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best condition by the sweep's objective, and the best of its trials."""

    objective: ObjectiveSpec
    condition: ArmResult
    trial: TrialResult
    """The best of the condition's replicates; each has a haystack and wordings of its own."""
    value: float
    """The objective of the condition over all replicates, 0 to 1."""
    interval: Interval | None
    """The interval of ``value``, not corrected for the choice of the best."""
    trial_value: float
    """The objective of ``trial``, 0 to 1."""


def best(results: SweepResults, *, tuned: bool = False) -> Best | None:
    """Return the best condition, of equal ones the first in the plan; None while no condition has a value.

    Conditions with missing replicates or with too many unscored cells (``has_enough_scored_cells``) are candidates only where no
    other condition is. With ``tuned``, only conditions whose trials have an adapter are.
    """
    objective = objective_of(results)
    sign = 1 if objective.mode == "max" else -1
    eligible = [condition for condition in results.scored if not tuned or all(trial.is_trained for trial in condition.trials)]
    candidates = [(condition, value) for condition in eligible if (value := objective.value(condition.rows)) is not None]
    complete = [(condition, value) for condition, value in candidates if _is_complete(condition)]
    if not candidates:
        return None
    condition, value = max(complete or candidates, key=lambda candidate: sign * candidate[1])
    scores = [(trial, score) for trial in condition.trials if (score := objective.value(trial.rows)) is not None]
    trial, trial_value = max(scores, key=lambda scored: sign * scored[1])
    interval = objective.interval(condition.rows)
    return Best(objective=objective, condition=condition, trial=trial, value=value, interval=interval, trial_value=trial_value)


def _is_complete(condition: ArmResult) -> bool:
    is_scored = condition.summary is not None and has_enough_scored_cells(condition.summary)
    return is_scored and condition.num_missing == 0 and condition.num_stopped == 0


def export_best(results: SweepResults, storage: Storage) -> Path | None:
    """Bring ``best/`` up to date with the finished trials of a sweep.

    Returns:
        The folder; None while no trial has finished, or, with a warning, if the adapter of the best one is missing or damaged.

    Raises:
        StorageError: The sweep's or a trial's files are damaged, or the disk is full.
    """
    found, folder = best(results, tuned=True) or best(results), results.folder / EXPORT
    if found is None:
        return None
    adapter = _adapter_folder(found.trial, storage)
    try:
        checkpoint = Checkpoint.open(adapter) if adapter is not None else None
    except CheckpointError as error:  # the report does not need it
        log.warning("the best trial is not exported: %s (and %s of its trial)", error, found.trial.folder / MANIFEST)
        return None
    manifest = _manifest(results, found, adapter)
    with exclusive(lock_of(folder), waiting=lambda holder: log.warning("the best trial: waiting for %s", holder)):
        if not (is_complete(folder) and read_json(folder / MANIFEST) == manifest):
            with building(folder) as scratch, space_errors(folder):
                if checkpoint is not None:
                    shutil.copytree(checkpoint.folder, scratch / ADAPTER)
                write_json(scratch / TRIAL, found.trial.spec)
                write_text(scratch / "README.md", _readme(manifest, found))
                write_json(scratch / MANIFEST, manifest)
    return folder


def exported(sweep_folder: Path) -> JsonObject | None:
    """Return the manifest of the exported trial; None if there is none."""
    folder = sweep_folder / EXPORT
    return read_json(folder / MANIFEST) if is_complete(folder) else None


def _adapter_folder(trial: TrialResult, storage: Storage) -> Path | None:
    """Return the adapter's folder under this storage root, which may have been moved, else the folder that the manifest names."""
    recorded = trial.manifest.get("checkpoint")
    if recorded is None:
        return None
    here = storage.checkpoints / Path(recorded).name
    return here if is_complete(here) else Path(recorded)


def _manifest(results: SweepResults, found: Best, adapter: Path | None) -> JsonObject:
    overall = best(results) or found
    return {
        "made_by": "pause-ray sweep",
        "sweep": results.name,
        "sweep_digest": results.digest,
        "trial": found.trial.digest,
        "condition": found.condition.label,
        "arm": found.condition.arm,
        "point": found.condition.point,
        "replicate": found.trial.replicate,
        "objective": found.objective.model_dump(mode="json"),
        "value": found.value,
        "trial_value": found.trial_value,
        "finished": results.is_finished,
        "better_untrained": overall.condition.label if overall.condition.label != found.condition.label else None,
        "model": found.trial.spec.get("model"),
        "model_digest": found.trial.manifest.get("model_digest"),
        "checkpoint": adapter.name if adapter else None,
    }


def _readme(manifest: JsonObject, found: Best) -> str:
    model, pauses = found.trial.spec["model"], found.trial.spec.get("pauses")
    parts = [
        f"# Best trial of {manifest['sweep']}",
        f"{manifest['condition']}, replicate {manifest['replicate']}: {format_objective(found.objective)} of the sweep's trained trials, "
        f"{manifest['value']:.3f} over its replicates{_format_interval(found.interval)}. As the best of many, this value is an "
        "overestimate: test the trial on new texts.",
    ]
    if manifest["better_untrained"]:
        parts.append(f"**An arm without training did better: {manifest['better_untrained']}.**")
    parts.append(f"Base model: `{model['source']}` (digest {manifest['model_digest']}).")
    if pauses:
        parts.append(
            "It was trained and scored on text with pauses, and needs them in its input. The first two ways below insert them; "
            f"with the others, insert them yourself:\n\n    {json.dumps(pauses, ensure_ascii=False)}"
        )
    return "\n\n".join([*parts, *(_usage(model, pauses) if manifest["checkpoint"] else [])]) + "\n"


def _format_interval(interval: Interval | None) -> str:
    return f" (95 % interval {format_interval(interval.low, interval.high)})" if interval else ""


def _usage(model: JsonObject, pauses: JsonObject | None) -> list[str]:
    source, rope = model["source"], model.get("rope")
    command = ["pause-ray", "eval", "eval/suites/single.yaml", "--model", source, "--adapter", ADAPTER]
    settings = {f"model.{name}": value for name, value in model.items() if name != "source" and value is not None}
    settings |= {"pauses": pauses} if pauses else {}
    settings |= {"engine.reuse": "depth"} if rope and rope["kind"] == "dynamic" else {}
    for path, value in settings.items():
        command += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    grows = pauses is not None and pauses.get("token") == "added"
    plain = rope is None and not source.startswith("pypi:") and not source.endswith(".gguf")
    revision = f", revision={json.dumps(model['revision'])}" if model.get("revision") else ""
    asked = f"""from pathlib import Path
from pause_ray.trial.ask import Answerer

print(Answerer.open(Path(".")).answer(context, question))  # {MODEL_VARIABLE} may name the base model's folder"""
    loaded = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{ADAPTER}")
base = AutoModelForCausalLM.from_pretrained({json.dumps(source)}{revision}){GROWN if grows else ""}
model = PeftModel.from_pretrained(base, "{ADAPTER}")"""
    return [
        f"## Ask it\n\n```python\n{asked}\n```",
        f"## Score it\n\n    {shlex.join(command)}",
        f"## Make a plain model of it, for transformers, vLLM and others\n\n    pause-ray export {ADAPTER} merged-model",
        *([f"## Load it with PEFT alone\n\n```python\n{loaded}\n```"] if plain else []),  # of others transformers makes another model
    ]


@dataclass(frozen=True, kw_only=True)
class PricedArm:
    """A condition with its score and its cost."""

    condition: ArmResult
    score: float
    """The mean score, 0 to 1."""
    interval: Interval | None
    """The interval of the score."""
    cost: float
    """The cost in the unit of the axis (see ``CostAxis.kind``)."""
    is_on_front: bool
    """Whether no other condition dominates this one."""
    compared_with: ArmResult | None
    """The condition whose score decides the position. Off the front: the best one that scores at least as high, costs at most as much
    and is better in one of them. On the front: the next cheaper one; None for the cheapest."""
    lead: Estimate | None
    """The mean paired difference of scores: of ``compared_with`` over this one, or, on the front, of this one over ``compared_with``;
    None where no cells pair."""

    @property
    def is_significant(self) -> bool:
        """Whether the lead that decides the position is above zero by its interval, without correction for multiple comparisons."""
        if self.compared_with is None:
            return True
        return self.lead is not None and self.lead.interval is not None and self.lead.interval.low > 0


@dataclass(frozen=True, kw_only=True)
class CostAxis:
    """All scored conditions against one kind of cost."""

    kind: CostKind
    """``overhead``: prompt tokens beyond the requested length, in percent; ``training``: unpadded tokens that one trial is trained on."""
    arms: tuple[PricedArm, ...]
    """The conditions, cheapest first."""

    @property
    def front(self) -> list[PricedArm]:
        """The conditions on the Pareto front, cheapest first."""
        return [arm for arm in self.arms if arm.is_on_front]


def cost_axes(results: SweepResults) -> list[CostAxis]:
    """Return score against token overhead and against training cost, without costs that are equal for all or missing in a log."""
    costs: dict[CostKind, Callable[[ArmResult], float | None]] = {"overhead": _overhead, "training": trained_tokens}
    axes = []
    for kind, cost in costs.items():
        priced = [
            (condition, cost(condition)) for condition in results.scored if condition.summary and condition.summary.grand_mean is not None
        ]
        if len({price for _, price in priced}) > 1 and all(price is not None for _, price in priced):
            axes.append(CostAxis(kind=kind, arms=_priced_arms([(condition, price or 0.0) for condition, price in priced])))
    return axes


def _priced_arms(priced: Sequence[tuple[ArmResult, float]]) -> tuple[PricedArm, ...]:
    choices = [Choice(condition.summary.grand_mean or 0.0 if condition.summary else 0.0, cost) for condition, cost in priced]
    front, dominating = pareto_front(choices), dominated_by(choices)
    arms = []
    for index, (condition, cost) in enumerate(priced):
        better = dominating[index]
        cheaper = [place for place in front if choices[place].cost < cost]
        other = better if better is not None else cheaper[-1] if cheaper else None
        winner, loser = (index, other) if better is None else (other, index)
        arms.append(
            PricedArm(
                condition=condition,
                score=choices[index].value,
                interval=condition.summary.interval if condition.summary else None,
                cost=cost,
                is_on_front=better is None,
                compared_with=None if other is None else priced[other][0],
                lead=None if winner is None or loser is None else paired_difference(priced[winner][0].rows, priced[loser][0].rows),
            )
        )
    return tuple(sorted(arms, key=lambda arm: (arm.cost, -arm.score)))


def _overhead(condition: ArmResult) -> float | None:
    """Return the prompt overhead rounded to a tenth of a percent, so that arms with equally many pauses cost the same."""
    return None if condition.summary is None else round(condition.summary.prompt_overhead_percent, 1) + 0.0


def trained_tokens(condition: ArmResult) -> float | None:
    """Return the number of tokens that one trial was trained on, mean over replicates; None where a log does not count them."""
    logs = [trial.training for trial in condition.trials]
    if any("tokens" not in row for log in logs for row in log) or any(
        trial.is_trained and not trial.training for trial in condition.trials
    ):
        return None
    return fmean(sum(row["tokens"] for row in log) for log in logs) if logs else None


@dataclass(frozen=True, kw_only=True)
class RungHistory:
    """The proxy scores of one trial under a scheduler, and the trial's end."""

    trial: str
    """The digest of the trial."""
    label: str
    """The label of the trial's condition."""
    rungs: tuple[RungScore, ...]
    """The rungs that the trial reached, in order."""
    stop: Stop | None
    """The record of its early stop; None where it was not stopped."""
    result: TrialResult | None
    """The result of the full grid; None until that is finished."""
    value: float | None
    """The sweep's objective on the full grid."""

    @property
    def proxy_scores(self) -> dict[int, float]:
        """The proxy score by rung, without the rungs that have none."""
        return {rung.rung: rung.proxy_score for rung in self.rungs if rung.proxy_score is not None}


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """The agreement of one rung's proxy scores with the full grid in the order of trials."""

    rung: int
    steps: tuple[int, ...]
    """The training steps at which the rung is scored, ascending; one where all trials have equally many steps."""
    num_trials: int
    """The number of trials with both scores."""
    num_stopped: int
    """The number of trials with a proxy score that were stopped before the full grid."""
    tau: float | None
    """Kendall's tau-b, -1 to 1; None with fewer than three trials, or where all values of one ranking are tied."""


def rung_histories(results: SweepResults) -> list[RungHistory]:
    """Return the history of every trial that a scheduler judged, in the sweep's order."""
    objective = objective_of(results)
    finished = {trial.digest: trial for trial in results.trials}
    rungs_of = {rungs[0].trial: rungs for rungs in grouped((rung.trial, rung) for rung in results.search.rungs)}
    return [
        RungHistory(
            trial=digest,
            label=label,
            rungs=tuple(sorted(rungs_of.get(digest, ()), key=lambda rung: rung.rung)),
            stop=results.search.stops.get(digest),
            result=finished.get(digest),
            value=objective.value(finished[digest].rows) if digest in finished else None,
        )
        for digest, label in results.labels.items()
        if digest in rungs_of or digest in results.search.stops
    ]


def rank_correlations(results: SweepResults) -> list[RankCorrelation]:
    """Return the correlation at each rung with a proxy score, over the trials that have a full grid, which are those not stopped.

    The scheduler applies the objective's ``mode`` to the proxy. So with either mode tau is positive where the proxy tends to prefer
    the trials that the objective prefers: reversing both rankings leaves tau unchanged.
    """
    histories = rung_histories(results)
    correlations = []
    for number in sorted({rung.rung for history in histories for rung in history.rungs}):
        at_rung = [history for history in histories if number in history.proxy_scores]
        both = [(history.proxy_scores[number], history.value) for history in at_rung if history.value is not None]
        steps = {rung.step for history in histories for rung in history.rungs if rung.rung == number}
        correlations.append(
            RankCorrelation(
                rung=number,
                steps=tuple(sorted(steps)),
                num_trials=len(both),
                num_stopped=sum(history.stop is not None and history.value is None for history in at_rung),
                tau=kendall_tau([proxy for proxy, _ in both], [full for _, full in both]),
            )
        )
    return correlations
