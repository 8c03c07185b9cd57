"""Submitting a command to a Ray cluster as a job. Knows no sweep.

Everybody with the cluster's token can read a job's command and environment. So secrets are refused here; they belong into the
environment of the cluster's nodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pause_ray.core.errors import ClusterError, SpecError
from pause_ray.core.spec import digest

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDES = (".git", "*.env", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "node_modules")
"""Patterns of files that a cluster has no use for, or that hold secrets; those of ``.gitignore`` are left out anyway."""
SECRET_NAME = re.compile(r"token(?!i[sz])|secret|passw|credential|(api|access|private)_?key|keys?(_|$)", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/\s:@]*:[^/\s@]+@|https?://[^/\s@]+@")
"""A URL with a password in it, or of the web with a name, which may be a token."""
ANSWER_SECONDS = 30
"""Timeout of the first request to a head; Ray's client has none."""
STOP_SECONDS = 600
"""Time between a job's SIGTERM and SIGKILL; Ray's own 3 seconds are too few for the running step and its checkpoint."""
GET_TOKEN = "put the cluster's token (on the head: ray get-auth-token) into RAY_AUTH_TOKEN or ~/.ray/auth_token"


def check_no_secrets(command: str, env: Mapping[str, str]) -> None:
    """Refuse what everybody could read.

    Raises:
        SpecError: a variable is named like a secret, or the environment or the command has a URL with a password.
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

    logging.getLogger("ray").setLevel(logging.WARNING)  # uploads and closed sockets are no news
    remedy = "give --address http://HOST:8265, the dashboard of a head, after a tunnel or a port-forward to it"
    try:
        requests.get(f"{address}/api/version", timeout=ANSWER_SECONDS)
        client = JobSubmissionClient(address)
        version = str(client._do_request("GET", "/api/version").json()["ray_version"])
    except AuthenticationError as error:
        is_wrong = str(error).startswith("Authentication failed")
        told = "the head refuses this token" if is_wrong else "the head asks for a token, and none is found here"
        raise ClusterError(f"{address}: {told}; {GET_TOKEN}") from error
    except (ConnectionError, requests.exceptions.RequestException, RuntimeError, ValueError, KeyError) as error:
        raise ClusterError(f"{address}: no Ray head answers there ({' '.join(str(error).split())}); {remedy}") from error
    if version != ray.__version__:
        raise ClusterError(
            f"{address}: the head runs Ray {version}, and this machine {ray.__version__}; install the version of constraints.txt on both"
        )
    return client


def submit(client: JobSubmissionClient, command: str, *, name: str, env: Mapping[str, str], **options: Any) -> str:
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
        raise ClusterError(f"the job was not taken: {' '.join(str(error).split())}; correct what the head names") from error


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
        told = " ".join(str(error).split())
        raise ClusterError(
            f"the connection to {submission_id} is lost ({told}); `ray job logs --follow {submission_id}` shows it"
        ) from error
