"""The transformer block of a loop: attention over the N tokens of one state, then a gated MLP; pre-norm, residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from world_model.latent import probabilities
from world_model.nets import Norm, linear

FEW = 8
"""Most tokens for which attention is written out."""


class Block(nn.Module):
    """(B, N, D) -> (B, N, D). `hidden` is the width of the gated MLP.

    For a handful of tokens attention is written out. Products of 4 x 16 matrices take a third of the time elementwise
    on a CPU, and the fused kernel of a GPU works on tiles of 64 x 64.
    """

    def __init__(self, tokens: int, width: int, heads: int, hidden: int):
        super().__init__()
        self.tokens, self.heads = tokens, heads
        self.attends = tokens > 1  # one token would attend to itself alone: a linear map
        if self.attends:
            self.attention_norm = Norm(width)
            self.qkv = linear(width, 3 * width)
            self.merge = linear(width, width, scale=0.1)
        self.mlp_norm = Norm(width)
        self.up = linear(width, 2 * hidden)
        self.down = linear(hidden, width, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x) if self.attends else x
        gate, value = self.up(self.mlp_norm(x)).chunk(2, -1)  # (B, N, hidden) each
        return x + self.down(F.silu(gate) * value)

    def attend(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        return x + self.merge(self.attention(self.qkv(self.attention_norm(x))))

    def attention(self, qkv: Tensor) -> Tensor:  # (B, N, 3D) -> (B, N, D)
        batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.view(shape).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        if tokens > FEW:
            mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, N, d)
        else:
            scores = (query.unsqueeze(3) * key.unsqueeze(2)).sum(-1) * shape[-1] ** -0.5  # (B, heads, N, N)
            mixed = (probabilities(scores, 0.0).to(value.dtype).unsqueeze(-1) * value.unsqueeze(2)).sum(3)
        return mixed.transpose(1, 2).reshape(batch, tokens, width)

    def flops(self) -> float:
        """Operations for one state of N tokens."""
        weights = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        mixing = 4.0 * self.tokens**2 * self.down.out_features if self.attends else 0.0
        return 2.0 * self.tokens * weights + mixing
