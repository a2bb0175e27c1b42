"""How far predicted observations are from the recorded ones, in a unit that knows how much each of them varies.

Images make this large, so nothing here holds more than a few hundred of them as floating-point numbers at once.

Symbols: E episodes, T rows, W predictions, F features, P numbers of an observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.dataset import Episodes
from world_model import Senses

AT_ONCE = 512
"""Observations that are held as floating-point numbers at once."""


def truth_at(senses: Senses, episodes: Episodes, episode: Tensor, row: Tensor) -> Tensor:
    """(W,) places -> (W, P) what was observed there."""
    return senses.truth({name: value[episode, row] for name, value in episodes.obs.items()})


def guess_at(senses: Senses, feat: Tensor, samples: int) -> Tensor:
    """(W * samples, F) -> (W, P) the mean of what the samples say."""
    step = max(1, AT_ONCE // samples) * samples
    parts = [senses.guess(part).unflatten(0, (-1, samples)).mean(1) for part in feat.split(step)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Yardstick:
    """Mean and variance of recorded observations, (P,) each, and the entries that count."""

    mean: Tensor
    variance: Tensor
    counts: Tensor

    @classmethod
    def of(cls, senses: Senses, recorded: Sequence[Episodes]) -> Yardstick:
        """Of all rows of the episodes."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for episodes in recorded:
            for episode, length in enumerate(episodes.length.tolist()):
                for rows in torch.arange(length, device=episodes.reward.device).split(AT_ONCE):
                    seen = truth_at(senses, episodes, torch.full_like(rows, episode), rows).double()
                    count, total, squares = count + len(seen), seen.sum(0) + total, seen.square().sum(0) + squares
        mean = total / count
        variance = ((squares - count * mean.square()) / max(1, count - 1)).clamp(min=0.0).float()
        # An entry that hardly moves would decide the mean by its noise.
        return cls(mean.float(), variance, variance > 1e-3 * variance.max())

    def error(self, guess: Tensor, truth: Tensor) -> Tensor:
        """(..., P) -> (...): squared error over the variance, mean over the entries; 1 is as good as the mean."""
        return ((guess - truth).square()[..., self.counts] / self.variance[self.counts]).mean(-1)
