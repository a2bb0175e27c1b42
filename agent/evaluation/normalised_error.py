"""How far predicted observations are from the recorded ones, in a unit that knows how much each of them varies.

Images make this large, so nothing here holds more than a few hundred of them as floating-point numbers at once.

Symbols: E episodes, T rows, W predictions, F features, P numbers of an observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.data.dataset import Episodes
from world_model import ObservationModel

AT_ONCE = 512
"""Observations that are held as floating-point numbers at once."""


def truth_at(observation_model: ObservationModel, episodes: Episodes, episode: Tensor, row: Tensor) -> Tensor:
    """(W,) places -> (W, P) what was observed there."""
    return observation_model.targets({name: value[episode, row] for name, value in episodes.obs.items()})


@dataclass(frozen=True)
class Yardstick:
    """Mean and variance of recorded observations, (P,) each, and the entries that count."""

    mean: Tensor
    variance: Tensor
    counts: Tensor

    @classmethod
    def of(cls, observation_model: ObservationModel, recorded: Sequence[Episodes]) -> Yardstick:
        """Of all rows of the episodes."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for episodes in recorded:
            for episode, length in enumerate(episodes.length.tolist()):
                for rows in torch.arange(length, device=episodes.reward.device).split(AT_ONCE):
                    seen = truth_at(observation_model, episodes, torch.full_like(rows, episode), rows).double()
                    count, total, squares = count + len(seen), seen.sum(0) + total, seen.square().sum(0) + squares
        mean = total / count
        variance = ((squares - count * mean.square()) / max(1, count - 1)).clamp(min=0.0).float()
        # An entry that hardly moves would decide the mean by its noise.
        return cls(mean.float(), variance, variance > 1e-3 * variance.max())

    def judge(
        self, observation_model: ObservationModel, feat: Tensor, samples: int, truth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `samples` dreams each say about W places, (W * samples, F), against the truth (W, P).

        -> the `error` of their mean (W,), and their energy score (W,): E|x - y| - E|x - x'| / 2 over dreams x, x' and
        the truth y, in standard deviations per number (Gneiting and Raftery 2007). The mean alone may be nearer to the
        truth where dreams are more uncertain than they should be; the score is best for dreams as likely as the truth.
        """
        parts, step = [], max(1, AT_ONCE // samples)
        scale = self.variance[self.counts].sqrt()
        for dreams, real in zip(feat.split(step * samples), truth.split(step), strict=True):
            guess = observation_model.predictions(dreams).unflatten(0, (-1, samples))  # (w, samples, P)
            x, y = guess[..., self.counts] / scale, real[:, None, self.counts] / scale
            away, apart = torch.cdist(x, y).mean((1, 2)), torch.cdist(x, x).sum((1, 2)) / (samples * (samples - 1))
            parts.append((self.error(guess.mean(1), real), (away - apart / 2.0) / len(scale) ** 0.5))
        error, energy = zip(*parts, strict=True)
        return torch.cat(error), torch.cat(energy)

    def error(self, guess: Tensor, truth: Tensor) -> Tensor:
        """(..., P) -> (...): squared error over the variance, mean over the entries; 1 is as good as the mean."""
        return ((guess - truth).square()[..., self.counts] / self.variance[self.counts]).mean(-1)
