"""A whole sweep small enough for a test: a random two-layer Llama, texts of invented sentences, and the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

from pause_ray.evaluation.ledger import CellResult, Ledger
from tests.training.tiny_llama import make_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("river", "stone", "paper", "light", "garden", "window", "letter", "morning", "engine", "silver", "market", "bridge")


UNTIMED = {"seconds": 0.0, "prefilled_tokens": 0, "margin": None, "reference_margin": None}
"""Columns that time an answer, or that the shapes it was computed in change in their last digits."""


def write_model(folder: Path) -> Path:
    """The tiny Llama of the training tests, for contexts of up to 1,024 tokens."""
    make_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


def write_texts(folder: Path, *, documents: int, seed: int) -> Path:
    """Text files of a few paragraphs each; no two sentences are known to any model."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    for number in range(documents):
        sentences = [f"{draw.choice(WORDS).capitalize()} {' '.join(draw.choices(WORDS, k=8))}." for _ in range(30)]
        paragraphs = [" ".join(sentences[start : start + 5]) for start in range(0, 30, 5)]
        (folder / f"{number:02}.txt").write_text("\n\n".join(paragraphs))
    return folder


def write_sweep(folder: Path, model_dir: Path, *, steps: int = 3) -> Path:
    """A sweep of three trials: a baseline and two pause frequencies; its texts are named by paths relative to ``folder``."""
    write_texts(folder / "training", documents=12, seed=1)
    write_texts(folder / "haystack", documents=12, seed=2)
    places = ["Oslo", "Lima", "Cairo", "Quito"]
    facts = {
        "needle": "The lamp of {place} is {colour}.",
        "question": "Which colour has the lamp of {place}?",
        "slots": {"place": places, "colour": ["red", "green", "blue", "white"]},
    }
    needle = {"needle": "The captain hid the map under a drum.", "question": "Where did the captain hide it?", "keywords": ["drum"]}
    sweep = {
        "name": "tiny",
        "trial": {
            "model": {"source": str(model_dir)},
            "pauses": {"unit": "paragraph", "token": "added"},
            "corpus": {
                "sources": [{"path": "training"}],
                "facts": {"facts": [facts]},
                "sequence_len": 256,
                "min_context_tokens": 192,
                "num_sequences": 12,
            },
            "train": {
                "max_steps": steps,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "lora": {"rank": 2},
                "zero": {"stage": 2},
            },
            "eval": {
                "name": "tiny",
                "haystack": [{"path": "haystack/*.txt"}],
                "task": {"kind": "single", "needles": {"needles": [needle]}},
                "context_tokens": [320, 448],
                "prompt": {"system": None},
                "depth_percent": [0, 50, 100],
                "max_new_tokens": 4,
            },
        },
        "search": {"pauses.every": {"grid": [1, 2]}},
        "arms": {"baseline": {"pauses": None, "train": None}},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def start(arguments: list[str], *, folder: Path, storage: Path) -> subprocess.Popen[str]:
    """``pause-ray`` as a user runs it in ``folder``, in a process (and session) of its own."""
    command = [sys.executable, "-m", "pause_ray", *arguments, "--storage", str(storage)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def start_sweep(sweep: Path, storage: Path, *more: str) -> subprocess.Popen[str]:
    """``pause-ray sweep`` on the tiny sweep."""
    return start(["sweep", sweep.name, *more], folder=sweep.parent, storage=storage)


def run_sweep_to_its_end(sweep: Path, storage: Path) -> str:
    """The output of a sweep that must succeed."""
    process = start_sweep(sweep, storage)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def answers(storage: Path) -> dict[str, tuple[CellResult, ...]]:
    """Trial → its ledger without the columns that time it or depend on what else was asked, by cell."""
    ledgers = {}
    for path in sorted((storage / "trials").glob("*/cells.jsonl")):
        rows = sorted(Ledger(path).rows(), key=lambda row: row.cell_id)
        ledgers[path.parent.name] = tuple(dataclasses.replace(row, **UNTIMED) for row in rows)
    return ledgers
