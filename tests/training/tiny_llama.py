"""A tiny random Llama with a tokenizer trained on the spot, and a shard set for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pause_ray.data.shards import DOCUMENTS, NO_LOSS, PackedRow, rows_to_table, seal, write_rows
from pause_ray.text.tokenizer import MarkerToken

SENTENCES = (
    "The old lighthouse keeper counts every ship that passes.",
    "A red bicycle stands against the wall of the bakery.",
    "Rain fell for nine days and the river left its bed.",
    "Nobody in the village remembers who built the tower.",
    "The library keeps its oldest map behind glass.",
)


def make_model(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A Llama of 2 layers × 32 values with safetensors and tokenizer.json; its tokenizer has 300 entries."""
    import tokenizers
    import torch
    import transformers

    folder.mkdir(parents=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|unused|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}')
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # at the usual 0.02 so small a model could not learn to prefer any token
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def added_marker(model_dir: Path) -> MarkerToken:
    """``<PAUSE>`` as the next free entry of the tiny tokenizer."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    ids = tuple(tokenizer.encode("<PAUSE>", add_special_tokens=False).ids)
    return MarkerToken(text="<PAUSE>", token_id=tokenizer.get_vocab_size(), added=True, initial_ids=ids)


def reserved_marker(model_dir: Path) -> MarkerToken:
    """``<|unused|>``, which the tiny tokenizer and the tiny model have."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return MarkerToken(text="<|unused|>", token_id=tokenizer.token_to_id("<|unused|>"), added=False, initial_ids=(2,))


def make_rows(num_rows: int, *, marker_id: int | None = None, seed: int = 0) -> list[PackedRow]:
    """Rows of 12 to 40 tokens whose last three are learned: always 7, 8, 0."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        ids = random.integers(2, 290, size=random.integers(12, 41), dtype=np.int32)
        ids[-3:] = (7, 8, 0)
        if marker_id is not None:
            ids[4::7] = marker_id
            ids[-3:] = (7, 8, 0)
        labels = np.full_like(ids, NO_LOSS)
        labels[-3:] = ids[-3:]
        rows.append(PackedRow(input_ids=ids, labels=labels, num_pauses=0, num_documents=1))
    return rows


def make_shards(folder: Path, rows: list[PackedRow], *, validation: Sequence[PackedRow] = ()) -> Path:
    """A sealed shard set with these rows in two shards, held-out rows in another, and two documents."""
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"digest": ["d0", "d1"]}), folder / DOCUMENTS)
    half = len(rows) // 2
    parts = [(folder / "rows-0.parquet", rows[:half], 0), (folder / "rows-1.parquet", rows[half:], half)]
    for path, part, first in parts:
        write_rows(path, [rows_to_table(part, first_row=first)])
    held_out = folder / "validation-0.parquet"
    if validation:
        write_rows(held_out, [rows_to_table(validation, first_row=len(rows))])
    seal(folder, shards=[path for path, _, _ in parts], manifest={}, validation_shards=[held_out] if validation else [])
    return folder
