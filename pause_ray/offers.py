"""Which nodes a cluster file offers, and whether a sweep's trials fit on those that Ray could give them. Pure: starts nothing.

Ray gives a worker any node with enough GPUs, whatever their memory; so every node type that could get one must be large enough.
Reads Ray's own cluster files and KubeRay's RayCluster and RayJob.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pause_ray.engines.engine import HfEngineSpec
from pause_ray.errors import SpecError
from pause_ray.plan import Plan
from pause_ray.spec import JsonObject
from pause_ray.trial.spec import TrialSpec

ACCELERATOR = "ray.io/accelerator-type"
KUBERNETES_GPU = "nvidia.com/gpu"
RAYS_MOST = 2
"""Workers of all types, where a cluster file of ``ray up`` does not say."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One kind of node that can come."""

    name: str
    cpus: float
    gpus: float
    gpu: str | None
    """As its label ``ray.io/accelerator-type`` says."""
    most: int
    """How many there can be."""
    of_all: int | None = None
    """How many nodes of all kinds there can be; None where only ``most`` ends it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a part of a trial takes on one node."""

    name: str
    cpus: float
    gpus: float

    def fits(self, offer: Offer) -> bool:
        """Whether such a node has it."""
        return self.cpus <= offer.cpus and self.gpus <= offer.gpus

    @property
    def words(self) -> str:
        """What it takes."""
        return f"{self.name} takes {self.cpus:g} CPUs and {self.gpus:g} GPUs on one node"


def read_offers(path: Path) -> tuple[Offer, ...]:
    """The node types of a cluster file of which there can be any.

    Raises:
        SpecError: no such file, none of a kind that is known, or a node type without numbers.
    """
    content = _first_cluster(path)
    spec = content.get("spec", {})
    groups = spec.get("rayClusterSpec", spec).get("workerGroupSpecs")
    if "available_node_types" in content:
        offers = _of_ray(content, origin=path)
    elif groups is not None:
        offers = [_of_kuberay(group, origin=path) for group in groups]
    else:
        raise SpecError(f"{path}: has neither available_node_types (ray up) nor workerGroupSpecs (KubeRay); give the file of a cluster")
    return tuple(offer for offer in offers if offer.most)


def _first_cluster(path: Path) -> JsonObject:
    """The document that describes a cluster; merge keys, which specs of this project do not know, are usual in such files."""
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; give the file of a cluster") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    kinds = [its for its in documents if isinstance(its, dict)]
    found: JsonObject = next((its for its in kinds if "available_node_types" in its or "spec" in its), {})
    return found


def _of_ray(content: JsonObject, *, origin: Path) -> list[Offer]:
    """The types that workers can have; one without a limit of its own has that of all, and the head's type none."""
    of_all = content.get("max_workers", RAYS_MOST)
    offers = []
    for name, kind in content["available_node_types"].items():
        most = min(of_all, kind.get("max_workers", 0 if name == content.get("head_node_type") else of_all))
        has = kind.get("resources") or {}
        numbers = [has.get("CPU"), has.get("GPU", 0)]
        if most and not all(isinstance(number, int | float) for number in numbers):
            where = f"{origin}: node type {name}: resources has no number for CPU, or none for GPU"
            raise SpecError(f"{where}, and what its machine has is not known here; write resources: {{CPU: …, GPU: …}}")
        gpu = (kind.get("labels") or {}).get(ACCELERATOR)
        offers.append(Offer(name=name, cpus=numbers[0] or 0, gpus=numbers[1], gpu=gpu, most=most, of_all=of_all))
    return offers


def _of_kuberay(group: JsonObject, *, origin: Path) -> Offer:
    name = group.get("groupName", "?")
    try:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        return Offer(
            name=name,
            cpus=_quantity(limits["cpu"]),
            gpus=_quantity(limits.get(KUBERNETES_GPU, 0)),
            gpu=group.get("labels", {}).get(ACCELERATOR),
            most=int(group["maxReplicas"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SpecError(f"{origin}: worker group {name}: {error} is missing or no number; give maxReplicas and limits for cpu") from error


def _quantity(told: Any) -> float:
    """``"15"``, or ``500m`` for half of one."""
    text = str(told)
    return float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)


def open_share(gpus: float, *, scored_here: bool) -> float:
    """GPUs of a training worker and of a scoring actor where the spec leaves it open, on a cluster of so many."""
    return min(1.0, gpus / 2 if scored_here else gpus)


def pieces_of(trial: TrialSpec, *, open_gpus: float = 1.0) -> dict[str, Piece]:
    """``worker``, ``actor`` and the trial's own process (``trial``), as far as it needs them; ``open_gpus`` where the spec does not say."""
    resources, here = trial.resources, isinstance(trial.engine, HfEngineSpec)
    worker = Piece(
        name="a training worker",
        cpus=resources.train_cpus_per_worker,
        gpus=open_gpus if resources.train_gpus_per_worker is None else resources.train_gpus_per_worker,
    )
    actor = Piece(
        name="a scoring actor",
        cpus=resources.scoring_cpus_per_actor,
        gpus=open_gpus * here if resources.scoring_gpus_per_actor is None else resources.scoring_gpus_per_actor,
    )
    found = {"actor": actor}
    if trial.train is not None:
        found["worker"] = worker
    if trial.train is None or resources.train_workers:
        found["trial"] = Piece(name="a trial", cpus=1, gpus=0)
    return found


def misfits(
    trial: TrialSpec, plans: Mapping[str, Plan], *, offers: Sequence[Offer], memory_gb: Mapping[str, float], origin: Path
) -> list[str]:
    """What of a cluster file does not do for a trial, each with a remedy.

    Args:
        trial: What is to be run.
        plans: Node type → the trial planned on such nodes, with as many workers as it has; none where its GPU is not known.
        offers: Of the file.
        memory_gb: GPU → memory, of all that are known.
        origin: The file.
    """
    found = []
    pieces = pieces_of(trial)
    for piece in unfit(pieces, offers):
        found.append(f"{origin}: {piece.words}, which no node type has; add one, or ask for less (resources)")
    for offer in offers:
        if not offer.gpus or not any(piece.gpus and piece.fits(offer) for piece in pieces.values()):
            continue
        if offer.name not in plans or offer.gpu is None:
            named = f"its GPU {offer.gpu} is in no table of GPUs" if offer.gpu else f"it has no label {ACCELERATOR}"
            known = ", ".join(memory_gb)
            found.append(f"{origin}: {offer.name}: {named}, so nobody knows their memory; name one of {known}, or add it to the table")
            continue
        found += _too_small(pieces, plans[offer.name], offer=offer, memory_gb=memory_gb[offer.gpu], origin=origin)
    return [*found, *_too_few(trial, pieces, offers=offers, origin=origin)]


def _too_small(pieces: Mapping[str, Piece], plan: Plan, *, offer: Offer, memory_gb: float, origin: Path) -> list[str]:
    found = []
    where, leave = f"{origin}: {offer.name}: its {offer.gpu}s have {memory_gb:g} GB", "or take the node type out"
    if "worker" in pieces and pieces["worker"].gpus and pieces["worker"].fits(offer) and plan.remedy:
        found.append(f"{where}, and the training does not fit; {plan.remedy}, {leave}")
    actor = pieces["actor"]
    if actor.gpus and actor.fits(offer) and plan.gpus_per_model > max(1.0, actor.gpus):
        needs = f"scoring needs {plan.gpus_per_model} of them for one copy of the model"
        found.append(f"{where}, and {needs}; set resources.scoring_gpus_per_actor to {plan.gpus_per_model}, {leave}")
    return found


def _too_few(trial: TrialSpec, pieces: Mapping[str, Piece], *, offers: Sequence[Offer], origin: Path) -> list[str]:
    """Whether all that a trial holds at a time can be there at a time."""
    needed, there = held_at_a_time(trial, pieces), most_gpus(offers)
    if needed <= there:
        return []
    return [f"{origin}: a trial holds {needed:g} GPUs at a time, and all nodes together have {there:g}; raise max_workers, or ask for less"]


def unfit(pieces: Mapping[str, Piece], offers: Sequence[Offer]) -> list[Piece]:
    """Those that no node has."""
    return [piece for piece in pieces.values() if not any(piece.fits(offer) for offer in offers)]


def held_at_a_time(trial: TrialSpec, pieces: Mapping[str, Piece]) -> float:
    """GPUs of a trial's fewest workers and of the actors that stay, or of the one that it cannot do without."""
    resources = trial.resources
    workers = max(1, resources.worker_bounds[0]) * pieces["worker"].gpus if "worker" in pieces else 0.0
    return max(workers + resources.scoring_bounds[0] * pieces["actor"].gpus, pieces["actor"].gpus)


def most_gpus(offers: Sequence[Offer]) -> float:
    """Of all nodes that can be there at a time, if they are those with the most GPUs."""
    left = min((offer.of_all for offer in offers if offer.of_all is not None), default=sum(offer.most for offer in offers))
    found = 0.0
    for offer in sorted(offers, key=lambda its: its.gpus, reverse=True):
        number = min(offer.most, left)
        found, left = found + number * offer.gpus, left - number
    return found
