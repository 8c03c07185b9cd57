"""What is looked up in a prompt followed the longest earlier match."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.inference.decoding import LONGEST_MATCH, SHORTEST_MATCH, prompt_lookup


def looked_up(text: str, max_tokens: int = 4) -> str:
    return "".join(map(chr, prompt_lookup(np.array([ord(letter) for letter in text], dtype=np.int32), max_tokens=max_tokens)))


def test_the_text_after_the_longest_match_is_guessed() -> None:
    assert looked_up("abcdefg xbcdzzz abcd") == "efg "
    assert looked_up("xbcdzzz abcdefg xbcd") == "zzz "
    assert looked_up("abcdefg abcdzzz abcd") == "zzz ", "of equally long matches the last one"
    assert looked_up("abcab", max_tokens=9) == "cab"
    assert looked_up("aaaa") == "a"


def test_one_token_is_no_match_and_nothing_asked_is_nothing_guessed() -> None:
    assert looked_up("abc dec") == ""
    assert looked_up("") == looked_up("a") == looked_up("ab") == looked_up("abcde") == ""
    assert looked_up("abcab", max_tokens=0) == ""


@given(tokens=st.lists(st.integers(0, 3), max_size=60), most=st.integers(0, 10))
def test_no_earlier_place_matches_longer(tokens: list[int], most: int) -> None:
    guessed = list(prompt_lookup(np.array(tokens, dtype=np.int32), max_tokens=most))

    def matched(end: int) -> int:
        """Length of the match that ends before ``end``, as long as it counts."""
        return next((n for n in range(min(LONGEST_MATCH, end)) if tokens[end - 1 - n] != tokens[-1 - n]), min(LONGEST_MATCH, end))

    places = {end: matched(end) for end in range(1, len(tokens))}
    longest = max(places.values(), default=0)
    if most == 0 or longest < SHORTEST_MATCH:
        assert guessed == []
    else:
        last = max(end for end, length in places.items() if length == longest)
        assert guessed == tokens[last : last + most]
