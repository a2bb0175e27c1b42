"""What a return in an Atari game is worth: between random play (0) and a human (1)."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

SCORES = Path(__file__).with_name("atari_scores.csv")
"""Random and human scores of the 26 games of Atari 100k, as all papers have them (Mnih et al. 2015, in Kaiser et al.,
arXiv 1903.00374)."""


@cache
def scores() -> dict[str, tuple[float, float]]:
    """game -> (random, human)"""
    with SCORES.open(encoding="utf-8", newline="") as file:
        return {row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}


def human_normalised(task: str, score: float) -> float | None:
    """(score - random) / (human - random) of "atari:GAME" or "atari100k:GAME"; None where nobody published both."""
    suite, _, game = task.partition(":")
    if suite not in ("atari", "atari100k") or game not in scores():
        return None
    random, human = scores()[game]
    return (score - random) / (human - random)
