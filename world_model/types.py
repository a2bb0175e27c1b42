"""What passes between replay, world model and actor-critic: Batch, Posterior, Rollout.

    B  batch (sequences)              N  tokens of the deterministic state    R  loops
    T  rows of a sequence             D  width of a token                     A  size of an action
    H  imagined steps (horizon)       S  groups of latents                    U  hidden units
    O  size of a vector observation   K  classes (numbers) of each            F  features of a state, N*D + S*K
    J  longest jump, in decisions     P  numbers of a group's distribution    C  the core's input of an action
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from world_model.core import LoopStats, Traces
from world_model.latent import LatentState
from world_model.latents import Latents


class Batch(NamedTuple):
    """Arrival rows (B, T, ...): row t is what the agent knows on arrival at observation t.

    obs {name: (B, T, O) or (B, T, height, width, C)}, prev_action (B, T, A), the rest (B, T). is_terminal: the episode
    terminated here; is_last: or was truncated. start: the state before the first row; None: the learned first state.
    span (B, T): number of decisions of each row, where rows are jumps: prev_action is (B, T, J, A), reward discounted.
    """

    obs: dict[str, Tensor]
    prev_action: Tensor
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    start: LatentState | None = None
    span: Tensor | None = None

    def ends(self) -> Tensor:
        """(B, T) rows that nothing of their episode follows: the last ones, and those that were cut off."""
        return self.is_last | F.pad(self.is_first[:, 1:], (0, 1))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """`fn` of every tensor, always in the same order."""
        obs = {name: fn(self.obs[name]) for name in sorted(self.obs)}
        rows = map(fn, (self.prev_action, self.reward, self.is_first, self.is_last, self.is_terminal))
        start = None if self.start is None else self.start.map(fn)
        return Batch(obs, *rows, start, self.span if self.span is None else fn(self.span))  # type: ignore


class Scanned(NamedTuple):
    """What a scan over the rows gives: states (B, T, ...), distributions (B, T, S, P), detached traces (B, T, ...), and
    the states' deter (B, N, D) row by row, from which the later rows were computed where the scan is not fused."""

    states: LatentState
    probs: Tensor
    trace: Traces
    deters: list[Tensor]


class Posterior(NamedTuple):
    """What the model infers along a batch: states (B, T, ...), distributions (B, T, S, P) as of `Latents.kl_form`.

    trace: loop states of every step, detached, for the exit rule and the metrics; loops: how many; deters: as of
    `Scanned`; embed (B, T, U): the encoder's embeddings; latents: the kind of the distributions.
    """

    states: LatentState
    post_dist: Tensor
    prior_dist: Tensor
    trace: Traces
    loops: int
    deters: list[Tensor]
    embed: Tensor
    latents: Latents

    def kl(self) -> Tensor:
        """KL(posterior || prior) of every row, (B, T) nats."""
        return self.latents.kl(self.post_dist, self.prior_dist)


class Rollout(NamedTuple):
    """An imagined trajectory; the alignment lives here and nowhere else.

    states    s_0 .. s_H       (B, H+1, ...)   s_0 is a posterior, detached by the caller
    actions   a_0 .. a_{H-1}   (B, H, A)       a_k sampled at s_k; (B, H, k, A) where given for jumps of k decisions
    rewards   r_1 .. r_H       (B, H)          predicted from s_{k+1}
    continues c_1 .. c_H       (B, H)          predicted from s_{k+1}; gamma (of a jump gamma^k): see lambda_return
    loops     depth (B, H) and residual (B, H, R)
    alive     (B,)             1 - is_terminal of the start row
    feat      (H+1, B, F)      features of s_0 .. s_H, time first: all but the first or last need no copy
    outputs   (H, B, ...)      of the policy's network at s_0 .. s_{H-1}, time first, where they were kept
    """

    states: LatentState
    actions: Tensor
    rewards: Tensor
    continues: Tensor
    loops: LoopStats
    alive: Tensor
    feat: Tensor
    outputs: Tensor | None = None
