"""What a YAML file describes: a sweep, a trial or a suite. Reads its fields; checks nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pause_ray.errors import SpecError
from pause_ray.spec import read_yaml

Kind = Literal["sweep", "trial", "suite"]
_EXAMPLES: dict[Kind, str] = {"sweep": "sweeps/quickstart.yaml", "trial": "sweeps/quickstart.yaml", "suite": "eval/suites/single.yaml"}


def expect(path: Path, *kinds: Kind) -> None:
    """Refuse a file that describes something else.

    Raises:
        SpecError: naming what it is and what is needed.
    """
    kind = kind_of(path)
    if kind not in kinds:
        raise SpecError(f"{path}: is a {kind}, and a {' or '.join(kinds)} is needed; give a file such as {_EXAMPLES[kinds[0]]}")


def kind_of(path: Path) -> Kind:
    """What a file describes.

    Raises:
        SpecError: none of these.
    """
    fields = read_yaml(path).keys()
    kinds: dict[str, Kind] = {"trial": "sweep", "model": "trial", "eval": "trial", "task": "suite"}
    for field, kind in kinds.items():
        if field in fields:
            return kind
    raise SpecError(
        f"{path}: describes no sweep (no trial in it), no trial (no model) and no suite (no task); its fields: {', '.join(fields)}"
    )
