"""The verb plan: memory, time and cost of a training and its scoring."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from pause_ray.cli.terminal import DEFAULT_STORAGE, AsJson, Sets, StorageRoot, app, err, kind_of, out, print_json
from pause_ray.core.errors import ModelError, SpecError
from pause_ray.core.format import format_count, format_duration, format_money
from pause_ray.core.spec import JsonObject, Spec, check_path, parse_assignments, read_yaml, with_overrides
from pause_ray.core.storage import Storage
from pause_ray.evaluation.suite import SuiteSpec
from pause_ray.models.shape import PUBLISHED, published_config
from pause_ray.models.spec import ModelSpec
from pause_ray.sweep.spec import PlannedTrial, listed_trials, read_sweep
from pause_ray.training.spec import TrainSpec
from pause_ray.trial.spec import read_suite, read_trial

if TYPE_CHECKING:
    from pause_ray.trial.needs import Hardware, Plan

T = TypeVar("T")
GPU_TABLE = "cluster/gpus.yaml"
SUITE = "eval/suites/paper.yaml"
ROW_TOKENS = 8192
LEAST_ROWS = 8
"""Least number of rows in a step if no file names it: the paper's batch."""
CONFIG = "config.json"
BESIDE = 3
"""Number of plans that are shown side by side, with their memory by part; more get a line each."""


class _Planned(Spec):
    """The fields that ``--set`` may change without a spec file."""

    train: TrainSpec = TrainSpec()


@app.command()
def plan(
    spec: Annotated[Path | None, typer.Argument(help="YAML file of a trial or sweep; without one, --model names the models.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Hub id, folder, config.json, or 3B, 8B, 70B (Llama 3). May be repeated; default without a file: these three."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs in all.")] = 8,
    gpu: Annotated[str | None, typer.Option(help="Name of a GPU in the table; default: the first with the memory of --gpu-memory.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, such as 80GB; default: as in the table.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Number of GPUs in one machine.")] = 8,
    row_tokens: Annotated[
        int | None, typer.Option(min=64, help=f"Tokens of every training row, without a spec file; default: {ROW_TOKENS}.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help=f"Suite to score, without a spec file; default: {SUITE}.")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Assumed share of the GPUs' peak operations per second.")] = 0.4,
    network: Annotated[float, typer.Option(min=0.1, help="Assumed network bandwidth of each machine in GB/s.")] = 50.0,
    gpu_table: Annotated[str, typer.Option(help="YAML file with GPUs and their prices.")] = GPU_TABLE,
    set_: Sets = None,
    as_json: AsJson = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Estimate memory, time, tokens and cost of fine-tuning and scoring, and the smallest cluster that fits. Loads no weights.

    Examples: `pause-ray plan --model 70B --gpus 16 --gpu-memory 80GB`;
    `pause-ray plan sweeps/paper.yaml --gpus 8 --gpu H100`;
    `pause-ray plan --model 8B --gpus 1 --row-tokens 131072 --set train.quantize=nf4`

    Next: `pause-ray sweep FILE --dry-run` lists every trial with what is left to do; `pause-ray check FILE --cluster` checks the nodes.
    """
    from pause_ray.trial.needs import GpuTable, Hardware

    table = GpuTable.parse(read_yaml(_content(gpu_table, option="--gpu-table")), origin=gpu_table)
    hardware = Hardware(
        gpu=table.choose(name=gpu, memory_gb=None if gpu_memory is None else parse_memory(gpu_memory)),
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        utilization=mfu,
        network_gb_per_second=network,
    )
    root = Storage(Path(storage).expanduser().absolute())
    overrides = parse_assignments(set_ or [])
    if spec is None:
        scored, tokens = read_suite(_content(suite or SUITE, option="--suite"), {}), row_tokens or ROW_TOKENS
        models = model or PUBLISHED
        plans = [_of_model(name, hardware=hardware, row_tokens=tokens, suite=scored, overrides=overrides, root=root) for name in models]
    else:
        _refuse_without_effect(spec, model=model, suite=suite, row_tokens=row_tokens)
        with err.status("building the prompts"):
            plans = _of_trials(spec, hardware=hardware, overrides=overrides, root=root)
    if as_json:
        assumed = {"utilization": mfu, "network_gb_per_second": network, "gpus": gpus, "gpus_per_node": gpus_per_node}
        print_json({"assumed": assumed | {"gpu": hardware.gpu.resolved()}, "plans": [each.as_json() for each in plans]})
        return
    _show(plans, hardware)


def parse_memory(text: str) -> float:
    """Return ``80GB``, ``80`` or ``74.5GiB`` in 10⁹ bytes.

    Raises:
        SpecError: The text is no size, or zero.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise SpecError(f"--gpu-memory {text}: expected a size such as 80GB or 40GiB")
    return float(match[1]) * (2**30 / 1e9 if (match[2] or "").lower() == "gib" else 1)


def _content(name: str, *, option: str) -> Path:
    """Return the path of a file that an option names.

    Raises:
        SpecError: There is no such file.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise SpecError(
            f"{option} {name}: no such file from {Path.cwd()}; run where the project's cluster and eval folders are, or name yours"
        )
    return path


def _refuse_without_effect(spec: Path, *, model: list[str] | None, suite: str | None, row_tokens: int | None) -> None:
    trial = "trial." if kind_of(spec) == "sweep" else ""
    if model:
        raise SpecError(f"--model {model[0]}: the file names the model; change it with --set {trial}model.source={model[0]}")
    if suite:
        raise SpecError(f"--suite {suite}: the file names the suite; change it with --set {trial}eval={suite}")
    if row_tokens:
        raise SpecError(f"--row-tokens {row_tokens}: the file says it; change it with --set {trial}corpus.sequence_len={row_tokens}")


def _of_model(name: str, *, hardware: Hardware, row_tokens: int, suite: SuiteSpec, overrides: JsonObject, root: Storage) -> Plan:
    """Return the plan of the paper's training: any ZeRO stage that fits, activations recomputed, at least eight rows in a step.

    Every token of a row has a loss, which is the most that a training can take.
    """
    from pause_ray.evaluation.haystack import check_lengths
    from pause_ray.models.shape import ModelShape
    from pause_ray.models.sources import config_limit_tokens
    from pause_ray.trial.needs import Rows, grid_of, make_plan

    for dotted in overrides:
        check_path(_Planned, dotted, origin="--set")
    passes = hardware.gpus * math.ceil(LEAST_ROWS / hardware.gpus)
    sparse = {"micro_batch_size": 1, "gradient_accumulation_steps": passes, "gradient_checkpointing": True, "zero": {"stage": "auto"}}
    train = _Planned.parse(with_overrides({"train": sparse}, overrides), origin="--set").train
    config, origin = _config(name, root=root)
    shape, limit_tokens = ModelShape.from_config(config, origin=origin), config_limit_tokens(config, origin=origin)
    check_lengths(suite, limit_tokens=limit_tokens, origin=name)
    if row_tokens > limit_tokens:
        raise ModelError(f"--row-tokens {row_tokens} exceeds the {limit_tokens} tokens that {name} can read")
    rows = Rows(longest_tokens=row_tokens, mean_tokens=row_tokens, loss_tokens=row_tokens)
    grid = grid_of(suite, shape=shape, hardware=hardware, dtype="bfloat16")
    return make_plan(name.rpartition("/")[2], shape=shape, train=train, rows=rows, grid=grid, hardware=hardware, rows_may_grow=True)


def _config(name: str, *, root: Storage) -> tuple[Mapping[str, Any], str]:
    """Return the config of a published model, a ``config.json`` or a ``model.source``, and its origin."""
    from pause_ray.models.sources import read_config, resolve_model

    path, published = Path(name).expanduser(), published_config(name)
    if path.suffix == ".json":
        return read_config(path), str(path)
    if published is not None and not path.exists():
        return published, name
    source = ModelSpec.parse({"source": name}, origin="--model")
    folder = path if (path / CONFIG).is_file() else resolve_model(source, cache=root.cache, weights=False)
    return read_config(folder / CONFIG), str(folder / CONFIG)


def _of_trials(spec: Path, *, hardware: Hardware, overrides: JsonObject, root: Storage) -> list[Plan]:
    from pause_ray.planning.forecast import TrialPlanner

    if kind_of(spec) == "sweep":
        trials = listed_trials(read_sweep(spec, overrides))
    else:
        trials = [PlannedTrial(arm="trial", point={}, spec=read_trial(spec, overrides))]
    planner = TrialPlanner(root)
    return [planner.plan(trial, hardware=hardware) for trial in trials]


def _show(plans: list[Plan], hardware: Hardware) -> None:
    out.print(_side_by_side(plans, hardware) if len(plans) <= BESIDE else _line_by_line(plans, hardware))
    labels: dict[str, list[str]] = {}
    for each in plans:
        for misfit in each.misfits(hardware):
            labels.setdefault(misfit, []).append(each.label)
    for misfit, concerned in labels.items():
        out.print(f"[red]{escape(', '.join(concerned))}: {escape(misfit)}[/]", highlight=False)
    gpu, network = hardware.gpu, hardware.network_gb_per_second
    out.print(
        f"Assumed: all GPUs train one model, then score it, one trial after another; {hardware.utilization:.0%} of "
        f"{gpu.bf16_tflops:g} TFLOP/s (--mfu), {network:g} GB/s between machines (--network), every answer of full length, "
        f"{format_money(gpu.price_per_hour)} {gpu.currency} per hour of one {gpu.name} ({gpu.price_source}, {gpu.price_date}). "
        "1 GB is 10⁹ bytes.",
        highlight=False,
    )


def _side_by_side(plans: list[Plan], hardware: Hardware) -> Table:
    from pause_ray.training.memory import HOST_PARTS, PARTS, gigabytes

    in_machine = f"{min(hardware.gpus, hardware.gpus_per_node)} in a machine"
    table = Table(title=f"{hardware.gpus} × {hardware.gpu.name} with {hardware.gpu.memory_gb:g} GB, {in_machine}")
    table.add_column("")
    for each in plans:
        table.add_column(each.label, justify="right", overflow="fold")

    def row(heading: str, values: Sequence[T | None], text: Callable[[T], str], *, end_section: bool = False) -> None:
        """Add a row, unless there is no value in it."""
        if any(value is not None for value in values):
            table.add_row(heading, *("–" if value is None else text(value) for value in values), end_section=end_section)

    trains, memories = [each.train for each in plans], [each.memory for each in plans]
    row("parameters", [each.parameters for each in plans], _billions)
    row("trained", [each.trained_parameters for each in plans], _billions, end_section=True)
    row("steps × rows", trains, lambda train: f"{train.max_steps} × {train.rows_per_step}")
    row("longest row, tokens", [each.longest_row_tokens if each.train else None for each in plans], format_count)
    row("base weights", trains, lambda train: train.quantize or train.precision)
    row("activations", trains, lambda train: "recomputed" if train.gradient_checkpointing else "kept")
    row("ZeRO stage", memories, lambda memory: str(memory.stage))
    row("memory of a GPU", memories, lambda memory: gigabytes(memory.worker_bytes))
    for part in PARTS:
        row(f"  {part}", [memory.worker.get(part) if memory else None for memory in memories], gigabytes)
    row("memory of a machine", memories, lambda memory: gigabytes(memory.host_bytes))
    for part in HOST_PARTS:
        row(f"  {part}", [memory.host.get(part) if memory else None for memory in memories], gigabytes)
    row("training fits", [each if each.memory else None for each in plans], lambda each: "no" if each.remedy else "yes", end_section=True)
    for heading, works in (("training", [each.training for each in plans]), ("scoring", [each.evaluation for each in plans])):
        row(f"{heading} tokens", works, lambda work: format_count(work.tokens))
        row("  PFLOP", works, lambda work: _rounded(work.flops / 1e15))
        row("  time", works, lambda work: format_duration(work.seconds))
        row("  bound by", works, lambda work: work.bound_by)
        row(f"  cost, {hardware.gpu.currency}", works, lambda work: format_money(work.cost), end_section=True)
    row("GPUs per scoring copy", [each.gpus_per_model or None for each in plans], str)
    row("smallest cluster", plans, lambda each: _cluster(each, hardware))
    return table


def _line_by_line(plans: list[Plan], hardware: Hardware) -> Table:
    from pause_ray.training.memory import gigabytes

    table = Table(title=f"{hardware.gpus} × {hardware.gpu.name} with {hardware.gpu.memory_gb:g} GB", show_footer=True)
    trainings, scorings = [each.training for each in plans if each.training], [each.evaluation for each in plans if each.evaluation]
    table.add_column("trial", footer="all, if nothing is shared", overflow="fold")
    for heading, footer in (
        ("stage", ""),
        ("GPU memory", ""),
        ("train", format_duration(sum(work.seconds for work in trainings))),
        ("score", format_duration(sum(work.seconds for work in scorings))),
        (hardware.gpu.currency, format_money(sum(work.cost for work in trainings + scorings))),
        ("smallest", ""),
    ):
        table.add_column(heading, footer=footer, justify="right")
    for each in plans:
        table.add_row(
            each.label,
            str(each.memory.stage) if each.memory else "–",
            gigabytes(each.memory.worker_bytes) if each.memory else "–",
            format_duration(each.training.seconds) if each.training else "–",
            format_duration(each.evaluation.seconds) if each.evaluation else "–",
            format_money(sum(work.cost for work in (each.training, each.evaluation) if work)),
            _cluster(each, hardware),
        )
    return table


def _cluster(plan: Plan, hardware: Hardware) -> str:
    return f"{plan.smallest} × {hardware.gpu.name}" if plan.smallest else "none"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M" if parameters else "–"


def _rounded(value: float) -> str:
    return format_count(value) if value >= 100 else f"{value:.2g}"
