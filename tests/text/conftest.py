"""Two tiny tokenizers of the families that real models use, trained here, and the texts that hypothesis tries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pause_ray.text.tokenizer import ModelTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|unk|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>"]
LESSONS = [
    "The harbour was quiet that morning. Nobody had expected the fog to lift before noon, and it did not.",
    "She counted the boats twice: eleven, then twelve. What had she missed? The twelfth lay behind the pier.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "user system assistant context question answer <PAUSE> helpful bot",
]


def write_model_folder(folder: Path, tokenizer: Tokenizer, *, template: str | None = CHATML) -> Path:
    """A model folder without weights: tokenizer, chat template, end token."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id("<|im_end|>")}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2: bytes, a space belongs to the word after it, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LESSONS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2 and Mistral: an underscore for the space, one before every text, an unknown token for the rest."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<|unk|>", show_progress=False)
    tokenizer.train_from_iterator(LESSONS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the byte-level tokenizer with a ChatML template."""
    return write_model_folder(tmp_path_factory.mktemp("byte_level"), byte_level())


@pytest.fixture(scope="session")
def byte_tokenizer(model_folder: Path) -> ModelTokenizer:
    return ModelTokenizer.load(model_folder)


@pytest.fixture(scope="session", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    trained = byte_level() if request.param == "byte_level" else metaspace()
    return ModelTokenizer.load(write_model_folder(tmp_path_factory.mktemp(request.param), trained))
