"""Control: DreamerV3's recurrent cell, a gated recurrent unit whose matrices are block-diagonal."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.core import Core, CoreSizes, Trace
from world_model.looped import LoopConfig
from world_model.nets import Norm, linear, truncated_normal

BLOCKS = 8
"""Blocks of the recurrent matrices (DreamerV3)."""


class BlockLinear(nn.Module):
    """g independent linear layers side by side: (B, g, I) -> (B, g, O), with bias.

    The initial scale is that of a full matrix (fan-in g * I), as DreamerV3 has it.
    """

    def __init__(self, blocks: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs, outputs))
        truncated_normal(self.weight, 1.0 / math.sqrt(blocks * inputs))
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
    """deter (B, N, D), taken as one vector of N*D numbers in g blocks. The number of loops means nothing.

    Source: the recurrent cell of DreamerV3's code (arXiv 2301.04104): state, latents and action are read by a
    layer each, every block sees all three and its own part of the state, one block-diagonal layer, then the
    gates: deter' = u * tanh(r * c) + (1 - u) * deter with u = sigmoid(. - 1). units: width of the layers that read, by
    default as of the looped core's.
    """

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes, units: int | None = None):
        super().__init__()
        units = units or cfg.units
        flat, latents = cfg.tokens * cfg.width, sizes.groups * sizes.classes
        if flat % BLOCKS:
            raise ValueError(
                f"the GRU has {BLOCKS} blocks, which must divide the size of the state, tokens * width = {flat}: "
                f"give a --model.loop.width that is a multiple of {BLOCKS}"
            )
        self.part, self.latents = flat // BLOCKS, latents
        self.read_deter = Read(flat, units)
        self.read_stoch = Read(latents, units)
        self.read_action = Read(sizes.actions, units)
        self.hidden = BlockLinear(BLOCKS, self.part + 3 * units, self.part)
        self.hidden_norm = Norm(flat)
        self.gates = BlockLinear(BLOCKS, self.part, 3 * self.part)
        self.start = nn.Parameter(torch.randn(cfg.tokens, cfg.width))

    def prepare(self) -> None:
        """Nothing."""

    def forward(self, deter: Tensor, inputs: Tensor, loops: int, prepared: None) -> tuple[Tensor, Trace]:
        latents, action = inputs[:, : self.latents], inputs[:, self.latents :]
        parts = deter.reshape(-1, BLOCKS, self.part)  # (B, g, N*D/g)
        read = torch.cat([self.read_deter(deter.flatten(1)), self.read_stoch(latents), self.read_action(action)], -1)
        read = read[:, None].expand(-1, BLOCKS, -1)  # (B, g, 3U)
        hidden = self.hidden(torch.cat([parts, read], -1))  # (B, g, N*D/g)
        hidden = F.silu(self.hidden_norm(hidden.flatten(1))).view_as(parts)
        reset, candidate, update = self.gates(hidden).chunk(3, -1)  # (B, g, N*D/g) each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        gate = torch.sigmoid(update - 1.0)
        new = torch.lerp(parts, candidate.to(parts.dtype), gate.to(parts.dtype)).reshape(deter.shape)
        return new, Trace([deter, new], deter, gate.reshape(deter.shape))

    def flops(self, loops: float = 1.0) -> float:
        """Two operations for each weight."""
        return 2.0 * sum(p.numel() for name, p in self.named_parameters() if name.endswith("weight"))
