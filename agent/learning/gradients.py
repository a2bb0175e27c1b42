"""Losses and gradients of one update: world model, dreams, actor and critic from one batch."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from agent.errors import NonFiniteError
from agent.learning.policy import Policy
from world_model import Batch, LatentState

Metrics = dict[str, Tensor]


class Losses(NamedTuple):
    """total is for world model and critic, policy for the actor alone; states (B, T, ...) are the posteriors, detached;
    depths (B, H) the loops of the dreams; lengths (B,) how far adaptive ones are trusted; metrics 0-d and detached."""

    total: Tensor
    policy: Tensor
    states: LatentState
    depths: Tensor
    lengths: Tensor | None
    metrics: Metrics


def finite(losses: Losses) -> None:
    """Raise NonFiniteError with the name of the first metric that is not finite, if a loss is not."""
    if not torch.isfinite(losses.total + losses.policy):
        bad = [name for name, value in losses.metrics.items() if not torch.isfinite(value).all()]
        raise NonFiniteError(bad[0] if bad else "total loss")


class Gradients:
    """What a policy's parameters learn from a batch.

    flats: the flat gradients that its parameters' are views of; parts: of how many equal parts of a whole batch each
    batch is one (the number of dreams is that of the whole); half: matrix products in bfloat16.
    """

    def __init__(self, policy: Policy, flats: list[Tensor], half: bool = False, parts: int = 1):
        self.policy, self.world, self.behavior = policy, policy.world, policy.behavior
        self.flats, self.half, self.parts = flats, half, parts
        self.seconds: dict[str, float] = {}  # time spent in each part of the updates

    def losses(self, batch: Batch, loops: int) -> Losses:
        """Everything that is computed forwards; gradients are zeroed."""
        clock = time.perf_counter()
        for flat in self.flats:
            flat.zero_()
        with torch.autocast(batch.reward.device.type, torch.bfloat16, enabled=self.half):
            post = self.world.observe_sequence(batch, loops)
            world_loss, metrics = self.world.loss(post, batch)
            clock = self.lap("world_model", clock)
            size, length = batch.reward.shape
            count = self.behavior.starts // self.parts or size * length
            # Rows at the end of each sequence that start dreams; the replayed value needs two.
            tail = min(length, max(2, count // size))
            ends = post.states.map(lambda leaf: leaf[:, -tail:])
            terminal = batch.is_terminal[:, -tail:]
            rollout = self.world.imagine(
                ends.detach().map(lambda leaf: leaf.flatten(0, 1)),
                self.behavior.policy,
                self.behavior.cfg.horizon,
                1.0 - terminal.flatten().float(),
                grad=self.behavior.through,
            )
            clock = self.lap("imagination", clock)
            policy_loss, value_loss, returns, behavior_metrics = self.behavior.loss(rollout)
            boot = returns[:, 0].view(size, tail)
            replay_loss = self.behavior.replay_loss(
                ends.feat(), batch.reward[:, -tail:], terminal, batch.is_last[:, -tail:], boot
            )
        metrics |= behavior_metrics
        metrics["behavior/replay_value_loss"] = replay_loss.detach()
        metrics["loop/dream_depth"] = rollout.loops.depth.float().mean()
        metrics["loop/dream_residual"] = rollout.loops.residual.float().sum(-1).mean()
        self.lap("actor_critic", clock)
        total = world_loss + value_loss + replay_loss
        depths, lengths = rollout.loops.depth, self.behavior.last_lengths
        return Losses(total, policy_loss, post.states.detach(), depths, lengths, metrics)

    def differentiate(self, losses: Losses) -> None:
        """Gradients of every part; the actor's alone, because the dynamics gradient passes through the world model."""
        clock = time.perf_counter()
        parts = self.policy.parts()
        losses.policy.backward(inputs=parts["actor"])
        losses.total.backward(inputs=parts["world"] + parts["critic"])
        self.lap("backward", clock)

    def lap(self, name: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since
        return now
