"""Which environment seeds are used for what: one range per purpose, none overlaps another.

    purpose                                  seeds                            option that chooses in the range
    training                                 0 to 999,999,999                 --seed, hashed with the step
    final evaluation, evaluate.py policy     1,000,000,000 to 1,000,999,999   --eval.seed, --seed
    interim evaluation, chooses best.pt      1,001,000,000 to 1,001,999,999   --eval.seed
    evaluate.py model                        1,002,000,000 to 1,002,999,999   --seed
    evaluate.py collect                      1,003,000,000 to 1,003,999,999   --seed

So no agent or model is scored on episodes that it was trained on or chosen by.
"""

from __future__ import annotations

from typing import NamedTuple


class SeedRange(NamedTuple):
    """`size` seeds from `first` on, for one purpose."""

    first: int
    size: int

    def episodes(self, seed: int, count: int, option: str = "--seed") -> range:
        """Seeds of `count` episodes: number `seed` of this range, and those that follow.

        Raises ValueError, naming the option, where they do not lie in the range.
        """
        if not 0 <= seed <= self.size - count:
            raise ValueError(f"{option} must lie between 0 and {self.size - count:,} for {count} episodes, got {seed}")
        return range(self.first + seed, self.first + seed + count)


TRAINING = SeedRange(0, 1_000_000_000)
FINAL_EVALUATION = SeedRange(1_000_000_000, 1_000_000)
INTERIM_EVALUATION = SeedRange(1_001_000_000, 1_000_000)
MODEL_RECORDING = SeedRange(1_002_000_000, 1_000_000)
COLLECTION = SeedRange(1_003_000_000, 1_000_000)

PURPOSES = (TRAINING, FINAL_EVALUATION, INTERIM_EVALUATION, MODEL_RECORDING, COLLECTION)
