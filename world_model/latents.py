"""What the stochastic part of a state can be: S groups of K numbers each.

    categorical   a one-hot vector, drawn from a distribution over K classes (DreamerV3; the default)
    simplicial    the distribution itself, nothing drawn (simplicial normalisation as in TD-MPC2)
    gaussian      K numbers, drawn from normal distributions (PlaNet, Dreamer)

Posterior and prior are of the same kind, and KL(posterior || prior) joins them, also where nothing is drawn. Symbols as
in `types.py`; P numbers describe the distribution of a group, K or 2K.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from world_model.latent import kl_divergence, probabilities, sample_onehot

SMALLEST_STD = 0.1
"""Of a Gaussian latent, as in PlaNet."""
LARGEST_STD = 10.0


class Latents(ABC):
    """The interface. Networks give S*P numbers, of which `distribution` makes the distribution of a state's latents."""

    def __init__(self, groups: int, classes: int):
        self.groups, self.classes = groups, classes

    @property
    @abstractmethod
    def size(self) -> int:
        """S*P."""

    @property
    @abstractmethod
    def squared_norm(self) -> float:
        """Expected square of a sample's norm, at first."""

    @abstractmethod
    def distribution(self, outputs: Tensor) -> Tensor:
        """(..., S*P) of a network -> (..., S, P)."""

    @abstractmethod
    def kl_form(self, distribution: Tensor) -> Tensor:
        """(..., S, P) -> (..., S, P), the form in which `kl` and `entropy` take it."""

    @abstractmethod
    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q), (..., S, P) twice -> (...), summed over the groups."""

    @abstractmethod
    def entropy(self, p: Tensor) -> Tensor:
        """(..., S, P) -> (...) nats."""

    @abstractmethod
    def level(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uniform random numbers for (*shape) states, of which `draw` makes samples (inverse-CDF sampling)."""

    @abstractmethod
    def draw(self, distribution: Tensor, level: Tensor | None) -> Tensor:
        """(..., S, P) -> (..., S, K): samples of the uniform numbers `level`, with None the mode (of gaussian latents
        the mean). Simplicial latents are the distribution, whatever `level` is."""


class Categorical(Latents):
    """One-hot samples with straight-through gradients. The form of `kl` are log-probabilities."""

    @property
    def size(self) -> int:
        return self.groups * self.classes

    @property
    def squared_norm(self) -> float:
        return self.groups

    def distribution(self, outputs: Tensor) -> Tensor:
        return probabilities(outputs.unflatten(-1, (self.groups, self.classes)))

    def kl_form(self, distribution: Tensor) -> Tensor:
        return torch.log(distribution)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return kl_divergence(p, q)

    def entropy(self, p: Tensor) -> Tensor:
        return -(p.exp() * p).sum((-2, -1))

    def level(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.rand(*shape, self.groups, 1, device=like.device, dtype=like.dtype)

    def draw(self, distribution: Tensor, level: Tensor | None) -> Tensor:
        return sample_onehot(distribution, level)


class Simplicial(Categorical):
    """Points of a simplex: what a categorical variable would be drawn from."""

    @property
    def squared_norm(self) -> float:
        return self.groups / self.classes

    def draw(self, distribution: Tensor, level: Tensor | None) -> Tensor:
        return distribution


class Gaussian(Latents):
    """Means and logarithms of standard deviations, K of each."""

    @property
    def size(self) -> int:
        return 2 * self.groups * self.classes

    @property
    def squared_norm(self) -> float:
        return self.groups * self.classes

    def distribution(self, outputs: Tensor) -> Tensor:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        mean, raw = outputs.unflatten(-1, (self.groups, 2 * self.classes)).chunk(2, -1)
        # at first, where the outputs are about 0, the deviation is about 1
        low, high = math.log(SMALLEST_STD), math.log(LARGEST_STD)
        return torch.cat([mean, low + (high - low) * torch.sigmoid(raw)], -1)

    def kl_form(self, distribution: Tensor) -> Tensor:
        return distribution

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        (mean, log_std), (other, other_log_std) = p.chunk(2, -1), q.chunk(2, -1)
        ratio = (log_std - other_log_std).exp()
        distance = (mean - other) * (-other_log_std).exp()
        return (0.5 * (ratio.square() + distance.square() - 1.0) - (log_std - other_log_std)).sum((-2, -1))

    def entropy(self, p: Tensor) -> Tensor:
        return (p.chunk(2, -1)[1] + 0.5 * math.log(2.0 * math.pi * math.e)).sum((-2, -1))

    def level(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.rand(*shape, self.groups, self.classes, device=like.device, dtype=like.dtype)

    def draw(self, distribution: Tensor, level: Tensor | None) -> Tensor:
        mean, log_std = distribution.chunk(2, -1)
        if level is None:
            return mean
        normal = torch.erfinv((2.0 * level - 1.0).clamp(-1.0 + 1e-6, 1.0 - 1e-6)) * 2.0**0.5
        return mean + log_std.exp() * normal


KINDS: dict[str, type[Latents]] = {"categorical": Categorical, "simplicial": Simplicial, "gaussian": Gaussian}
