"""Sweeps on storage for the tests of what reads them: ledgers, manifests and ``sweep.json`` as trials and sweeps leave them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pause_ray.core.storage import Storage, write_json
from pause_ray.evaluation.ledger import CellResult, FactResult, Ledger

Grid = Mapping[tuple[int, float], float | None]
"""(context_tokens, depth_percent) → score, or None for a cell that could not be scored."""

CORPUS_STATS = {
    "num_documents": 24,
    "pauses_per_1k_tokens": 11.25,
    "longest_stretch_tokens": None,
    "documents_by_paragraph_rule": {"glued": 20, "newline": 4},
    "row_tokens_histogram": [{"from_tokens": 1, "to_tokens": 256, "rows": 3}, {"from_tokens": 257, "to_tokens": 512, "rows": 5}],
}
TRAINING = [{"step": step, "loss": loss, "learning_rate": 2e-4, "seconds": 2.0} for step, loss in ((1, 2.5), (2, 1.5), (3, 0.75))]


LENGTHS, DEPTHS = (1024, 2048, 4096), (10.0, 50.0, 90.0)
NEEDLE = "The best thing to do in Lisbon is ride tram 28 at dawn."


def cell(
    context_tokens: int, depth_percent: float, score: float | None, *, trial: str = "t", replicate: int = 0, sample: int = 0, **changes: Any
) -> CellResult:
    """A ledger row; what is not said is like in a run on a 1,024-token prompt without pauses."""
    needle_token = changes.get("needle_token", int(context_tokens * depth_percent / 100))
    references = ("tram 28", "dawn")
    fact = FactResult(text=NEEDLE, references=references, depth_percent=depth_percent, token=needle_token, score=score)
    values: dict[str, Any] = {
        "cell_id": f"{trial}-{context_tokens}-{depth_percent:g}-{sample}",
        "task": "single",
        "arm": "baseline",
        "replicate": replicate,
        "sample": sample,
        "seed": 1000 * replicate,
        "model": "some/model",
        "adapter": None,
        "pauses": "none",
        "context_tokens": context_tokens,
        "prompt_tokens": context_tokens,
        "content_tokens": context_tokens - 60,
        "num_pauses": 0,
        "rule": "newline",
        "depth_percent": depth_percent,
        "needle_token": needle_token,
        "facts": (fact,),
        "question": "What is the best thing to do in Lisbon?",
        "references": references,
        "response": None if score is None else f"{trial} answers {score}",
        "score": score,
        "rubric": None if score is None else int(1.5 + 9 * score),
        "unscored_reason": "engine: out of memory" if score is None else None,
        "scorer": "keywords",
        "engine": "scripted",
        "prefilled_tokens": context_tokens,
        "decoded_tokens": 12,
        "seconds": context_tokens / 1000,
    }
    return CellResult(**(values | changes))


def rows(grid: Grid, *, trial: str = "t", replicate: int = 0, **changes: Any) -> list[CellResult]:
    """One replicate's rows."""
    return [cell(length, depth, score, trial=trial, replicate=replicate, **changes) for (length, depth), score in grid.items()]


def several_facts(
    context_tokens: int,
    places: Sequence[tuple[float, float | None]],
    *,
    trial: str = "t",
    replicate: int = 0,
    sample: int = 0,
    **changes: Any,
) -> CellResult:
    """A ledger row with a fact at each depth, its own score beside it (all None: not scored); the score is their mean."""
    facts = tuple(
        FactResult(
            text=f"Ingredient {number} is in the cake.",
            references=(f"ingredient {number}",),
            depth_percent=depth,
            token=int(context_tokens * depth / 100),
            score=score,
        )
        for number, (depth, score) in enumerate(places)
    )
    scores = [score for _, score in places if score is not None]
    found = {"facts": facts, "references": tuple(fact.references[0] for fact in facts), "question": "What is in the cake?"} | changes
    mean = sum(scores) / len(scores) if scores else None
    return cell(context_tokens, places[0][0], mean, trial=trial, replicate=replicate, sample=sample, **found)


def store_trial(
    storage: Storage,
    trial: str,
    results: Sequence[CellResult],
    *,
    trained: bool = False,
    pauses: bool = False,
    finished: bool = True,
    spec: Mapping[str, Any] | None = None,
    suite: Mapping[str, Any] | None = None,
    evaluation_overlap: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    training: Sequence[Mapping[str, Any]] = TRAINING,
) -> Path:
    """A trial's folder as a run leaves it; unfinished ones have no manifest. ``training`` is the log of a trained one."""
    folder = storage.trials / trial
    ledger = Ledger(folder / "cells.jsonl")
    for result in results:
        ledger.append(result)
    write_json(
        folder / "spec.json",
        spec
        or {
            "model": {"source": "some/model"},
            "pauses": {"every": 1} if pauses else None,
            "train": {"max_steps": 3, "lora": {"rank": 4}} if trained else None,
            "eval": {"max_new_tokens": 48, **(suite or {})},
        },
    )
    if finished:
        write_json(
            folder / "manifest.json",
            {
                "digest": trial,
                "version": "0.1.0",
                "num_cells": len(results),
                "model_digest": "0123456789abcdef",
                "shards": "aaaaaaaaaaaaaaaa" if trained else None,
                "checkpoint": "/x/checkpoints/bbbbbbbbbbbbbbbb" if trained else None,
                "corpus_stats": CORPUS_STATS if trained else None,
                "training": list(training) if trained else [],
                "evaluation_overlap": evaluation_overlap,
                "noise": noise,
                "seconds": {"total": 60.0 if trained else 20.0},
            },
        )
    return folder


def store_sweep(
    storage: Storage,
    trials: Sequence[tuple[str, str, Mapping[str, Any], int]],
    *,
    compare_to: str = "baseline",
    control: str | None = None,
    name: str = "demo",
    spec: Mapping[str, Any] | None = None,
) -> Path:
    """``sweep.json`` that lists (trial digest, arm, point, replicate); ``spec`` is more of the sweep's spec than its name."""
    folder = storage.sweeps / f"{name}-0011223344556677"
    listed = [
        {"digest": trial, "arm": arm, "point": dict(point), "replicate": replicate, "seed": 0} for trial, arm, point, replicate in trials
    ]
    write_json(
        folder / "sweep.json",
        {
            "name": name,
            "digest": "0011223344556677",
            "spec": {"name": name, **(spec or {})},
            "compare_to": compare_to,
            "control": control,
            "trials": listed,
            "command": f"pause-ray sweep sweeps/{name}.yaml",
            "version": "0.1.0",
        },
    )
    return folder


def store_search(folder: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """A sweep's ``search.jsonl``."""
    (folder / "search.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def rung_event(trial: str, rung: int, score: float | None, *, step: int | None = None) -> dict[str, Any]:
    """What a scheduler's driver writes down of one rung."""
    return {
        "event": "rung",
        "trial": trial,
        "point": {},
        "rung": rung,
        "step": 10 * 3**rung if step is None else step,
        "proxy_score": score,
        "cells": 16,
        "seconds": 2.0,
        "prefilled_tokens": 4000,
    }


def stop_event(trial: str, rung: int) -> dict[str, Any]:
    """What it writes down of a trial that it gave up."""
    return {"event": "stopped", "trial": trial, "point": {}, "rung": rung, "by": "asha"}


def grid(
    lengths: Sequence[int], depths: Sequence[float], score: Callable[[int, float], float | None]
) -> dict[tuple[int, float], float | None]:
    """Scores by rule."""
    return {(length, depth): score(length, depth) for length in lengths for depth in depths}


def sweep_of(storage: Storage, arms: dict[str, float | None], *, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """One replicate per arm, all of whose cells have one score; None: not finished."""
    for arm, score in arms.items():
        if score is not None:
            scores = dict.fromkeys(itertools.product(lengths, DEPTHS), score)
            tuned = arm in ("pause_tuned", "tuned_without_pauses")
            store_trial(storage, f"{arm}-trial", rows(scores, trial=arm), trained=tuned, pauses=arm.startswith("pause"))
    return store_sweep(storage, [(f"{arm}-trial", arm, {}, 0) for arm in arms])


def with_control(storage: Storage, scores: dict[str, float], *, control: str | None = "tuned_without_pauses") -> Path:
    """As ``sweep_of``, with a control."""
    sweep_of(storage, scores)
    return store_sweep(storage, [(f"{arm}-trial", arm, {}, 0) for arm in scores], control=control)
