"""The world model of DreamerV3 (arXiv 2301.04104) with the looped core in place of its GRU.

    observe_sequence   training: posterior states along a batch, with gradient; `loss` is what is learned from them
    observe            acting: one step of the core, then the posterior given the observation
    imagine            dreams: steps of the core, then a sample of the prior

Symbols as in `types.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.averages import Average, alone
from world_model.controls.matching import check_core, make_core
from world_model.core import Core, CoreSizes, LoopStats, Traces
from world_model.distributions import BINS, TwoHot
from world_model.exits import HaltingBatch, Metrics
from world_model.images import FIRST_LOGITS, ImageConfig
from world_model.jumps import action_input, action_input_size
from world_model.latent import LatentState, kl_balance
from world_model.latents import KINDS
from world_model.looped import LoopConfig, LoopedCore, sample_depth
from world_model.metrics import posterior_metrics
from world_model.nets import MLP, Norm, linear
from world_model.observation import ObservationModel, ObsSize
from world_model.ranges import AT_LEAST_ONE, NOT_NEGATIVE, require
from world_model.types import Batch, Posterior, Rollout, Scanned

FREE_NATS = 0.1
"""Below this, the KL losses do not push (nats, after the sum over the groups); DreamerV3 has 1."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and losses of the world model."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """The looped core."""
    core: str = "looped"
    """The dynamics: looped; certified or contracting; a control, stacked or gru; or module:Class of your own."""
    match: Literal["none", "params", "flops"] = "none"
    """Size a control to the parameters, or to the operations per step, of the looped core with these settings."""
    latents: Literal["categorical", "simplicial", "gaussian"] = "categorical"
    """The stochastic part of a state: classes that are drawn, their probabilities themselves, or normal numbers."""
    groups: int = 16
    """S, groups of latent variables."""
    classes: int = 8
    """K, classes of each, or its numbers."""
    units: int = 128
    """U, width of encoder, decoder and heads."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Image observations."""
    reward_scale: float = 1.0
    """Weight of the reward loss."""
    objective: Literal["reconstruct", "redundancy", "sigreg"] = "reconstruct"
    """What latents are trained by: the observation, or its embedding, without a decoder."""
    rep_scale: float = 0.1
    """Weight of the representation loss KL(posterior || sg(prior)), against that of the dynamics loss."""
    jump: int = 1
    """J, most decisions that one prediction covers; in training each update draws from 1 to J."""

    def __post_init__(self) -> None:
        check_core(self.core)
        if self.latents == "gaussian" and self.loop.exit == "kl":
            raise ValueError("the exit rule kl compares probabilities; gaussian latents have none: give another rule")
        scales = dict.fromkeys(("reward_scale", "rep_scale"), NOT_NEGATIVE)
        require(self, "", groups=AT_LEAST_ONE, units=AT_LEAST_ONE, jump=AT_LEAST_ONE, classes=(2.0, math.inf), **scales)


class WorldModel(nn.Module):
    """obs_sizes {name: O, or (H, W, C) for an image}; action_size A (one-hot size for discrete actions)."""

    def __init__(self, cfg: ModelConfig, obs_sizes: Mapping[str, ObsSize], action_size: int):
        super().__init__()
        self.cfg, self.obs_sizes, self.action_size = cfg, dict(obs_sizes), action_size
        self.latents = KINDS[cfg.latents](cfg.groups, cfg.classes)
        flat, described, units = cfg.loop.tokens * cfg.loop.width, self.latents.size, cfg.units
        self.feat_size = flat + cfg.groups * cfg.classes
        sizes = CoreSizes(cfg.groups, cfg.classes, action_input_size(action_size, cfg.jump), self.latents.squared_norm)
        self.core: Core = make_core(cfg.core, cfg.loop, sizes, cfg.match)
        self.observation_model = ObservationModel(obs_sizes, self.feat_size, units, cfg.image, cfg.objective, flat)
        # The posterior's first layer is split, so that its observation half runs outside of the scan over time.
        self.post_deter = linear(flat, units)
        self.post_embed = linear(units, units)
        self.post_norm = Norm(units)
        first = FIRST_LOGITS if self.observation_model.images and cfg.latents != "gaussian" else 1.0
        self.post_out = linear(units, described, bias=True, scale=first)
        self.prior = MLP(flat, units, 1, described)
        self.twohot = TwoHot()
        self.reward = MLP(self.feat_size, units, 1, BINS, out_scale=0.0)
        self.cont = MLP(self.feat_size, units, 1, 1)

    @property
    def run_cap(self) -> int:
        """Most loops outside of world-model training; 1 for a core without loops."""
        return self.cfg.loop.run_cap if self.core.looping else 1

    def sample_depth(self) -> int:
        """Loops of one training update; 1 for a core without loops."""
        return sample_depth(self.cfg.loop) if self.core.looping else 1

    # ------------------------------------------------------------------ states and latents

    def initial(self, batch: int) -> LatentState:
        """The state before the first observation of an episode: learned tokens, no latents."""
        start = self.core.start
        return LatentState(start.expand(batch, *start.shape), start.new_zeros(batch, self.cfg.groups, self.cfg.classes))

    def reset(self, state: LatentState, keep: Tensor) -> LatentState:
        """The initial state where keep (B,) is 0, the given state where it is 1."""
        keep = keep[:, None, None]
        return LatentState(torch.lerp(self.core.start, state.deter, keep), state.stoch * keep)

    def unflatten(self, feat: Tensor) -> LatentState:
        """(..., F) features -> the state that they are made of, as views."""
        shapes = self.core.start.shape, (self.cfg.groups, self.cfg.classes)
        leaves = feat.split([math.prod(shape) for shape in shapes], -1)
        return LatentState(*(leaf.unflatten(-1, shape) for leaf, shape in zip(leaves, shapes, strict=True)))

    def inputs(self, state: LatentState, actions: Tensor) -> Tensor:
        """(B, S*K + C): what enters the core beside deter; actions (B, C) as of `jumps.action_input`."""
        return torch.cat([state.stoch.flatten(1), actions], -1)

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        """deter (..., N, D), embed (..., U) as of `post_embed` -> (..., S, P) distribution q(stoch | deter, obs)."""
        hidden = F.silu(self.post_norm(self.post_deter(deter.flatten(-2)) + embed))
        return self.latents.distribution(self.post_out(hidden))

    def prior_probs(self, deter: Tensor) -> Tensor:
        """(..., N, D) -> (..., S, P) distribution p(stoch | deter)."""
        return self.latents.distribution(self.prior(deter.flatten(-2)))

    def log_prior(self, deter: Tensor) -> Tensor:
        """(..., N, D) -> (..., S, P) the same in the form that a KL compares: logarithms."""
        return self.latents.kl_form(self.prior_probs(deter))

    def draw(self, probs: Tensor, level: Tensor | None) -> Tensor:
        """(..., S, P) distribution -> (..., S, K) latents at random levels, or the most probable ones with None."""
        return self.latents.draw(probs, level)

    def decode(self, state: LatentState) -> dict[str, Tensor]:
        """(..., N, D), (..., S, K) -> {name: (..., O), or (..., H, W, C) from 0 to 1} predicted observations."""
        return self.observation_model.decode(state.feat())

    # ------------------------------------------------------------------ training: posterior states and losses

    def observe_sequence(self, batch: Batch, loops: int) -> Posterior:
        """Posterior states along (B, T) rows, with gradient and `loops` loops per step (see `sample_depth`)."""
        size, length = batch.reward.shape
        start = self.initial(size) if batch.start is None else batch.start
        embed = self.observation_model(batch.obs)  # (B, T, U)
        levels = self.latents.level((length, size), batch.reward)
        states, probs, trace, deters = self.scan(start, batch, self.post_embed(embed), levels, loops)
        post, prior = self.latents.kl_form(probs), self.log_prior(states.deter)  # (B, T, S, P)
        return Posterior(states, post, prior, trace, loops, deters, embed, self.latents)

    def scan(self, state: LatentState, batch: Batch, embeds: Tensor, levels: Tensor, loops: int) -> Scanned:
        """Row by row: the core from the state before, then the posterior; embeds (B, T, U), levels of `latents`."""
        prepared, length = self.core.prepare(), embeds.shape[1]
        actions = action_input(batch.prev_action, batch.span, self.cfg.jump)  # (B, T, C)
        resets = [True] * length if self.core.static_shapes else batch.is_first.any(0).tolist()
        keeps = (1.0 - batch.is_first.to(levels.dtype)).unbind(1)
        states, posts, traces = [], [], []
        for t in range(length):
            action = actions[:, t]  # (B, C)
            if resets[t]:
                state, action = self.reset(state, keeps[t]), action * keeps[t][:, None]
            deter, trace = self.core(state.deter, self.inputs(state, action), loops, prepared)  # (B, N, D)
            probs = self.posterior(deter, embeds[:, t])  # (B, S, P)
            state = LatentState(deter, self.draw(probs, levels[t]))
            states.append(state)
            posts.append(probs)
            traces.append(trace)
        deters, stochs = zip(*states, strict=True)
        rows = LatentState(torch.stack(deters, 1), torch.stack(stochs, 1))  # (B, T, ...)
        return Scanned(rows, torch.stack(posts, 1), Traces.stack(traces), list(deters))

    def loss(self, post: Posterior, batch: Batch, average: Average = alone) -> tuple[Tensor, Metrics]:
        """The world-model loss plus the exit gate's regression: a scalar, and detached metrics."""
        losses = self.losses(post, batch, average)
        metrics = {f"world/{name}_loss": value.detach().mean() for name, value in losses.items()}
        total = torch.stack([value.mean() for value in losses.values()]).sum()
        if isinstance(self.core, LoopedCore) and self.core.rule.trained:
            exit_loss, exit_metrics = self.exit_loss(post)
            total, metrics = total + exit_loss, metrics | exit_metrics
        return total, metrics | posterior_metrics(post)

    def losses(self, post: Posterior, batch: Batch, average: Average = alone) -> dict[str, Tensor]:
        """The weighted losses of every row, (B, T) each (DreamerV3 eq. 4 and 5)."""
        feat = post.states.feat()  # (B, T, F)
        dynamics, representation = kl_balance(post.post_dist, post.prior_dist, FREE_NATS, self.latents.kl)
        alive = 1.0 - batch.is_terminal.float()
        return {
            **self.observation_model.losses(feat, batch.obs, post.embed, average),
            "reward": self.cfg.reward_scale * self.twohot.loss(self.reward(feat), batch.reward),
            "continue": F.binary_cross_entropy_with_logits(self.cont(feat).squeeze(-1), alive, reduction="none"),
            "dynamics": dynamics,
            "representation": self.cfg.rep_scale * representation,
        }

    def exit_loss(self, post: Posterior) -> tuple[Tensor, Metrics]:
        """The exit rule's own loss, on detached inputs. Gain of a loop: by how much KL(post_r || prior_r) falls."""
        assert isinstance(self.core, LoopedCore)
        states, prev, gate, e = post.trace
        x, change = states[1:], states.diff(dim=0)  # (R, B, T, N, D)
        gain = states.new_zeros(0)
        if self.core.rule.needs_gain:
            with torch.no_grad():  # the posterior is that of the depth at which a state would stop
                early = self.core.readout(prev.expand_as(x[:-1]), x[:-1], gate.expand_as(x[:-1]))  # (R-1, B, T, N, D)
                early_post = self.latents.kl_form(self.posterior(early, self.post_embed(post.embed)))
                kl = self.latents.kl(early_post, self.log_prior(early))  # (R-1, B, T)
                gain = -torch.cat([kl, post.kl()[None]]).diff(dim=0)
        return self.core.rule.loss(HaltingBatch(x, change, e, gain))

    # ------------------------------------------------------------------ acting and imagination

    @torch.no_grad()
    def observe(
        self, obs: dict[str, Tensor], prev_action: Tensor, is_first: Tensor, state: LatentState,
        sample: bool = True, max_loops: int | None = None,
    ) -> tuple[LatentState, LoopStats]:  # fmt: skip
        """One step of acting: obs {name: (B, O) or images}, prev_action (B, A), is_first (B,) -> posterior state and
        loops. sample=False: the most probable latents (evaluation). max_loops: instead of the configured cap.
        """
        keep = 1.0 - is_first.to(prev_action.dtype)
        state, prepared = self.reset(state, keep), self.core.prepare()
        inputs = self.inputs(state, action_input(prev_action, None, self.cfg.jump) * keep[:, None])  # (B, S*K + C)
        deter, stats = self.core.adaptive_step(state.deter, inputs, prepared, max_loops, log_prior=self.log_prior)
        probs = self.posterior(deter, self.post_embed(self.observation_model(obs)))  # (B, S, P)
        return LatentState(deter, self.draw(probs, self.latents.level((len(probs),), probs) if sample else None)), stats

    def imagine(
        self, start: LatentState, policy: Callable[[Tensor], Tensor] | Tensor, horizon: int,
        alive: Tensor | None = None, max_loops: int | None = None, sample: bool = True, grad: bool = False,
        jump: int = 1,
    ) -> Rollout:  # fmt: skip
        """Dream `horizon` steps of `jump` decisions from (B, ...) states, without gradient unless `grad`.

        policy maps features (B, F) to (B, A) actions, each held for a step, or is itself the actions of an open-loop
        prediction: (B, H, A), or (B, H, k, A) of steps of k decisions. alive (B,): 0 where the start is terminal.
        """
        if horizon < 1:
            raise ValueError(f"an imagination horizon must be at least 1, got {horizon}")
        with torch.set_grad_enabled(grad):
            prepared = self.core.prepare()
            state, feats, actions, stats = start, [start.feat()], [], []
            for k in range(horizon):
                actions.append(policy[:, k] if isinstance(policy, Tensor) else policy(feats[-1]))  # (B, A)
                state, step_stats = self.dream_step(state, actions[-1], prepared, max_loops, sample, jump)
                feats.append(state.feat())  # (B, F)
                stats.append(step_stats)
            loops = LoopStats(*(torch.stack(part, 1) for part in zip(*stats, strict=True)))  # (B, H), (B, H, R)
            return self.rollout(torch.stack(feats), torch.stack(actions, 1), loops, alive)

    def rollout(
        self, feat: Tensor, actions: Tensor, loops: LoopStats, alive: Tensor | None, outputs: Tensor | None = None
    ) -> Rollout:
        """Features (H+1, B, F) and actions (B, H, A) of a dream, with the rewards and continues of its states."""
        # (H, B) -> (B, H)
        rewards = self.twohot.mean(self.reward(feat[1:])).t()
        continues = torch.sigmoid(self.cont(feat[1:]).squeeze(-1)).t()
        alive = torch.ones_like(feat[0, :, 0]) if alive is None else alive
        return Rollout(self.unflatten(feat.transpose(0, 1)), actions, rewards, continues, loops, alive, feat, outputs)

    def dream_step(
        self, state: LatentState, action: Tensor, prepared: Any, max_loops: int | None = None, sample: bool = True,
        jump: int = 1,
    ) -> tuple[LatentState, LoopStats]:  # fmt: skip
        """One imagined step: the core with exits, then a sample (or the mode) of the prior.

        action (B, A) is held for `jump` decisions, or (B, k, A) holds those of k decisions.
        """
        inputs = self.inputs(state, action_input(action, jump, self.cfg.jump))  # (B, S*K + C)
        deter, stats = self.core.adaptive_step(state.deter, inputs, prepared, max_loops, log_prior=self.log_prior)
        probs = self.prior_probs(deter)  # (B, S, P)
        stoch = self.draw(probs, self.latents.level((len(probs),), probs) if sample else None)  # (B, S, K)
        return LatentState(deter, stoch.to(deter.dtype)), stats
