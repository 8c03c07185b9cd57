"""At which lengths a sweep's trials can be asked the proxy. Reads texts and tokenizers; asks nobody."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pause_ray.engines.model_source import model_limit_tokens
from pause_ray.errors import ModelError, SpecError, TextError
from pause_ray.needle.haystack import ask, check_fits, check_lengths, load_haystack, prompt_builder
from pause_ray.needle.proxy import proxy_suite
from pause_ray.needle.task import SuiteSpec, cells
from pause_ray.spec import digest
from pause_ray.text.tokens import ModelTokenizer
from pause_ray.trial.prepare import PreparedTrial


def proxy_lengths(trials: Collection[PreparedTrial], *, facts: int, context_tokens: Sequence[int] | None, cache: Path) -> tuple[int, ...]:
    """Lengths at which the proxy can be asked of all ``trials``, so that their scores compare.

    Args:
        trials: Of one sweep.
        facts: Of the proxy.
        context_tokens: The lengths that are wanted; None for the longest that all suites have and that fits all trials.
        cache: Where packages are kept.

    Raises:
        SpecError: the suites have no length in common, or no text to hide facts in.
        ModelError: a prompt is longer than the model takes.
        TextError: a length leaves no room for the facts.
    """
    distinct = {digest(_asked_as(trial)): trial for trial in trials}
    shared = set.intersection(*(set(trial.spec.eval.context_tokens) for trial in distinct.values()))
    if context_tokens is None and not shared:
        raise SpecError("scheduler: the trials' suites have no length in common; set scheduler.proxy.context_tokens")
    wanted = [tuple(context_tokens)] if context_tokens is not None else [(length,) for length in sorted(shared, reverse=True)]
    for lengths in wanted:
        try:
            for trial in distinct.values():
                _check_proxy(trial, proxy_suite(trial.spec.eval, facts=facts, context_tokens=lengths), cache=cache)
        except (ModelError, TextError):
            if lengths == wanted[-1]:
                raise
        else:
            return lengths
    raise AssertionError("every suite has a length")


def _asked_as(trial: PreparedTrial) -> list[object]:
    """What decides the prompts of a trial's proxy."""
    spec = trial.spec
    return [spec.eval.resolved(), spec.pauses.resolved() if spec.pauses else None, str(trial.model_dir), spec.seed, spec.replicate]


def _check_proxy(trial: PreparedTrial, suite: SuiteSpec, *, cache: Path) -> None:
    """Build its shortest and its longest prompt."""
    spec, limit_tokens = trial.spec, model_limit_tokens(trial.model_dir)
    check_lengths(suite, limit_tokens=limit_tokens, origin=spec.model.source)
    haystack = load_haystack(suite, cache=cache, seed=spec.seed, replicate=spec.replicate, data_seed=spec.data_seed)
    tokenizer = ModelTokenizer.load(trial.model_dir)
    builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=spec.pauses, marker=trial.marker, seed=spec.data_seed)
    asked = cells(suite, identity="", replicate=spec.replicate, seed=spec.data_seed)
    for length in {min(suite.context_tokens), max(suite.context_tokens)}:
        prompt = ask(next(cell for cell in asked if cell.context_tokens == length), builder)
        check_fits(prompt, max_new_tokens=suite.max_new_tokens, limit_tokens=limit_tokens, origin=spec.model.source)
