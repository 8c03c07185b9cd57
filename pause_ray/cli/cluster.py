"""The verb submit, which starts a sweep as a Ray job on a cluster, and the checks of ``check --cluster``.

Everybody with the cluster's token can read a job's command and environment. So secrets are refused here; they belong into the
environment of the cluster's nodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pause_ray.cli.terminal import AsJson, Sets, SpecFile, app, err, out, print_json
from pause_ray.core.errors import ClusterError, SpecError, TrackingError
from pause_ray.core.spec import digest, parse_assignments, read_yaml
from pause_ray.core.storage import Storage
from pause_ray.sweep.spec import PlannedTrial, expand, read_sweep

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from pause_ray.planning.preflight import ModelReplica, Node, Problem


EXCLUDES = (".git", "*.env", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "node_modules")
"""Patterns of files that are not copied to a cluster: builds, caches and secrets. The files that .gitignore names are not copied either."""
SECRET_NAME = re.compile(r"token(?!i[sz])|secret|passw|credential|(api|access|private)_?key|keys?(_|$)", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/\s:@]*:[^/\s@]+@|https?://[^/\s@]+@")
"""A URL with a password, or a web URL with a user name, which may be a token."""
ANSWER_SECONDS = 30
"""Timeout of the first request to a head; Ray's client has none."""
STOP_SECONDS = 600
"""Time between a job's SIGTERM and SIGKILL; Ray's own 3 seconds are too few for the running step and its checkpoint."""
GET_TOKEN = "put the cluster's token (on the head: ray get-auth-token) into RAY_AUTH_TOKEN or ~/.ray/auth_token"


@app.command()
def submit(
    spec: SpecFile,
    storage: Annotated[
        str,
        typer.Option(help="Folder for all results; a shared folder that every node of the cluster sees by this path.", show_default=False),
    ],
    address: Annotated[
        str, typer.Option(help="URL of the dashboard of the head node.", envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[
        Path, typer.Option(help="Folder that is copied to the cluster, without the files that .gitignore names.")
    ] = Path(),
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of files that are not copied, as in a .gitignore. May be repeated.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Environment variable of the job; secrets are refused. May be repeated.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Run the driver on a node with this label. May be repeated.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Logical CPUs of the driver; with 0 and no label it runs on the head node.")] = 0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the job is submitted, without following its log.")] = False,
    set_: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run a sweep on a Ray cluster as a job: check the sweep here, copy the working directory to the cluster, and follow the job's log.

    Example: `pause-ray submit sweeps/paper.yaml --storage /mnt/shared/runs --label ray.io/market-type=on-demand`

    Ctrl-C ends the log, not the job; `ray job stop ID` ends the job, and the same command resumes the sweep. A sweep that runs is not
    submitted a second time. The token of the cluster is read as `ray job submit` reads it: from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
    ~/.ray/auth_token.

    Next: `pause-ray status NAME --storage ...` shows the progress, `pause-ray report NAME --storage ...` the results so far.
    """
    command, variables = _sweep_command(spec, storage, working_dir=working_dir, sets=set_ or []), _pairs(env or [], option="--env")
    copied = {"working_dir": str(working_dir.expanduser().resolve()), "excludes": [*EXCLUDES, *(exclude or [])]}
    client = connect(address)
    submission_id = submit_job(
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
        status = follow(client, submission_id, show=lambda text: typer.echo(text, nl=False, err=True))
    except KeyboardInterrupt:
        err.print(f"{submission_id} continues; `ray job stop {submission_id}` ends it", highlight=False)
        raise typer.Exit(130) from None
    print_json({"job": submission_id, "status": status}) if as_json else out.print(f"{submission_id} {status.lower()}", highlight=False)
    if status != "SUCCEEDED":
        raise typer.Exit(1)


def check_no_secrets(command: str, env: Mapping[str, str]) -> None:
    """Check that a job's environment and command hold no secret.

    Raises:
        SpecError: A variable is named like a secret, or the environment or the command has a URL with a password.
    """
    remedy = "a job's environment and command can be read by everybody on the cluster; set it on the cluster's nodes (docs/security.md)"
    for name, value in env.items():
        if SECRET_NAME.search(name) or SECRET_VALUE.search(value):
            raise SpecError(f"--env {name}: looks like a secret; {remedy}")
    if SECRET_VALUE.search(command):
        raise SpecError(f"the command has a URL with a password in it; {remedy}")


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the head whose dashboard has this address, with the token of this environment.

    Raises:
        ClusterError: no head answers, the token is missing or wrong, or the head runs another version of Ray.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it reports every upload and closed socket
    remedy = "give --address http://HOST:8265, the dashboard of a head, after a tunnel or a port-forward to it"
    try:
        requests.get(f"{address}/api/version", timeout=ANSWER_SECONDS)
        client = JobSubmissionClient(address)
        version = str(client._do_request("GET", "/api/version").json()["ray_version"])
    except AuthenticationError as error:
        is_wrong = str(error).startswith("Authentication failed")
        problem = "the head refuses this token" if is_wrong else "the head asks for a token, and none is found here"
        raise ClusterError(f"{address}: {problem}; {GET_TOKEN}") from error
    except (ConnectionError, requests.exceptions.RequestException, RuntimeError, ValueError, KeyError) as error:
        raise ClusterError(f"{address}: no Ray head answers there ({' '.join(str(error).split())}); {remedy}") from error
    if version != ray.__version__:
        raise ClusterError(
            f"{address}: the head runs Ray {version}, and this machine {ray.__version__}; install the version of constraints.txt on both"
        )
    return client


def submit_job(client: JobSubmissionClient, command: str, *, name: str, env: Mapping[str, str], **options: Any) -> str:
    """Start a command as a job and return its submission id, which is numbered and begins with a digest of command and environment.

    Ray takes each id once, so of two equal jobs that are submitted at the same time one is refused.

    Args:
        client: A client of the head.
        command: The shell command, run in the copied working directory.
        name: The beginning of the submission id.
        env: Environment of all processes of the job.
        options: Further arguments of ``JobSubmissionClient.submit_job``.

    Raises:
        SpecError: something in it looks like a secret.
        ClusterError: the same job is running, or the head refuses it.
    """
    check_no_secrets(command, env)
    prefix = f"{name}-{digest([name, command, dict(env)])[:8]}-"
    same = [job for job in client.list_jobs() if str(job.submission_id).startswith(prefix)]
    for job in same:
        if not job.status.is_terminal():
            shown = f"`ray job logs --follow {job.submission_id}` shows its output, `ray job stop {job.submission_id}` ends it"
            raise ClusterError(f"{job.submission_id} runs the same command; {shown}")
    runtime_env = {**options.pop("runtime_env"), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **env}}
    try:
        return str(client.submit_job(entrypoint=command, submission_id=f"{prefix}{len(same) + 1}", runtime_env=runtime_env, **options))
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"the head refuses the job: {' '.join(str(error).split())}; correct what it names") from error


def follow(client: JobSubmissionClient, submission_id: str, *, show: Callable[[str], None]) -> str:
    """Pass the job's output on until it ends; return ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.

    Raises:
        ClusterError: the head is gone.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(submission_id):
            show(text)

    try:
        asyncio.run(tail())
        return str(client.get_job_status(submission_id).value)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"the connection to {submission_id} is lost ({reason}); `ray job logs --follow {submission_id}` shows it"
        ) from error


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


def check_cluster(planned: Sequence[PlannedTrial], *, storage: str, name: str, as_json: bool) -> None:
    """Fetch the models and texts of the trials, probe every node, and print all problems; exit with code 2 if there are any.

    Raises:
        UserError: The trials cannot be prepared, or there is no cluster.
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
        with ray_cluster.connection(), err.status("probing every node"):
            nodes = preflight.probe_nodes(root.root, probe=probe.name, paths=preflight.named_paths(trials))
            is_all = ray_cluster.has_no_autoscaler()
    finally:
        probe.unlink()
    gpus = max((node.gpus for node in nodes), default=0)
    needed = preflight.needed_memory(trials, gpus_per_node=gpus) if gpus else None
    found = preflight.problems(nodes, needed=needed, replica=_largest_replica(planned, root) if gpus else None)
    found += _mlflow_problems(root, experiment=name)
    sizes = {(node.cpus, node.gpus): node.name for node in reversed(nodes)}
    available = {name: {"CPU": cpus, "GPU": gpus} for (cpus, gpus), name in sizes.items()}
    requests = (preflight.requests_of(trial.spec, open_gpus=min(1.0, gpus)) for trial in _first_and_last(planned))
    lacking = list(dict.fromkeys(line for request in requests for line in preflight.unschedulable(request, available)))
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


def _first_and_last(planned: Sequence[PlannedTrial]) -> list[PlannedTrial]:
    """Return the first and the last trial of each arm."""
    first, last = {trial.arm: trial for trial in reversed(planned)}, {trial.arm: trial for trial in planned}
    return [*first.values(), *(trial for arm, trial in last.items() if trial is not first[arm])]


def _largest_replica(planned: Sequence[PlannedTrial], root: Storage) -> ModelReplica | None:
    """Return the model that takes most memory of a scoring actor's GPUs, with the keys and values of its longest prompt."""
    from pause_ray.planning.forecast import TrialPlanner
    from pause_ray.planning.preflight import SCORING_ACTOR, ModelReplica, requests_of

    planner, replicas = TrialPlanner(root), []
    for trial in _first_and_last(planned):
        gpus = requests_of(trial.spec, open_gpus=1.0)[SCORING_ACTOR]["GPU"]
        if gpus:
            _, grid = planner.work(trial.spec)
            replicas.append(ModelReplica(bytes_=grid.prompts.weight_bytes + grid.prompts.kv_bytes, gpus=gpus))
    return max(replicas, key=lambda replica: replica.bytes_, default=None)


def check_cluster_file(planned: Sequence[PlannedTrial], file: Path) -> list[str]:
    """Return each request of the trials that no node type of a cluster file can hold, with a remedy.

    Raises:
        SpecError: the file cannot be read.
    """
    from pause_ray.planning.preflight import read_node_types, requests_of, unschedulable

    kinds = read_node_types(file)
    found = dict.fromkeys(
        line for trial in _first_and_last(planned) for line in unschedulable(requests_of(trial.spec, open_gpus=1.0), kinds)
    )
    return [f"{file}: {line}; add a node type that has it, or lower trial.resources" for line in found]


def _mlflow_problems(storage: Storage, *, experiment: str) -> list[Problem]:
    """Return a problem if MLflow cannot be written by this process, which is the sweep's driver."""
    from pause_ray.planning.preflight import Problem
    from pause_ray.tracking.store import connected

    try:
        with connected(storage, experiment=experiment):
            return []
    except TrackingError as error:
        what, _, remedy = str(error).partition("; ")
        return [Problem(node="driver", what=what, remedy=remedy)]


def _show_nodes(nodes: Sequence[Node], found: Sequence[Problem]) -> None:
    table = Table(title=f"{len(nodes)} nodes")
    for heading in ("node", "GPUs", "storage free", "packages"):
        table.add_column(heading)
    for node in nodes:
        info = node.look
        gpus = ", ".join(f"{gpu.name} {_gigabytes(gpu.memory_bytes)}" for gpu in info.gpus) if info and info.gpus else f"{node.gpus:g}"
        free = _gigabytes(info.free_bytes if info else None)
        packages = ", ".join(f"{name} {info.versions.get(name, '–')}" for name in ("ray", "torch", "pause_ray")) if info else "–"
        table.add_row(node.name, gpus, free, packages)
    out.print(table)
    for problem in found:
        out.print(f"[red]{escape(problem.node)}[/]: {escape(problem.what)}; {escape(problem.remedy)}", highlight=False, soft_wrap=True)
    if not found:
        out.print("no problems found", highlight=False)
    if len(nodes) == 1:
        out.print(
            "nodes that an autoscaler starts later are not checked; run the same command again when they have started", highlight=False
        )


def _gigabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e9:,.0f} GB"
