"""The search space of a sweep: domains of values, their points, and constraints between the values of one trial.

A domain is recognised by its key, for example ``{grid: [1, 2, 4]}`` or ``{quantised: [low, high], step: x}``; bounds belong to the domain.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec, digest

DRAWN_DIGITS = 6
"""Significant digits of a drawn number: as many as a label and a ledger can show, and more than any result depends on."""
Whole = int
"""``int`` where a field has that name."""
Bounds = tuple[float, float]


class _Keyed(Spec):
    """A domain whose first field holds its values or bounds."""

    @property
    def key(self) -> str:
        """The name of the first field."""
        return next(iter(type(self).model_fields))

    @model_validator(mode="after")
    def _is_valid(self) -> Self:
        self._check(*getattr(self, self.key))
        return self

    def _check(self, *values: Any) -> None:
        """Refuse bounds that are not a range."""
        low, high = values
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{self.key} [{low}, {high}]: bounds must be finite numbers")
        if low >= high:
            raise ValueError(
                f"{self.key} [{low:g}, {high:g}]: the first bound must be below the second; swap them, or write {{grid: [{low:g}]}}"
            )


class _Listed(_Keyed):
    """A domain that can list its values."""

    def listed(self) -> Sequence[Any]:
        """Return all values, in the order in which they are written or ascending."""
        values: Sequence[Any] = getattr(self, self.key)
        return values

    def draw(self, source: random.Random) -> Any:
        """Return a value; all are equally likely."""
        return source.choice(self.listed())

    def ends(self) -> list[Any]:
        """Return the outermost values."""
        values = self.listed()
        return [values[0]] if len(values) == 1 else [values[0], values[-1]]


class _Values(_Listed):
    def _check(self, *values: Any) -> None:
        if len({digest([value]) for value in values}) != len(values):
            raise ValueError(f"{self.key} names a value twice: {list(values)}")


class GridDomain(_Values):
    """Every one of the listed values; where points are drawn, one of them."""

    grid: tuple[Any, ...] = Field(min_length=1)
    """Plain YAML values."""


class ChoiceDomain(_Values):
    """One of the listed values; algorithm grid refuses it, as it would be no choice."""

    choice: tuple[Any, ...] = Field(min_length=1)
    """Plain YAML values."""


class _Interval(_Keyed):
    """All numbers between two bounds."""

    def listed(self) -> None:
        """Return None: the values cannot be listed."""

    def ends(self) -> list[Any]:
        """Return the bounds."""
        return list(getattr(self, self.key))

    def rounded(self, value: float) -> float:
        """Return a drawn number with ``DRAWN_DIGITS`` significant digits, still within the bounds."""
        low, high = getattr(self, self.key)
        return float(min(max(float(f"{value:.{DRAWN_DIGITS}g}"), low), high))


class UniformDomain(_Interval):
    """A number between two bounds, anywhere as likely."""

    uniform: Bounds
    """Smallest and largest value."""

    def draw(self, source: random.Random) -> float:
        """Return a value."""
        return self.rounded(source.uniform(*self.uniform))


class LogUniformDomain(_Interval):
    """A positive number between two bounds whose order of magnitude is anywhere as likely."""

    loguniform: Bounds
    """Smallest and largest value."""

    def _check(self, *values: Any) -> None:
        super()._check(*values)
        if values[0] <= 0:
            raise ValueError(f"loguniform {list(values)}: orders of magnitude begin above zero; raise the lower bound, or use uniform")

    def draw(self, source: random.Random) -> float:
        """Return a value."""
        low, high = self.loguniform
        return self.rounded(math.exp(source.uniform(math.log(low), math.log(high))))


class IntDomain(_Listed):
    """A whole number between two bounds, both included."""

    int: tuple[Whole, Whole]
    """Smallest and largest value."""
    step: Whole = Field(default=1, ge=1)
    """From one value to the next."""
    log: bool = False
    """Whether orders of magnitude are as likely as each other, instead of numbers."""

    def _check(self, *values: Any) -> None:
        super()._check(*values)
        low, high = values
        if (high - low) % self.step:
            raise ValueError(f"int [{low}, {high}]: not a whole number of steps of {self.step} from {low} to {high}; change one of them")
        if self.log and low < 1:
            raise ValueError(f"int [{low}, {high}] with log: orders of magnitude begin at 1; raise the lower bound, or leave log out")
        if self.log and self.step != 1:
            raise ValueError(f"int with log and step {self.step}: steps are equal and orders of magnitude are not; leave one of them out")

    def listed(self) -> Sequence[Any]:
        """Return all values, ascending."""
        low, high = self.int
        return range(low, high + 1, self.step)

    def draw(self, source: random.Random) -> Any:
        """Return a value."""
        if not self.log:
            return super().draw(source)
        low, high = self.int
        drawn = math.exp(source.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(max(round(drawn), low), high)


class QuantisedDomain(_Listed):
    """A number between two bounds that is a whole number of steps above the lower one."""

    quantised: Bounds
    """Smallest and largest value, both included."""
    step: float = Field(gt=0)
    """From one value to the next. Where the lower bound and the step are whole numbers, so are all values."""

    def _check(self, *values: Any) -> None:
        super()._check(*values)
        low, high = values
        if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(self.step)):
            raise ValueError(
                f"quantised [{low:g}, {high:g}]: not a whole number of steps of {self.step:g} from {low:g} to {high:g}; change one of them"
            )

    def listed(self) -> Sequence[Any]:
        """Return all values, ascending; they are decimal sums, so that 0.1 + 2 × 0.1 is 0.3."""
        low, high, step = (Decimal(str(number)) for number in (*self.quantised, self.step))
        values = [low + number * step for number in range(int((high - low) / step) + 1)]
        whole = all(value == value.to_integral_value() for value in (low, step))
        return [int(value) if whole else float(value) for value in values]


_DOMAINS: Final = (GridDomain, ChoiceDomain, UniformDomain, LogUniformDomain, IntDomain, QuantisedDomain)
_KINDS = {next(iter(domain.model_fields)): domain for domain in _DOMAINS}
DOMAIN_FIELDS: Final = frozenset(field for domain in _DOMAINS for field in domain.model_fields)
"""Keys that a domain may have."""


def _kind_of(value: Any) -> str | None:
    """Return the tag of the domain whose key the mapping has, exactly or nearly; None if it has none or two."""
    if isinstance(value, _DOMAINS):
        return f"<{value.key}>"
    if not isinstance(value, dict):
        return None
    known = [kind for kind in _KINDS if kind in value]
    near = (match for key in value for match in difflib.get_close_matches(str(key), _KINDS, n=1))
    meant = known or list(itertools.islice(near, 1))
    return f"<{meant[0]}>" if len(meant) == 1 else None


Domain = Annotated[
    Annotated[GridDomain, Tag("<grid>")]
    | Annotated[ChoiceDomain, Tag("<choice>")]
    | Annotated[UniformDomain, Tag("<uniform>")]
    | Annotated[LogUniformDomain, Tag("<loguniform>")]
    | Annotated[IntDomain, Tag("<int>")]
    | Annotated[QuantisedDomain, Tag("<quantised>")],
    Discriminator(
        _kind_of,
        custom_error_type="domain",
        custom_error_message=f"a domain of values is a mapping with just one of {', '.join(_KINDS)}; for example {{grid: [1, 2, 4]}}",
    ),
]
"""Values that a search may choose."""


ABSENT: Final[Any] = object()
"""Stands for a value that a trial lacks because it lacks the branch above it."""


def value_at(data: JsonObject, path: str) -> Any:
    """Return the value at a dotted path of resolved data, or ``ABSENT``."""
    value: Any = data
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return ABSENT
        value = value[name]
    return value


class Constraint(Spec):
    """A rule between two values of a trial, or between a value and a number; the values need not be searched.

    It does not apply to a trial that lacks one of the values, such as ``train.lora.alpha`` where nothing is trained.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    path: str
    """Dotted path of the trial."""
    relation: Literal["at_least", "at_most", "equal", "different"] = Field(alias="is")
    """In YAML ``is``: how the value at ``path`` stands to ``times`` × ``than``."""
    than: Annotated[
        Annotated[float, Tag("<number>")] | Annotated[str, Tag("<path>")],
        Discriminator(lambda value: "<path>" if isinstance(value, str) else "<number>"),
    ]
    """Another dotted path of the trial, or a number."""
    times: float = 1.0
    """By which ``than`` is multiplied; other than 1 only where both values are numbers."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The dotted paths of the values that are compared."""
        return (self.path, self.than) if isinstance(self.than, str) else (self.path,)

    @property
    def rule(self) -> str:
        """The rule as text: ``train.lora.alpha at_least 2 × train.lora.rank``."""
        times = "" if self.times == 1 else f"{self.times:g} × "
        than = self.than if isinstance(self.than, str) else f"{self.than:g}"
        return f"{self.path} {self.relation} {times}{than}"

    def holds(self, trial: JsonObject) -> bool | None:
        """Return whether the rule holds in a trial's resolved data; None if the trial lacks one of the values.

        Raises:
            SpecError: one of the values to be compared is not a number.
        """
        value = value_at(trial, self.path)
        other = value_at(trial, self.than) if isinstance(self.than, str) else self.than
        if value is ABSENT or other is ABSENT:
            return None
        if self.relation in ("at_least", "at_most") or self.times != 1:
            for path, number in zip(self.paths, (value, other), strict=False):
                if isinstance(number, bool) or not isinstance(number, int | float):
                    shown = json.dumps(number)
                    raise SpecError(f"constraints: {self.rule}: {path} is {shown}, which is no number to compare; use equal or different")
            other = self.times * other
        if self.relation == "at_least":
            return bool(value >= other)
        if self.relation == "at_most":
            return bool(value <= other)
        return (value == other) is (self.relation == "equal")


MOST_DRAWS = 1000
"""Draws in a row without a new valid point, after which there is taken to be none."""
MOST_COUNTED = 1000
"""Points of a finite space that are tried one by one to know how many are valid."""
MOST_CORNERS = 64
Search = Mapping[str, Domain]
Allows = Callable[[JsonObject], bool]


def grid_points(search: Search, allows: Allows, *, origin: str) -> list[JsonObject]:
    """Return every valid combination of the values of domains that all list them; the last path varies fastest.

    Raises:
        SpecError: there is none.
    """
    lists = [domain.listed() or () for domain in search.values()]
    points = (dict(zip(search, values, strict=True)) for values in itertools.product(*lists))
    valid = [point for point in points if allows(point)]
    _check_number(len(valid), wanted=1, origin=origin)
    return valid


def drawn_points(search: Search, allows: Allows, *, points: int, seed: int, origin: str) -> list[JsonObject]:
    """Return as many different valid points as are wanted, drawn at random.

    Raises:
        SpecError: the space has fewer.
    """
    lists = [domain.listed() for domain in search.values()]
    if None not in lists and math.prod(len(listed) for listed in lists if listed is not None) <= MOST_COUNTED:
        _check_number(len(grid_points(search, allows, origin=origin)), wanted=points, origin=origin)
    source = random.Random(digest(["points of a search", seed]))  # noqa: S311 (drawn points must be the same everywhere)
    found: dict[str, JsonObject] = {}
    draws_in_vain = 0
    while len(found) < points and draws_in_vain < MOST_DRAWS:
        point = {path: domain.draw(source) for path, domain in search.items()}
        key = digest(point)
        draws_in_vain += 1
        if key not in found and allows(point):
            found[key] = point
            draws_in_vain = 0
    _check_number(len(found), wanted=points, origin=origin)
    return list(found.values())


def _check_number(valid: int, *, wanted: int, origin: str) -> None:
    if not valid:
        raise SpecError(f"{origin}: search: no point keeps the constraints; widen a domain or change a constraint")
    if valid < wanted:
        raise SpecError(
            f"{origin}: algorithm.points {wanted}: the search has {valid} valid points; lower points, or list values and use algorithm grid"
        )


def corners(search: Search) -> list[JsonObject]:
    """Return all combinations of the outermost values, or if these are many, those with at most one path at its other end."""
    ends = {path: domain.ends() for path, domain in search.items()}
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        return [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
    low, high = ({path: values[index] for path, values in ends.items()} for index in (0, -1))
    return [low, *(low | {path: high[path]} for path in ends), *(high | {path: low[path]} for path in ends), high]
