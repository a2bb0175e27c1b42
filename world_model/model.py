"""The world model: encoder, looped core, categorical latents with prior and posterior, and the heads.

Symbols: B batch, T time, H horizon, O observation size, A action size, N tokens, D token width, S groups,
K classes, R loops, F = N*D + S*K features, U units.

    observe   prior step through the core, then the posterior sees the observation    (acting, training)
    imagine   prior step through the core, and a sample of the prior                  (dreams, open loop)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.controls import check_core, make_core
from world_model.core import Core, CoreSizes, LoopStats, Traces
from world_model.diagnostics import diagnostics
from world_model.distributions import TwoHot
from world_model.exits import Lesson, Metrics
from world_model.gru import GRUConfig
from world_model.latent import LatentState, kl_balance, kl_divergence, probabilities, sample_onehot
from world_model.looped import LoopConfig, LoopedCore, sample_depth
from world_model.nets import MLP, Norm, clipped, linear
from world_model.ranges import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE, require
from world_model.senses import ObsSize, Senses
from world_model.stacked import StackConfig
from world_model.surprise import Surprise
from world_model.types import Batch, Posterior, Rollout
from world_model.vision import ImageConfig


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and losses of the world model."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """The looped core."""
    core: str = "looped"
    """The dynamics: looped; a control, stacked (separate weights per layer) or gru (DreamerV3's); or module:Class."""
    match: Literal["none", "params", "flops"] = "none"
    """Size a control to the parameters, or to the operations per step, of the looped core with these settings."""
    stack: StackConfig = field(default_factory=StackConfig)
    """The control `stacked`."""
    gru: GRUConfig = field(default_factory=GRUConfig)
    """The control `gru`."""
    groups: int = 16
    """S, number of categorical latent variables."""
    classes: int = 8
    """K, classes of each."""
    units: int = 128
    """U, width of encoder, decoder and heads."""
    decoder_layers: int = 2
    """Hidden layers of the decoder; encoder, posterior, prior and heads have one."""
    unimix: float = 0.01
    """Share of the uniform distribution in every categorical."""
    free_nats: float = 0.1
    """Below this, the KL losses do not push (nats, after the sum over the groups)."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Image observations."""
    rec_scale: float = 10.0
    """Weight of the vectors' reconstruction: the inverse of the observation noise that the decoder assumes, halved."""
    reward_scale: float = 1.0
    """Weight of the reward loss."""
    dyn_scale: float = 1.0
    """Weight of the dynamics loss KL(sg(posterior) || prior)."""
    rep_scale: float = 0.1
    """Weight of the representation loss KL(posterior || sg(prior))."""
    entropy_scale: float = 0.0
    """Weight of the posterior's entropy. Latents that nothing needs then rest, instead of feeding noise to the core."""
    surprise: bool = False
    """Train a read-out of the KL that each step is expected to have, for dreams of --behavior.adaptive surprise."""
    bins: int = 95
    """Bins of the two-hot reward and value heads (odd)."""
    bin_limit: float = 20_000.0
    """Largest reward or value that the bins can express."""

    def __post_init__(self) -> None:
        check_core(self.core)
        require(self, "", **dict.fromkeys(("groups", "units", "decoder_layers"), AT_LEAST_ONE))
        require(self, classes=(2.0, math.inf), bins=(3.0, math.inf), unimix=(0.0, 0.99), bin_limit=ABOVE_ZERO)
        scales = ("free_nats", "rec_scale", "reward_scale", "dyn_scale", "rep_scale", "entropy_scale")
        require(self, "", **dict.fromkeys(scales, NOT_NEGATIVE))
        if self.bins % 2 == 0:
            raise ValueError(f"bins must be odd, got {self.bins}: one of them is 0")


class WorldModel(nn.Module):
    """obs_sizes {name: O, or (H, W, C) for an image}; action_size A (one-hot size for discrete actions)."""

    def __init__(self, cfg: ModelConfig, obs_sizes: Mapping[str, ObsSize], action_size: int):
        super().__init__()
        self.cfg, self.obs_sizes, self.action_size = cfg, dict(obs_sizes), action_size
        loop, stoch, units = cfg.loop, cfg.groups * cfg.classes, cfg.units
        flat = loop.tokens * loop.width
        self.feat_size = flat + stoch
        sizes = CoreSizes(cfg.groups, cfg.classes, action_size)
        self.core: Core = make_core(cfg.core, loop, cfg.stack, cfg.gru, sizes, cfg.match)
        self.senses = Senses(obs_sizes, self.feat_size, units, cfg.decoder_layers, cfg.rec_scale, cfg.image)
        # The posterior's first layer is split, so that its observation half runs outside of the scan.
        self.post_deter = linear(flat, units)
        self.post_embed = linear(units, units)
        self.post_norm = Norm(units)
        self.post_out = linear(units, stoch, bias=True)
        if self.senses.images:
            with torch.no_grad():
                self.post_out.weight.mul_(cfg.image.first_logits)
        self.prior = MLP(flat, units, 1, stoch)
        self.twohot = TwoHot(cfg.bins, cfg.bin_limit)
        self.reward = MLP(self.feat_size, units, 1, cfg.bins, out_scale=0.0)
        self.cont = MLP(self.feat_size, units, 1, 1)
        with torch.random.fork_rng(devices=[]):
            self.surprise = Surprise(flat) if cfg.surprise else None

    @property
    def run_cap(self) -> int:
        """Most loops outside of world-model training; 1 for a core without loops."""
        return self.cfg.loop.run_cap if self.core.looping else 1

    # ------------------------------------------------------------------ states

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
        shape = (self.cfg.loop.tokens, self.cfg.loop.width), (self.cfg.groups, self.cfg.classes)
        deter, stoch = feat.split([math.prod(part) for part in shape], -1)
        return LatentState(deter.unflatten(-1, shape[0]), stoch.unflatten(-1, shape[1]))

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        """-> (..., S, K) probabilities of q(stoch | deter, observation)."""
        return self.probabilities(self.post_out(F.silu(self.post_norm(self.post_deter(deter.flatten(-2)) + embed))))

    def prior_probs(self, deter: Tensor) -> Tensor:
        """-> (..., S, K) probabilities of p(stoch | deter)."""
        return self.probabilities(self.prior(deter.flatten(-2)))

    def log_prior(self, deter: Tensor) -> Tensor:
        """-> (..., S, K) their logarithms."""
        return torch.log(self.prior_probs(deter))

    def probabilities(self, logits: Tensor) -> Tensor:
        shape = (*logits.shape[:-1], self.cfg.groups, self.cfg.classes)
        return probabilities(logits.view(shape), self.cfg.unimix)

    def level(self, probs: Tensor, sample: bool) -> Tensor | None:
        """(..., S, 1) random levels at which to sample, or None for the mode."""
        return torch.rand(*probs.shape[:-1], 1, device=probs.device, dtype=probs.dtype) if sample else None

    def draw(self, probs: Tensor, level: Tensor | None) -> Tensor:
        """(..., S, K) probabilities -> one-hot latents at random levels, or the most probable ones with None."""
        return sample_onehot(probs, level)

    def inputs(self, state: LatentState, action: Tensor) -> Tensor:
        """(B, S*K + A): what enters the core beside deter."""
        return torch.cat([state.stoch.flatten(1), action], -1)

    def carried(self, state: LatentState) -> LatentState:
        """The state as the next step may see it: unchanged, unless the memory is cut."""
        return self.initial(state.deter.shape[0]) if self.cfg.loop.carry == "cut" else state

    # ------------------------------------------------------------------ one step

    @torch.no_grad()
    def observe(
        self,
        obs: dict[str, Tensor],
        prev_action: Tensor,
        is_first: Tensor,
        state: LatentState,
        sample: bool = True,
        max_loops: int | None = None,
    ) -> tuple[LatentState, LoopStats]:
        """One step of acting: obs {name: (B, O)}, prev_action (B, A), is_first (B,) -> posterior state.

        sample=False takes the most probable latents (evaluation).
        """
        keep = 1.0 - is_first.to(prev_action.dtype)
        state = self.carried(self.reset(state, keep))
        inputs = self.inputs(state, clipped(prev_action) * keep[:, None])
        deter, stats = self.core.settle(state.deter, inputs, self.core.prepare(), max_loops, log_prior=self.log_prior)
        probs = self.posterior(deter, self.post_embed(self.senses(obs)))
        return LatentState(deter, self.draw(probs, self.level(probs, sample))), stats

    # ------------------------------------------------------------------ sequences

    def observe_sequence(self, batch: Batch, loops: int | Tensor | None = None) -> Posterior:
        """Posterior states along (B, T) rows, with gradient; depth by `loops` or the configured sampling."""
        size, length = batch.reward.shape
        state = self.initial(size) if batch.start is None else batch.start
        loops = sample_depth(self.cfg.loop, size, batch.reward.device) if loops is None else loops
        prepared = self.core.prepare()
        seen = self.senses(batch.obs)
        embeds = self.post_embed(seen).unbind(1)
        actions = clipped(batch.prev_action).unbind(1)
        levels = torch.rand(length, size, self.cfg.groups, 1, device=batch.reward.device)
        resets = [True] * length if self.core.static else batch.is_first.any(0).tolist()
        keeps = (1.0 - batch.is_first.to(levels.dtype)).unbind(1)
        deters, stochs, posts, traces, before = [], [], [], [], []
        for t in range(length):
            action = actions[t]
            if resets[t]:
                state, action = self.reset(state, keeps[t]), action * keeps[t][:, None]
            state = self.carried(state)
            deter, trace = self.core(state.deter, self.inputs(state, action), loops, prepared)
            probs = self.posterior(deter, embeds[t])
            state = LatentState(deter, self.draw(probs, levels[t]))
            deters.append(deter)
            stochs.append(state.stoch)
            posts.append(probs)
            traces.append([x.detach() for x in trace.states])
            before.append([x.detach() for x in trace[1:] if x is not None])
        deter = torch.stack(deters, 1)  # (B, T, N, D)
        states = LatentState(deter, torch.stack(stochs, 1))
        levels = torch.stack([torch.stack(level, 1) for level in zip(*traces, strict=True)])  # (R+1, B, T, N, D)
        return Posterior(
            states,
            torch.log(torch.stack(posts, 1)),
            self.log_prior(deter),
            Traces(levels, *(torch.stack(part, 1) for part in zip(*before, strict=True))),
            loops,
            deters,
            seen,
        )

    def imagine(
        self,
        start: LatentState,
        policy: Callable[[Tensor], Tensor] | Tensor,
        horizon: int,
        alive: Tensor | None = None,
        max_loops: int | None = None,
        sample: bool = True,
        grad: bool = False,
    ) -> Rollout:
        """Dream `horizon` steps from (B, ...) states, without gradient unless `grad`.

        policy maps features (B, F) to (B, A) actions, or is itself the (B, H, A) actions of an open-loop prediction.
        """
        if horizon < 1:
            raise ValueError(f"an imagination horizon must be at least 1, got {horizon}")
        with torch.set_grad_enabled(grad):
            prepared = self.core.prepare()
            state, feats, actions, depths, residuals = start, [start.feat()], [], [], []
            for k in range(horizon):
                action = policy[:, k] if isinstance(policy, Tensor) else policy(feats[-1])
                state, stats = self.dream_step(state, action, prepared, max_loops, sample)
                feats.append(state.feat())
                actions.append(action)
                depths.append(stats.depth)
                residuals.append(stats.residual)
            feat = torch.stack(feats)  # (H+1, B, F)
            return Rollout(
                self.unflatten(feat.transpose(0, 1)),
                torch.stack(actions, 1),
                self.twohot.mean(self.reward(feat[1:])).t(),
                torch.sigmoid(self.cont(feat[1:]).squeeze(-1)).t(),
                LoopStats(torch.stack(depths, 1), torch.stack(residuals, 1)),
                torch.ones_like(feat[0, :, 0]) if alive is None else alive,
                feat,
            )

    def dream_step(
        self,
        state: LatentState,
        action: Tensor,
        prepared: Any,
        max_loops: int | None = None,
        sample: bool = True,
    ) -> tuple[LatentState, LoopStats]:
        """One imagined step: the core with exits, then a sample (or the mode) of the prior."""
        state = self.carried(state)
        inputs = self.inputs(state, clipped(action))
        deter, stats = self.core.settle(state.deter, inputs, prepared, max_loops, log_prior=self.log_prior)
        probs = self.prior_probs(deter)
        return LatentState(deter, self.draw(probs, self.level(probs, sample)).to(deter.dtype)), stats

    def decode(self, state: LatentState) -> dict[str, Tensor]:
        """(..., N, D), (..., S, K) -> {name: (..., O), or (..., H, W, C) from 0 to 1} predicted observations."""
        return self.senses.decode(state.feat())

    # ------------------------------------------------------------------ losses

    @property
    def observation(self) -> Senses:
        return self.senses

    def loss(self, post: Posterior, batch: Batch) -> tuple[Tensor, Metrics]:
        """The world-model loss (DreamerV3 eq. 4 and 5) plus the exit gate's regression.

        Returns a scalar, the posterior (with gradient, for the replay value loss), and detached metrics.
        """
        losses = self.losses(post, batch)
        for name, value in losses.items():
            assert value.shape == batch.reward.shape, (name, value.shape)
        metrics = {f"world/{name}_loss": value.detach().mean() for name, value in losses.items()}
        total = torch.stack([value.mean() for value in losses.values()]).sum()
        if isinstance(self.core, LoopedCore) and self.core.rule.trained:
            exit_loss, exit_metrics = self.exit_loss(post)
            total = total + exit_loss
            metrics |= exit_metrics
        metrics |= diagnostics(post)
        return total, metrics

    def losses(self, post: Posterior, batch: Batch) -> dict[str, Tensor]:
        """The weighted losses of every row, (B, T) each."""
        feat = post.states.feat()
        dyn, rep = kl_balance(post.post_logp, post.prior_logp, self.cfg.free_nats)
        alive = 1.0 - batch.is_terminal.float()
        losses = {
            **self.senses.losses(feat, batch.obs, post.seen),
            "reward": self.cfg.reward_scale * self.twohot.loss(self.reward(feat), batch.reward),
            "continue": F.binary_cross_entropy_with_logits(self.cont(feat).squeeze(-1), alive, reduction="none"),
            "dynamics": self.cfg.dyn_scale * dyn,
            "representation": self.cfg.rep_scale * rep,
        }
        if self.surprise is not None:
            kl = kl_divergence(post.post_logp, post.prior_logp)
            losses["surprise"] = self.surprise.loss(post.states.deter, kl)
        if self.cfg.entropy_scale:
            losses["entropy"] = -self.cfg.entropy_scale * (post.post_logp.exp() * post.post_logp).sum((-2, -1))
        return losses

    def exit_loss(self, post: Posterior) -> tuple[Tensor, Metrics]:
        """The exit rule's own loss. Loop states, and what each further loop brought to the prior, are detached."""
        assert isinstance(self.core, LoopedCore)
        states, deter, gate, e = post.trace
        x, change = states[1:], states[1:] - states[:-1]  # (R, B, T, N, D)
        loops, size = len(x), post.post_logp.shape[0]
        gain = deter.new_zeros(0)
        if self.core.rule.needs_gain:
            if loops == 1:
                return gain.sum(), {}
            with torch.no_grad():
                ends = self.core.finish(deter.expand_as(x), x, gate.expand_as(x))
                gain = -kl_divergence(post.post_logp.detach(), self.log_prior(ends)).diff(dim=0)  # (R-1, B, T)
        ran = torch.ones(loops, size, device=deter.device)
        if isinstance(post.loops, Tensor):
            ran = (post.loops > torch.arange(loops, device=deter.device)[:, None]).float()
        return self.core.rule.loss(Lesson(x, change, e, gain, ran))
