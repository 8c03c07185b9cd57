"""The verb plan: memory, time and cost of a training and its scoring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pause_ray.cli.terminal import DEFAULT_STORAGE, AsJson, Sets, StorageRoot, app, err, out, print_json
from pause_ray.core.errors import ModelError, SpecError
from pause_ray.core.format import format_count, format_duration, format_money
from pause_ray.core.spec import Spec, check_path, parse_assignments, read_yaml, with_overrides
from pause_ray.core.storage import Storage
from pause_ray.evaluation.suite import SuiteSpec
from pause_ray.models.shape import PUBLISHED, published_config
from pause_ray.models.spec import ModelSpec
from pause_ray.sweep.spec import PlannedTrial, listed_trials, read_sweep
from pause_ray.training.spec import TrainSpec
from pause_ray.trial.spec import read_suite, read_trial

if TYPE_CHECKING:
    from pause_ray.trial.needs import Plan, Site

GPU_TABLE = "cluster/gpus.yaml"
SUITE = "eval/suites/paper.yaml"
ROW_TOKENS = 8192
LEAST_ROWS = 8
"""Least number of rows in a step if no file names it: the paper's batch."""
CONFIG = "config.json"
BESIDE = 3
"""TrialPlanner that are shown side by side, with their memory by part; more get a line each."""


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
    from pause_ray.trial.needs import Site, parse_memory, read_gpus

    memory_gb = None if gpu_memory is None else parse_memory(gpu_memory)
    table = read_gpus(_content(gpu_table, option="--gpu-table"))
    site = Site(
        gpu=table.choose(name=gpu, memory_gb=memory_gb),
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        utilization=mfu,
        network_gb_per_second=network,
    )
    root = Storage(Path(storage).expanduser().absolute())
    if spec is None:
        asked = read_suite(_content(suite or SUITE, option="--suite"), {})
        plans = [
            _of_model(name, site=site, row_tokens=row_tokens or ROW_TOKENS, suite=asked, set_=set_, root=root)
            for name in model or PUBLISHED
        ]
    else:
        _refuse_without_effect(spec, model=model, suite=suite, row_tokens=row_tokens)
        with err.status("building the prompts"):
            plans = _of_trials(spec, site=site, set_=set_, root=root)
    if as_json:
        assumed = {"utilization": mfu, "network_gb_per_second": network, "gpus": gpus, "gpus_per_node": gpus_per_node}
        print_json({"assumed": assumed | {"gpu": site.gpu.resolved()}, "plans": [found.as_json() for found in plans]})
        return
    _show(plans, site)


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
    trial = "trial." if _is_sweep(spec) else ""
    if model:
        raise SpecError(f"--model {model[0]}: the file names the model; change it with --set {trial}model.source={model[0]}")
    if suite:
        raise SpecError(f"--suite {suite}: the file names the suite; change it with --set {trial}eval={suite}")
    if row_tokens:
        raise SpecError(f"--row-tokens {row_tokens}: the file says it; change it with --set {trial}corpus.sequence_len={row_tokens}")


def _is_sweep(spec: Path) -> bool:
    return "trial" in read_yaml(spec)


def _of_model(name: str, *, site: Site, row_tokens: int, suite: SuiteSpec, set_: list[str] | None, root: Storage) -> Plan:
    """Return the plan of the paper's training: any ZeRO stage that fits, activations recomputed, at least eight rows in a step.

    Every token of a row has a loss, which is the most that a training can take.
    """
    from pause_ray.evaluation.haystack import check_lengths
    from pause_ray.models.shape import ModelShape
    from pause_ray.models.sources import config_limit_tokens
    from pause_ray.trial.needs import Rows, grid_of, make_plan

    overrides = parse_assignments(set_ or [])
    for dotted in overrides:
        check_path(_Planned, dotted, origin="--set")
    rows_per_step = site.gpus * math.ceil(LEAST_ROWS / site.gpus)
    sparse = {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": rows_per_step,
        "gradient_checkpointing": True,
        "zero": {"stage": "auto"},
    }
    train = _Planned.parse(with_overrides({"train": sparse}, overrides), origin="--set").train
    config, origin = _config(name, root=root)
    shape, limit_tokens = ModelShape.from_config(config, origin=origin), config_limit_tokens(config, origin=origin)
    check_lengths(suite, limit_tokens=limit_tokens, origin=name)
    if row_tokens > limit_tokens:
        raise ModelError(f"--row-tokens {row_tokens} exceeds the {limit_tokens} tokens that {name} can read")
    rows = Rows(longest_tokens=row_tokens, mean_tokens=row_tokens, loss_tokens=row_tokens)
    grid = grid_of(suite, shape=shape, site=site, dtype="bfloat16")
    return make_plan(name.rpartition("/")[2], shape=shape, train=train, rows=rows, grid=grid, site=site, rows_may_grow=True)


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


def _of_trials(spec: Path, *, site: Site, set_: list[str] | None, root: Storage) -> list[Plan]:
    from pause_ray.planning.forecast import plan_trials

    overrides = parse_assignments(set_ or [])
    if _is_sweep(spec):
        trials = listed_trials(read_sweep(spec, overrides))
    else:
        trials = [PlannedTrial(arm="trial", point={}, spec=read_trial(spec, overrides))]
    return plan_trials(trials, site=site, root=root)


def _show(plans: list[Plan], site: Site) -> None:
    out.print(_side_by_side(plans, site) if len(plans) <= BESIDE else _line_by_line(plans, site))
    for reason, labels in _too_large(plans, site).items():
        out.print(f"[red]{escape(', '.join(labels))}: {escape(reason)}[/]", highlight=False)
    gpu = site.gpu
    out.print(
        f"Assumed: all GPUs train one model, then score it, one trial after another; {site.utilization:.0%} of {gpu.bf16_tflops:g} TFLOP/s "
        f"(--mfu), {site.network_gb_per_second:g} GB/s between machines (--network), every answer of full length, "
        f"{format_money(gpu.price_per_hour)} {gpu.currency} per hour of one {gpu.name} ({gpu.price_source}, {gpu.price_date}). "
        "1 GB is 10⁹ bytes.",
        highlight=False,
    )


def _too_large(plans: list[Plan], site: Site) -> dict[str, list[str]]:
    """Return sentences that say what does not fit and what would, each with the labels of its plans."""
    found: dict[str, list[str]] = {}
    for each in plans:
        if each.remedy is not None:
            found.setdefault(f"the training does not fit; {each.remedy}", []).append(each.label)
        if each.gpus_per_model > site.gpus:
            needed = f"scoring needs {each.gpus_per_model} GPUs of this size for one copy of the model, and there are {site.gpus}"
            found.setdefault(f"{needed}; give more (--gpus), or larger ones (--gpu)", []).append(each.label)
    return found


def _side_by_side(plans: list[Plan], site: Site) -> Table:
    from pause_ray.training.memory import HOST_PARTS, PARTS, gigabytes

    table = Table(title=f"{site.gpus} × {site.gpu.name} with {site.gpu.memory_gb:g} GB, {min(site.gpus, site.gpus_per_node)} in a machine")
    table.add_column("")
    for found in plans:
        table.add_column(found.label, justify="right", overflow="fold")

    def row(heading: str, values: Iterable[str], *, end_section: bool = False) -> None:
        table.add_row(heading, *values, end_section=end_section)

    trains, memories = [found.train for found in plans], [found.memory for found in plans]
    row("parameters", (_billions(found.parameters) for found in plans))
    row("trained", (_billions(found.trained_parameters) for found in plans), end_section=True)
    if any(trains):
        row("steps × rows", (f"{train.max_steps} × {train.rows_per_step}" if train else "–" for train in trains))
        row("longest row, tokens", (format_count(found.longest_row_tokens) if found.train else "–" for found in plans))
        row("base weights", ((train.quantize or train.precision) if train else "–" for train in trains))
        row("activations", (("recomputed" if train.gradient_checkpointing else "kept") if train else "–" for train in trains))
    if any(memories):
        parts = [part for part in PARTS if any(memory and part in memory.worker for memory in memories)]
        row("ZeRO stage", (str(memory.stage) if memory else "–" for memory in memories))
        row("memory of a GPU", (gigabytes(memory.worker_bytes) if memory else "–" for memory in memories))
        for part in parts:
            row(f"  {part}", (gigabytes(memory.worker[part]) if memory and part in memory.worker else "–" for memory in memories))
        row("memory of a machine", (gigabytes(memory.host_bytes) if memory else "–" for memory in memories))
        for part in HOST_PARTS:
            if any(memory and part in memory.host for memory in memories):
                row(f"  {part}", (gigabytes(memory.host[part]) if memory and part in memory.host else "–" for memory in memories))
        row("training fits", ("–" if not found.memory else "no" if found.remedy else "yes" for found in plans), end_section=True)
    for heading, spent in (("training", [found.training for found in plans]), ("scoring", [found.evaluation for found in plans])):
        if any(spent):
            row(f"{heading} tokens", (format_count(its.tokens) if its else "–" for its in spent))
            row("  PFLOP", (_rounded(its.flops / 1e15) if its else "–" for its in spent))
            row("  time", (format_duration(its.seconds) if its else "–" for its in spent))
            row("  bound by", (its.bound_by if its else "–" for its in spent))
            row(f"  cost, {site.gpu.currency}", (format_money(its.cost) if its else "–" for its in spent), end_section=True)
    if any(found.gpus_per_model for found in plans):
        row("GPUs per scoring copy", (str(found.gpus_per_model or "–") for found in plans))
    row("smallest cluster", (_cluster(found, site) for found in plans))
    return table


def _line_by_line(plans: list[Plan], site: Site) -> Table:
    from pause_ray.training.memory import gigabytes

    table = Table(title=f"{site.gpus} × {site.gpu.name} with {site.gpu.memory_gb:g} GB", show_footer=True)
    costs = [its.cost for found in plans for its in (found.training, found.evaluation) if its]
    table.add_column("trial", footer="all, if nothing is shared", overflow="fold")
    for heading, footer in (
        ("stage", ""),
        ("GPU memory", ""),
        ("train", format_duration(sum(found.training.seconds for found in plans if found.training))),
        ("score", format_duration(sum(found.evaluation.seconds for found in plans if found.evaluation))),
        (site.gpu.currency, format_money(sum(costs))),
        ("smallest", ""),
    ):
        table.add_column(heading, footer=footer, justify="right")
    for found in plans:
        spent = [its for its in (found.training, found.evaluation) if its]
        table.add_row(
            found.label,
            str(found.memory.stage) if found.memory else "–",
            gigabytes(found.memory.worker_bytes) if found.memory else "–",
            format_duration(found.training.seconds) if found.training else "–",
            format_duration(found.evaluation.seconds) if found.evaluation else "–",
            format_money(sum(its.cost for its in spent)),
            _cluster(found, site),
        )
    return table


def _cluster(found: Plan, site: Site) -> str:
    return f"{found.smallest} × {site.gpu.name}" if found.smallest else "none"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M" if parameters else "–"


def _rounded(value: float) -> str:
    return format_count(value) if value >= 100 else f"{value:.2g}"
