"""Scale-free targets: symlog, symexp and the two-hot distribution over symexp-spaced bins.

Everything here is a pure function of tensors or a small module without learned parameters.
Source: DreamerV3 (Hafner et al. 2025), "Robust predictions".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BINS = 95
"""Bins of the two-hot reward and value heads (odd: one of them is 0)."""
BIN_LIMIT = 20_000.0
"""Largest reward or value that the bins can express."""


def symlog(x: Tensor) -> Tensor:
    """sign(x) * log(1 + |x|), elementwise."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class TwoHot(nn.Module):
    """A categorical distribution over fixed bins that stands for a real number.

    Bins lie at symexp(linspace(-symlog(limit), symlog(limit), bins)). A target is split between its two
    neighbouring bins in raw space, so that the mean of the target distribution is exactly the target:
    interpolating in symlog space instead would bias each target upward, because symexp is convex.
    Targets beyond `limit` are clamped to it.

    Raises ValueError for an even number of bins (zero must be a bin) or fewer than three.
    """

    bins: Tensor

    def __init__(self, bins: int = BINS, limit: float = BIN_LIMIT):
        super().__init__()
        if bins < 3 or bins % 2 == 0:
            raise ValueError(f"two-hot needs an odd number of bins, at least 3, got {bins}")
        top = float(symlog(torch.tensor(limit, dtype=torch.float64)))
        half = symexp(torch.linspace(0.0, top, bins // 2 + 1, dtype=torch.float64))
        # Built from one half so that the bins are exactly symmetric about zero.
        self.register_buffer("bins", torch.cat([-half.flip(0)[:-1], half]).float(), persistent=False)
        self.top = float(self.bins[-1])

    def mean(self, logits: Tensor) -> Tensor:
        """(..., bins) logits -> (...) expected value.

        Negative and positive bins are paired before they are summed: a uniform distribution then has mean
        exactly zero, instead of the rounding error of large bins.
        """
        middle = len(self.bins) // 2
        probs = F.softmax(logits.float(), dim=-1)
        # A sum of products, not a matrix product, which a GPU may round to fewer digits than the bins need.
        return ((probs[..., middle + 1 :] - probs[..., :middle].flip(-1)) * self.bins[middle + 1 :]).sum(-1)

    def score(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(..., bins) logits and (..., M) targets -> (..., M) logits weighted by each target's two-hot code."""
        targets = targets.detach().float().clamp(-self.top, self.top)
        upper = torch.searchsorted(self.bins, targets.contiguous()).clamp(1, len(self.bins) - 1)
        low, high = self.bins[upper - 1], self.bins[upper]
        share = (targets - low) / (high - low)  # (..., M) weight of the upper bin
        lower, higher = torch.gather(logits.float(), -1, torch.cat([upper - 1, upper], -1)).chunk(2, -1)
        return torch.lerp(lower, higher, share)

    def loss(self, logits: Tensor, target: Tensor, second: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Cross-entropy of (..., bins) logits against the two-hot code of (...) targets -> (...).

        With a second target, `scale` times its cross-entropy is added: the two share the normalisation.
        """
        normalised = torch.logsumexp(logits.float(), -1)
        if second is None:
            return normalised - self.score(logits, target[..., None]).squeeze(-1)
        first, other = self.score(logits, torch.stack([target, second], -1)).unbind(-1)
        return (1.0 + scale) * normalised - first - scale * other
