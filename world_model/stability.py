"""A closer look at a trained model, now and then: do loop, memory and dreams stay bounded?

Symbols as in `types.py`. Nothing here changes what is learned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from world_model.certified import certificate
from world_model.looped import LoopedCore
from world_model.model import WorldModel
from world_model.objectives import effective_rank
from world_model.types import Batch

OBSERVED = ("reconstruction", "image", "embedding", "reward")
"""The losses of what a state says about its own row."""


def stability(world: WorldModel, batch: Batch, loops: int | None = None, horizon: int = 50) -> dict[str, float]:
    """The running checks of a looped model, on one batch.

    decay_max           largest entry of the linear part of the loop; below 1 or it does not forget
    norm_R, residual_R  mean |x_r|, and |x_r - x_{r-1}| / |x_r|, after each loop r = 1..`loops` (default: the most
                        that training runs)
    cosine_R            between the changes of loops r-1 and r: near -1 the loop oscillates, near 1 it drifts
    time_gradient_K     |d loss(last row) / d deter(K rows before)| relative to that at the last row itself
    dream_norm_K        mean |deter| after K steps of an open-loop dream under actions drawn from the batch
    embedding_rank      directions that the embeddings of observations fill, as a share of their size; embedding_std and
                        embedding_least_std are their mean standard deviation, and that along the direction (principal
                        axis) in which they vary least; near 0 they have collapsed. The last where rows are twice
                        as many as directions
    certified_NAME      the bounds of `certificate`, those that are finite
    """
    core = world.core
    depth = loops or (world.cfg.loop.train_cap if core.looping else 1)
    metrics: dict[str, Any] = dict(_by_loop(world, batch, depth)) | _embeddings(world, batch)
    if isinstance(core, LoopedCore):
        metrics["decay_max"] = core.prepare().decay.detach().abs().max()
    metrics |= {f"certified_{name}": bound for name, bound in certificate(core)._asdict().items() if bound < math.inf}
    metrics |= _over_time(world, batch, depth) | _dream_norms(world, batch, depth, horizon)
    return {f"stability/{name}": float(value) for name, value in metrics.items()}


@torch.no_grad()
def _by_loop(world: WorldModel, batch: Batch, depth: int) -> dict[str, Tensor]:
    states = world.observe_sequence(batch, depth).trace.states
    flat = states.flatten(3)  # (R+1, B, T, N*D)
    change = flat.diff(dim=0)  # (R, B, T, N*D)
    metrics = {}
    for loop in range(1, len(flat)):
        now, norm = change[loop - 1], flat[loop].norm(dim=-1)
        metrics[f"norm_{loop}"] = norm.mean()
        metrics[f"residual_{loop}"] = (now.norm(dim=-1) / norm).mean()
        if loop > 1:
            metrics[f"cosine_{loop}"] = torch.cosine_similarity(now, change[loop - 2], dim=-1).mean()
    return metrics


@torch.no_grad()
def _embeddings(world: WorldModel, batch: Batch) -> dict[str, Tensor]:
    embed = world.observation_model.watched(world.observation_model(batch.obs)).flatten(0, 1)  # (B*T, E)
    rank = effective_rank(embed) / embed.shape[1]
    metrics = {"embedding_rank": rank, "embedding_std": embed.std(0).mean()}
    if len(embed) >= 2 * embed.shape[1]:  # fewer rows leave directions in which they do not vary
        metrics["embedding_least_std"] = torch.linalg.eigvalsh(embed.double().t().cov())[0].clamp(min=0.0).sqrt()
    return metrics


def _over_time(world: WorldModel, batch: Batch, depth: int) -> dict[str, Tensor]:
    """How much the model's error in the last row still depends on the states of the rows before."""
    with torch.enable_grad():
        post = world.observe_sequence(batch._replace(is_first=torch.zeros_like(batch.is_first)), depth)
        losses = world.losses(post, batch)
        loss = torch.stack([losses[name][:, -1].sum() for name in OBSERVED if name in losses]).sum()
        grads = torch.autograd.grad(loss, post.deters, allow_unused=True, materialize_grads=True)
    # (T,): lag 0 is the last row
    norms = torch.stack([grad.flatten(1).norm(dim=1).mean() for grad in grads]).flip(0)
    lags = [lag for lag in (1, 2, 4, 8, 16, 32, 64) if lag < len(norms)]
    return {f"time_gradient_{lag}": norms[lag] / norms[0].clamp(min=1e-12) for lag in lags}


@torch.no_grad()
def _dream_norms(world: WorldModel, batch: Batch, depth: int, horizon: int) -> dict[str, Tensor]:
    end = world.observe_sequence(batch, depth).states.map(lambda leaf: leaf[:, -1])
    size, length = batch.reward.shape
    # (B, horizon, 1): rows from which the actions are taken
    drawn = torch.randint(length, (size, horizon, 1), device=batch.reward.device)
    actions = batch.prev_action if batch.span is None else batch.prev_action[:, :, 0]  # (B, T, A)
    actions = actions.gather(1, drawn.expand(-1, -1, world.action_size))
    norms = world.imagine(end, actions, horizon).states.deter.flatten(2).norm(dim=-1).mean(0)  # (H+1,)
    return {f"dream_norm_{step}": norms[step] for step in (1, horizon)}
