"""Handing a command to a cluster's head as a Ray job: what is sent along, what must not be, what it says. Knows no sweep.

Whoever may submit jobs may read them: command, environment and metadata of a job are shown to everybody with the cluster's
token. So secrets are refused here; they belong into the environment of the cluster's nodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_ray.errors import ClusterError, SpecError
from pause_ray.spec import digest

NOT_SENT = (".git", "*.env", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "node_modules")
"""What a cluster has no use for, and secrets that lie about, besides what ``.gitignore`` names."""
WORK = "pause_ray.work"
"""Metadata of a job: which work it does, so that nothing is submitted twice."""
SECRET_NAME = re.compile(r"token(?!i[sz])|secret|passw|credential|(api|access|private)_?key|keys?(_|$)", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/\s:@]*:[^/\s@]+@|https?://[^/\s@]+@")
"""A URL with a password in it, or of the web with a name, which may be a token."""
RUNNING = ("PENDING", "RUNNING")
ANSWER_SECONDS = 30
"""For a head to say anything at all."""
STOP_SECONDS = 600
"""Between asking a job to end and ending it by force; Ray's own 3 are too few for the running step and its checkpoint."""
BEGIN_SECONDS = 60
"""For a job that is asked to end to begin first, which it must: its copy of the working directory may be on its way. One for which there is
no node would be waited for until Ray gives it up, a quarter of an hour after it was submitted."""
LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a head is asked to run."""

    name: str
    """The submission id begins with it."""
    command: str
    """For the shell of the node that it runs on, in the copied working directory."""
    working_dir: Path
    """Copied to the cluster without ``NOT_SENT`` and ``exclude``."""
    exclude: tuple[str, ...] = ()
    """Further patterns, as in a ``.gitignore``."""
    env: Mapping[str, str]
    """Environment of all its processes; no secrets."""
    num_cpus: float
    """Logical CPUs of the node that the command itself runs on; 0 puts it on the head."""
    labels: Mapping[str, str]
    """Of that node, such as ``ray.io/market-type: on-demand``."""

    @property
    def work(self) -> str:
        """Digest of what it does; the same for the same command and environment."""
        return digest([self.name, self.command, dict(self.env)])


def check_no_secrets(job: Job) -> None:
    """Refuse what everybody could read.

    Raises:
        SpecError: a variable that is named like a secret, or a URL with a password in the environment or the command.
    """
    remedy = "a job's environment and command can be read by everybody on the cluster; set it on the cluster's nodes (docs/security.md)"
    for name, value in job.env.items():
        if SECRET_NAME.search(name) or SECRET_VALUE.search(value):
            raise SpecError(f"--env {name}: looks like a secret; {remedy}")
    if SECRET_VALUE.search(job.command):
        raise SpecError(f"the command has a URL with a password in it; {remedy}")


class Head:
    """The head of a cluster, as its jobs API shows it."""

    def __init__(self, address: str) -> None:
        """Connect, with the token of this environment unless ``RAY_AUTH_MODE`` says otherwise.

        Args:
            address: Of the dashboard, such as ``http://127.0.0.1:8265``.

        Raises:
            ClusterError: nobody answers, the token is missing or wrong, or the head runs another version of Ray.
        """
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # uploads and closed sockets are no news
        self._address = address
        try:
            requests.get(f"{address}/api/version", timeout=ANSWER_SECONDS)  # the client below waits for ever
            self._client = JobSubmissionClient(address)
            there = str(self._client._do_request("GET", "/api/version").json()["ray_version"])
        except AuthenticationError as error:
            raise ClusterError(f"{address}: {_token_words(str(error))}") from error
        except (ConnectionError, requests.exceptions.RequestException, ValueError, KeyError) as error:
            raise ClusterError(
                f"{address}: no Ray head answers there; give --address http://HOST:8265, after a tunnel or a port-forward to the head"
            ) from error
        except RuntimeError as error:  # what answers is no head, or one before jobs were
            raise ClusterError(
                f"{address}: {' '.join(str(error).split())} Give --address the dashboard of a head, http://HOST:8265"
            ) from error
        if there != ray.__version__:
            raise ClusterError(
                f"{address}: the head runs Ray {there}, and this machine {ray.__version__}; "
                "install the head's version here, or the one of constraints.txt there"
            )

    def running(self, job: Job) -> str | None:
        """Submission id of the job that does the same work and has not ended."""
        return next((str(its.submission_id) for its in self._client.list_jobs() if _does(its, job) and its.status in RUNNING), None)

    def submit(self, job: Job) -> str:
        """Copy the working directory and start the job; returns its submission id.

        Raises:
            SpecError: something in it looks like a secret.
            ClusterError: the same work is running already, or the head refuses it.
        """
        check_no_secrets(job)
        running = self.running(job)
        if running is not None:
            raise ClusterError(
                f"{self._address}: {running} does the same already; the same command with --follow shows what it says, with --stop ends it"
            )
        before = sum(_does(its, job) for its in self._client.list_jobs())
        try:
            return str(
                self._client.submit_job(
                    entrypoint=job.command,
                    submission_id=f"{job.name}-{job.work[:8]}-{before + 1}",
                    runtime_env={
                        "working_dir": str(job.working_dir),
                        "excludes": [*NOT_SENT, *job.exclude],
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **job.env},
                    },
                    metadata={WORK: job.work},
                    entrypoint_num_cpus=job.num_cpus or None,
                    entrypoint_label_selector=dict(job.labels) or None,
                )
            )
        except (RuntimeError, ValueError) as error:
            raise ClusterError(f"{self._address}: the job was not taken: {' '.join(str(error).split())}") from error

    def follow(self, submission_id: str, *, say: Callable[[str], None]) -> str:
        """Pass the job's output on until it ends; returns ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.

        Raises:
            ClusterError: the head is gone.
        """

        async def tail() -> None:
            async for text in self._client.tail_job_logs(submission_id):
                say(text)

        try:
            asyncio.run(tail())
            return str(self._client.get_job_status(submission_id).value)
        except (OSError, RuntimeError) as error:
            raise ClusterError(
                f"{self._address}: lost sight of {submission_id} ({' '.join(str(error).split())}); "
                "it goes on as long as the head does: look again with --follow"
            ) from error

    def stop(self, submission_id: str, *, wait: bool) -> None:
        """Ask the job to end; what it has finished stays on storage.

        Args:
            submission_id: Of the job.
            wait: Return when it has ended, so that the same work can be submitted again.

        Raises:
            ClusterError: the head is gone, or ``wait`` was in vain: the job has not begun.
        """
        try:
            self._client.stop_job(submission_id)
            ended = not wait or has_ended(lambda: str(self._client.get_job_status(submission_id).value), begin_seconds=BEGIN_SECONDS)
        except (OSError, RuntimeError) as error:
            raise ClusterError(
                f"{self._address}: lost sight of {submission_id} ({' '.join(str(error).split())}); look again with --follow"
            ) from error
        if not ended:
            raise ClusterError(
                f"{self._address}: {submission_id} was asked to end, but has not begun, and ends when it does or when Ray gives it up "
                "(15 minutes after it was submitted); usually no node has what --cpus and --label ask for: see ray status on the head"
            )


def has_ended(status: Callable[[], str], *, begin_seconds: float) -> bool:
    """Wait until a job that runs has ended; False if it has not even begun within ``begin_seconds``."""
    until = time.monotonic() + begin_seconds
    while (now := status()) in RUNNING:
        if now == "PENDING" and time.monotonic() >= until:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _does(details: Any, job: Job) -> bool:
    return bool((details.metadata or {}).get(WORK) == job.work)


def _token_words(told: str) -> str:
    """What to do about a token, from Ray's page about it."""
    if told.startswith("Authentication failed"):
        return (
            "the head refuses this token; put the cluster's own (on the head: ray get-auth-token) into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    return (
        "the head asks for a token, and none is found here; put the cluster's (on the head: ray get-auth-token) "
        "into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )
