"""The documents: no long lines, no dead links, and the modules and layers they name are those of the code."""

from __future__ import annotations

import random
import re
import textwrap
from pathlib import Path
from typing import Any

from pause_ray.evaluation.scorers import Score, grade
from tests.architecture.test_layers import LAYERS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in ("docs", "eval") for path in sorted((ROOT / folder).rglob("*.md")))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
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


def test_the_layers_of_the_architecture_are_those_that_are_held() -> None:
    [block] = re.findall(r"do not import each other\.\n\n((?:    .*\n)+)", ARCHITECTURE)
    assert [set(line.strip().split(" | ")) for line in block.splitlines()] == [layer for layer in LAYERS if layer != {"__main__"}]


def test_the_architecture_lists_every_module_once() -> None:
    listed: list[str] = []
    folders: dict[int, str] = {}
    block = ARCHITECTURE[ARCHITECTURE.index("```\npause_ray/\n") :].split("```")[1]
    for line in block.partition("\nsweeps/")[0].splitlines()[2:]:
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        above = "".join(folder for level, folder in sorted(folders.items()) if level < depth)
        if name.endswith("/"):
            folders = {level: folder for level, folder in folders.items() if level < depth} | {depth: name}
        else:
            listed.append(above + name)
    package = ROOT / "pause_ray"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert sorted(listed) == sorted(modules)


def test_every_module_that_a_document_names_is_there() -> None:
    roots = (ROOT, ROOT / "pause_ray", ROOT / "docs")
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in DOCUMENTS
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 40
    assert {(path, name) for path, name in named if not any((root / name).exists() for root in (*roots, (ROOT / path).parent))} == set()


def test_the_task_of_the_example_is_one() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(textwrap.dedent(code), "extending.md", "exec", dont_inherit=True), namespace)
    task = namespace["FestivalTask"](kind="festival")
    question = task.question(random.Random(0), replicate=0)
    [fact] = question.facts
    [year] = fact.references
    assert year in fact.text
    assert year not in question.question
    assert grade(f"It began in {year}.", question.facts, scorer="keywords") == Score(value=1.0, fact_scores=(1.0,))
