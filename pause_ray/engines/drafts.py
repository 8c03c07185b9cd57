"""Guesses of how an answer goes on, for a model to verify in one forward pass. Pure; knows tokens and no model.

A guess costs a little computation and never changes a greedy answer: of a guess only the part is taken that the model
would have said itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

SHORTEST_MATCH = 2
"""Tokens at the end that must have occurred before: after a single one nearly anything may follow."""
LONGEST_MATCH = 8
"""Where more tokens agree, more would not say more."""


def prompt_lookup(tokens: Ids, *, most: int) -> tuple[int, ...]:
    """What followed the last tokens where they occurred before, up to ``most`` tokens; empty where they did not.

    Answers quote their prompt, so the text after the longest earlier match is often the text to come (Saxena 2023,
    "Prompt lookup decoding"). Among equally long matches the last one counts.

    Args:
        tokens: Prompt and answer so far, 1-D.
        most: Tokens of the guess at most.
    """
    if most < 1 or len(tokens) <= SHORTEST_MATCH:
        return ()
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    matched = 1
    while matched < LONGEST_MATCH:
        longer = ends[ends >= matched]
        longer = longer[tokens[longer - matched] == tokens[-1 - matched]]
        if not longer.size:
            break
        ends, matched = longer, matched + 1
    if matched < SHORTEST_MATCH:
        return ()
    begin = int(ends[-1]) + 1
    return tuple(int(token) for token in tokens[begin : begin + most])
