"""Published returns, from published.csv, that a comparison shows beside the runs."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

PUBLISHED = Path(__file__).with_name("published.csv")


class PublishedReturn(NamedTuple):
    """A return that a paper reports."""

    method: str
    task: str
    step: int
    value: float
    seeds: int
    episodes: str
    """training (sampled actions) or evaluation."""
    source: str


@cache
def published_returns() -> tuple[PublishedReturn, ...]:
    """All rows of published.csv."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return tuple(
            PublishedReturn(row["method"], row["task"], int(row["step"]), float(row["return"]), int(row["seeds"]),
                            row["episodes"], row["source"])
            for row in csv.DictReader(file)
        )  # fmt: skip


def published_near(task: str, step: int) -> list[PublishedReturn]:
    """The task's published returns, one of each method, best first: those at most a quarter of `step` away from it, or
    where there are none, those at the nearest step."""
    rows = sorted((row for row in published_returns() if row.task == task), key=lambda row: abs(row.step - step))
    near = [row for row in rows if abs(row.step - step) <= step / 4]
    near = near or [row for row in rows if row.step == rows[0].step]
    nearest = {row.method: row for row in reversed(near)}
    return sorted(nearest.values(), key=lambda row: -row.value)
