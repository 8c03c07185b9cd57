"""The errors of the package: a small tree of picklable exceptions. Showing them is the callers' task.

``UserError`` is something the reader of the message can put right: the command line prints its one line and
exits with 2. Every other exception is a bug or a failed machine: it keeps its traceback and exits with 1.
Each message names what was wrong (field, file, value), the rule, and the remedy.
Every class takes exactly one positional message, so that it survives the way through Ray's pickling.
"""

from __future__ import annotations

EXTRAS = {
    "accelerate": "eval",
    "gguf": "eval",
    "peft": "eval",
    "safetensors": "eval",
    "torch": "eval",
    "transformers": "eval",
    "deepspeed": "eval,train",
    "optuna": "eval,train",
    "ray": "eval,train",
    "bitsandbytes": "quantize",
    "mlflow": "mlflow",
    "boto3": "cluster",
    "botocore": "cluster",
    "googleapiclient": "cluster",
    "psycopg2": "cluster",
}
"""Libraries that are no requirement of the package, and the extras that install them."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return the remedy if the module belongs to a library that an extra installs, in one line; otherwise None."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return None
    return f"{library} is not installed, and this needs it; pip install 'pause-ray[{EXTRAS[library]}]'"


class PauseRayError(Exception):
    """Root of everything this package raises on purpose."""


class UserError(PauseRayError):
    """Something the user can put right; shown as one line, exit code 2."""


class SpecError(UserError, ValueError):
    """A spec, override or dotted path that breaks a rule."""


class SourceError(UserError, ValueError):
    """A corpus, haystack or package file that is missing, empty, undecodable or of another digest."""


class TextError(UserError, ValueError):
    """A text or marker that cannot be segmented, paused or tokenised as asked."""


class ModelError(UserError, ValueError):
    """A model folder, tokenizer or context length that does not fit the spec."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is incomplete, edited, or made for another base model or marker."""


class StoppedError(UserError, RuntimeError):
    """Work that was asked to end before it was done; the same command goes on with it."""


class StorageError(UserError, RuntimeError):
    """A storage root that cannot be written, is full, or is in use by another process."""


class TrackingError(UserError, RuntimeError):
    """The MLflow server cannot be reached or refuses; results on storage are unharmed."""


class ClusterError(UserError, RuntimeError):
    """A cluster that cannot be reached, refuses, or is not as a sweep needs it."""


class TrainingError(PauseRayError, RuntimeError):
    """Training stopped for a reason that lies in the run, such as a loss that is not a number."""


class ScoringPoolError(PauseRayError, RuntimeError):
    """Scoring actors were lost too often, do not start, or were stopped."""
