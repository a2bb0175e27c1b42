"""The world model that uses the kernels: scans and dreams as one operation each, where they can be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from agent.execution.fused import dream
from agent.execution.fused.behavior import FusedActorCritic
from agent.execution.fused.dream import Dreamed
from agent.execution.fused.dream_gradient import Dream
from agent.execution.fused.functions import LayerWeights, chain
from agent.execution.fused.networks import FusedCertifiedCore, FusedLoopedCore, FusedMLP
from agent.execution.fused.scan import Given, Scan
from agent.execution.fused.scope import frozen_weights, fusible
from agent.execution.fused.values import Sample
from agent.learning.actor_critic import Actor, ActorCritic
from world_model import Batch, LatentState, Rollout, WorldModel
from world_model.core import LoopStats, Traces
from world_model.exits import ExitRule, Gate
from world_model.jumps import action_input, check_jump
from world_model.latents import Categorical, Gaussian, Simplicial
from world_model.types import Scanned


class FusedWorldModel(WorldModel):
    """The scan over the rows is one operation, or posterior, prior and samples are one each."""

    def scan(self, state: LatentState, batch: Batch, embeds: Tensor, levels: Tensor, loops: int) -> Scanned:
        core = self.whole_core()
        if core is None or not (fusible(embeds) and fusible(levels)):
            return super().scan(state, batch, embeds, levels, loops)
        (kind, of_loops), shell = core.loop_weights(), core.shell_weights()
        posterior = self.post_deter.weight, self.post_norm.gain, self.post_out.weight, self.post_out.bias
        weights = (*shell[:6], *of_loops, *shell[6:], *posterior)
        actions = action_input(batch.prev_action, batch.span, self.cfg.jump).transpose(0, 1).contiguous()
        keeps = (1.0 - batch.is_first.to(levels.dtype)).t().contiguous()
        resets, drawn = batch.is_first.any(0).tolist(), type(self.latents) is Categorical
        given = Given(kind, actions, keeps, resets, levels, loops, self.cfg.classes, drawn)
        deter, stoch, probs, *beside = Scan.apply(
            given, state.deter.flatten(1).contiguous(), state.stoch.flatten(1).contiguous(), core.start.flatten(),
            embeds.transpose(0, 1), *weights,
        )  # fmt: skip
        latents = (self.cfg.groups, self.cfg.classes)
        states, e, gate = (x.unsqueeze(-2).transpose(-4, -3) for x in beside)
        rows = LatentState(deter.unsqueeze(-2).transpose(0, 1), stoch.unflatten(-1, latents).transpose(0, 1))
        trace = Traces(states, states[0], gate, e)
        return Scanned(rows, probs.unflatten(-1, latents).transpose(0, 1), trace, list(rows.deter.unbind(1)))

    def whole_core(self) -> FusedLoopedCore | FusedCertifiedCore | None:
        """The core, where it and the latents are such that `Scan` and `Dream` compute them."""
        core = self.core
        if not isinstance(core, FusedLoopedCore | FusedCertifiedCore) or core.cfg.tokens > 1:
            return None
        return core if type(self.latents) in (Categorical, Simplicial) else None

    def described(self, x: Tensor, layers: Sequence[LayerWeights], base: Tensor | None = None) -> Tensor:
        """`latents.distribution` of what the layers give."""
        if isinstance(self.latents, Gaussian):
            return self.latents.distribution(chain(x, layers, base))
        return chain(x, layers, base, self.cfg.classes)

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        if not fusible(deter):
            return super().posterior(deter, embed)
        layers = (self.post_deter.weight, None, self.post_norm.gain), (self.post_out.weight, self.post_out.bias, None)
        return self.described(deter.flatten(-2), layers, embed)

    def prior_probs(self, deter: Tensor) -> Tensor:
        if not fusible(deter) or not isinstance(self.prior, FusedMLP):
            return super().prior_probs(deter)
        return self.described(deter.flatten(-2), self.prior.layers())

    def draw(self, probs: Tensor, level: Tensor | None) -> Tensor:
        if level is None or not fusible(probs) or type(self.latents) is not Categorical:
            return super().draw(probs, level)
        return Sample.apply(probs, level)

    def imagine(
        self, start: LatentState, policy: Any, horizon: int, alive: Tensor | None = None, max_loops: int | None = None,
        sample: bool = True, grad: bool = False, jump: int = 1,
    ) -> Rollout:  # fmt: skip
        """No gradient of an update reaches the world model's weights through dreams, but the policy's."""
        with frozen_weights(fusible(start.deter)):
            if max_loops is None and sample and self.one_operation(start, policy, grad):
                return self.dream(start, policy, horizon, alive, grad, jump)
            return super().imagine(start, unfrozen(policy), horizon, alive, max_loops, sample, grad, jump)

    def one_operation(self, start: LatentState, policy: Any, grad: bool = False) -> bool:
        """Whether a dream can be computed so: of the actor, with a gradient through continuous actions alone, or of
        given actions (B, H, A) without one. There is none to the states at its start."""
        core = self.whole_core()
        if grad and any(leaf.requires_grad for leaf in start):
            return False
        if not fusible(start.deter) or core is None or type(core.rule) not in (Gate, ExitRule):
            return False
        if not isinstance(self.prior, FusedMLP):
            return False
        if isinstance(policy, Tensor):
            return policy.dim() == 3 and not grad
        behavior = getattr(policy, "__self__", None)
        if type(behavior) is not FusedActorCritic or policy.__func__ is not ActorCritic.policy:
            return False
        plain = type(behavior.actor) is Actor and isinstance(behavior.actor.net, FusedMLP)
        return plain and not (grad and behavior.spec.discrete)

    def dream(
        self, start: LatentState, policy: Any, horizon: int, alive: Tensor | None, grad: bool, jump: int
    ) -> Rollout:
        """`imagine` with one operation for all steps."""
        check_jump(jump, self.cfg.jump)
        core, size = self.whole_core(), len(start.deter)
        assert core is not None
        assert isinstance(self.prior, FusedMLP)
        actor = None if isinstance(policy, Tensor) else policy.__self__.actor
        source: Literal["noise", "choice", "given"] = "given"
        if actor is not None:
            source = "choice" if actor.spec.discrete else "noise"
        noise, levels = [], []
        for t in range(horizon):
            if actor is None:
                noise.append(action_input(policy[:, t], jump, self.cfg.jump))  # (B, C)
            else:
                noise.append(torch.rand(size, 1) if source == "choice" else torch.randn(size, self.action_size))
            levels.append(self.latents.level((size,), start.deter))
        gate, rule = None, core.rule
        if isinstance(rule, Gate):
            gate = dream.GateWeights(rule.state.weight[0], rule.state.bias, rule.change.weight[0], rule.threshold)
        with torch.no_grad():
            kind, of_loops = core.loop_weights()
        (w_prior, _, gain_prior), (w_logits, b_logits, _) = self.prior.layers()
        shell = core.shell_weights()
        weights = (*shell[:6], *of_loops, *shell[6:], w_prior, gain_prior, w_logits, b_logits)
        given = dream.Given(
            kind, core.cfg.run_cap, jump, self.cfg.jump, start.deter.flatten(1).contiguous(),
            start.stoch.flatten(1).contiguous(), self.action_size, source, torch.stack(noise), torch.stack(levels),
            self.cfg.classes, type(self.latents) is Categorical, weights, gate,
        )  # fmt: skip
        layers = [] if actor is None else list(itertools.chain.from_iterable(actor.net.layers()))
        with torch.set_grad_enabled(grad):
            dreamed = Dreamed(*Dream.apply(given, *layers)) if grad else dream.run_forward(given, layers)[-1]
            feat, outputs, actions, depth, residual = dreamed
            actions = policy[:, :horizon] if actor is None else actions.transpose(0, 1)  # (B, H, A)
            loops = LoopStats(depth.t().long(), residual.transpose(0, 1))  # (B, H), (B, H, R)
            return self.rollout(feat, actions, loops, alive, outputs if grad else None)


def unfrozen(policy: Any) -> Any:
    """The same policy, whose weights get gradients."""

    def act(feat: Tensor) -> Tensor:
        with frozen_weights(False):
            return policy(feat)

    return policy if isinstance(policy, Tensor) else act
