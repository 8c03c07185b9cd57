"""Exports the best trial of a sweep to ``<sweep folder>/best/``: adapter, spec, and a README that says how to use them.

The folder holds ``trial.json``, ``adapter/`` (a whole checkpoint), ``README.md``, and ``manifest.json``, which is written last. The best
trained trial is exported; a sweep without training exports the spec of its best trial alone.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from pathlib import Path

from pause_ray.core.errors import CheckpointError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import (
    MANIFEST,
    Storage,
    building,
    exclusive,
    is_complete,
    lock_of,
    read_json,
    space_errors,
    write_json,
    write_text,
)
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.report.ranking import Best, best, format_objective
from pause_ray.report.results import SweepResults, TrialResult, results_of
from pause_ray.trial.ask import ADAPTER, MODEL_VARIABLE, TRIAL

FOLDER = "best"
README = "README.md"
GROWN = """
if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # the marker is an entry of its own
    base.resize_token_embeddings(len(tokenizer))"""
log = logging.getLogger("pause_ray")


def export_best(sweep: Path | SweepResults, storage: Storage) -> Path | None:
    """Bring ``best/`` up to date with the finished trials.

    Args:
        sweep: The sweep's folder or its results.
        storage: The storage root with the adapters.

    Returns:
        The folder; None while no trial has finished, or, with a warning, if the adapter of the best one is missing or damaged.

    Raises:
        StorageError: The sweep's or a trial's files are damaged, or the disk is full.
    """
    results = results_of(sweep, storage)
    found, folder = best(results, tuned=True) or best(results), results.folder / FOLDER
    if found is None:
        return None
    adapter = _adapter_folder(found.trial, storage)
    try:
        checkpoint = Checkpoint.open(adapter) if adapter is not None else None
    except CheckpointError as error:  # the report does not need it
        log.warning("the best trial is not exported: %s (and %s of its trial)", error, found.trial.folder / MANIFEST)
        return None
    manifest = _manifest(results, found, adapter)
    with exclusive(lock_of(folder), waiting=lambda holder: log.warning("the best trial: waiting for %s", holder)):
        if not (is_complete(folder) and read_json(folder / MANIFEST) == manifest):
            with building(folder) as scratch, space_errors(folder):
                if checkpoint is not None:
                    shutil.copytree(checkpoint.folder, scratch / ADAPTER)
                write_json(scratch / TRIAL, found.trial.spec)
                write_text(scratch / README, _readme(manifest, found))
                write_json(scratch / MANIFEST, manifest)
    return folder


def exported(sweep_folder: Path) -> JsonObject | None:
    """Return the manifest of the exported trial; None if there is none."""
    folder = sweep_folder / FOLDER
    return read_json(folder / MANIFEST) if is_complete(folder) else None


def _adapter_folder(trial: TrialResult, storage: Storage) -> Path | None:
    """Return the adapter's folder under this storage root, which may have been moved, else the folder that the manifest names."""
    recorded = trial.manifest.get("checkpoint")
    if recorded is None:
        return None
    here = storage.checkpoints / Path(recorded).name
    return here if is_complete(here) else Path(recorded)


def _manifest(results: SweepResults, found: Best, adapter: Path | None) -> JsonObject:
    overall = best(results) or found
    return {
        "made_by": "pause-ray sweep",
        "sweep": results.name,
        "sweep_digest": results.digest,
        "trial": found.trial.digest,
        "condition": found.condition.label,
        "arm": found.condition.arm,
        "point": found.condition.point,
        "replicate": found.trial.replicate,
        "objective": found.objective.model_dump(mode="json"),
        "value": found.value,
        "trial_value": found.trial_value,
        "finished": results.is_finished,
        "better_untrained": overall.condition.label if overall.condition.label != found.condition.label else None,
        "model": found.trial.spec.get("model"),
        "model_digest": found.trial.manifest.get("model_digest"),
        "checkpoint": adapter.name if adapter else None,
    }


def _readme(manifest: JsonObject, found: Best) -> str:
    model, pauses = found.trial.spec["model"], found.trial.spec.get("pauses")
    parts = [
        f"# Best trial of {manifest['sweep']}",
        f"{manifest['condition']}, replicate {manifest['replicate']}: {format_objective(found.objective)} of the sweep's trained trials, "
        f"{manifest['value']:.3f} over its replicates. As the best of many, this value is an overestimate: test the trial on new texts.",
    ]
    if manifest["better_untrained"]:
        parts.append(f"**An arm without training did better: {manifest['better_untrained']}.**")
    parts.append(f"Base model: `{model['source']}` (digest {manifest['model_digest']}).")
    if pauses:
        parts.append(
            "It was trained and scored on text with pauses, and needs them in its input. The first two ways below insert them; "
            f"with the others, insert them yourself:\n\n    {json.dumps(pauses, ensure_ascii=False)}"
        )
    return "\n\n".join([*parts, *(_ways(model, pauses) if manifest["checkpoint"] else [])]) + "\n"


def _ways(model: JsonObject, pauses: JsonObject | None) -> list[str]:
    source, rope = model["source"], model.get("rope")
    command = ["pause-ray", "eval", "eval/suites/single.yaml", "--model", source, "--adapter", ADAPTER]
    said = {f"model.{name}": value for name, value in model.items() if name != "source" and value is not None}
    said |= {"pauses": pauses} if pauses else {}
    said |= {"engine.reuse": "depth"} if rope and rope["kind"] == "dynamic" else {}
    for path, value in said.items():
        command += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    grows = pauses is not None and pauses.get("token") == "added"
    plain = rope is None and not source.startswith("pypi:") and not source.endswith(".gguf")
    revision = f", revision={json.dumps(model['revision'])}" if model.get("revision") else ""
    asked = f"""from pathlib import Path
from pause_ray.trial.ask import Answerer

print(Answerer.open(Path(".")).answer(context, question))  # {MODEL_VARIABLE} may name the base model's folder"""
    loaded = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{ADAPTER}")
base = AutoModelForCausalLM.from_pretrained({json.dumps(source)}{revision}){GROWN if grows else ""}
model = PeftModel.from_pretrained(base, "{ADAPTER}")"""
    return [
        f"## Ask it\n\n```python\n{asked}\n```",
        f"## Score it\n\n    {shlex.join(command)}",
        f"## Make a plain model of it, for transformers, vLLM and others\n\n    pause-ray export {ADAPTER} merged-model",
        *([f"## Load it with PEFT alone\n\n```python\n{loaded}\n```"] if plain else []),  # of others transformers makes another model
    ]
