"""Control: the looped core with separate weights for each application, a stack of layers of fixed depth."""

from __future__ import annotations

from torch import Tensor, nn

from world_model.block import Block
from world_model.core import CoreSizes, Trace
from world_model.looped import GatedCore, LoopConfig
from world_model.nets import Norm
from world_model.retention import Dynamics, Retention


class Layer(nn.Module):
    """What the looped core applies in each loop, with weights of its own."""

    def __init__(self, cfg: LoopConfig, hidden: int):
        super().__init__()
        self.retention = Retention(cfg.width, cfg.gain, cfg.retention)
        self.block = Block(cfg.tokens, cfg.width, cfg.heads, hidden)
        self.norm = Norm(cfg.width)

    def forward(self, x: Tensor, e: Tensor, dynamics: Dynamics) -> Tensor:
        return self.norm(self.block(x * dynamics.decay + e @ dynamics.injection.t()))


class StackedCore(GatedCore):
    """cfg: the `LoopConfig` that this is the control of, with as many layers as that has loops on average; hidden:
    width of the gated MLPs, by default as there. The number of loops asked for means nothing here.
    """

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes, hidden: int | None = None):
        super().__init__(cfg, sizes)
        self.layers = nn.ModuleList(Layer(cfg, hidden or cfg.hidden) for _ in range(round(cfg.mean_loops)))

    def prepare(self) -> list[Dynamics]:
        """Abar and Bbar of every layer."""
        return [module() for module in self.modules() if isinstance(module, Retention)]

    def forward(self, deter: Tensor, inputs: Tensor, loops: int, prepared: list[Dynamics]) -> tuple[Tensor, Trace]:
        e, gate = self.prelude(deter, inputs)  # (B, N, D) each
        states = [deter]
        for layer, dynamics in zip(self.layers, prepared, strict=True):
            states.append(layer(states[-1], e, dynamics))
        return self.readout(deter, states[-1], gate), Trace(states, deter, gate, e)

    def flops(self, loops: float = 1.0) -> float:
        """Every layer once, whatever `loops`."""
        layers = [layer for layer in self.layers if isinstance(layer, Layer)]
        injection = 2.0 * self.cfg.tokens * self.cfg.width**2
        return self.shell_flops() + sum(injection + layer.block.flops() for layer in layers)
