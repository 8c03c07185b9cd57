"""Numbers as people read them. Knows no arm and no file."""

from __future__ import annotations

from collections.abc import Sequence

MINUS = "−"


def number(value: float | None) -> str:
    """``0.67``, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    """``+0.22`` with a real minus sign, or a dash."""
    if value is None:
        return "–"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", MINUS)


def signed_percent(value: float | None) -> str:
    """``+10.6 %`` of a value in percent, or a dash."""
    return "–" if value is None else f"{value:+.1f} %".replace("-", MINUS)


def span(low: float, high: float, *, digits: int = 2, signs: bool = False, unit: str = "") -> str:
    """``0.44 to 0.89``, ``−0.12 to +0.31``, ``+1.2 to +4.0 %``."""
    shape = f"{'+' if signs else ''}.{digits}f"
    return f"{low:{shape}} to {high:{shape}}{unit}".replace("-", MINUS)


def p_value(p: float | None) -> str:
    """``0.031``, ``< 0.001``, or a dash."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def count(value: float) -> str:
    """``12,345``."""
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share of 0 to 1 as ``67 %``."""
    return "–" if value is None else f"{100 * value:.0f} %"


def money(amount: float) -> str:
    """``12.34``, two digits of what is less than one."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def memory(number_of_bytes: float) -> str:
    """``1.4 GiB``, ``820 MiB``."""
    mebibytes = number_of_bytes / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def duration(seconds: float) -> str:
    """``41 s``, ``12 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def title(name: str) -> str:
    """``pauses_per_1k_tokens`` → ``Pauses per 1k tokens``."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def named(names: Sequence[str], *, most: int = 12) -> str:
    """``a, b and c``; of many the first, and how many more."""
    return listed(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def value_range(values: Sequence[str], unit: str) -> str:
    """All of a few values, the ends of many."""
    return f"{', '.join(values)} {unit}" if len(values) <= 5 else f"{values[0]} to {values[-1]} {unit} ({len(values)} values)"
