"""The modules that use the kernels, as subclasses of the plain ones: same weights, names and results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agent.execution.fused import dream
from agent.execution.fused.build import load
from agent.execution.fused.dream import Dreamed
from agent.execution.fused.dream_gradient import Dream
from agent.execution.fused.functions import (
    LayerWeights,
    Sample,
    TwoHotLoss,
    TwoHotMean,
    certified_loop,
    chain,
    loop,
    prelude,
    readout,
)
from agent.execution.fused.gru import gru_step
from agent.execution.fused.scan import Given, Scan
from agent.execution.fused.scan_loops import CertifiedRows, LoopedRows, Rows
from agent.execution.fused.scope import Scope, frozen_weights, fusible
from agent.learning.actor_critic import Actor, ActorCritic, Critic
from agent.learning.dreamer import Dreamer
from world_model import Batch, LatentState, Rollout, TwoHot, WorldModel
from world_model.block import Block
from world_model.certified import CertifiedCore, CertifiedDynamics, CertifiedLoop
from world_model.controls.gru import GRUCore
from world_model.controls.stacked import Layer, StackedCore
from world_model.core import LoopStats, Trace, Traces
from world_model.exits import ExitRule, Gate
from world_model.jumps import control
from world_model.latents import Categorical, Gaussian, Simplicial
from world_model.looped import GatedCore, LoopedCore
from world_model.nets import MLP, Norm
from world_model.retention import Dynamics
from world_model.types import Scanned


class FusedMLP(MLP):
    """All layers are one operation."""

    def layers(self) -> list[LayerWeights]:
        hidden: list[Any] = list(self.hidden)
        pairs = zip(hidden[::3], hidden[1::3], strict=True)
        layers: list[LayerWeights] = [(linear.weight, None, norm.gain) for linear, norm in pairs]
        return layers if self.out is None else [*layers, (self.out.weight, self.out.bias, None)]

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, self.layers()) if fusible(x) else super().forward(x)


class FusedTwoHot(TwoHot):
    """Mean and loss are one operation each."""

    def mean(self, logits: Tensor) -> Tensor:
        return TwoHotMean.apply(logits, self.bins) if fusible(logits) else super().mean(logits)

    def loss(self, logits: Tensor, target: Tensor, second: Tensor | None = None, scale: float = 1.0) -> Tensor:
        targets = [target] if second is None else [target, second]
        if not fusible(logits) or any(given.dtype != torch.float32 for given in targets):
            return super().loss(logits, target, second, scale)
        shaped = [given.detach().expand(logits.shape[:-1]) for given in targets]
        return TwoHotLoss.apply(logits, self.bins, shaped[0], shaped[1] if second is not None else None, scale)


class FusedGatedCore(GatedCore):
    """Prelude and read-out are one operation each."""

    def prelude(self, deter: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if not fusible(deter):
            return super().prelude(deter, inputs)
        return prelude(
            deter, inputs, self.prelude_in.weight, self.prelude_norm.gain, self.prelude_out.weight,
            self.input_norm.gain, self.update_gate.weight, self.update_gate.bias,
        )  # fmt: skip

    def readout(self, deter: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        if not fusible(x):
            return super().readout(deter, x, gate)
        return readout(deter.expand_as(x), x, gate.expand_as(x), self.coda, self.coda_norm.gain)

    def shell_weights(self) -> tuple[Tensor, ...]:
        """Six of prelude and outer gate, two of the read-out, in the order of scans and dreams."""
        return (
            self.prelude_in.weight, self.prelude_norm.gain, self.prelude_out.weight, self.input_norm.gain,
            self.update_gate.weight, self.update_gate.bias, self.coda, self.coda_norm.gain,
        )  # fmt: skip


class FusedLoopedCore(FusedGatedCore, LoopedCore):
    """A loop is one operation too."""

    def inject(self, e: Tensor, prepared: Dynamics) -> Tensor:
        return chain(e, [(prepared.injection, None, None)]) if fusible(e) else super().inject(e, prepared)

    def refine(self, x: Tensor, injected: Tensor, prepared: Dynamics) -> Tensor:
        if not fusible(x):
            return super().refine(x, injected, prepared)
        return one_loop(self.block, self.loop_norm, x, injected, prepared.decay)

    def loop_weights(self) -> tuple[Rows, tuple[Tensor, ...]]:
        """How the scan runs the loops, and the weights in its order."""
        (decay, injection), block = self.prepare(), self.block
        mlp = block.mlp_norm.gain, block.up.weight, block.down.weight
        return LoopedRows, (injection, decay, *mlp, self.loop_norm.gain)


def one_loop(block: Block, norm: Norm, x: Tensor, injected: Tensor, decay: Tensor) -> Tensor:
    """(M, N, D) -> (M, N, D): retention and injection, block, norm."""
    weights = block.mlp_norm.gain, block.up.weight, block.down.weight, norm.gain
    if block.attends:
        return loop(None, block.attend(injected + x * decay), None, *weights)
    return loop(x, injected, decay, *weights)


class FusedCertifiedLoop(CertifiedLoop):
    """With one token a loop is one operation; with several, which mix, it stays plain."""

    def inject(self, e: Tensor, prepared: CertifiedDynamics) -> Tensor:
        if prepared.mixing is not None or not fusible(e):
            return super().inject(e, prepared)
        return chain(e, [(prepared.reads, None, None)])  # the kernel takes the gate's sigmoid

    def forward(self, x: Tensor, injected: Tensor, prepared: CertifiedDynamics) -> Tensor:
        if prepared.mixing is not None or not fusible(x):
            return super().forward(x, injected, prepared)
        return certified_loop(x, injected, prepared.decay, prepared.coupling, prepared.up, prepared.down)


class FusedCertifiedCore(FusedGatedCore, CertifiedCore):
    """Its loop is a `FusedCertifiedLoop`, as that of a contracting core is, whose prelude and read-out stay plain."""

    def loop_weights(self) -> tuple[Rows, tuple[Tensor, ...]]:
        decay, coupling, up, down, reads, _ = self.prepare()
        return CertifiedRows, (reads, decay, coupling, up, down)


class FusedStackedCore(FusedGatedCore, StackedCore):
    """Its layers are `FusedLayer`."""


class FusedLayer(Layer):
    """What a loop is to the looped core."""

    def forward(self, x: Tensor, e: Tensor, dynamics: Dynamics) -> Tensor:
        if not fusible(x):
            return super().forward(x, e, dynamics)
        return one_loop(self.block, self.norm, x, chain(e, [(dynamics.injection, None, None)]), dynamics.decay)


class FusedGRUCore(GRUCore):
    """A step is one operation."""

    def forward(self, deter: Tensor, inputs: Tensor, loops: int, prepared: None) -> tuple[Tensor, Trace]:
        if not fusible(deter):
            return super().forward(deter, inputs, loops, prepared)
        weights: list[Tensor] = []
        for read in (self.read_deter, self.read_stoch, self.read_action):
            weights += read.linear.weight, read.linear.bias, read.norm.gain
        weights += self.hidden.weight, self.hidden.bias, self.hidden_norm.gain, self.gates.weight, self.gates.bias
        new, gate = gru_step(deter.flatten(1), inputs, self.latents, weights)
        return new.view_as(deter), Trace([deter, new.view_as(deter)], deter, gate.view_as(deter))


class FusedWorldModel(WorldModel):
    """The scan over the rows is one operation, or posterior, prior and samples are one each."""

    def scan(self, state: LatentState, batch: Batch, embeds: Tensor, levels: Tensor, loops: int) -> Scanned:
        core = self.whole_core()
        if core is None or not fusible(embeds):
            return super().scan(state, batch, embeds, levels, loops)
        (kind, of_loops), shell = core.loop_weights(), core.shell_weights()
        posterior = self.post_deter.weight, self.post_norm.gain, self.post_out.weight, self.post_out.bias
        weights = (*shell[:6], *of_loops, *shell[6:], *posterior)
        actions = control(batch.prev_action, batch.taken, self.cfg.jump).transpose(0, 1).contiguous()
        keeps = (1.0 - batch.is_first.to(levels.dtype)).t().contiguous()
        resets, drawn = batch.is_first.any(0).tolist(), type(self.latents) is Categorical
        given = Given(kind, actions, keeps, resets, levels, loops, self.cfg.classes, drawn)
        deter, stoch, probs, *beside = Scan.apply(
            given, state.deter.flatten(1).contiguous(), state.stoch.flatten(1).contiguous(), core.start.flatten(),
            embeds.transpose(0, 1), *weights,
        )  # fmt: skip
        latents = (self.cfg.groups, self.cfg.classes)
        states, e, gate, before = (x.unsqueeze(-2).transpose(-4, -3) for x in beside)
        rows = LatentState(deter.unsqueeze(-2).transpose(0, 1), stoch.unflatten(-1, latents).transpose(0, 1))
        trace = Traces(states, before, gate, e)
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
        given actions (B, H, A) without one."""
        core = self.whole_core()
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
                noise.append(control(policy[:, t], jump, self.cfg.jump))  # (B, C)
            else:
                noise.append(torch.rand(size, 1) if source == "choice" else torch.randn(size, self.action_size))
            levels.append(self.latents.level((size,), start.deter))
        gate, rule = None, core.rule
        if isinstance(rule, Gate):
            gate = dream.Gate(rule.state.weight[0], rule.state.bias, rule.change.weight[0], rule.threshold)
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
            actions = dreamed.actions.transpose(0, 1) if actor is not None else policy[:, :horizon]
            return self.rollout(dreamed._replace(actions=actions), alive, grad)

    def rollout(self, dreamed: Dreamed, alive: Tensor | None, grad: bool) -> Rollout:
        """With the rewards and continues of its features; its actions are (B, H, A)."""
        feat, outputs, actions, depth, residual = dreamed
        return Rollout(
            states=self.unflatten(feat.transpose(0, 1)),
            actions=actions,
            rewards=self.twohot.mean(self.reward(ahead := feat[1:])).t(),
            continues=torch.sigmoid(self.cont(ahead).squeeze(-1)).t(),
            loops=LoopStats(depth.t().long(), residual.transpose(0, 1)),
            alive=torch.ones_like(feat[0, :, 0]) if alive is None else alive,
            feat=feat,
            outputs=outputs if grad else None,
        )


def unfrozen(policy: Any) -> Any:
    """The same policy, whose weights get gradients."""

    def act(feat: Tensor) -> Tensor:
        with frozen_weights(False):
            return policy(feat)

    return policy if isinstance(policy, Tensor) else act


class FusedActorCritic(ActorCritic):
    """Logits and values of a rollout are computed once: those have the gradient of weights, these that of features."""

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        net = self.critic.net
        if not (self.dynamics_backprop and fusible(rollout.feat) and isinstance(net, FusedMLP)):
            return super().values(rollout)
        known: list[Any] = []
        logits = chain(rollout.feat.detach(), net.layers(), known=known)
        with frozen_weights():
            same = chain(rollout.feat, net.layers(), known=known)
        return logits, self.critic.twohot.mean(same).t()


class FusedCritic(Critic):
    """The gradient of a value is the actor's: it ends at the inputs."""

    def value(self, feat: Tensor) -> Tensor:
        with frozen_weights(fusible(feat)):
            return super().value(feat)


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    MLP: FusedMLP,
    TwoHot: FusedTwoHot,
    LoopedCore: FusedLoopedCore,
    CertifiedCore: FusedCertifiedCore,
    CertifiedLoop: FusedCertifiedLoop,
    StackedCore: FusedStackedCore,
    GRUCore: FusedGRUCore,
    Layer: FusedLayer,
    WorldModel: FusedWorldModel,
    Critic: FusedCritic,
    ActorCritic: FusedActorCritic,
}


def fuse(agent: Dreamer) -> None:
    """Let the agent's networks use the kernels inside of `fused_layers`."""
    fuse_modules(agent.policy)


def fuse_modules(net: nn.Module) -> None:
    """Let a network use the kernels inside of `fused_layers`; cores of one's own keep what they have.

    Compiles the kernels, the first time on a machine; where that fails, nothing is changed.
    """
    Scope.kernels = load()  # for all threads
    if Scope.kernels is None:
        return
    for module in net.modules():
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]
