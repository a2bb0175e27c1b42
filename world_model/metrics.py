"""The metrics of one world-model update, read off its posterior. Nothing here changes what is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from world_model.types import Posterior


@torch.no_grad()
def posterior_metrics(post: Posterior) -> dict[str, Tensor]:
    """0-d tensors: KL and entropies in nats, depth, and the norms of loop states."""
    states, gate = post.trace.states, post.trace.gate  # (R+1, B, T, N, D), (B, T, N, D)
    last = states[-1]
    return {
        "world/kl": post.kl().mean(),
        "world/posterior_entropy": post.latents.entropy(post.post_dist).mean(),
        "world/prior_entropy": post.latents.entropy(post.prior_dist).mean(),
        "loop/train_depth": last.new_full((), post.loops),
        "loop/residual_last": (last - states[-2]).norm() / last.norm(),
        "loop/state_norm": post.states.deter.flatten(2).norm(dim=-1).mean(),
        "loop/update_gate": gate.mean(),
    }
