"""Writes docs/configuration.md from the pydantic models, so that the list of fields cannot differ from the code.

Usage: ``python docs/generate_configuration.py`` (``make docs``). Imports specs only, so it needs neither Ray nor torch.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pause_ray.evaluation.scorers import JudgeSpec
from pause_ray.evaluation.suite import SuiteSpec
from pause_ray.sweep.spec import SweepSpec
from pause_ray.trial.needs import GpuTable
from pause_ray.trial.spec import TrialSpec

TARGET = Path(__file__).with_name("configuration.md")
COLUMNS = 118
INTRODUCTION = """\
# Configuration

Every field of every YAML file: its path, type, default and meaning. This page is generated from the code by `make
docs`; edit the docstrings of the fields instead.

A hand-written file needs only the fields that differ from their defaults. An unknown field, a value of another type
or a bad combination is an error of one line before anything starts, which names file, field, value, rule and remedy.
On the command line `--set dotted.path=value` changes one value of any file. A path with `[]` is a field of each
entry of a list, one with `<name>` a field of each value of a mapping.
"""
ROOTS: dict[type[BaseModel], tuple[str, str]] = {
    SweepSpec: ("Sweep", "A file in `sweeps/`, for `pause-ray check`, `sweep`, `submit`, `plan`, `status` and `report`."),
    TrialSpec: ("Trial", "The field `trial` of a sweep, or a file of its own, for `pause-ray corpus` and `train`."),
    SuiteSpec: ("Suite", "The field `eval` of a trial, or a file in `eval/suites/`, for `pause-ray eval`."),
    JudgeSpec: ("Judge", "A file in `eval/judges/`, for `pause-ray rescore --judge`."),
    GpuTable: ("GPU table", "The file `cluster/gpus.yaml`: sizes and prices for `pause-ray plan` and `--dry-run`."),
}
"""Model of each kind of file → title and description of its section."""
PLURALS = {"text": "texts", "integer": "integers", "number": "numbers", "mapping": "mappings", "any value": "any values"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "at least {} long", "pattern": "matches `{}`"}


@dataclass
class Page:
    """The page while it is written."""

    lines: list[str] = field(default_factory=list)
    written: dict[type[BaseModel], str] = field(default_factory=dict)
    """Title of the section that describes a model."""

    def write_root(self, model: type[BaseModel]) -> None:
        """Append the section of one kind of file, with a part for each model in it."""
        title, description = ROOTS[model]
        self.lines += [f"## {title}", "", *wrapped(description), "", *wrapped(plain(inspect.getdoc(model) or "")), ""]
        self.written[model] = title
        self._write_fields(model, "")

    def _write_fields(self, model: type[BaseModel], path: str) -> None:
        fields = {f"{path}{info.alias or name}": info for name, info in model.model_fields.items()}
        if fields:
            self.lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
            self.lines += [
                f"| `{name}` | {type_of(info)} | {default_of(info)} | {meaning_of(name, info)} |" for name, info in fields.items()
            ]
            self.lines.append("")
        for name, info in fields.items():
            for inner, suffix in models_in(info.annotation):
                self._write_model(inner, f"{name}{suffix}")

    def _write_model(self, model: type[BaseModel], path: str) -> None:
        if model in ROOTS:
            title = ROOTS[model][0]
            self.lines += [f"The fields of `{path}` are those of [{title}](#{slug(title)}).", ""]
        elif model in self.written:
            title = self.written[model]
            self.lines += [f"The fields of `{path}` are those of [{title}](#{slug(title)}).", ""]
        else:
            title = f"`{path}`{variant(model)}"
            if title in self.written.values():
                raise ValueError(f"two models are called {title}; extend variant() so that they differ")
            self.written[model] = title
            self.lines += [f"### {title}", "", *wrapped(plain(inspect.getdoc(model) or "")), ""]
            self._write_fields(model, f"{path}.")


def variant(model: type[BaseModel]) -> str:
    """Return, for a heading, what tells a model from the others that the same field can hold: its ``kind``, or its first field."""
    kind = model.model_fields.get("kind")
    if kind is not None and len(typing.get_args(kind.annotation)) == 1:
        return f" (kind: {typing.get_args(kind.annotation)[0]})"
    if model.__name__.endswith("Domain"):
        return f" ({next(iter(model.model_fields))})"
    return ""


def models_in(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models that a field may hold, each with the path from the field to it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return
    suffix = "[]" if origin in (tuple, list) else ".<name>" if origin is dict else ""
    for argument in arguments:
        for model, rest in models_in(argument):
            yield model, f"{suffix}{rest}"


def type_of(info: FieldInfo) -> str:
    """Return a field's type and bounds in words."""
    bounds = [
        text.format(getattr(rule, name)) for rule in info.metadata for name, text in BOUNDS.items() if getattr(rule, name, None) is not None
    ]
    return ", ".join([described(info.annotation), *bounds]).replace("|", "\\|")


def described(annotation: Any) -> str:
    """Return a type in the words of YAML."""
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return described(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(argument) for argument in arguments))
    if origin in (tuple, list):
        inner = dict.fromkeys(described(argument) for argument in arguments if argument is not ...)
        return f"list of {' and '.join(PLURALS.get(words, words) for words in inner)}"
    if origin is dict:
        return f"mapping of {described(arguments[0])} to {described(arguments[1])}"
    raise TypeError(f"{annotation}: this page has no word for the type; add one in {Path(__file__).name}")


def default_of(info: FieldInfo) -> str:
    """Return a field's default as it is written in YAML."""
    if info.is_required():
        return "required"
    value = info.default if info.default is not PydanticUndefined else typing.cast(Any, info.default_factory)()
    if isinstance(value, BaseModel):
        changed = {name: getattr(value, name) for name in value.model_fields_set}
        return "the defaults of its fields" if not changed else f"`{json.dumps(value.model_dump(mode='json', exclude_unset=True))}`"
    text = json.dumps(value, ensure_ascii=False, default=list)
    return f"`{text}`".replace("|", "\\|")


def meaning_of(path: str, info: FieldInfo) -> str:
    """Return a field's docstring; the field that only names a variant needs none."""
    return cell(info.description) or ("Chooses this variant." if path.rpartition(".")[2] == "kind" else "")


def plain(text: str) -> str:
    """Return a docstring as Markdown: single backticks, one line for each paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.replace("``", "`")))


def cell(text: str | None) -> str:
    """Return a docstring as the content of one table cell."""
    return plain(text or "").replace("\n\n", " ").replace("|", "\\|")


def wrapped(text: str) -> list[str]:
    """Return the lines of Markdown paragraphs."""
    paragraphs = [textwrap.wrap(paragraph, COLUMNS, break_long_words=False, break_on_hyphens=False) for paragraph in text.split("\n\n")]
    return [line for number, lines in enumerate(paragraphs) for line in ([""] if number else []) + lines]


def slug(title: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-")


def render() -> str:
    """Return the whole page."""
    page = Page(lines=[*INTRODUCTION.splitlines(), ""])
    for model in ROOTS:
        page.write_root(model)
    return "\n".join(page.lines).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
