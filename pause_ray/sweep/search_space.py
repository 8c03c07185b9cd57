"""The search space of a sweep: domains of values, and constraints between the values of one trial. Pure.

A domain is recognised by its key: ``{grid: [...]}``, ``{choice: [...]}``, ``{uniform: [low, high]}``, ``{loguniform: [low, high]}``,
``{int: [low, high]}`` or ``{quantised: [low, high], step: x}``. Bounds belong to the domain.
"""

from __future__ import annotations

import abc
import difflib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec, digest

DRAWN_DIGITS = 6
"""Significant digits of a drawn number: what a label and a ledger can show, and finer than any result depends on."""
Whole = int
"""``int`` where a field has that name."""
Bounds = tuple[float, float]


class _Keyed(Spec):
    """A domain, told by its first field."""

    @property
    def key(self) -> str:
        """The name of that field."""
        return next(iter(type(self).model_fields))


class _Listed(_Keyed, abc.ABC):
    """A domain that lists its values."""

    @abc.abstractmethod
    def listed(self) -> Sequence[Any]:
        """All values, in the order in which they are written."""

    @property
    def size(self) -> int:
        """Number of values."""
        return len(self.listed())

    def draw(self, source: random.Random) -> Any:
        """One value; each is as likely as another."""
        return source.choice(self.listed())

    def ends(self) -> list[Any]:
        """The outermost values."""
        values = self.listed()
        return [values[0]] if len(values) == 1 else [values[0], values[-1]]

    def _check_values_differ(self) -> None:
        values = self.listed()
        if len({digest([value]) for value in values}) != len(values):
            raise ValueError(f"{self.key} names a value twice: {list(values)}")


class GridDomain(_Listed):
    """Every one of the listed values; where points are drawn, one of them."""

    grid: tuple[Any, ...] = Field(min_length=1)
    """Plain YAML values."""

    def listed(self) -> Sequence[Any]:
        """The values."""
        return self.grid

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        self._check_values_differ()
        return self


class ChoiceDomain(_Listed):
    """One of the listed values; algorithm grid refuses it, as it would be no choice."""

    choice: tuple[Any, ...] = Field(min_length=1)
    """Plain YAML values."""

    def listed(self) -> Sequence[Any]:
        """The values."""
        return self.choice

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        self._check_values_differ()
        return self


class UniformDomain(_Keyed):
    """A number between two bounds, anywhere as likely."""

    uniform: Bounds
    """Smallest and largest value."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range("uniform", self.uniform)
        return self

    def listed(self) -> None:
        """No list: there is no end of values."""

    @property
    def size(self) -> None:
        """No end of values."""

    def draw(self, source: random.Random) -> float:
        """One value."""
        return rounded(source.uniform(*self.uniform), self.uniform)

    def ends(self) -> list[Any]:
        """The bounds."""
        return list(self.uniform)


class LogUniformDomain(_Keyed):
    """A positive number between two bounds whose order of magnitude is anywhere as likely."""

    loguniform: Bounds
    """Smallest and largest value."""

    @model_validator(mode="after")
    def _is_a_range_above_zero(self) -> Self:
        _check_range("loguniform", self.loguniform)
        if self.loguniform[0] <= 0:
            raise ValueError(
                f"loguniform {list(self.loguniform)}: orders of magnitude begin above zero; raise the lower bound, or use uniform"
            )
        return self

    def listed(self) -> None:
        """No list: there is no end of values."""

    @property
    def size(self) -> None:
        """No end of values."""

    def draw(self, source: random.Random) -> float:
        """One value."""
        low, high = self.loguniform
        return rounded(math.exp(source.uniform(math.log(low), math.log(high))), self.loguniform)

    def ends(self) -> list[Any]:
        """The bounds."""
        return list(self.loguniform)


class IntDomain(_Keyed):
    """A whole number between two bounds, both included."""

    int: tuple[Whole, Whole]
    """Smallest and largest value."""
    step: Whole = Field(default=1, ge=1)
    """From one value to the next."""
    log: bool = False
    """Whether orders of magnitude are as likely as each other, instead of numbers."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        low, high = self.int
        _check_range("int", (low, high))
        if (high - low) % self.step:
            raise ValueError(f"int [{low}, {high}]: not a whole number of steps of {self.step} from {low} to {high}; change one of them")
        if self.log and low < 1:
            raise ValueError(f"int [{low}, {high}] with log: orders of magnitude begin at 1; raise the lower bound, or leave log out")
        if self.log and self.step != 1:
            raise ValueError(f"int with log and step {self.step}: steps are equal and orders of magnitude are not; leave one of them out")
        return self

    @property
    def size(self) -> Whole:
        """Number of values."""
        low, high = self.int
        return (high - low) // self.step + 1

    def listed(self) -> Sequence[Any]:
        """All values, ascending."""
        low, high = self.int
        return range(low, high + 1, self.step)

    def draw(self, source: random.Random) -> Any:
        """One value."""
        low, high = self.int
        if not self.log:
            return source.randrange(low, high + 1, self.step)
        drawn = math.exp(source.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(max(round(drawn), low), high)

    def ends(self) -> list[Any]:
        """The bounds."""
        return list(self.int)


class QuantisedDomain(_Listed):
    """A number between two bounds that is a whole number of steps above the lower one."""

    quantised: Bounds
    """Smallest and largest value, both included."""
    step: float = Field(gt=0)
    """From one value to the next. Where the lower bound and the step are whole numbers, so are all values."""

    @model_validator(mode="after")
    def _is_a_range_of_steps(self) -> Self:
        low, high = self.quantised
        _check_range("quantised", self.quantised)
        if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(self.step)):
            raise ValueError(
                f"quantised [{low:g}, {high:g}]: not a whole number of steps of {self.step:g} from {low:g} to {high:g}; change one of them"
            )
        return self

    def listed(self) -> Sequence[Any]:
        """All values, ascending; decimal sums, so that 0.1 + 2 × 0.1 is 0.3."""
        low, high, step = (Decimal(str(number)) for number in (*self.quantised, self.step))
        values = [low + place * step for place in range(int((high - low) / step) + 1)]
        whole = all(value == value.to_integral_value() for value in (low, step))
        return [int(value) if whole else float(value) for value in values]


_DOMAINS: Final = (GridDomain, ChoiceDomain, UniformDomain, LogUniformDomain, IntDomain, QuantisedDomain)
_KINDS = {next(iter(domain.model_fields)): domain for domain in _DOMAINS}
DOMAIN_FIELDS: Final = frozenset(field for domain in _DOMAINS for field in domain.model_fields)
"""Keys that a domain may have."""


def _kind_of(value: Any) -> str | None:
    """The tag of the domain that is meant: the one whose key is there, or nearly; None where no key is like any, or two are there."""
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


def rounded(value: float, bounds: Bounds) -> float:
    """A drawn number with ``DRAWN_DIGITS`` significant digits, still within its bounds."""
    low, high = bounds
    return min(max(float(f"{value:.{DRAWN_DIGITS}g}"), low), high)


def _check_range(kind: str, bounds: Bounds) -> None:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{kind} [{low}, {high}]: bounds must be finite numbers")
    if low >= high:
        raise ValueError(f"{kind} [{low:g}, {high:g}]: the first bound must be below the second; swap them, or write {{grid: [{low:g}]}}")


class _Absent:
    """Stands for a value that a trial does not have, as it has none of the branch that it would be in."""


ABSENT: Final = _Absent()


def value_at(data: JsonObject, path: str) -> Any:
    """The value at a dotted path of resolved data, or ``ABSENT``."""
    place: Any = data
    for name in path.split("."):
        if not isinstance(place, dict) or name not in place:
            return ABSENT
        place = place[name]
    return place


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
        """Dotted paths that it reads."""
        return (self.path, self.than) if isinstance(self.than, str) else (self.path,)

    @property
    def words(self) -> str:
        """For people: ``train.lora.alpha at_least 2 × train.lora.rank``."""
        times = "" if self.times == 1 else f"{self.times:g} × "
        than = self.than if isinstance(self.than, str) else f"{self.than:g}"
        return f"{self.path} {self.relation} {times}{than}"

    def holds(self, value_of: Callable[[str], Any]) -> bool | None:
        """Whether it holds in the trial with these values; None where the trial lacks one of them (``ABSENT``).

        Raises:
            SpecError: a comparison of something that is no number.
        """
        value = value_of(self.path)
        other = value_of(self.than) if isinstance(self.than, str) else self.than
        if value is ABSENT or other is ABSENT:
            return None
        if self.relation in ("at_least", "at_most") or self.times != 1:
            for path, its in zip(self.paths, (value, other), strict=False):
                if isinstance(its, bool) or not isinstance(its, int | float):
                    shown = json.dumps(its)
                    raise SpecError(f"constraints: {self.words}: {path} is {shown}, which is no number to compare; use equal or different")
            other = self.times * other
        if self.relation == "at_least":
            return bool(value >= other)
        if self.relation == "at_most":
            return bool(value <= other)
        return (value == other) is (self.relation == "equal")


MOST_DRAWS = 1000
"""In a row without a new valid point; then there is taken to be none."""
MOST_COUNTED = 1000
"""Points of a finite space that are tried one by one to know how many are valid."""
MOST_CORNERS = 64
Search = Mapping[str, Domain]
Allows = Callable[[JsonObject], bool]


def every_point(search: Search) -> Iterator[JsonObject]:
    """Every combination of the values of domains that all list them; the last path varies fastest."""
    lists = [listed for domain in search.values() if (listed := domain.listed()) is not None]
    return (dict(zip(search, values, strict=True)) for values in itertools.product(*lists))


def grid_points(search: Search, allows: Allows, *, origin: str) -> list[JsonObject]:
    """Every valid point.

    Raises:
        SpecError: there is none.
    """
    points = [point for point in every_point(search) if allows(point)]
    if not points:
        raise no_valid_point(origin)
    return points


def drawn_points(search: Search, allows: Allows, *, points: int, seed: int, origin: str) -> list[JsonObject]:
    """So many different valid points, drawn at random.

    Raises:
        SpecError: the space has fewer.
    """
    check_enough(search, allows, points=points, origin=origin)
    source = random.Random(digest(["points of a search", seed]))  # noqa: S311 (drawn points must be the same everywhere)
    found: dict[str, JsonObject] = {}
    draws_in_vain = 0
    while len(found) < points:
        point = {path: domain.draw(source) for path, domain in search.items()}
        key = digest(point)
        if key not in found and allows(point):
            found[key] = point
            draws_in_vain = 0
            continue
        draws_in_vain += 1
        if draws_in_vain == MOST_DRAWS:
            raise too_few(len(found), wanted=points, origin=origin) if found else no_valid_point(origin)
    return list(found.values())


def check_enough(search: Search, allows: Allows, *, points: int, origin: str) -> None:
    """Refuse more points than a small finite space has.

    Raises:
        SpecError: it has fewer, or none.
    """
    size = size_of(search)
    if size is None or size > MOST_COUNTED:
        return
    valid = sum(map(allows, every_point(search)))
    if not valid:
        raise no_valid_point(origin)
    if valid < points:
        raise too_few(valid, wanted=points, origin=origin)


def size_of(search: Search) -> int | None:
    """Points of the space, valid or not; None where there is no end of them."""
    sizes = [domain.size for domain in search.values()]
    return math.prod(size for size in sizes if size is not None) if None not in sizes else None


def corners(search: Search) -> list[JsonObject]:
    """Points at the outermost values: all of their combinations, or where these are many, those with one path at its other end."""
    ends = {path: domain.ends() for path, domain in search.items()}
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        return [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
    low, high = ({path: its[place] for path, its in ends.items()} for place in (0, -1))
    return [low, *(low | {path: high[path]} for path in ends), *(high | {path: low[path]} for path in ends), high]


def no_valid_point(origin: str) -> SpecError:
    """The error of a space that is empty."""
    return SpecError(f"{origin}: search: no point keeps the constraints; widen a domain or change a constraint")


def too_few(valid: int, *, wanted: int, origin: str) -> SpecError:
    """The error of a space that is too small."""
    return SpecError(
        f"{origin}: algorithm.points {wanted}: the search has {valid} valid points; lower points, or list values and use algorithm grid"
    )
