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

from pause_ray.cli.planning import GPU_TABLE
from pause_ray.cli.terminal import AsJson, Sets, SpecFile, app, err, out, print_json
from pause_ray.errors import ClusterError, SpecError, TrackingError
from pause_ray.spec import parse_assignments
from pause_ray.storage import Storage
from pause_ray.sweep.spec import PlannedTrial, expand, read_sweep

if TYPE_CHECKING:
    from pause_ray.preflight import Copy, Node, Problem
    from pause_ray.submission import Head, Job


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
    follow: Annotated[bool, typer.Option("--follow", help="Start nothing: show what the running job of this sweep says.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="Start nothing: end the running job of this sweep, and wait until it has ended.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the job is submitted, or asked to end.")] = False,
    set_: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run a sweep on a cluster: check it here, copy the working directory, start it as a Ray job and follow its log.

    Example: `pause-ray submit sweeps/paper.yaml --storage /mnt/shared/runs --label ray.io/market-type=on-demand`

    Submitted again after a stop or a loss it goes on where it was. Ctrl-C leaves the log, not the job. The cluster's token is
    read as by `ray job submit`: from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    from pause_ray.submission import Head

    job = _job(spec, storage, working_dir=working_dir, exclude=exclude or [], env=env or [], label=label or [], cpus=cpus, sets=set_ or [])
    head = Head(address)
    if not (follow or stop):
        submission_id = head.submit(job)
        err.print(f"submitted {submission_id}: {job.command}", highlight=False, markup=False, soft_wrap=True)
    else:
        running = head.running(job)
        if running is None:
            raise ClusterError(f"{address}: no running job does this: {job.command}")
        submission_id = running
    if stop:
        with err.status(f"{submission_id} ends: a training that runs writes a checkpoint, running cells are answered"):
            head.stop(submission_id, wait=not no_wait)
    if stop or no_wait:
        print_json({"job": submission_id}) if as_json else out.print(submission_id, highlight=False)
        return
    _follow(head, submission_id, as_json=as_json)


def _job(
    spec: Path, storage: str, *, working_dir: Path, exclude: list[str], env: list[str], label: list[str], cpus: float, sets: list[str]
) -> Job:
    """What is submitted.

    Raises:
        SpecError: the sweep has a mistake, its file is not in the working directory, or the storage root is no absolute path.
    """
    from pause_ray.submission import Job

    sweep = read_sweep(spec, parse_assignments(sets))
    expand(sweep)
    root = working_dir.expanduser().resolve()
    if not spec.resolve().is_relative_to(root):
        raise SpecError(f"{spec}: is not below the working directory {root}, which is what the cluster gets; give it with --working-dir")
    if not storage.startswith("/"):
        raise SpecError(
            f"--storage {storage}: must be the absolute path of a folder that every node sees; a job's working directory goes with it"
        )
    changes = [part for assignment in sets for part in ("--set", assignment)]
    command = ["python", "-m", "pause_ray", "sweep", str(spec.resolve().relative_to(root)), "--storage", storage, *changes]
    return Job(
        name=sweep.name,
        command=shlex.join(command),
        working_dir=root,
        exclude=tuple(exclude),
        env=_pairs(env, option="--env"),
        num_cpus=cpus,
        labels=_pairs(label, option="--label"),
    )


def _pairs(given: Sequence[str], *, option: str) -> dict[str, str]:
    """``NAME=VALUE`` → a mapping.

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


def _follow(head: Head, submission_id: str, *, as_json: bool) -> None:
    """Show a job's output until it ends; its end is this command's."""

    def say(text: str) -> None:
        typer.echo(text, nl=False, err=True)

    try:
        status = head.follow(submission_id, say=say)
    except KeyboardInterrupt:
        err.print(f"{submission_id} goes on; the same command with --follow shows what it says, with --stop ends it", highlight=False)
        raise typer.Exit(130) from None
    if as_json:
        print_json({"job": submission_id, "status": status})
    else:
        out.print(f"{submission_id} {status.lower()}", highlight=False)
    if status != "SUCCEEDED":
        raise typer.Exit(1)


def look_at_cluster(planned: Sequence[PlannedTrial], *, storage: str, name: str, as_json: bool) -> None:
    """Fetch what the trials name, look at every node, and print what is wrong where; exit code 2 if anything is.

    Raises:
        UserError: the trials themselves cannot be prepared, or there is no cluster.
    """
    from pause_ray import cluster, preflight
    from pause_ray.trial.prepare import prepare

    root = Storage.open(storage)
    with err.status("fetching models and texts"):
        trials = [prepare(trial.spec, cache=root.cache) for trial in planned]
    probe = root.root / f"{preflight.PROBE}{secrets.token_hex(8)}"
    probe.write_text("")
    try:
        with cluster.connection(), err.status("looking at every node"):
            nodes = preflight.look_at_nodes(root.root, probe=probe.name, paths=preflight.named_paths(trials))
            is_all = cluster.has_all_its_nodes()
    finally:
        probe.unlink()
    gpus = max((node.gpus for node in nodes), default=0)
    needed = preflight.needed_memory(trials, gpus_per_node=gpus) if gpus else None
    found = preflight.problems(nodes, needed=needed, copy=_largest_copy(planned, root) if gpus else None)
    found += _mlflow_problems(root, experiment=name)
    lacking = list(dict.fromkeys(lack for trial in _ends(planned) for lack in preflight.too_little(nodes, trial.spec)))
    if is_all:
        found += lacking
    notes = [] if is_all else [f"as the cluster is now: {lack.what}; {lack.remedy}" for lack in lacking]
    if as_json:
        print_json({"nodes": [asdict(node) for node in nodes], "problems": [asdict(problem) for problem in found], "notes": notes})
    else:
        _show_nodes(nodes, found)
        for note in notes:
            out.print(note, highlight=False, markup=False, soft_wrap=True)
    if found:
        raise typer.Exit(2)


def _ends(planned: Sequence[PlannedTrial]) -> list[PlannedTrial]:
    """The first and the last trial of each arm."""
    first, last = {trial.arm: trial for trial in reversed(planned)}, {trial.arm: trial for trial in planned}
    return [*first.values(), *(trial for arm, trial in last.items() if trial is not first[arm])]


def _largest_copy(planned: Sequence[PlannedTrial], root: Storage) -> Copy | None:
    """The model that takes most of a scoring actor's GPUs, with the keys and values of its longest prompt."""
    from pause_ray.offers import pieces_of
    from pause_ray.preflight import Copy
    from pause_ray.sweep.plans import Plans

    plans, copies = Plans(root), []
    for trial in _ends(planned):
        actor = pieces_of(trial.spec)["actor"]
        if actor.gpus:
            prompts = plans.work(trial.spec).grid.prompts
            copies.append(Copy(bytes_=prompts.weight_bytes + prompts.kv_bytes, gpus=actor.gpus))
    return max(copies, key=lambda copy: copy.bytes_, default=None)


def hold_to_file(planned: Sequence[PlannedTrial], file: Path, *, storage: str) -> list[str]:
    """What of a cluster file does not do for the trials; of each arm its first and last are looked at.

    Raises:
        UserError: a file that cannot be read, or a trial that cannot be planned.
    """
    from pause_ray.offers import misfits, pieces_of, read_offers
    from pause_ray.plan import Site, read_gpus
    from pause_ray.sweep.plans import Plans

    if not Path(GPU_TABLE).is_file():
        raise SpecError(f"--cluster-file {file}: no {GPU_TABLE} from {Path.cwd()}; run where the project's cluster folder is")
    offers, table = read_offers(file), {gpu.name: gpu for gpu in read_gpus(Path(GPU_TABLE)).gpus}
    memory_gb = {name: gpu.memory_gb for name, gpu in table.items()}
    plans = Plans(Storage(Path(storage).expanduser().absolute()))
    found: dict[str, None] = {}
    with err.status("planning trials on the nodes of the file"):
        for trial in _ends(planned):
            workers = max(1, trial.spec.resources.worker_bounds[0]) if "worker" in pieces_of(trial.spec) else 1
            sites = {
                offer.name: Site(
                    gpu=table[offer.gpu],
                    gpus=workers,
                    gpus_per_node=max(1, int(offer.gpus)),
                    utilization=1.0,
                    network_gb_per_second=1.0,  # times do not matter here
                )
                for offer in offers
                if offer.gpu in table
            }
            on_each = {name: plans.plan(trial, site=site) for name, site in sites.items()}
            found |= dict.fromkeys(misfits(trial.spec, on_each, offers=offers, memory_gb=memory_gb, origin=file))
    return list(found)


def _mlflow_problems(storage: Storage, *, experiment: str) -> list[Problem]:
    """Whether MLflow can be written; only the sweep's driver ever does."""
    from pause_ray.preflight import Problem
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
