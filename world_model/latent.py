"""The latent state: N deterministic tokens carried by the looped core, and S groups of K numbers; categoricals."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from world_model.onehot import onehot_at, onehot_mode

UNIMIX = 0.01
"""Share of the uniform distribution in every categorical of the world model (DreamerV3)."""


class LatentState(NamedTuple):
    """What the world model knows at one moment.

    deter  (..., N, D)  tokens of the looped core
    stoch  (..., S, K)  a sample of the latents (`latents.py`): one-hot, with straight-through gradients, by default
    """

    deter: Tensor
    stoch: Tensor

    def feat(self) -> Tensor:
        """(..., F) with F = N*D + S*K: the input of every head."""
        return torch.cat([self.deter.flatten(-2), self.stoch.flatten(-2)], -1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> LatentState:
        return LatentState(fn(self.deter), fn(self.stoch))

    def detach(self) -> LatentState:
        return self.map(torch.Tensor.detach)


def probabilities(logits: Tensor, unimix: float = UNIMIX) -> Tensor:
    """Softmax over the last axis, mixed with `unimix` of the uniform distribution.

    The mixture keeps every class possible, so that no KL divergence is infinite (DreamerV3). Written out
    because the fused softmax runs scalar code over so short an axis: 290 against 50 us for 128 x 16 x 8.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    probs = weights / weights.sum(-1, keepdim=True)
    return probs if unimix == 0.0 else torch.add(unimix / logits.shape[-1], probs, alpha=1.0 - unimix)


def sample_onehot(probs: Tensor, level: Tensor | None) -> Tensor:
    """One-hot (..., K) with straight-through gradient: a sample at `level` (..., 1), or the mode with None."""
    fixed = probs.detach()
    onehot = onehot_mode(fixed) if level is None else onehot_at(fixed, level)
    return onehot + (probs - fixed) if probs.requires_grad else onehot


def kl_divergence(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    """KL(p || q) of S independent categoricals: (..., S, K) log-probabilities -> (...), summed over S."""
    return (p_logp.exp() * (p_logp - q_logp)).sum((-2, -1))


def kl_balance(
    post: Tensor, prior: Tensor, free_nats: float, kl: Callable[[Tensor, Tensor], Tensor] = kl_divergence
) -> tuple[Tensor, Tensor]:
    """The two KL losses of DreamerV3, each (...): dynamics loss and representation loss.

    dynamics        KL(sg(posterior) || prior): trains the prior towards the posterior
    representation  KL(posterior || sg(prior)): makes the posterior predictable
    Both are clipped from below at `free_nats` after the sum over the S variables.
    """
    dynamics = kl(post.detach(), prior)
    representation = kl(post, prior.detach())
    return dynamics.clamp(min=free_nats), representation.clamp(min=free_nats)
