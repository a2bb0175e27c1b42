"""The modules that use the kernels, as subclasses of the plain ones: same weights, names and results."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from agent.execution.fused.build import load
from agent.execution.fused.functions import Categorical, Sample, layer, loop, prelude, readout
from agent.execution.fused.scope import SCOPE, frozen_weights, fusible
from agent.learning.dreamer import Dreamer
from world_model import LatentState, Rollout, WorldModel
from world_model.latent import UNIMIX
from world_model.looped import LoopedCore
from world_model.nets import MLP
from world_model.retention import Dynamics


class FusedMLP(MLP):
    """Every layer is one operation."""

    def forward(self, x: Tensor) -> Tensor:
        if not fusible(x):
            return super().forward(x)
        for linear, norm in zip(self.hidden[::3], self.hidden[1::3], strict=True):
            x = layer(x, linear.weight, None, norm.gain)
        return x if self.out is None else layer(x, self.out.weight, self.out.bias)


class FusedLoopedCore(LoopedCore):
    """Prelude, loop and read-out are one operation each."""

    def prelude(self, deter: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if not fusible(deter):
            return super().prelude(deter, inputs)
        return prelude(
            deter, inputs, self.prelude_in.weight, self.prelude_norm.gain, self.prelude_out.weight,
            self.input_norm.gain, self.update_gate.weight, self.update_gate.bias,
        )  # fmt: skip

    def inject(self, e: Tensor, prepared: Dynamics) -> Tensor:
        return layer(e, prepared.injection) if fusible(e) else super().inject(e, prepared)

    def refine(self, x: Tensor, injected: Tensor, decay: Tensor) -> Tensor:
        if not fusible(x):
            return super().refine(x, injected, decay)
        block = self.block
        weights = block.mlp_norm.gain, block.up.weight, block.down.weight, self.loop_norm.gain
        if block.attends:
            return loop(None, block.attend(injected + x * decay), None, *weights)
        return loop(x, injected, decay, *weights)

    def readout(self, deter: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        if not fusible(x):
            return super().readout(deter, x, gate)
        return readout(deter, x, gate, self.coda, self.coda_norm.gain)


class FusedWorldModel(WorldModel):
    """The layers of the posterior, categorical distributions and samples are one operation each."""

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        if not fusible(deter):
            return super().posterior(deter, embed)
        hidden = layer(deter.flatten(-2), self.post_deter.weight, embed, self.post_norm.gain)
        return self.probabilities(layer(hidden, self.post_out.weight, self.post_out.bias))

    def probabilities(self, logits: Tensor) -> Tensor:
        if not fusible(logits):
            return super().probabilities(logits)
        return Categorical.apply(logits.view(*logits.shape[:-1], self.cfg.groups, self.cfg.classes), UNIMIX)

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


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    MLP: FusedMLP,
    LoopedCore: FusedLoopedCore,
    WorldModel: FusedWorldModel,
}


def fuse(agent: Dreamer) -> None:
    """Let the agent's networks use the kernels inside of `fused_layers`. Controls keep the cores that they have.

    Compiles the kernels, the first time on a machine; where that fails, nothing is changed.
    """
    SCOPE.kernels = load()
    if SCOPE.kernels is None:
        return
    for module in agent.policy.modules():
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]
