"""Texts as they are compared: one normalisation for answers, keywords, haystacks and training rows."""

from __future__ import annotations

import unicodedata


def plain(text: str) -> str:
    """``folded`` text with every run of white space one blank and none at the ends."""
    return " ".join(folded(text).split())


def folded(text: str) -> str:
    """Text without letter case and Unicode compatibility forms (NFKC)."""
    return unicodedata.normalize("NFKC", text).casefold()
