"""A trial whose corpus cannot fill one optimizer step is refused when its spec is read."""

from __future__ import annotations

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import with_overrides
from pause_ray.trial.spec import TrialSpec
from tests.sweep.test_spec import SWEEP


def test_a_corpus_smaller_than_one_step_is_refused() -> None:
    step = {"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 3}
    TrialSpec.parse(with_overrides(SWEEP["trial"], step | {"corpus.num_sequences": 6}), origin="test")
    with pytest.raises(SpecError, match=r"corpus.num_sequences 5 is less than one optimizer step takes: .* 2 × .* 3 = 6"):
        TrialSpec.parse(with_overrides(SWEEP["trial"], step | {"corpus.num_sequences": 5}), origin="test")
