"""The normal distribution of continuous actions, whose bounds are -1 and 1."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_LOG_2PI = 0.9189385332046727


def normal_logp(x: Tensor) -> Tensor:
    """Logarithm of the standard normal density, elementwise."""
    return -0.5 * x.square() - HALF_LOG_2PI


def truncated_entropy(mean: Tensor, std: Tensor) -> Tensor:
    """Entropy of a normal distribution cut off at -1 and 1, with its mean between them; elementwise.

    The entropy of the uncut one does not see the mean. Where nothing is won yet, the mean then follows the noise in its
    gradient, which Adam brings to full size, until all actions lie at one end (results/notes/suite.md).
    """
    low, high = (-1.0 - mean) / std, (1.0 - mean) / std
    mass = 0.5 * (torch.erf(high * 0.5**0.5) - torch.erf(low * 0.5**0.5))
    ends = low * normal_logp(low).exp() - high * normal_logp(high).exp()
    return torch.log(std * mass) + (0.5 + HALF_LOG_2PI) + 0.5 * ends / mass
