"""Control: DreamerV3's recurrent cell, a gated recurrent unit whose matrices are block-diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.core import Core, CoreSizes, Trace
from world_model.nets import Norm, linear

if TYPE_CHECKING:
    from world_model.looped import LoopConfig


@dataclass(frozen=True)
class GRUConfig:
    """The block GRU; its state is as large as the looped core's."""

    units: int = 128
    """Width of the layers that read state, latents and action."""
    blocks: int = 8
    """Blocks of the recurrent matrices; must divide the state's size."""

    def __post_init__(self) -> None:
        for name in ("units", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class BlockLinear(nn.Module):
    """g independent linear layers side by side: (B, g, I) -> (B, g, O), with bias.

    The initial scale is that of a full matrix (fan-in g * I), as DreamerV3 has it.
    """

    def __init__(self, blocks: int, inputs: int, outputs: int):
        super().__init__()
        std = 1.0 / math.sqrt(blocks * inputs) / 0.8796  # of a unit normal cut off at two deviations
        self.weight = nn.Parameter(torch.empty(blocks, inputs, outputs))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        self.bias = nn.Parameter(torch.zeros(blocks, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


class Read(nn.Module):
    """Linear, norm, silu: one of the three inputs."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.linear, self.norm = linear(inputs, units, bias=True), Norm(units)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.linear(x)))


class GRUCore(Core):
    """deter (B, N, D), taken as one vector of F = N * D numbers in g blocks. The number of loops means nothing.

    Source: the recurrent cell of DreamerV3's code (arXiv 2301.04104): state, latents and action are read by a
    layer each, every block sees all three and its own part of the state, one block-diagonal layer, then the
    gates: deter' = u * tanh(r * c) + (1 - u) * deter with u = sigmoid(. - 1).
    """

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes, gru: GRUConfig):
        super().__init__()
        flat, latents = cfg.tokens * cfg.width, sizes.groups * sizes.classes
        if flat % gru.blocks:
            raise ValueError(f"the GRU's blocks ({gru.blocks}) must divide the size of the state ({flat})")
        self.blocks, self.part, self.latents = gru.blocks, flat // gru.blocks, latents
        self.read_deter = Read(flat, gru.units)
        self.read_stoch = Read(latents, gru.units)
        self.read_action = Read(sizes.actions, gru.units)
        self.hidden = BlockLinear(self.blocks, self.part + 3 * gru.units, self.part)
        self.hidden_norm = Norm(flat)
        self.gates = BlockLinear(self.blocks, self.part, 3 * self.part)
        self.start = nn.Parameter(torch.randn(cfg.tokens, cfg.width))

    def prepare(self) -> None:
        """Nothing."""

    def forward(self, deter: Tensor, inputs: Tensor, loops: int | Tensor, prepared: None) -> tuple[Tensor, Trace]:
        latents, action = inputs[:, : self.latents], inputs[:, self.latents :]
        parts = deter.reshape(-1, self.blocks, self.part)
        said = torch.cat([self.read_deter(deter.flatten(1)), self.read_stoch(latents), self.read_action(action)], -1)
        said = said[:, None].expand(-1, self.blocks, -1)
        hidden = self.hidden(torch.cat([parts, said], -1))
        hidden = F.silu(self.hidden_norm(hidden.flatten(1))).view_as(parts)
        reset, candidate, update = self.gates(hidden).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        gate = torch.sigmoid(update - 1.0)
        new = torch.lerp(parts, candidate.to(parts.dtype), gate.to(parts.dtype)).reshape(deter.shape)
        return new, Trace([deter, new], deter, gate.reshape(deter.shape))

    def flops(self, loops: float = 1.0) -> float:
        """Two operations for each weight."""
        return 2.0 * sum(p.numel() for name, p in self.named_parameters() if name.endswith("weight"))
