"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

import math
from itertools import pairwise

_UNITS = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def size_text(number: float) -> str:
    """Three digits and a unit: 8.03 B, 480 k; below a thousand a whole number."""
    for unit, size in _UNITS:
        if number >= 0.9995 * size:
            return f"{_three(number / size)} {unit}"
    return f"{number:.0f}"


def flops_text(number: float) -> str:
    """FLOPs: 37.5 GFLOPs."""
    return f"{size_text(number).replace('B', 'G')}FLOPs"


def duration_text(seconds: float) -> str:
    """3 d 4 h, 3 h 12 min, 12 min 5 s, 8.4 s."""
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    for (unit, size), (part, smaller) in pairwise(units.items()):
        if round(seconds) >= size:
            whole, rest = divmod(round(seconds / smaller), size // smaller)
            return f"{whole} {unit} {rest} {part}"
    return f"{_three(seconds)} s"


def plain(value: object) -> str:
    """Short enough for a table: nothing for None and NaN, four decimals or three digits."""
    if value is None or value != value:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 1000:
        return ("−" if value < 0 else "") + size_text(abs(value))
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}".replace("-", "−")


def interval_text(mean: float, low: float, high: float) -> str:
    """A mean with its interval, if there is one."""
    said, *ends = (f"{x:.4f}".replace("inf", "∞").replace("-", "−") for x in (mean, low, high))
    return said if math.isnan(low) else f"{said} [{ends[0]}, {ends[1]}]"


def _three(value: float) -> str:
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
