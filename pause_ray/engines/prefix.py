"""How much of a computed prompt the next one can use. Pure; knows no model library."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shared_prefix_tokens(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """Number of leading ids that both arrays have in common."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def reusable_tokens(computed: NDArray[np.int32], prompt: NDArray[np.int32], *, chunk_tokens: int) -> int:
    """Leading tokens of ``prompt`` that need no forward pass when ``computed`` went through the model just before.

    Prompts are computed in chunks that begin at multiples of ``chunk_tokens``, and only whole chunks are reused: then
    every key and value comes out of a forward pass of the same shape with reuse and without, so answers are equal bit
    by bit in every precision, not only up to rounding. The last token is always computed, for its logits.
    """
    shared = min(shared_prefix_tokens(computed, prompt), len(prompt) - 1, len(computed))
    return shared - shared % chunk_tokens
