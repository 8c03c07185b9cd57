"""For clusters: ``pause-ray submit``, over the API that ``ray job submit`` uses, and the look of ``check --cluster`` at every node."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pause_ray.cli.terminal import AsJson, Sets, SpecFile, app, err, out, print_json
from pause_ray.core.errors import SpecError, TrackingError
from pause_ray.core.spec import parse_assignments, read_yaml
from pause_ray.core.storage import Storage
from pause_ray.sweep.spec import PlannedTrial, expand, read_sweep

if TYPE_CHECKING:
    from pause_ray.planning.preflight import Copy, Node, Problem


@app.command()
def submit(
    spec: SpecFile,
    storage: Annotated[str, typer.Option(help="Folder for all results, the same on every node of the cluster.", show_default=False)],
    address: Annotated[
        str, typer.Option(help="Dashboard of the head.", envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path, typer.Option(help="Copied to the cluster, without what .gitignore names.")] = Path(),
    exclude: Annotated[list[str] | None, typer.Option(help="Leave this out of the copy, as in a .gitignore. May be repeated.")] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Set a variable in the job; no secrets. May be repeated.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="The driver runs on a node with this label.")] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Logical CPUs of the driver; 0, without labels, puts it on the head.")] = 0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the job is submitted.")] = False,
    set_: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run a sweep on a cluster: check it here, copy the working directory, start it as a Ray job and follow its log.

    Example: `pause-ray submit sweeps/paper.yaml --storage /mnt/shared/runs --label ray.io/market-type=on-demand`

    The same sweep is not submitted twice at once; after a stop (`ray job stop ID`) or a loss it continues where it was. Ctrl-C leaves the
    log, not the job. The cluster's token is read as by `ray job submit`: from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    from pause_ray.cli import submission

    command, variables = _sweep_command(spec, storage, working_dir=working_dir, sets=set_ or []), _pairs(env or [], option="--env")
    copied = {"working_dir": str(working_dir.expanduser().resolve()), "excludes": [*submission.EXCLUDES, *(exclude or [])]}
    client = submission.connect(address)
    submission_id = submission.submit(
        client,
        command,
        name=str(read_yaml(spec).get("name", spec.stem)),
        env=variables,
        runtime_env=copied,
        entrypoint_num_cpus=cpus or None,
        entrypoint_label_selector=_pairs(label or [], option="--label") or None,
    )
    err.print(f"submitted {submission_id}: {command}", highlight=False, markup=False, soft_wrap=True)
    if no_wait:
        print_json({"job": submission_id}) if as_json else out.print(submission_id, highlight=False)
        return
    try:
        status = submission.follow(client, submission_id, show=lambda text: typer.echo(text, nl=False, err=True))
    except KeyboardInterrupt:
        err.print(f"{submission_id} continues; `ray job stop {submission_id}` ends it", highlight=False)
        raise typer.Exit(130) from None
    print_json({"job": submission_id, "status": status}) if as_json else out.print(f"{submission_id} {status.lower()}", highlight=False)
    if status != "SUCCEEDED":
        raise typer.Exit(1)


def _sweep_command(spec: Path, storage: str, *, working_dir: Path, sets: list[str]) -> str:
    """Check a sweep and return the command that runs it in a copy of the working directory.

    Raises:
        SpecError: the sweep has a mistake, its file is not in the working directory, or the storage root is no absolute path.
    """
    expand(read_sweep(spec, parse_assignments(sets)))
    root = working_dir.expanduser().resolve()
    if not spec.resolve().is_relative_to(root):
        raise SpecError(f"{spec}: is not below the working directory {root}, which is what the cluster gets; give it with --working-dir")
    if not storage.startswith("/"):
        raise SpecError(
            f"--storage {storage}: must be the absolute path of a folder that every node sees; a job's working directory goes with it"
        )
    changes = [part for assignment in sets for part in ("--set", assignment)]
    return shlex.join(["python", "-m", "pause_ray", "sweep", str(spec.resolve().relative_to(root)), "--storage", storage, *changes])


def _pairs(given: Sequence[str], *, option: str) -> dict[str, str]:
    """Return a mapping from texts such as ``NAME=VALUE``.

    Raises:
        SpecError: no ``=``, or no name.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SpecError(f"{option} {text}: expected NAME=VALUE")
        found[name] = value
    return found


def look_at_cluster(planned: Sequence[PlannedTrial], *, storage: str, name: str, as_json: bool) -> None:
    """Fetch the models and texts of the trials, look at every node, and print its problems; exit with code 2 if there are any.

    Raises:
        UserError: the trials themselves cannot be prepared, or there is no cluster.
    """
    from pause_ray.core import ray_cluster
    from pause_ray.planning import preflight
    from pause_ray.trial.prepare import prepare

    root = Storage.open(storage)
    with err.status("fetching models and texts"):
        trials = [prepare(trial.spec, cache=root.cache) for trial in planned]
    probe = root.root / f"{preflight.PROBE}{secrets.token_hex(8)}"
    probe.write_text("")
    try:
        with ray_cluster.connection(), err.status("looking at every node"):
            nodes = preflight.look_at_nodes(root.root, probe=probe.name, paths=preflight.named_paths(trials))
            is_all = ray_cluster.has_no_autoscaler()
    finally:
        probe.unlink()
    gpus = max((node.gpus for node in nodes), default=0)
    needed = preflight.needed_memory(trials, gpus_per_node=gpus) if gpus else None
    found = preflight.problems(nodes, needed=needed, copy=_largest_copy(planned, root) if gpus else None)
    found += _mlflow_problems(root, experiment=name)
    sizes = {(node.cpus, node.gpus): node.name for node in reversed(nodes)}
    there = {name: {"CPU": cpus, "GPU": gpus} for (cpus, gpus), name in sizes.items()}
    requests = (preflight.requests_of(trial.spec, open_gpus=min(1.0, gpus)) for trial in _ends(planned))
    lacking = list(dict.fromkeys(line for request in requests for line in preflight.misfits(request, there)))
    remedy = "start nodes that have it, or lower trial.resources"
    if is_all:
        found += [preflight.Problem(node="the cluster", what=line, remedy=remedy) for line in lacking]
    notes = [] if is_all else [f"as the cluster is now: {line}; {remedy}" for line in lacking]
    if as_json:
        print_json({"nodes": [asdict(node) for node in nodes], "problems": [asdict(problem) for problem in found], "notes": notes})
    else:
        _show_nodes(nodes, found)
        for note in notes:
            out.print(note, highlight=False, markup=False, soft_wrap=True)
    if found:
        raise typer.Exit(2)


def _ends(planned: Sequence[PlannedTrial]) -> list[PlannedTrial]:
    """Return the first and the last trial of each arm."""
    first, last = {trial.arm: trial for trial in reversed(planned)}, {trial.arm: trial for trial in planned}
    return [*first.values(), *(trial for arm, trial in last.items() if trial is not first[arm])]


def _largest_copy(planned: Sequence[PlannedTrial], root: Storage) -> Copy | None:
    """Return the model that takes most memory of a scoring actor's GPUs, with the keys and values of its longest prompt."""
    from pause_ray.planning.forecast import Plans
    from pause_ray.planning.preflight import SCORING_ACTOR, Copy, requests_of

    plans, copies = Plans(root), []
    for trial in _ends(planned):
        gpus = requests_of(trial.spec, open_gpus=1.0)[SCORING_ACTOR]["GPU"]
        if gpus:
            prompts = plans.work(trial.spec).grid.prompts
            copies.append(Copy(bytes_=prompts.weight_bytes + prompts.kv_bytes, gpus=gpus))
    return max(copies, key=lambda copy: copy.bytes_, default=None)


def hold_to_file(planned: Sequence[PlannedTrial], file: Path) -> list[str]:
    """Return each request of the trials that no node type of a cluster file can hold, with a remedy.

    Raises:
        SpecError: the file cannot be read.
    """
    from pause_ray.planning.preflight import misfits, read_node_types, requests_of

    kinds = read_node_types(file)
    found = dict.fromkeys(line for trial in _ends(planned) for line in misfits(requests_of(trial.spec, open_gpus=1.0), kinds))
    return [f"{file}: {line}; add a node type that has it, or lower trial.resources" for line in found]


def _mlflow_problems(storage: Storage, *, experiment: str) -> list[Problem]:
    """Return a problem if MLflow cannot be written by this process, which is the sweep's driver."""
    from pause_ray.planning.preflight import Problem
    from pause_ray.tracking.store import connected

    try:
        with connected(storage, experiment=experiment, uri=None, waiting=lambda holder: None):
            return []
    except TrackingError as error:
        told, _, remedy = str(error).partition("; ")
        return [Problem(node="driver", what=told, remedy=remedy)]


def _show_nodes(nodes: Sequence[Node], found: Sequence[Problem]) -> None:
    table = Table(title=f"{len(nodes)} nodes")
    for heading in ("node", "GPUs", "storage free", "packages"):
        table.add_column(heading)
    for node in nodes:
        its = node.look
        gpus = ", ".join(f"{gpu.name} {_gigabytes(gpu.memory_bytes)}" for gpu in its.gpus) if its and its.gpus else f"{node.gpus:g}"
        free = _gigabytes(its.free_bytes if its else None)
        packages = ", ".join(f"{name} {its.versions.get(name, '–')}" for name in ("ray", "torch", "pause_ray")) if its else "–"
        table.add_row(node.name, gpus, free, packages)
    out.print(table)
    for problem in found:
        out.print(f"[red]{escape(problem.node)}[/]: {escape(problem.what)}; {escape(problem.remedy)}", highlight=False, soft_wrap=True)
    if not found:
        out.print("nothing is wrong with them", highlight=False)
    if len(nodes) == 1:
        out.print("nodes that an autoscaler starts later are not among them; look again when they are there", highlight=False)


def _gigabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e9:,.0f} GB"
