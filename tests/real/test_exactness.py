"""What is shared between prompts, and drafts, change no answer of the real small model: every suite, in float32.

The reference computes each prompt from its first token and decodes token by token. ``make exactness`` asks 15 cells of every
suite (over 300); without ``PAUSE_RAY_EXACTNESS=full`` a few suites and cells stand for them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pause_ray.core.spec import inline_files
from pause_ray.evaluation.answer import CellRunner, PlannedCell, plan_cells
from pause_ray.evaluation.haystack import load_haystack, prompt_builder
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.inference.engine import Completion, HfEngineSpec, LoadedAs, Reuse
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from pause_ray.trial.spec import FILE_FIELDS

pytestmark = [pytest.mark.real, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
FULL = os.environ.get("PAUSE_RAY_EXACTNESS") == "full"
SUITES = sorted(path.stem for path in (ROOT / "eval" / "suites").glob("*.yaml"))
STAND_INS = ("lattice", "multi_random", "ruler_niah_multikey_1", "key_value")
LENGTHS = [448, 576, 704] if FULL else [448, 640]
POSITIONS = 5 if FULL else 2
PAUSED = {"single", "lattice", "multi_spaced", "combine_1"}
"""Suites that are asked with pauses."""
assert set(SUITES) >= PAUSED


def short(name: str) -> SuiteSpec:
    """A suite with few short cells, its grid of the same kind."""
    path = ROOT / "eval" / "suites" / f"{name}.yaml"
    data = inline_files({"eval": str(path)}, FILE_FIELDS, origin=path)["eval"]
    data |= {"context_tokens": LENGTHS, "repeat_haystack": bool(data.get("haystack")), "max_new_tokens": 24}
    if data.get("lattice_tokens"):
        data["lattice_tokens"] = LENGTHS[0] // (POSITIONS - 1)
    elif data.get("samples"):
        data["samples"] = POSITIONS
    else:
        data["depth_percent"] = [round(100 * place / (POSITIONS - 1)) for place in range(POSITIONS)]
    return SuiteSpec.parse(data, origin=str(path))


def runner_of(suite: SuiteSpec, model_dir: Path, cache: Path) -> CellRunner:
    tokenizer = ModelTokenizer.load(model_dir)
    policy = PausePolicy(unit="sentence", every=3) if suite.name in PAUSED else None
    marker = resolve_marker(tokenizer, policy)
    haystack = load_haystack(suite, cache=cache, seed=0, replicate=0)
    builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker, seed=0)
    return CellRunner(builder=builder, tokenizer=tokenizer, policy=policy, marker=marker, max_new_tokens=suite.max_new_tokens)


@pytest.mark.parametrize("name", SUITES if FULL else STAND_INS)
def test_answers_are_the_same_however_they_are_computed(name: str, model_dir: Path, cache: Path, real_engine: object) -> None:
    from pause_ray.inference.hf import HfEngine

    engine = real_engine
    assert isinstance(engine, HfEngine)
    engine.use(LoadedAs(model_dir=model_dir, dtype="float32"))
    suite = short(name)
    runner = runner_of(suite, model_dir, cache)
    grid = cells(suite, identity="exactness", replicate=0, seed=0)

    def answers(reuse: Reuse, *, drafts: bool) -> dict[str, Completion]:
        asked = plan_cells(grid, runner=runner, prefix_block_size=engine.prefix_block_size, reuse=reuse, drafts=drafts)
        return {asked[place].cell.id: completion_of(asked[place], outcome) for place, outcome in engine.answer([step for _, step in asked])}

    reference = answers("none", drafts=False)
    modes: tuple[Reuse, ...] = ("full", "depth")
    for reuse in modes:
        found = answers(reuse, drafts=True)
        assert {cell: completion.ids for cell, completion in found.items()} == {cell: its.ids for cell, its in reference.items()}
        if reuse == "full":
            shared = sum(completion.prefilled_tokens for completion in found.values())
            assert shared < sum(completion.prefilled_tokens for completion in reference.values()), (
                "nothing was shared, so nothing was shown"
            )


def completion_of(asked: PlannedCell, outcome: object) -> Completion:
    assert isinstance(outcome, Completion), f"{asked.cell}: {outcome}"
    return outcome


@pytest.fixture(scope="module")
def real_engine() -> object:
    from pause_ray.inference.hf import HfEngine

    return HfEngine(HfEngineSpec())
