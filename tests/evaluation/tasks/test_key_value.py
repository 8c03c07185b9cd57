"""Key-value pairs are the lines of a JSON object."""

from __future__ import annotations

import itertools
import json
import random
import uuid

from pause_ray.evaluation.tasks.keys_values import KeyValueTask

TASK = KeyValueTask(kind="key_value")


def test_lines_and_the_hidden_pair_make_a_json_object() -> None:
    question = TASK.question(random.Random(0), replicate=0)
    lines = list(itertools.islice(TASK.filler_lines(random.Random(1)), 75))
    lines.insert(40, question.facts[0].text)
    pairs: dict[str, str] = json.loads("{\n" + "\n".join(lines).removesuffix(",") + "\n}")
    assert len(pairs) == 76
    assert all(uuid.UUID(text).version == 4 for pair in pairs.items() for text in pair)
    asked = question.question.split('"')[1]
    assert pairs[asked] == question.references[0]


def test_the_answer_is_begun_inside_the_quotation_marks() -> None:
    question = TASK.question(random.Random(0), replicate=0)
    assert question.answer_prefix.endswith('is "')
    assert question.draft == f'{question.references[0]}"'
