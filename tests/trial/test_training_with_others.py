"""What a trial says of itself while it trains others beside its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pause_ray.corpus.shards import ShardJob
from pause_ray.errors import SourceError
from pause_ray.rows import ShardSet
from pause_ray.spec import JsonObject
from pause_ray.storage import Storage
from pause_ray.text.tokens import Marker
from pause_ray.train.launch import TrainJob
from pause_ray.trial import run
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import TrialSpec
from tests.needle.tiny import make_suite
from tests.train.tiny_llama import make_rows, make_shards

pytestmark = pytest.mark.ray  # is imported, not started
STEPS = {"leader": 3, "longer": 6, "shorter": 1}


@pytest.fixture
def trials(tmp_path: Path) -> dict[str, PreparedTrial]:
    suite = make_suite(None, noise="Grass is green.", context_tokens=[200]).resolved()
    found = {}
    for name, steps in STEPS.items():
        corpus = {"sources": [{"path": "x"}], "objective": "language_modeling"}
        data = {"model": {"source": "m"}, "eval": suite, "corpus": corpus, "train": {"steps": steps, "zero": {"stage": 0}}}
        spec = TrialSpec.parse(data, origin="test")
        assert spec.corpus is not None
        job = ShardJob(spec=spec.corpus, prompt=spec.eval.prompt, policy=None, model_dir=tmp_path, seed=0)
        marker = Marker((), None)
        found[name] = PreparedTrial(spec=spec, digest=name, model_dir=tmp_path, base_digest="b", marker=marker, shards=job)
    return found


@pytest.fixture
def train(trials: dict[str, PreparedTrial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train the leader with others; the rows of the trainings' logs come in the order that is given."""
    rows = ShardSet.open(make_shards(tmp_path / "shards", make_rows(20)))

    def run_it(*others: str, order: Sequence[tuple[int, int]], without_rows: str | None = None) -> tuple[list[int], dict[str, list[Any]]]:
        trained: list[int] = []
        told: dict[str, list[Any]] = {name: [] for name in STEPS}

        def rows_of(trial: PreparedTrial, *, storage: Storage, progress: run.TrialProgress) -> ShardSet:
            progress("text", rows.num_rows, rows.num_rows)
            if trial.digest == without_rows:
                raise SourceError("no document")
            return rows

        def fit_together(jobs: Sequence[TrainJob], *, progress: Any, stage: Any, **_: Any) -> list[str]:
            trained.extend(job.train.steps for job in jobs)
            stage("training")
            for number, done in order:
                progress(number, done, jobs[number].train.steps, {"step": done})
            return ["adapter"]

        monkeypatch.setattr(run, "make_shards", rows_of)
        monkeypatch.setattr(run, "fit_together", fit_together)

        def teller(name: str) -> run.TrialProgress:
            return lambda stage, done, total, row=None: told[name].append((stage, done, total, row))

        leader = trials["leader"]
        job = run.training_job(leader, rows)
        assert job is not None
        run.train_with(
            [run.Companion(trial=trials[name], progress=teller(name)) for name in others],
            job,
            leader.spec.resources,
            storage=Storage.open(tmp_path / "runs"),
            train_gpus=0,
            progress=teller("leader"),
            stop=None,
        )
        return trained, told

    return run_it


@pytest.mark.parametrize("order", [[(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)], [(1, 5), (0, 1), (1, 6), (0, 2), (0, 3)]])
def test_a_trial_tells_its_own_steps_and_gives_a_sign_of_life_with_every_other(train: Any, order: list[tuple[int, int]]) -> None:
    _, told = train("longer", order=order)
    rows: list[JsonObject] = [row for _, _, _, row in told["leader"] if row is not None]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert {total for _, _, total, _ in told["leader"]} == {3}
    done = [done for _, done, _, _ in told["leader"]]
    assert done == sorted(done)
    assert len(done) == 1 + len(order)
    assert [row["step"] for _, _, _, row in told["longer"]] == [done for number, done in order if number == 1]


def test_one_that_is_not_trained_any_more_is_said_nothing_of(train: Any) -> None:
    """It may have ended long ago, and would seem to have begun again."""
    _, told = train("longer", "shorter", order=[(0, 1), (2, 1)])
    assert told["longer"] == []
    assert told["shorter"] == [("training", 1, STEPS["shorter"], {"step": 1})]


def test_one_whose_rows_cannot_be_made_leaves_the_others_alone(train: Any) -> None:
    trained, _ = train("longer", "shorter", order=[], without_rows="longer")
    assert trained == [STEPS["leader"], STEPS["shorter"]]
