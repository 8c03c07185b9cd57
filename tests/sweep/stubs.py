"""Sweeps without a neural network: a training that only writes its files, an engine that answers by a rule, in real processes.

Everything else is real: Ray, Tune, the pool, locks, ledgers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pause_ray.core.errors import SpecError
from pause_ray.inference.engine import Completion, EngineError, LoadedAs, PromptStep
from pause_ray.inference.scripted import UNKNOWN, ScriptedEngine
from pause_ray.training.spec import WorkerConfig
from tests.evaluation.tiny import STOCK, WORDS, make_haystack_folder, make_text, make_tokenizer_folder

ROOT = Path(__file__).resolve().parents[2]
FAILING_RANK, HANGING_RANK, KILLING_RANK = 13, 17, 19
"""Adapters of these ranks cannot be trained, never come to their end, or take their process with them."""


@dataclass(kw_only=True)
class StubEngine(ScriptedEngine):
    """Is blind in a part of the prompt that the adapter decides, so that trials differ in their scores."""

    cell_seconds: float = 0.0
    _rank: int = field(default=0, init=False)

    def use(self, wanted: LoadedAs) -> None:
        super().use(wanted)
        name = wanted.adapter_dir.name if wanted.adapter_dir else "base"
        self.blind_percent = (20.0, 30.0 + hashlib.sha256(name.encode()).digest()[0] / 4)
        config = wanted.adapter_dir / "adapter_config.json" if wanted.adapter_dir else None
        self._rank = json.loads(config.read_text())["r"] if config else 0

    def _answer(self, text: str, *, num_tokens: int) -> str:
        """Answer the proxy as well: the higher the adapter's rank, the earlier in the context is the first fact that it finds."""
        asked = re.search(r"Which number opens the locker (.+?)\?", text)
        fact = re.search(rf"The locker {re.escape(asked[1])} opens with the number (\d+)\.", text) if asked else None
        if fact is None:
            return super()._answer(text, num_tokens=num_tokens)
        return fact[1] if fact.start() >= len(text) * (1 - self._rank / 16) else UNKNOWN

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        for place, outcome in super().answer(steps):
            time.sleep(self.cell_seconds)
            yield place, outcome


def write_adapter(config: WorkerConfig, *, step_seconds: float, scaling: object = None) -> None:
    """Stand in for Ray Train's workers: go on from the last checkpoint, write a row of the log per step, then an adapter."""
    from pause_ray.core.errors import StoppedError
    from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STOP, TRAINING_LOG

    lora = config.job.train.lora
    if lora.rank == FAILING_RANK:
        raise SpecError(f"train.lora.rank {lora.rank}: this stub has no such rank (seed {config.job.seed}); choose another")
    while lora.rank == HANGING_RANK:
        time.sleep(1)
    if lora.rank == KILLING_RANK:
        os.kill(os.getpid(), signal.SIGKILL)
    saved = config.running.latest()
    rows = saved.log_rows() if saved else []
    with (config.folder / TRAINING_LOG).open("w") as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)
        for step in range(len(rows) + 1, config.until + 1):
            if (config.folder / STOP).exists():
                raise StoppedError(f"stopped before step {step}; the same command goes on")
            time.sleep(step_seconds)
            row = {
                "step": step,
                "loss": 2.0 / step,
                "learning_rate": 0.001,
                "tokens": 100,
                "seconds": step_seconds,
                "tokens_per_second": 1e4,
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
            rows.append(row)
    if config.until < config.job.train.max_steps:
        config.running.save(config.until, write_tensors=lambda path: path.write_bytes(b""), log_rows=rows, facts={}, keep_last=1)
    (config.folder / ADAPTER_CONFIG).write_text(json.dumps({"r": lora.rank, "seed": config.job.seed}))
    (config.folder / ADAPTER_WEIGHTS).write_bytes(b"")


def make_stub_engine(*, cell_seconds: float) -> StubEngine:
    """One that knows the stock needle."""
    return StubEngine(facts={STOCK.question: STOCK.needle}, cell_seconds=cell_seconds)


def write_model(folder: Path) -> Path:
    """A tokenizer, a config, and weights of one number."""
    make_tokenizer_folder(folder)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + np.zeros(1, np.float32).tobytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 4096}))
    return folder


def write_stub_sweep(folder: Path, *, name: str = "stubbed", **changes: Any) -> Path:
    """A sweep of two ranks, a baseline and untuned pauses; ``changes`` are dotted paths of it."""
    from pause_ray.core.spec import with_overrides

    if not (folder / "model").exists():
        write_model(folder / "model")
        make_haystack_folder(folder / "essays", num_documents=3)
        (folder / "training").mkdir()
        for number in range(4):
            (folder / "training" / f"{number}.txt").write_text(make_text(120, seed=100 + number))
    place = {"needle": "The gate of {place} is {colour}.", "question": "Which colour has the gate of {place}?"}
    slots = {"place": ["Oslo", "Lima", "Cairo", "Quito"], "colour": list(WORDS[:4])}
    sweep = {
        "name": name,
        "trial": {
            "model": {"source": str(folder / "model")},
            "pauses": {"unit": "paragraph"},
            "corpus": {
                "sources": [{"path": str(folder / "training")}],
                "facts": {"facts": [{**place, "slots": slots}]},
                "sequence_len": 256,
                "min_context_tokens": 192,
                "num_sequences": 4,
            },
            "train": {"max_steps": 4, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "lora": {"rank": 2}},
            "eval": {
                "name": "stubbed",
                "haystack": [{"path": str(folder / "essays" / "*.txt")}],
                "task": {"kind": "single", "needles": {"needles": [STOCK.resolved()]}},
                "context_tokens": [256, 384],
                "prompt": {"system": None},
                "depth_percent": [0, 20, 40, 60, 80, 100],
                "max_new_tokens": 64,
            },
            "resources": {"threads": 1},
        },
        "search": {"train.lora.rank": {"grid": [2, 4]}},
        "arms": {"baseline": {"pauses": None, "train": None}, "pauses_untuned": {"train": None}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(with_overrides(sweep, changes)))
    return path


def main() -> None:
    """``pause-ray`` with stubs in its trials: ``python -m tests.sweep.stubs [--cell-seconds S …] -- sweep FILE …``."""
    from pause_ray.cli.main import main as pause_ray
    from pause_ray.data import pipeline
    from tests.sweep.stub_processes import stub_every_process

    parser = argparse.ArgumentParser()
    parser.add_argument("--cell-seconds", type=float, default=0.0)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--unit-tokens", type=int, default=pipeline.TOKENS_PER_UNIT, help="of training text that one task makes")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    stub_every_process(cell_seconds=arguments.cell_seconds, step_seconds=arguments.step_seconds)
    pipeline.TOKENS_PER_UNIT = arguments.unit_tokens
    sys.argv = ["pause-ray", *arguments.command]
    pause_ray()


if __name__ == "__main__":
    main()
