"""Ranges of settings: a value that cannot be is refused where it is given, and not by an error far from there."""

from __future__ import annotations

import math
from typing import Any

AT_LEAST_ONE = (1.0, math.inf)
AT_LEAST_FOUR = (4.0, math.inf)
ABOVE_ZERO = (math.nextafter(0.0, 1.0), math.inf)
NOT_NEGATIVE = (0.0, math.inf)
LARGEST = 3e38  # of float32
SOME_SHARE = (ABOVE_ZERO[0], 1.0)


def require(settings: Any, prefix: str = "", **ranges: tuple[float, float]) -> None:
    """Raise ValueError unless each named field is None or a number in its range, both ends included, and no larger than
    the networks' numbers can be."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is None or low <= value <= min(high, LARGEST):
            continue
        high = min(high, LARGEST) if value > LARGEST and math.isfinite(value) else high
        if low == ABOVE_ZERO[0]:
            words = "above 0" if high == math.inf else f"above 0 and at most {high:g}"
        elif high == math.inf:
            words = "0 or more" if low == 0 else f"at least {low:g}"
        else:
            words = f"between {low:g} and {high:g}"
        raise ValueError(f"{prefix}{name.replace('_', '-') if prefix else name} must be {words}, got {value}")
