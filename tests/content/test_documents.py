"""The documents: no long lines, no dead links, and code that the text names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in ("docs", "eval") for path in sorted((ROOT / folder).rglob("*.md")))]
COLUMNS = 120


def test_no_line_is_longer_than_a_screen() -> None:
    """Tables, images and indented code are excepted."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in DOCUMENTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > COLUMNS and not line.startswith(("|", "!", "    "))
    ]
    assert long == []


def test_every_link_to_a_file_leads_to_one() -> None:
    dead = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in DOCUMENTS
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", path.read_text(encoding="utf-8"))
        if not (path.parent / link).exists()
    ]
    assert dead == []
