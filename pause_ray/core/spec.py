"""The base of all specs: frozen, keyword-only, no unknown key; and YAML, dotted paths and digests.

A hand-written file is sparse YAML; a machine-written one is fully resolved JSON. ``digest`` is the identity of
a spec: whatever is marked ``resources`` (where something runs) never enters it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pause_ray.core.errors import SpecError

DIGEST_CHARS = 16
OTHER_NAMES = {
    "rows": "num_sequences",
    "num_samples": "num_sequences",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "per_device_train_batch_size": "micro_batch_size",
    "train_batch_size": "micro_batch_size",
    "lr": "learning_rate",
    "r": "rank",
}
"""Names that other tools use, and what the field with this meaning is called here, where spelling does not tell."""
JsonObject = dict[str, Any]


class Spec(BaseModel):
    """The base class of all specs. Values are checked strictly: ``"16"`` is not a number and ``true`` is not 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, origin: str) -> Self:
        """Check ``data`` against this schema.

        Raises:
            SpecError: naming ``origin`` (a file or a command line), field, value and rule.
        """
        try:
            return cls.model_validate_json(json.dumps(data, allow_nan=False))
        except (TypeError, ValueError) as error:
            if isinstance(error, ValidationError):
                raise SpecError(_explain(error, cls, origin)) from error
            raise SpecError(f"{origin}: not plain YAML data ({error}); use only text, numbers, lists and mappings") from error

    def resolved(self) -> JsonObject:
        """Return every field with its value, as plain JSON data."""
        return self.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``2e-4`` is a number (YAML 1.1 reads it as text) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """Build a mapping, refusing a key that is written twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> JsonObject:
    """Read the mapping in a YAML or JSON file.

    Raises:
        SpecError: file missing, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({error}); give the path of a YAML file") from error
    data = parse_yaml(text, origin=str(path))
    if not isinstance(data, dict):
        raise SpecError(f"{path}: holds {type(data).__name__}, expected a mapping of fields to values")
    return data


def find_file(name: str, *, beside: Path) -> Path:
    """Return the file that ``name`` means when it is written in the file ``beside``.

    It is sought in that file's folder, then in each folder above it, then in the working directory.

    Raises:
        SpecError: none of these has it.
    """
    folders = [*beside.absolute().parents, Path.cwd()]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise SpecError(f"{beside}: names the file {name}, which is neither beside it, nor in a folder above it, nor in {Path.cwd()}")


def inline_files(data: JsonObject, fields: tuple[str, ...], *, origin: Path) -> JsonObject:
    """Return a copy of sparse ``data`` in which a text at one of ``fields`` is replaced by the content of the YAML file it names.

    Args:
        data: Sparse mapping.
        fields: Dotted paths, outer before inner; nested, or written as dotted keys.
        origin: The file that ``data`` came from.
    """
    result: JsonObject = json.loads(json.dumps(data))
    for path in fields:
        if isinstance(result.get(path), str):
            result[path] = read_yaml(find_file(result[path], beside=origin))
            continue
        *branches, leaf = path.split(".")
        place: Any = result
        for branch in branches:
            place = place.get(branch) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(leaf), str):
            place[leaf] = read_yaml(find_file(place[leaf], beside=origin))
    return result


def parse_yaml(text: str, *, origin: str) -> Any:
    """Parse any YAML value; a syntax error is a ``SpecError`` with its line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error


def digest(data: Spec | Mapping[str, Any] | list[Any] | str | bytes) -> str:
    """Return 16 hexadecimal characters that change exactly when ``data`` changes; the order of keys does not count."""
    if isinstance(data, Spec):
        data = data.resolved()
    if isinstance(data, str):
        data = data.encode()
    if not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return hashlib.sha256(data).hexdigest()[:DIGEST_CHARS]


def with_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> JsonObject:
    """Return a copy of sparse ``data`` with each dotted path set; ``None`` at a path replaces the whole branch by null."""
    result: JsonObject = json.loads(json.dumps(data))
    for path, value in overrides.items():
        place, key, rest = result, *_longest_key(result, path)
        while rest:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
            key, rest = _longest_key(place, rest)
        place[key] = value
    return result


def _longest_key(place: Mapping[str, Any], path: str) -> tuple[str, str]:
    """Return the first key of ``path`` and the rest of it; a key of ``place`` may itself be dotted, such as a searched path."""
    parts = path.split(".")
    known = (end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in place)
    end = next(known, 1)
    return ".".join(parts[:end]), ".".join(parts[end:])


def parse_assignments(assignments: list[str]) -> JsonObject:
    """Turn ``["train.max_steps=20"]`` into ``{"train.max_steps": 20}``; the right side is YAML.

    Raises:
        SpecError: an assignment without ``=``.
    """
    overrides: JsonObject = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path:
            raise SpecError(f"--set {assignment}: expected dotted.path=value, for example train.max_steps=20")
        overrides[path] = parse_yaml(value, origin=f"--set {assignment}")
    return overrides


def check_path(schema: type[Spec], path: str, *, origin: str) -> None:
    """Refuse a dotted path that ``schema`` does not have, with the nearest one that it has.

    Raises:
        SpecError: naming the path and the fields that exist at that level.
    """
    current: tuple[type[Spec], ...] = (schema,)
    walked: list[str] = []
    for name in path.split("."):
        if not current:
            raise SpecError(f"{origin}: {path}: {'.'.join(walked)} is a plain value and has no field {name!r}")
        fields = _fields(current)
        if name not in fields:
            where = ".".join(walked) or schema.__name__
            raise SpecError(f"{origin}: unknown path {path}: no field {name!r} in {where}{_nearest(name, list(fields), walked)}")
        current = fields[name]
        walked.append(name)


def _fields(specs: tuple[type[Spec], ...]) -> dict[str, tuple[type[Spec], ...]]:
    """Return the fields that one of ``specs`` has, each with the specs that it may hold."""
    found: dict[str, tuple[type[Spec], ...]] = {}
    for spec in specs:
        for name, field in spec.model_fields.items():
            written = field.alias or name
            found[written] = (*found.get(written, ()), *_inner_specs(field.annotation))
    return found


def _inner_specs(annotation: Any) -> tuple[type[Spec], ...]:
    """Return the spec classes inside ``Spec``, ``Spec | Other | None``, ``tuple[Spec, ...]`` or ``Annotated[Spec, …]``."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return (annotation,)
    return tuple(spec for argument in typing.get_args(annotation) for spec in _inner_specs(argument))


def _explain(error: ValidationError, schema: type[Spec], origin: str) -> str:
    """Return one line with every broken field: place, value, rule and, for a misspelt key, the nearest one."""
    lines = []
    for problem in error.errors(include_url=False):
        location, siblings = _located(schema, problem["loc"])
        place = ".".join(location) or schema.__name__
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown field{_nearest(location[-1], siblings)}")
        elif problem["type"] == "missing":
            lines.append(f"{place}: required, and missing")
        elif problem["type"] == "union_tag_not_found" and isinstance(problem["input"], dict):
            lines.append(f"{place}.{problem['ctx']['discriminator'].strip(chr(39))}: required, and missing")
        elif problem["type"] == "value_error":
            lines.append(f"{place}: {problem['ctx']['error']!s}")
        elif problem["type"] == "union_tag_invalid":
            lines.append(f"{place}.kind: {problem['ctx']['tag']!r} is none of {problem['ctx']['expected_tags']}")
        else:
            shown = json.dumps(problem["input"], default=str)
            lines.append(f"{place} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {problem['msg']}")
    return f"{origin}: " + "; ".join(lines)


def _located(schema: type[Spec], location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """Return a problem's dotted path without the tags that pydantic adds for unions, and the fields beside its last part."""
    current: tuple[type[Spec], ...] = (schema,)
    path, siblings = list[str](), list[str]()
    for part in location:
        if str(part).startswith("<"):  # a tag that a spec gives to a member of a union without ``kind``
            continue
        fields = _fields(current)
        tagged = tuple(spec for spec in current if _tag(spec) == part) if part not in fields else ()
        if tagged:
            current = tagged
            continue
        path.append(str(part))
        siblings = list(fields)
        current = fields.get(str(part), current)  # a part that is no field is a place in a list, or a key of a mapping
    return path, siblings


def _tag(spec: type[Spec]) -> str | None:
    """Return the ``kind`` by which pydantic recognises a member of a union."""
    kind = spec.model_fields.get("kind")
    return next(iter(typing.get_args(kind.annotation)), None) if kind else None


def _nearest(name: str, fields: list[str], path: Sequence[str] = ()) -> str:
    """Return the end of a message about an unknown field: the field that may be meant, or all that there are."""
    if not fields:
        return ""
    near = [OTHER_NAMES[name]] if OTHER_NAMES.get(name) in fields else difflib.get_close_matches(name, fields, n=1)
    return f"; did you mean {'.'.join([*path, near[0]])}?" if near else f"; fields there: {', '.join(fields)}"
