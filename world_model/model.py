"""The world model: encoder, looped core, categorical latents with prior and posterior, and the heads.

Symbols: B batch, T time, H horizon, O observation size, A action size, N tokens, D token width, S groups,
K classes, R loops, F = N*D + S*K features, U units.

    observe   prior step through the core, then the posterior sees the observation    (acting, training)
    imagine   prior step through the core, and a sample of the prior                  (dreams, open loop)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.distributions import TwoHot, symexp, symlog
from world_model.latent import LatentState, kl_balance, kl_divergence, probabilities, sample_onehot
from world_model.looped import Dynamics, LoopConfig, LoopedCore, LoopStats, sample_depth
from world_model.nets import MLP, Norm, linear
from world_model.types import Batch, Posterior, Rollout

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and losses of the world model."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """The looped core."""
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
    rec_scale: float = 10.0
    """Weight of the reconstruction loss: the inverse of the observation noise that the decoder assumes, halved."""
    dyn_scale: float = 1.0
    """Weight of the dynamics loss KL(sg(posterior) || prior)."""
    rep_scale: float = 0.1
    """Weight of the representation loss KL(posterior || sg(prior))."""
    entropy_scale: float = 0.0
    """Weight of the posterior's entropy. Latents that nothing needs then rest, instead of feeding noise to the core."""
    bins: int = 95
    """Bins of the two-hot reward and value heads (odd)."""
    bin_limit: float = 20_000.0
    """Largest reward or value that the bins can express."""


def clipped(action: Tensor) -> Tensor:
    """Actions beyond 1 count as 1, as in the environment, but keep their gradient (DreamerV3)."""
    return action / action.detach().abs().clamp(min=1.0)


class WorldModel(nn.Module):
    """obs_sizes {name: O}; action_size A (one-hot size for discrete actions)."""

    def __init__(self, cfg: ModelConfig, obs_sizes: dict[str, int], action_size: int):
        super().__init__()
        self.cfg, self.obs_sizes, self.action_size = cfg, dict(obs_sizes), action_size
        loop, stoch, units = cfg.loop, cfg.groups * cfg.classes, cfg.units
        flat, total = loop.tokens * loop.width, sum(obs_sizes.values())
        self.feat_size = flat + stoch
        self.core = LoopedCore(loop, cfg.groups, cfg.classes, action_size)
        self.encoder = MLP(total, units, 1)
        # The posterior's first layer is split, so that its observation half runs outside of the scan.
        self.post_deter = linear(flat, units)
        self.post_embed = linear(units, units)
        self.post_norm = Norm(units)
        self.post_out = linear(units, stoch, bias=True)
        self.prior = MLP(flat, units, 1, stoch)
        self.decoder = MLP(self.feat_size, units, cfg.decoder_layers, total)
        self.twohot = TwoHot(cfg.bins, cfg.bin_limit)
        self.reward = MLP(self.feat_size, units, 1, cfg.bins, out_scale=0.0)
        self.cont = MLP(self.feat_size, units, 1, 1)

    # ------------------------------------------------------------------ states

    def initial(self, batch: int) -> LatentState:
        """The state before the first observation of an episode: learned tokens, no latents."""
        start = self.core.start
        return LatentState(start.expand(batch, *start.shape), start.new_zeros(batch, self.cfg.groups, self.cfg.classes))

    def reset(self, state: LatentState, keep: Tensor) -> LatentState:
        """The initial state where keep (B,) is 0, the given state where it is 1."""
        keep = keep[:, None, None]
        return LatentState(torch.lerp(self.core.start, state.deter, keep), state.stoch * keep)

    def embed(self, obs: dict[str, Tensor]) -> Tensor:
        """{name: (..., O)} -> (..., U), the observation's half of the posterior's first layer."""
        return self.post_embed(self.encoder(symlog(self.flatten(obs))))

    def flatten(self, obs: dict[str, Tensor]) -> Tensor:
        """The observation vectors side by side, (..., sum of O)."""
        parts = [obs[name] for name in self.obs_sizes]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

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

    def probabilities(self, logits: Tensor) -> Tensor:
        shape = (*logits.shape[:-1], self.cfg.groups, self.cfg.classes)
        return probabilities(logits.view(shape), self.cfg.unimix)

    def level(self, probs: Tensor, sample: bool) -> Tensor | None:
        """(..., S, 1) random levels at which to sample, or None for the mode."""
        return torch.rand(*probs.shape[:-1], 1, device=probs.device, dtype=probs.dtype) if sample else None

    def inputs(self, state: LatentState, action: Tensor) -> Tensor:
        """(B, S*K + A): what enters the core beside deter."""
        return torch.cat([state.stoch.flatten(1), action], -1)

    def carried(self, state: LatentState) -> LatentState:
        """The state as the next step may see it: unchanged, unless the memory is cut."""
        return self.initial(len(state.deter)) if self.cfg.loop.carry == "cut" else state

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
        deter, stats = self.core.settle(state.deter, inputs, self.core.retention(), max_loops)
        probs = self.posterior(deter, self.embed(obs))
        return LatentState(deter, sample_onehot(probs, self.level(probs, sample))), stats

    # ------------------------------------------------------------------ sequences

    def observe_sequence(self, batch: Batch, loops: int | Tensor | None = None) -> Posterior:
        """Posterior states along (B, T) rows, with gradient; depth by `loops` or the configured sampling."""
        size, length = batch.reward.shape
        state = self.initial(size) if batch.start is None else batch.start
        loops = sample_depth(self.cfg.loop, size, batch.reward.device) if loops is None else loops
        dynamics = self.core.retention()
        embeds = self.embed(batch.obs).unbind(1)
        actions = clipped(batch.prev_action).unbind(1)
        levels = torch.rand(length, size, self.cfg.groups, 1, device=batch.reward.device)
        resets = batch.is_first.any(0).tolist()
        keeps = (1.0 - batch.is_first.to(levels.dtype)).unbind(1)
        deters, stochs, posts, traces, gates = [], [], [], [], []
        for t in range(length):
            action = actions[t]
            if resets[t]:
                state, action = self.reset(state, keeps[t]), action * keeps[t][:, None]
            state = self.carried(state)
            deter, trace, gate = self.core(state.deter, self.inputs(state, action), loops, dynamics)
            probs = self.posterior(deter, embeds[t])
            state = LatentState(deter, sample_onehot(probs, levels[t]))
            deters.append(deter)
            stochs.append(state.stoch)
            posts.append(probs)
            traces.append([x.detach() for x in trace])
            gates.append(gate.detach())
        deter = torch.stack(deters, 1)  # (B, T, N, D)
        states = LatentState(deter, torch.stack(stochs, 1))
        trace = torch.stack([torch.stack(level, 1) for level in zip(*traces, strict=True)])  # (R+1, B, T, N, D)
        return Posterior(
            states,
            torch.log(torch.stack(posts, 1)),
            torch.log(self.prior_probs(deter)),
            (trace[1:], trace[0], torch.stack(gates, 1)),
            loops,
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
            dynamics = self.core.retention()
            state, feats, actions, depths, residuals = start, [start.feat()], [], [], []
            for k in range(horizon):
                action = policy[:, k] if isinstance(policy, Tensor) else policy(feats[-1])
                state, stats = self.dream_step(state, action, dynamics, max_loops, sample)
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
        dynamics: Dynamics,
        max_loops: int | None = None,
        sample: bool = True,
    ) -> tuple[LatentState, LoopStats]:
        """One imagined step: the core with exits, then a sample (or the mode) of the prior."""
        state = self.carried(state)
        deter, stats = self.core.settle(state.deter, self.inputs(state, clipped(action)), dynamics, max_loops)
        probs = self.prior_probs(deter)
        return LatentState(deter, sample_onehot(probs, self.level(probs, sample)).to(deter.dtype)), stats

    def decode(self, state: LatentState) -> dict[str, Tensor]:
        """(..., N, D), (..., S, K) -> {name: (..., O)} predicted observations."""
        parts = symexp(self.decoder(state.feat())).split(list(self.obs_sizes.values()), -1)
        return dict(zip(self.obs_sizes, parts, strict=True))

    # ------------------------------------------------------------------ losses

    def loss(self, batch: Batch, loops: int | Tensor | None = None) -> tuple[Tensor, Posterior, Metrics]:
        """The world-model loss (DreamerV3 eq. 4 and 5) plus the exit gate's regression.

        Returns a scalar, the posterior (with gradient, for the replay value loss), and detached metrics.
        """
        post = self.observe_sequence(batch, loops)
        feat = post.states.feat()
        target = symlog(self.flatten(batch.obs))
        dyn, rep, kl = kl_balance(post.post_logp, post.prior_logp, self.cfg.free_nats)
        losses = {
            "reconstruction": self.cfg.rec_scale * (self.decoder(feat) - target).square().sum(-1),
            "reward": self.twohot.loss(self.reward(feat), batch.reward),
            "continue": F.binary_cross_entropy_with_logits(
                self.cont(feat).squeeze(-1), 1.0 - batch.is_terminal.float(), reduction="none"
            ),
            "dynamics": self.cfg.dyn_scale * dyn,
            "representation": self.cfg.rep_scale * rep,
        }
        if self.cfg.entropy_scale:
            entropy = -(post.post_logp.exp() * post.post_logp).sum((-2, -1))
            losses["entropy"] = self.cfg.entropy_scale * entropy
        for name, value in losses.items():
            assert value.shape == batch.reward.shape, (name, value.shape)
        metrics = {f"world/{name}_loss": value.detach().mean() for name, value in losses.items()}
        total = sum(value.mean() for value in losses.values())
        if self.cfg.loop.exit == "gate" and len(post.trace[0]) > 1:
            exit_loss, exit_metrics = self.exit_loss(post)
            total = total + exit_loss
            metrics |= exit_metrics
        metrics |= self.diagnostics(post, kl)
        return total, post, metrics

    def exit_loss(self, post: Posterior) -> tuple[Tensor, Metrics]:
        """Regress the exit gate on what each further loop brought to the prior (nats of KL).

        Only the gate is trained here: loop states and improvements are detached, so that the gate cannot
        bend the trajectory that it judges.
        """
        trace, start, gate = post.trace  # (R, B, T, N, D), (B, T, N, D), (B, T, N, D)
        with torch.no_grad():
            deter = self.core.finish(start.expand_as(trace), trace, gate.expand_as(trace))
            kl = kl_divergence(post.post_logp.detach(), torch.log(self.prior_probs(deter)))  # (R, B, T)
            gain = (kl[:-1] - kl[1:]).clamp(-2.0, 2.0)
            change = torch.diff(torch.cat([start[None], trace[:-1]]), dim=0)  # change of loops 1..R-1
        flat = trace[:-1].flatten(0, 2)
        predicted = self.core.improvement(flat, change.flatten(0, 2)).view_as(gain)
        error = (predicted - gain).square().mean(-1)  # (R-1, B)
        ran = torch.ones_like(error)
        if isinstance(post.loops, Tensor):  # a sequence teaches nothing about loops that it did not run
            ran = (post.loops > torch.arange(1, len(trace), device=gain.device)[:, None]).float()
        loss = (error * ran).sum() / ran.sum().clamp(min=1)
        second = (gain[0].mean(-1) * ran[0]).sum() / ran[0].sum().clamp(min=1)
        return loss, {"loop/exit_loss": loss.detach(), "loop/gain_second": second}

    @torch.no_grad()
    def diagnostics(self, post: Posterior, kl: Tensor) -> Metrics:
        """Health of latents and loop, as 0-d tensors."""
        trace, start, gate = post.trace
        last = trace[-1]
        previous = trace[-2] if len(trace) > 1 else start
        return {
            "world/kl": kl.mean(),
            "world/posterior_entropy": -(post.post_logp.exp() * post.post_logp).sum((-2, -1)).mean(),
            "world/prior_entropy": -(post.prior_logp.exp() * post.prior_logp).sum((-2, -1)).mean(),
            "loop/train_depth": torch.as_tensor(post.loops, dtype=torch.float32).mean(),
            "loop/residual_last": ((last - previous).norm() / last.norm()),
            "loop/state_norm": post.states.deter.flatten(2).norm(dim=-1).mean(),
            "loop/update_gate": gate.mean(),
            "loop/decay_max": self.core.retention().decay.max(),
        }
