"""Errors of predicted observations, each entry divided by its variance over recorded episodes.

Images make this large, so at most BLOCK_ROWS observations are held as floating-point numbers at once.

Symbols: E episodes, T rows, W windows (predictions), Q dreams per window, F features, P entries of an observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.data.dataset import Episodes
from world_model import ObservationModel

BLOCK_ROWS = 512
"""Observations that are held as floating-point numbers at once."""


def targets_at(observation_model: ObservationModel, episodes: Episodes, episode: Tensor, row: Tensor) -> Tensor:
    """Observations at the given rows, in the form that the decoder predicts: indices (W,) -> (W, P)."""
    return observation_model.targets({name: value[episode, row] for name, value in episodes.obs.items()})


@dataclass(frozen=True)
class NormalisedError:
    """Squared error over variance, mean over entries: 1 is the error of always predicting the mean.

    mean, variance (P,): of the recorded observations; varies (P,): True for entries that enter the error.
    """

    mean: Tensor
    variance: Tensor
    varies: Tensor

    @classmethod
    def fit(cls, observation_model: ObservationModel, recorded: Sequence[Episodes]) -> NormalisedError:
        """Mean and variance over all rows of the episodes."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for episodes in recorded:
            for episode, length in enumerate(episodes.length.tolist()):
                for rows in torch.arange(length, device=episodes.reward.device).split(BLOCK_ROWS):
                    targets = targets_at(observation_model, episodes, torch.full_like(rows, episode), rows).double()
                    count, total = count + len(targets), targets.sum(0) + total
                    squares = targets.square().sum(0) + squares
        mean = total / count
        variance = ((squares - count * mean.square()) / max(1, count - 1)).clamp(min=0.0).float()
        # The noise of an almost constant entry, divided by its tiny variance, would dominate the mean over entries.
        return cls(mean.float(), variance, variance > 1e-3 * variance.max())

    def score(
        self, observation_model: ObservationModel, feat: Tensor, dreams: int, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score `dreams` dreams of each window, feat (W * Q, F), against targets (W, P).

        Returns the `error` of their mean (W,) and their energy score (W,): E|x - y| - E|x - x'| / 2 over dreams x, x'
        and the target y, in standard deviations per entry (Gneiting and Raftery 2007). The mean of dreams that are
        too uncertain may be closer to the target than that of calibrated ones; the energy score is lowest, in
        expectation, for dreams that are distributed like the targets.
        """
        errors, energies, block = [], [], max(1, BLOCK_ROWS // dreams)
        scale = self.variance[self.varies].sqrt()
        for part, target in zip(feat.split(block * dreams), targets.split(block), strict=True):
            # (W * Q, F) -> (W, Q, P)
            prediction = observation_model.predictions(part).unflatten(0, (-1, dreams))
            x, y = prediction[..., self.varies] / scale, target[:, None, self.varies] / scale
            # (W, Q, 1) -> (W,) and (W, Q, Q) -> (W,)
            to_target, between = torch.cdist(x, y).mean((1, 2)), torch.cdist(x, x).sum((1, 2)) / (dreams * (dreams - 1))
            errors.append(self.error(prediction.mean(1), target))
            energies.append((to_target - between / 2.0) / len(scale) ** 0.5)
        return torch.cat(errors), torch.cat(energies)

    def error(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """(..., P) -> (...): squared error over the variance, mean over the entries that vary."""
        return ((prediction - targets).square()[..., self.varies] / self.variance[self.varies]).mean(-1)
