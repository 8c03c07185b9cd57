"""Which trials of a sweep train together on one copy of the base weights. Pure: looks at prepared trials, trains nothing.

Trials of one group have base model, marker and the handling of the base in common (``train.together.frame``); LoRA settings, seed,
learning rate, steps and rows may differ. The first trial of a group whose turn comes trains all of them, the others find theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pause_ray.corpus.shards import shards_digest
from pause_ray.spec import digest
from pause_ray.train.loop import check_side_by_side
from pause_ray.train.together import frame
from pause_ray.trial.prepare import PreparedTrial


def companions(trials: Mapping[str, PreparedTrial], *, at_most: int) -> dict[str, tuple[str, ...]]:
    """Groups of near-equal size of trials that train together.

    Args:
        trials: By digest, in the order in which they are run; those that train nothing are left out.
        at_most: Trainings in a group. Trials with the same training, which differ in what they are asked, count as one.

    Returns:
        Trial → a trial for each training of its group, its own or an equal one among them. Trials that train alone are not in it.

    Raises:
        SpecError: a training that cannot take place beside others, if ``at_most`` is more than 1.
    """
    if at_most == 1:
        return {}
    trainings: dict[str, list[str]] = {}
    frames: dict[str, list[str]] = {}
    for key, trial in trials.items():
        if trial.spec.train is None:
            continue
        check_side_by_side(trial.spec.train)
        base = frame(trial.spec.train, base_digest=trial.base_digest, marker=trial.marker.token)
        training = digest([base, trial.spec.train.identity(), shards_digest(trial.shards) if trial.shards else None, trial.spec.data_seed])
        if training not in trainings:
            frames.setdefault(digest(base), []).append(training)
        trainings.setdefault(training, []).append(key)
    found: dict[str, tuple[str, ...]] = {}
    for alike in frames.values():
        number = math.ceil(len(alike) / at_most)
        for index in range(number):
            group = alike[index * len(alike) // number : (index + 1) * len(alike) // number]
            if len(group) > 1:
                members = tuple(trainings[training][0] for training in group)
                found |= {key: members for training in group for key in trainings[training]}
    return found


def leaders_first(keys: Iterable[str], groups: Mapping[str, tuple[str, ...]]) -> list[str]:
    """``keys`` so that trials that run at the same time train in different groups, where they would wait for one training.

    First one of each group and all that train alone, then those that find their adapters.
    """
    listed = list(keys)
    led: set[tuple[str, ...]] = set()
    first = []
    for key in listed:
        group = groups.get(key)
        if group is None or group not in led:
            first.append(key)
        if group is not None:
            led.add(group)
    chosen = set(first)
    return first + [key for key in listed if key not in chosen]
