"""What trials take, from their texts and their model's config: plans for GPUs, and work where no GPU is named. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_ray.engines.cost import ModelShape
from pause_ray.engines.engine import HfEngineSpec
from pause_ray.engines.model_source import resolve_model, row_limit_tokens
from pause_ray.plan import Grid, Plan, Rows, Site, grid_of_prompts, make_plan, step_work
from pause_ray.spec import digest
from pause_ray.storage import Storage
from pause_ray.sweep.spec import PlannedTrial
from pause_ray.text.tokens import ModelTokenizer
from pause_ray.train.loop import check_corpus
from pause_ray.trial.forecast import forecast_trial
from pause_ray.trial.spec import TrialSpec

SFT_LEARNED_TOKENS = 64
"""Of a needle_sft row: the fact as answer and its end."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one trial, from its beginning to its end."""

    training_tokens: int
    training_flops: float
    grid: Grid
    """Of its cells."""


class Plans:
    """Plans trials of a sweep; what they have in common is found out once."""

    def __init__(self, root: Storage) -> None:
        """Find models and texts through the caches of ``root``."""
        self._root = root
        self._folders: dict[str, Path] = {}
        self._tokenizers: dict[Path, ModelTokenizer] = {}
        self._grids: dict[str, tuple[Grid, float]] = {}

    def plan(self, planned: PlannedTrial, *, site: Site) -> Plan:
        """One trial's training and scoring on ``site``.

        Raises:
            UserError: as ``trial.forecast.forecast_trial`` and ``plan.make_plan``.
        """
        trial = planned.spec
        there = {"scoring_actors": site.gpus, "scoring_gpus_per_actor": 1}
        grid, rows = self._checked(trial.model_copy(update={"resources": trial.resources.model_copy(update=there)}))
        scored_here = isinstance(trial.engine, HfEngineSpec)
        return make_plan(
            planned.label, shape=self.shape(trial), train=trial.train, rows=rows, grid=grid if scored_here else None, site=site
        )

    def work(self, trial: TrialSpec) -> Work:
        """One trial's tokens and operations, scored by as many actors as it names.

        Raises:
            UserError: as ``trial.forecast.forecast_trial``.
        """
        grid, rows = self._checked(trial)
        tokens, flops, steps = 0, 0, 0
        if trial.train is not None:
            tokens, flops = step_work(trial.train, shape=self.shape(trial), rows=rows)
            steps = trial.train.steps
        return Work(training_tokens=steps * tokens, training_flops=steps * flops, grid=grid)

    def shape(self, trial: TrialSpec) -> ModelShape:
        """Sizes of the trial's model."""
        return ModelShape.load(self.folder(trial))

    def _checked(self, trial: TrialSpec) -> tuple[Grid, Rows]:
        """What is asked and what is trained on."""
        if trial.train is not None and trial.corpus is not None:
            tokens, limit_tokens = trial.corpus.sequence_tokens, row_limit_tokens(self.folder(trial))
            check_corpus(trial.train, num_rows=trial.corpus.rows, longest_row_tokens=tokens, limit_tokens=limit_tokens)
        grid, paused = self._grid(trial)
        return grid, _rows(trial, paused=paused)

    def folder(self, trial: TrialSpec) -> Path:
        """With the config and tokenizer of the trial's model."""
        key = digest(trial.model)
        if key not in self._folders:
            self._folders[key] = resolve_model(trial.model, cache=self._root.cache, weights=False)
        return self._folders[key]

    def _tokenizer(self, trial: TrialSpec) -> ModelTokenizer:
        folder = self.folder(trial)
        if folder not in self._tokenizers:
            self._tokenizers[folder] = ModelTokenizer.load(folder)
        return self._tokenizers[folder]

    def _grid(self, trial: TrialSpec) -> tuple[Grid, float]:
        """The scoring, and how much longer pauses make a text."""
        asked = trial.resolved()
        key = digest([asked[part] for part in ("model", "pauses", "eval", "engine", "adapter", "seed", "replicate", "resources")])
        if key not in self._grids:
            found = forecast_trial(trial, cache=self._root.cache, tokenizer=self._tokenizer(trial))
            prompts = found.by_reuse[found.reuse]
            on_top = trial.pauses is not None and trial.pauses.budget == "content"
            content = prompts.asked_tokens - found.pause_tokens
            shape = self.shape(trial)
            grid = grid_of_prompts(prompts, shape=shape, answer_tokens=trial.eval.max_new_tokens, dtype=trial.model.dtype)
            self._grids[key] = grid, prompts.asked_tokens / content if on_top else 1.0
        return self._grids[key]


def plan_trials(trials: Sequence[PlannedTrial], *, site: Site, root: Storage) -> list[Plan]:
    """The plan of each trial on ``site``.

    Raises:
        UserError: a trial that cannot be planned.
    """
    plans = Plans(root)
    return [plans.plan(trial, site=site) for trial in trials]


def _rows(trial: TrialSpec, *, paused: float) -> Rows:
    if trial.train is None or trial.corpus is None:
        return Rows(longest_tokens=0, mean_tokens=0, learned_tokens=0)
    longest = trial.corpus.sequence_tokens * paused
    if trial.corpus.objective == "language_modeling":
        return Rows(longest_tokens=round(longest), mean_tokens=longest, learned_tokens=round(longest))
    mean = (trial.corpus.min_context_tokens * paused + longest) / 2
    return Rows(longest_tokens=round(longest), mean_tokens=mean, learned_tokens=SFT_LEARNED_TOKENS)
