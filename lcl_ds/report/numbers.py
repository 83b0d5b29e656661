"""Write numbers as people read them."""

import math
from datetime import datetime
from typing import Any

ABSENT = "-"
"""Stands where there is no number."""
MINUS, PERCENT = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}%"


def is_number(value: Any) -> bool:
    """Say whether something is a finite number; truth values are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: float) -> str:
    """Write a count: 12,345 up to a million, then 1.23 M."""
    if not is_number(value):
        return ABSENT
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def plural(count: int, noun: str) -> str:
    """Write a whole number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number(value: float | None) -> str:
    """Write a loss or another plain number with three decimals, a very small or large one by its size."""
    if value is None or not is_number(value):
        return ABSENT
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3f}".replace("-", MINUS)
    return count(value) if 1000 <= abs(value) < 1e15 else f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")


def percent(value: float | None) -> str:
    """Write a fraction in percent."""
    if value is None or not is_number(value):
        return ABSENT
    return f"{100 * value:.2f}{PERCENT}" if 0 < value < 0.01 else f"{100 * value:.1f}{PERCENT}"


def duration(seconds: float) -> str:
    """Write seconds in hours, minutes and seconds, at most two of them."""
    if not is_number(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def signed(text: str) -> str:
    """Write a change that Python wrote with ``+`` or ``-`` with the proper minus; nothing where it rounds to none."""
    return "" if not text.strip(f"+-0. points{PERCENT}") else text.replace("-", MINUS)


def when(text: Any) -> str:
    """Write a point in time that is in ISO format."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return ABSENT
    zone = moment.tzname() or ""
    return f"{moment.day} {moment:%B %Y, %H:%M} {zone}".strip()
