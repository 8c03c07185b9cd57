"""The proxy of a suite: a cheap stand-in for its cells, asked of adapters that are still being trained. Pure.

Keyed facts in the suite's own text, all in one context that is computed once, each asked for. Its score is none of the suite's: it
decides who is trained on, and is called a proxy's wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject
from pause_ray.evaluation.suite import SuiteSpec
from pause_ray.evaluation.tasks.keyed import MOST_FACTS

ANSWER_TOKENS = 24
"""A number of seven digits in a short sentence, where every digit is a token."""


def proxy_suite(suite: SuiteSpec, *, facts: int, context_tokens: Sequence[int]) -> SuiteSpec:
    """The proxy of a suite: ``facts`` keyed facts, evenly spaced in its text, at each of some lengths.

    Raises:
        SpecError: lengths that are none, too many facts, or a suite that hides its facts in lines that only its own task has.
    """
    if facts > MOST_FACTS:
        raise SpecError(f"scheduler.proxy.facts {facts} is more than the {MOST_FACTS} that one context can hold; lower it")
    if suite.task.has_filler:
        raise SpecError(
            f"scheduler: its proxy hides facts in documents or noise, and suite {suite.name} has only the lines of task {suite.task.kind}; "
            "use a suite with a haystack, or leave scheduler out"
        )
    changes: JsonObject = {
        "name": f"{suite.name}-proxy",
        "task": {"kind": "keyed"},
        "scorer": "keywords",
        "context_tokens": list(context_tokens),
        "depth_percent": {"from": 0, "to": 100, "count": facts},
        "lattice_tokens": None,
        "samples": None,
        "max_new_tokens": ANSWER_TOKENS,
    }
    return SuiteSpec.parse(suite.resolved() | changes, origin="scheduler.proxy")
