"""Parses docs/cluster/: its blocks of commands, their marks, and the words of every command."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from tests.cluster_files.autoscaler import ROOT

FOLDER = ROOT / "docs" / "cluster"
PAGES = {name: (FOLDER / name).read_text(encoding="utf-8") for name in ("local.md", "README.md", "aws.md", "gcp.md", "kuberay.md")}
"""Text of each page. The blocks that run here are run in this order, so the page that starts the cluster is the first."""
TEXT = "\n".join(PAGES.values())
RUN_HERE = ""
"""The mark of blocks for which one machine is enough."""
ELSEWHERE = {"cloud", "kubernetes"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of shell commands."""

    page: str
    section: str
    mark: str
    """The word after ``bash``."""
    text: str

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command, also of those behind a pipe and of those whose output is a variable's value."""
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
    """Return the blocks of all pages, in order."""
    found = []
    for page, content in PAGES.items():
        for section in re.split(r"^##? ", content, flags=re.MULTILINE)[1:]:
            title = section.partition("\n")[0]
            for indent, mark, text in re.findall(r"^( *)```bash ?(\w*)\n(.*?)^\1```$", section, flags=re.DOTALL | re.MULTILINE):
                text = textwrap.dedent(indent + text.removeprefix(indent)).strip()
                found.append(Block(page=page, section=title, mark=mark, text=text))
    return found
