"""Human-normalised scores of Atari games: 0 is random play, 1 a human."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

SCORES = Path(__file__).with_name("atari_scores.csv")
"""Random and human scores of the 26 games of Atari 100k (Mnih et al. 2015, as printed in Kaiser et al.,
arXiv 1903.00374)."""


@cache
def scores() -> dict[str, tuple[float, float]]:
    """game -> (random, human)"""
    with SCORES.open(encoding="utf-8", newline="") as file:
        return {row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}


def human_normalised(task: str, score: float) -> float | None:
    """(score - random) / (human - random) of "atari:GAME" or "atari100k:GAME"; None for other tasks and games."""
    suite, _, game = task.partition(":")
    if suite not in ("atari", "atari100k") or game not in scores():
        return None
    random, human = scores()[game]
    return (score - random) / (human - random)
