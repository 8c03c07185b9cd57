"""Numbers and lists as people read them."""

from __future__ import annotations

from collections.abc import Sequence

MINUS = "−"
MOST_LISTED = 12


def format_number(value: float | None) -> str:
    """Format a number with two decimals (``0.67``); None is a dash."""
    return "–" if value is None else f"{value:.2f}"


def format_signed(value: float | None) -> str:
    """Format a number with its sign (``+0.22``) and a real minus; None is a dash."""
    if value is None:
        return "–"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", MINUS)


def format_signed_percent(value: float | None) -> str:
    """Format a value that is in percent already, with its sign (``+10.6 %``); None is a dash."""
    return "–" if value is None else f"{value:+.1f} %".replace("-", MINUS)


def format_interval(low: float, high: float, *, digits: int = 2, signs: bool = False, unit: str = "") -> str:
    """Format an interval: ``0.44 to 0.89``, ``−0.12 to +0.31``, ``+1.2 to +4.0 %``."""
    shape = f"{'+' if signs else ''}.{digits}f"
    return f"{low:{shape}} to {high:{shape}}{unit}".replace("-", MINUS)


def format_p_value(p: float | None) -> str:
    """Format a p value: ``0.031``, ``< 0.001``; None is a dash."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_count(value: float) -> str:
    """Format a count with thousands separators (``12,345``)."""
    return f"{value:,.0f}"


def format_percent(value: float | None) -> str:
    """Format a share of 0 to 1 in percent (``67 %``); None is a dash."""
    return "–" if value is None else f"{100 * value:.0f} %"


def format_money(amount: float) -> str:
    """Format an amount of money: ``12.34``, or two significant digits below one."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def format_memory(number_of_bytes: float) -> str:
    """Format a number of bytes: ``1.4 GiB``, ``820 MiB``."""
    mebibytes = number_of_bytes / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def format_duration(seconds: float) -> str:
    """Format seconds: ``41 s``, ``12 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_title(name: str) -> str:
    """Format an identifier as a title: ``pauses_per_1k_tokens`` becomes ``Pauses per 1k tokens``."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def format_list(names: Sequence[str]) -> str:
    """Join names in a sentence (``a, b and c``); of many, the first ``MOST_LISTED`` and the number of the others."""
    if len(names) > MOST_LISTED:
        names = [*names[:MOST_LISTED], f"{len(names) - MOST_LISTED} more"]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def format_values(values: Sequence[str], unit: str) -> str:
    """Format all of a few values, or the first and last of many."""
    return f"{', '.join(values)} {unit}" if len(values) <= 5 else f"{values[0]} to {values[-1]} {unit} ({len(values)} values)"
