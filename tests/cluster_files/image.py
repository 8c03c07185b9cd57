"""What cluster/Dockerfile says, instruction by instruction."""

from __future__ import annotations

import re
import shlex

from tests.cluster_files.autoscaler import CLUSTER

DOCKERFILE = CLUSTER / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of each, with continued lines joined and comments left out."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.strip()]
    return [(name, rest.strip()) for name, rest in (line.split(None, 1) for line in lines)]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def environment() -> dict[str, str]:
    """What a container of the image finds in its environment."""
    return dict(word.split("=", 1) for rest in of("ENV") for word in shlex.split(rest))


def arguments() -> dict[str, str]:
    return dict(word.split("=", 1) for rest in of("ARG") for word in shlex.split(rest))


def bases() -> list[str]:
    """Images that it is made of, with arguments filled in."""
    values = arguments()
    return [re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], rest.split()[0]) for rest in of("FROM")]
