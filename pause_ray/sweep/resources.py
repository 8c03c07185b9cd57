"""Placement of trials on the cluster: the resources of training and scoring, and how many trials run at a time."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pause_ray.core import ray_cluster
from pause_ray.inference.engine import HfEngineSpec
from pause_ray.sweep.spec import SweepSpec
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import Resources, TrialSpec

log = logging.getLogger("pause_ray")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The resources of training and scoring on this cluster, with the spec's open fields filled in."""

    resources: Resources
    train_gpus: float
    """GPUs of each training worker."""
    scoring_gpus: float
    """GPUs of each scoring actor."""
    trains: bool
    """Whether any trial trains."""
    concurrent_trials: int = 1
    trial_labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes on which trials' own processes run; empty where they may run anywhere."""

    @classmethod
    def of(cls, sweep: SweepSpec, trials: Sequence[TrialSpec]) -> Placement:
        """Compute the placement on the cluster as it is now; all trials of a sweep have the same resources.

        Raises:
            SpecError: the cluster can never provide them.
        """
        resources, gpus = trials[0].resources, ray_cluster.total("GPU")
        here = any(isinstance(trial.engine, HfEngineSpec) for trial in trials)
        share = min(1.0, gpus / 2 if here else gpus)
        train = share if resources.train_gpus_per_worker is None else resources.train_gpus_per_worker
        scoring = share * here if resources.scoring_gpus_per_actor is None else resources.scoring_gpus_per_actor
        fields = ("train_gpus_per_worker", "scoring_gpus_per_actor")
        named = " and ".join(f"resources.{name}" for name in fields if getattr(resources, name) is None)
        if here and not gpus and named and not ray_cluster.is_fixed_size():
            log.warning("the cluster has no GPU now, so none is asked for; if it can start machines with GPUs, say how many with %s", named)
        if train and not resources.train_workers and resources.scoring_bounds[0] < resources.scoring_bounds[1]:
            # Tune holds what a trial's own process has until the trial is scored, which may need that very GPU.
            resources = resources.model_copy(update={"train_workers": 1})
        placement = cls(resources=resources, train_gpus=train, scoring_gpus=scoring, trains=any(trial.train for trial in trials))
        placement._check()
        number = placement._trials_at_a_time(sweep.max_concurrent_trials, gpus=gpus)
        return dataclasses.replace(placement, concurrent_trials=number, trial_labels=placement._labels_for_trials(min(number, len(trials))))

    def placed(self, trial: PreparedTrial) -> PreparedTrial:
        """Return the trial with these resources filled in; its results and its digest stay the same."""
        return dataclasses.replace(trial, spec=trial.spec.model_copy(update={"resources": self.resources}))

    def trial_bundle(self) -> dict[str, float]:
        """Return what Tune holds for a trial, which trains in its own process or drives workers with bundles of their own."""
        return {"CPU": 1, "GPU": 0} if self.resources.train_workers else self._worker()

    def held_at_a_time(self) -> dict[str, float]:
        """Return the least that the cluster must provide at once: a trial, the permanent actors, and its workers or one actor."""
        beside = self._beside_trials()
        return {name: amount + beside[name] for name, amount in self.trial_bundle().items()}

    def _check(self) -> None:
        """Refuse resources for which a sweep would wait for ever: no node, or not the whole cluster, can ever hold them."""
        takers = {"a trial": self.trial_bundle(), "a scoring actor": self._actor()}
        if self.trains and self.resources.train_workers:
            takers["a training worker"] = self._worker()
        ray_cluster.check_nodes(takers)
        fewest, most = self.resources.scoring_bounds
        remedy = "lower train_workers or scoring_actors, or what each of them takes"
        if fewest == most:
            remedy += f", or let training and scoring take turns with scoring_actors: {{min: 0, max: {most}}}"
        ray_cluster.check_capacity(self.held_at_a_time(), remedy=remedy)

    def _trials_at_a_time(self, wanted: int | None, *, gpus: float) -> int:
        """Return how many trials Tune may run at a time; by default as many as can train while one actor scores.

        On a cluster that cannot grow, their own processes must leave room for the workers and actors that they wait for.
        """
        if wanted is None:
            per_trial = self.train_gpus * max(1, self.resources.worker_bounds[1])
            wanted = max(1, int((gpus - self.scoring_gpus * max(1, self.resources.scoring_bounds[0])) // per_trial)) if per_trial else 1
        trial, beside = self.trial_bundle(), self._beside_trials()
        fitting = max(1, min(int((ray_cluster.total(name) - beside[name]) // trial[name]) for name in trial if trial[name]))
        if wanted <= fitting:
            return wanted
        if ray_cluster.is_fixed_size():
            return fitting
        log.warning(
            "%d trials at a time leave no room for training workers and scoring actors until the cluster has grown; "
            "with max_concurrent_trials: %d they need not wait",
            wanted,
            fitting,
        )
        return wanted

    def _labels_for_trials(self, number: int) -> Mapping[str, str]:
        """Return ``ray_cluster.STAYS`` where on-demand nodes have room for ``number`` trials, or will have; else no labels.

        Permanent actors may run there too. A trial that is lost with its node begins again, so no trial has to wait for such nodes.
        """
        if not ray_cluster.has_market_labels():
            return {}
        actor = self._actor()
        trial = {name: amount for name, amount in self.trial_bundle().items() if amount}
        taken_by_actor = max((math.ceil(actor[name] / amount) for name, amount in trial.items()), default=0)
        wanted = number + self.resources.scoring_bounds[0] * taken_by_actor
        there = sum(min(int(node.get(name, 0) // amount) for name, amount in trial.items()) for node in ray_cluster.on_demand_nodes())
        if there >= wanted or (not ray_cluster.is_fixed_size() and ray_cluster.can_place(trial, number=wanted, labels=ray_cluster.STAYS)):
            return ray_cluster.STAYS
        log.warning("nodes that stay have no room for %d trials beside scoring; a trial that is lost with its node begins again", number)
        return {}

    def _worker(self) -> dict[str, float]:
        return {"CPU": self.resources.train_cpus_per_worker, "GPU": self.train_gpus}

    def _actor(self) -> dict[str, float]:
        return {"CPU": self.resources.scoring_cpus_per_actor, "GPU": self.scoring_gpus}

    def _beside_trials(self) -> dict[str, float]:
        """Return the resources that must stay free beside trials so that one can always continue: permanent actors and workers."""
        actor = self._actor()
        workers, actors = self.resources.worker_bounds[0] * self.trains, self.resources.scoring_bounds[0]
        return {name: max(workers * amount + actors * actor[name], max(1, actors) * actor[name]) for name, amount in self._worker().items()}
