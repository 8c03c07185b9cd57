"""What a sweep is: one trial, a search space over its dotted paths, named arms, replicates. Pure; starts nothing.

A sweep only makes trial specs. Every arm is combined with every point of the search, except that an arm which sets a
searched path (or a branch above it) itself is not varied along that path: an arm with ``train: null`` has no LoRA rank,
and one with ``train.lora.rank: 16`` has just that one. Equal trials are run once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pause_ray.errors import SpecError
from pause_ray.spec import JsonObject, Spec, check_path, digest, inline_files, read_yaml, with_overrides
from pause_ray.trial.spec import FILE_FIELDS, TrialSpec

PLACES_NOT_SEARCHED = ("replicate", "resources")
"""Set by the sweep itself, or without effect on the result; the same for every arm."""


class GridDomain(Spec):
    """Every one of the listed values."""

    grid: tuple[Any, ...] = Field(min_length=1)
    """Plain YAML values."""

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        if len({digest([value]) for value in self.grid}) != len(self.grid):
            raise ValueError(f"grid names a value twice: {list(self.grid)}")
        return self


class SweepSpec(Spec):
    """Which trials to run, and how to compare them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Names the MLflow experiment, the report and the sweep's folder."""
    trial: JsonObject
    """The trial that everything else varies: sparse, its defaults filled in per trial."""
    arm: str = Field(default="pause_tuned", pattern=r"^[a-z0-9][a-z0-9_]*$")
    """Name of the unchanged trial's arm."""
    search: dict[str, GridDomain] = Field(default_factory=dict)
    """Dotted path of the trial → values."""
    arms: dict[str, JsonObject] = Field(default_factory=dict)
    """Further conditions: name → dotted paths and their values (a mapping or null replaces the whole branch)."""
    replicates: int = Field(default=1, ge=1)
    """Repetitions of every trial, each with its own haystack order, needle wording and seed."""
    compare_to: str | None = None
    """The arm that the others are compared with; null: the first of ``arms``."""
    control: str | None = None
    """The arm that was tuned the same way without pauses: what pause-tuned arms add to it is the effect of the pauses."""
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """Trials at a time; null: as many as the GPUs allow, one on CPUs."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.arm in self.arms:
            raise ValueError(f"arms: {self.arm} is the name of the unchanged trial's arm; choose another, or set arm")
        known = [self.arm, *self.arms]
        for field, name in (("compare_to", self.compare_to), ("control", self.control)):
            if name is not None and name not in known:
                raise ValueError(f"{field} {name!r} is none of the arms {', '.join(known)}")
        return self

    @property
    def reference_arm(self) -> str:
        """The arm that the others are compared with."""
        return self.compare_to or next(iter(self.arms), self.arm)


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """One trial of a sweep and its place in it."""

    arm: str
    point: JsonObject
    """Searched paths and their values, those that apply to the arm."""
    spec: TrialSpec

    @property
    def label(self) -> str:
        """For people: ``pause_tuned every=2 rank=16 #0``."""
        point = "".join(f" {path.rsplit('.', 1)[-1]}={value}" for path, value in self.point.items())
        return f"{self.arm}{point} #{self.spec.replicate}"


def read_sweep(path: Path, overrides: JsonObject) -> SweepSpec:
    """A sweep from its YAML file; ``overrides`` are dotted paths of the sweep, such as ``trial.train.steps``.

    Raises:
        SpecError: as ``SweepSpec.parse`` and ``expand``.
    """
    data = read_yaml(path)
    for dotted in overrides:
        if dotted.startswith("trial."):
            check_path(TrialSpec, dotted.removeprefix("trial."), origin="--set")
        else:
            check_path(SweepSpec, dotted.split(".")[0] if dotted.startswith(("search.", "arms.")) else dotted, origin="--set")
    data = _whole(with_overrides(_whole(data, path), overrides), path)
    return SweepSpec.parse(data, origin=str(path))


def _whole(data: JsonObject, path: Path) -> JsonObject:
    """Sparse sweep data with the content of every file that its trial or an arm names."""
    whole = dict(data)
    if isinstance(data.get("trial"), dict):
        whole["trial"] = inline_files(data["trial"], FILE_FIELDS, origin=path)
    if isinstance(data.get("arms"), dict):
        whole["arms"] = {
            name: inline_files(changes, FILE_FIELDS, origin=path) if isinstance(changes, dict) else changes
            for name, changes in data["arms"].items()
        }
    return whole


def expand(sweep: SweepSpec) -> list[PlannedTrial]:
    """Every distinct trial of the sweep: arm by arm, point by point, replicate by replicate.

    Raises:
        SpecError: a searched or arm path that the trial does not have, a trial that breaks a rule, or two arms that are the same trial.
    """
    origin = f"sweep {sweep.name}"
    if "replicate" in sweep.trial:
        raise SpecError(f"{origin}: trial.replicate {sweep.trial['replicate']} is set by the sweep, from 0 to replicates - 1; leave it out")
    arms: dict[str, JsonObject] = {sweep.arm: {}, **sweep.arms}
    for path in sweep.search:
        check_path(TrialSpec, path, origin=f"{origin}: search")
        if path.split(".")[0] in PLACES_NOT_SEARCHED:
            raise SpecError(f"{origin}: search: {path} cannot be searched: it is set by the sweep or has no effect on the result")
    for name, changes in arms.items():
        for path in changes:
            check_path(TrialSpec, path, origin=f"{origin}: arms.{name}")
            if path.split(".")[0] in PLACES_NOT_SEARCHED:
                raise SpecError(f"{origin}: arms.{name}: {path} is the same for all arms; set it in trial")
    planned: dict[str, PlannedTrial] = {}
    for (name, changes), point, replicate in itertools.product(arms.items(), _points(sweep), range(sweep.replicates)):
        applied = {path: value for path, value in point.items() if not _is_set_by(changes, path)}
        data = with_overrides(sweep.trial, {**changes, **applied, "replicate": replicate})
        spec = TrialSpec.parse(data, origin=f"{origin}: arm {name} {applied or ''}".rstrip())
        key = digest(spec.defining())
        if key in planned and planned[key].arm != name:
            raise SpecError(f"{origin}: arms {planned[key].arm} and {name} are the same trial; change what sets them apart, or drop one")
        if name == sweep.control and (spec.pauses is not None or (spec.train is None and spec.adapter is None)):
            raise SpecError(f"{origin}: control {name}: must be tuned, and without pauses, to show what the pauses add")
        planned.setdefault(key, PlannedTrial(arm=name, point=applied, spec=spec))
    return list(planned.values())


def _points(sweep: SweepSpec) -> list[JsonObject]:
    return [
        dict(zip(sweep.search, values, strict=True)) for values in itertools.product(*(domain.grid for domain in sweep.search.values()))
    ]


def _is_set_by(changes: JsonObject, path: str) -> bool:
    return any(path == changed or path.startswith(f"{changed}.") for changed in changes)
