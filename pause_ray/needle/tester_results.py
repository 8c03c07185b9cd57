"""Result files of the original needle-in-a-haystack tester (github.com/gkamradt/needle-in-a-haystack), read one by one.

Version 0.1 leaves a folder with one JSON object per cell: ``model context_length depth_percent version needle model_response
score test_duration_seconds test_timestamp_utc``, its score a judge's grade from 1 to 10. Version 2 leaves a JSONL file with
``schema_version`` 2, where scores are 0 to 1, and a recipe says what was hidden at which token. Knows nothing of arms,
replicates or ledgers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_ray.errors import SourceError
from pause_ray.needle.ledger import UNKNOWN_TOKEN, FactResult

log = logging.getLogger("pause_ray")

_SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class TesterResult:
    """One cell as the tester left it. What its file does not tell is empty, 0 or ``UNKNOWN_TOKEN``."""

    origin: str
    """File, and line in a JSONL file."""
    version: int | None
    """Which run it belongs to, from 1; only 0.1 tells."""
    seed: int | None
    """Of what was hidden; only 2 tells."""
    task: str
    model: str
    context_tokens: int
    depth_percent: float
    facts: tuple[FactResult, ...]
    question: str
    references: tuple[str, ...]
    labels: tuple[str, ...]
    """Of a chain, what leads to its end, without the beginning that the question names; only 2 tells."""
    response: str | None
    score: float | None
    """0 to 1."""
    rubric: int | None
    """1 to 10."""
    unscored_reason: str | None
    scorer: str
    content_tokens: int
    needle_token: int
    prefilled_tokens: int
    decoded_tokens: int
    seconds: float
    cost: float | None
    timestamp: str


def read_tester_results(source: Path) -> list[TesterResult]:
    """All results of a folder, or of a ``.json`` or ``.jsonl`` file, in the order of their names.

    Raises:
        SourceError: nothing there, not JSON, or a field that is missing or no such value; names file and field.
    """
    if source.is_file():
        return _read_lines(source) if source.suffix == ".jsonl" else [_version_1(_parse(_text(source), str(source)), str(source))]
    if not source.is_dir():
        raise SourceError(f"{source}: no such file or folder; give a folder of the tester's result files, or its .jsonl file")
    files = _result_files(source) or _result_files(source / "results")
    if not files:
        below = sorted({str(path.parent.relative_to(source)) for path in source.rglob("*.json*") if not path.name.startswith(".")})
        there = f"give the folders in it that do: {', '.join(below[:5])}" if below else "nor has any folder in it"
        raise SourceError(f"{source}: has no result files (*.json or *.jsonl); {there}")
    return [result for file in files for result in read_tester_results(file)]


def _result_files(folder: Path) -> list[Path]:
    """Those of one version: JSONL files where there are any."""
    for ending in (".jsonl", ".json"):
        if found := sorted(path for path in folder.glob(f"*{ending}") if path.is_file() and not path.name.startswith(".")):
            return found
    return []


def _read_lines(path: Path) -> list[TesterResult]:
    *lines, last = _text(path).split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if last.strip():
        try:
            json.loads(last)
            numbered.append((len(lines) + 1, last))
        except ValueError:
            log.warning("%s: the last line was not written to its end; its cell is left out", path)
    if not numbered:
        raise SourceError(f"{path}: has no results")
    return [_version_2(_parse(line, origin), origin) for number, line in numbered for origin in (f"{path} line {number}",)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 text, so no result file ({error.reason} at byte {error.start})") from error


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise SourceError(f"{origin}: is not JSON ({error}); remove it, or mend it") from error
    if not isinstance(data, dict):
        raise SourceError(f"{origin}: holds a JSON {type(data).__name__}, where a result is one object with fields such as model and score")
    return data


def _version_1(data: Mapping[str, Any], origin: str) -> TesterResult:
    fields = _Fields(data, origin)
    needle = data.get("needle") or ""
    texts = [text for text in (needle if isinstance(needle, list) else [needle]) if isinstance(text, str) and text.strip()]
    depth = fields.depth("depth_percent")
    answer = fields.anything("model_response")
    response = answer.get("text") if isinstance(answer, dict) else answer
    if response is not None and not isinstance(response, str):
        raise SourceError(f"{origin}: field model_response is {answer!r}, which is neither a text nor an object with a text")
    grade, reason = _grade(data.get("score"), response)
    length = fields.whole("context_length", least=1)
    return TesterResult(
        origin=origin,
        version=fields.whole("version", default=1, least=1),
        seed=None,
        task="needlehaystack",
        model=fields.text("model"),
        context_tokens=length,
        depth_percent=depth,
        facts=tuple(FactResult(text=text.strip(), references=(), depth_percent=depth, token=UNKNOWN_TOKEN, score=None) for text in texts),
        question=fields.text("question", default=""),
        references=(),
        labels=(),
        response=response,
        score=None if grade is None else (grade - 1) / 9,
        rubric=grade,
        unscored_reason=reason,
        scorer="judge (imported)",
        content_tokens=length,
        needle_token=UNKNOWN_TOKEN,
        prefilled_tokens=0,
        decoded_tokens=0,
        seconds=fields.number("test_duration_seconds", default=0.0),
        cost=None,
        timestamp=fields.text("test_timestamp_utc", default=""),
    )


def _grade(score: object, response: str | None) -> tuple[int | None, str | None]:
    """A judge's grade of 1 to 10, or why there is none."""
    if response is None:
        return None, "imported: the file has no answer"
    if score is None:
        return None, "imported: the file has no score"
    if isinstance(score, bool) or not isinstance(score, int | float) or score not in range(1, 11):
        return None, f"imported: score {score!r} is no grade of 1 to 10"
    return int(score), None


def _version_2(data: Mapping[str, Any], origin: str) -> TesterResult:
    fields = _Fields(data, origin)
    if data.get("schema_version") != _SCHEMA:
        raise SourceError(f"{origin}: field schema_version is {data.get('schema_version')!r}; only {_SCHEMA} is known")
    recipe, metadata, usage = (_Fields(fields.part(name), origin) for name in ("recipe", "needle_metadata", "usage"))
    expected = fields.text("expected_answer")
    references = metadata.texts("expected_fragments") or ((expected,) if expected else ())
    response = None if data.get("response") is None else fields.text("response")
    facts = _placed_facts(recipe.data.get("needle_placements") or [], references, response, origin)
    found = _Fields(fields.part("score"), origin)
    score = None if response is None or not found.data else found.number("value", least=0, most=1)
    length = fields.whole("context_length", least=1)
    return TesterResult(
        origin=origin,
        version=None,
        seed=fields.whole("seed", default=0),
        task=f"needlehaystack_{fields.text('task_type')}",
        model=fields.text("model_id"),
        context_tokens=length,
        depth_percent=fields.depth("target_depth_percent"),
        facts=facts,
        question=fields.text("prompt_question", default=""),
        references=references,
        labels=metadata.texts("chain")[1:],
        response=response if score is not None else None,
        score=score,
        rubric=None if score is None else int(1.5 + 9 * score),
        unscored_reason=None if score is not None else f"imported: {data.get('error') or 'the row has no score'}",
        scorer=f"{'chain_match' if 'hops_correct' in (found.data.get('details') or {}) else 'exact_match'} (imported)",
        content_tokens=recipe.whole("final_context_token_count", default=length),
        needle_token=facts[0].token if facts else UNKNOWN_TOKEN,
        prefilled_tokens=usage.whole("input_tokens", default=0),
        decoded_tokens=usage.whole("output_tokens", default=0),
        seconds=fields.number("duration_seconds", default=0.0),
        cost=None if data.get("cost_usd") is None else fields.number("cost_usd"),
        timestamp=fields.text("timestamp_utc", default=""),
    )


def _placed_facts(placements: Sequence[Any], references: Sequence[str], response: str | None, origin: str) -> tuple[FactResult, ...]:
    """What was hidden, each with those references that it holds and the share of them in the answer, letter case aside."""
    facts = []
    for placement in placements:
        fields = _Fields(placement if isinstance(placement, dict) else {}, origin)
        text = fields.text("text")
        own = tuple(reference for reference in references if reference.strip().lower() in text.lower())
        found = [reference.strip().lower() in (response or "").lower() for reference in own]
        facts.append(
            FactResult(
                text=text,
                references=own,
                depth_percent=fields.depth("actual_depth_percent"),
                token=fields.whole("insertion_token_index"),
                score=sum(found) / len(found) if found and response is not None else None,
            )
        )
    return tuple(facts)


class _Fields:
    """Fields of one object, read with a message that names file, field and rule."""

    def __init__(self, data: Mapping[str, Any], origin: str) -> None:
        self.data, self._origin = data, origin

    def anything(self, name: str) -> Any:
        """The field as it is; it must be there."""
        if name not in self.data:
            known = ", ".join(sorted(self.data)) or "no field at all"
            raise SourceError(f"{self._origin}: field {name} is missing (it has {known}); remove the file if it is no result of the tester")
        return self.data[name]

    def part(self, name: str) -> Mapping[str, Any]:
        """An object; empty where it is null."""
        return self._checked(name, dict, "an object") if self.data.get(name) is not None else {}

    def text(self, name: str, *, default: str | None = None) -> str:
        return default if default is not None and self.data.get(name) is None else str(self._checked(name, str, "a text"))

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._checked(name, list, "a list of texts") if self.data.get(name) is not None else []
        if not all(isinstance(value, str) for value in values):
            raise SourceError(f"{self._origin}: field {name} is {values!r}, but must be a list of texts")
        return tuple(values)

    def whole(self, name: str, *, default: int | None = None, least: int | None = None) -> int:
        value = default if default is not None and self.data.get(name) is None else self._checked(name, int, "a whole number")
        if least is not None and value < least:
            raise SourceError(f"{self._origin}: field {name} is {value}, but must be at least {least}")
        return int(value)

    def number(self, name: str, *, default: float | None = None, least: float = 0.0, most: float = math.inf) -> float:
        value = default if default is not None and self.data.get(name) is None else self._checked(name, int | float, "a number")
        if not least <= value <= most or not math.isfinite(value):
            raise SourceError(f"{self._origin}: field {name} is {value}, but must be {least:g} to {most:g}")
        return float(value)

    def depth(self, name: str) -> float:
        """Percent of the context."""
        return self.number(name, most=100)

    def _checked(self, name: str, kind: Any, wording: str) -> Any:
        value = self.anything(name)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise SourceError(f"{self._origin}: field {name} is {value!r}, but must be {wording}")
        return value
