"""docs/configuration.md is what the specs of today say, and has every field."""

from __future__ import annotations

import re

from docs import generate_configuration
from pause_ray.core.spec import Spec


def test_the_committed_page_is_current() -> None:
    assert generate_configuration.TARGET.read_text(encoding="utf-8") == generate_configuration.render(), "run make docs"


def test_every_field_of_every_spec_that_a_file_can_hold_is_described() -> None:
    text = generate_configuration.TARGET.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.<>\[\]]+)` \| (.*) \| (.*) \| (.*) \|$", text, flags=re.MULTILINE)
    described = {path.rpartition(".")[2] for path, *_ in rows}
    specs = [spec for spec in subclasses(Spec) if not spec.__name__.startswith("_")]
    assert len(specs) > 30
    fields = {info.alias or name for spec in specs for name, info in spec.model_fields.items()}
    assert fields - described == set()
    assert {name for name in described if name not in fields} == set()


def test_every_field_has_a_meaning() -> None:
    text = generate_configuration.TARGET.read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w.<>\[\]]+)` \| .* \|  \|$", text, flags=re.MULTILINE) == []


def test_every_link_leads_to_a_heading() -> None:
    text = generate_configuration.TARGET.read_text(encoding="utf-8")
    headings = [generate_configuration.slug(title) for title in re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)]
    assert len(headings) == len(set(headings))
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= set(headings)


def subclasses(spec: type[Spec]) -> set[type[Spec]]:
    return {spec for child in spec.__subclasses__() for spec in ({child} | subclasses(child))}
