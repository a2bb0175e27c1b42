"""The modules that use the kernels, as subclasses of the plain ones: same weights, names and results."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from agent.execution.fused.build import load
from agent.execution.fused.functions import LayerWeights, Sample, certified_loop, chain, loop, prelude, readout
from agent.execution.fused.scan import Given, Rows, Scan
from agent.execution.fused.scan_loops import CertifiedRows, LoopedRows
from agent.execution.fused.scope import Scope, frozen_weights, fusible
from agent.learning.actor_critic import Critic
from agent.learning.dreamer import Dreamer
from world_model import Batch, LatentState, Rollout, WorldModel
from world_model.block import Block
from world_model.certified import CertifiedCore, CertifiedDynamics, CertifiedLoop
from world_model.controls.stacked import Layer, StackedCore
from world_model.core import Traces
from world_model.jumps import control
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
        return readout(deter, x, gate, self.coda, self.coda_norm.gain)


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


class FusedWorldModel(WorldModel):
    """The scan over the rows is one operation, or posterior, prior and samples are one each."""

    def scan(self, state: LatentState, batch: Batch, embeds: Tensor, levels: Tensor, loops: int) -> Scanned:
        core = self.core
        if not fusible(embeds) or not isinstance(core, FusedLoopedCore | FusedCertifiedCore) or core.cfg.tokens > 1:
            return super().scan(state, batch, embeds, levels, loops)
        kind, of_loops = core.loop_weights()
        weights = (
            core.prelude_in.weight, core.prelude_norm.gain, core.prelude_out.weight, core.input_norm.gain,
            core.update_gate.weight, core.update_gate.bias, *of_loops, core.coda, core.coda_norm.gain,
            self.post_deter.weight, self.post_norm.gain, self.post_out.weight, self.post_out.bias,
        )  # fmt: skip
        actions = control(batch.prev_action, batch.taken, self.cfg.jump).transpose(0, 1).contiguous()
        keeps = (1.0 - batch.is_first.to(levels.dtype)).t().contiguous()
        given = Given(kind, actions, keeps, batch.is_first.any(0).tolist(), levels, loops, self.cfg.classes)
        deter, stoch, probs, *beside = Scan.apply(
            given, state.deter.flatten(1).contiguous(), state.stoch.flatten(1).contiguous(), core.start.flatten(),
            embeds.transpose(0, 1), *weights,
        )  # fmt: skip
        latents = (self.cfg.groups, self.cfg.classes)
        states, e, gate, before = (x.unsqueeze(-2).transpose(-4, -3) for x in beside)
        rows = LatentState(deter.unsqueeze(-2).transpose(0, 1), stoch.unflatten(-1, latents).transpose(0, 1))
        trace = Traces(states, before, gate, e)
        return Scanned(rows, probs.unflatten(-1, latents).transpose(0, 1), trace, list(rows.deter.unbind(1)))

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        if not fusible(deter):
            return super().posterior(deter, embed)
        layers = (self.post_deter.weight, None, self.post_norm.gain), (self.post_out.weight, self.post_out.bias, None)
        return chain(deter.flatten(-2), layers, embed, self.cfg.classes)

    def prior_probs(self, deter: Tensor) -> Tensor:
        if not fusible(deter) or not isinstance(self.prior, FusedMLP):
            return super().prior_probs(deter)
        return chain(deter.flatten(-2), self.prior.layers(), classes=self.cfg.classes)

    def draw(self, probs: Tensor, level: Tensor | None) -> Tensor:
        if level is None or not fusible(probs):
            return super().draw(probs, level)
        return Sample.apply(probs, level)

    def imagine(self, start: LatentState, policy: Any, *args: Any, **options: Any) -> Rollout:
        """No gradient of an update reaches the world model's weights through dreams, but the policy's."""

        def act(feat: Tensor) -> Tensor:
            with frozen_weights(False):
                return policy(feat)

        with frozen_weights(fusible(start.deter)):
            return super().imagine(start, policy if isinstance(policy, Tensor) else act, *args, **options)


class FusedCritic(Critic):
    """The gradient of a value is the actor's: it ends at the inputs."""

    def value(self, feat: Tensor) -> Tensor:
        with frozen_weights(fusible(feat)):
            return super().value(feat)


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    MLP: FusedMLP,
    LoopedCore: FusedLoopedCore,
    CertifiedCore: FusedCertifiedCore,
    CertifiedLoop: FusedCertifiedLoop,
    StackedCore: FusedStackedCore,
    Layer: FusedLayer,
    WorldModel: FusedWorldModel,
    Critic: FusedCritic,
}


def fuse(agent: Dreamer) -> None:
    """Let the agent's networks use the kernels inside of `fused_layers`."""
    fuse_modules(agent.policy)


def fuse_modules(net: nn.Module) -> None:
    """Let a network use the kernels inside of `fused_layers`; a GRU, and cores of one's own, keep what they have.

    Compiles the kernels, the first time on a machine; where that fails, nothing is changed.
    """
    Scope.kernels = load()  # for all threads
    if Scope.kernels is None:
        return
    for module in net.modules():
        if isinstance(module, WorldModel) and module.cfg.latents != "categorical":
            continue
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]
