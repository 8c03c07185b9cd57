"""docs/cluster.md taken apart: its blocks of commands, their marks, and the words of every command."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from tests.cluster_files.autoscaler import ROOT

TEXT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
RUN_HERE = ""
"""The mark of blocks that one machine is enough for."""
ELSEWHERE = {"cloud", "kubernetes"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of shell commands."""

    section: str
    mark: str
    """The word behind ``bash``."""
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each command, those behind a pipe and those whose output is a variable's value included."""
        for line in self.text.replace("\\\n", " ").splitlines():
            line = re.sub(r"^export \w+=\$\((.*)\)$", r"\1", line)
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "|"]:
                if word != "|":
                    words.append(word)
                    continue
                yield words
                words = []


def blocks() -> list[Block]:
    """All of the document, in order."""
    found = []
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for indent, mark, text in re.findall(r"^( *)```bash ?(\w*)\n(.*?)^\1```$", section, flags=re.DOTALL | re.MULTILINE):
            found.append(Block(section=title, mark=mark, text=textwrap.dedent(indent + text.removeprefix(indent)).strip()))
    return found
