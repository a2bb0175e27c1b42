"""How far a step can be trusted: the surprise that the world model expects of itself, read off its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.nets import linear


class Surprise(nn.Module):
    """deter (..., N, D) of a step -> (...), the nats of KL(posterior || prior) that its observation should bring.

    A linear read-out, regressed on the KL that came (on its logarithm, which is spread evenly). States are detached:
    it changes nothing that it judges. In a dream, where no observation comes, it is the model's measured uncertainty.
    """

    def __init__(self, flat: int):
        super().__init__()
        self.read = linear(flat, 1, bias=True, scale=0.0)

    def log1p(self, deter: Tensor) -> Tensor:
        """log(1 + the expected KL)."""
        return F.softplus(self.read(deter.flatten(-2)).squeeze(-1))

    def forward(self, deter: Tensor) -> Tensor:
        return torch.expm1(self.log1p(deter))

    def loss(self, deter: Tensor, kl: Tensor) -> Tensor:
        """deter (B, T, N, D), kl (B, T) -> (B, T)"""
        return (self.log1p(deter.detach()) - torch.log1p(kl.detach())).square()
