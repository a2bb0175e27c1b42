"""Networks, values and cores that use the kernels, as subclasses of the plain ones: same weights, names and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agent.execution.fused.functions import LayerWeights, certified_loop, chain, loop, prelude, readout
from agent.execution.fused.gru import gru_step
from agent.execution.fused.scan_loops import CertifiedRows, LoopedRows, Rows
from agent.execution.fused.scope import fusible
from agent.execution.fused.values import TwoHotLoss, TwoHotMean
from world_model import TwoHot
from world_model.block import Block
from world_model.certified import CertifiedCore, CertifiedDynamics, CertifiedLoop
from world_model.controls.gru import GRUCore
from world_model.controls.stacked import Layer, StackedCore
from world_model.core import Trace
from world_model.looped import GatedCore, LoopedCore
from world_model.nets import MLP, Norm
from world_model.retention import Dynamics


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
