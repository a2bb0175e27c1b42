"""Numbers as people read them, whatever the scale of a task's rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOISE = 1e-9
"""What is smaller than this share of the numbers beside it is an error of rounding, and shown as 0."""


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, or all before the point: 0.8125, 812.4, 48213, 1.25e-06, 4.84e+13."""
    if math.isfinite(value) and 10**digits <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:z.{digits}g}"


def mean_and_spread(mean: float, spread: float) -> str:
    """812.4 +- 35.1, and -3 +- 0 where the spread is an error of rounding."""
    return f"{number(mean)} +- {number(0.0 if spread < NOISE * abs(mean) else spread, 3)}"


def byte_size(size: float) -> str:
    """12.3 GB, or 4.2 MB where it is little."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def side_by_side(values: Sequence[float]) -> list[str]:
    """Numbers of one kind, to the same place: of three decimals below 10, of one from there on."""
    largest = max(map(abs, values))
    if largest == 0.0 or 0.01 <= largest < 1e7:
        return [f"{value:z.{1 if largest >= 10 else 3}f}" for value in values]
    return [number(0.0 if abs(value) < NOISE * largest else value) for value in values]
