"""A model folder with a tokenizer but no weights, a haystack, and a suite over both. Needs no model library."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pause_ray.evaluation.suite import SuiteSpec
from pause_ray.evaluation.tasks.needle_files import NeedleSpec
from pause_ray.inference.engine import LoadedAs

STOCK = NeedleSpec(
    needle="The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    question="What is the best thing to do in San Francisco?",
    keywords=("sandwich", "Dolores Park", "sunny day"),
)
WORDS = ("river", "stone", "light", "old", "carries", "a", "the", "under", "village", "seven", "quiet", "engines", "paint", "north", "slow")
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_text(num_sentences: int, *, seed: int) -> str:
    """Prose of random words, ten sentences a paragraph."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(5, 14))).capitalize() + "." for _ in range(num_sentences)]
    return "\n\n".join(" ".join(sentences[start : start + 10]) for start in range(0, num_sentences, 10))


def make_tokenizer_folder(folder: Path, *, limit_tokens: int = 100_000) -> Path:
    """A byte-level BPE tokenizer with two control tokens and a chat template, and a config.json."""
    import tokenizers

    folder.mkdir(parents=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(50, seed=0), STOCK.needle, STOCK.question], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": limit_tokens, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_haystack_folder(folder: Path, *, num_documents: int = 8) -> Path:
    """Text files of 200 sentences each, about 2,000 words."""
    folder.mkdir(parents=True)
    for number in range(num_documents):
        (folder / f"essay{number}.txt").write_text(make_text(200, seed=number))
    return folder


def make_suite(haystack: Path | None, **changes: Any) -> SuiteSpec:
    """Three lengths × three depths of the stock needle in a folder's texts; None: ``changes`` say in what."""
    data: dict[str, Any] = {
        "name": "tiny",
        "haystack": [{"path": str(haystack / "*.txt")}] if haystack else [],
        "task": {"kind": "single", "needles": {"needles": [STOCK.resolved()]}},
        "context_tokens": [1024, 2048, 4096],
        "depth_percent": [0, 50, 100],
    }
    return SuiteSpec.parse(data | changes, origin="test")


def base(model_dir: Path) -> LoadedAs:
    return LoadedAs(model_dir=model_dir, dtype="float32")
