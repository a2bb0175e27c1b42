"""The linear part of a loop, Abar x + Bbar e: how much of its state it keeps, and how its input enters.

    constrained   Abar = exp(-Delta * exp(a)) in (0, 1) by construction      Looped World Models, eq. 4 (the default)
    free          Abar is any vector (the control: nothing keeps it below 1)

    gain          Bbar
    euler         Delta * B                         the paper's and Parcae's
    leaky         (1 - Abar) * B                    a channel takes its input in as slowly as it forgets
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dynamics(NamedTuple):
    """decay (D,) and injection (D, D), computed once per sequence."""

    decay: Tensor
    injection: Tensor


class Retention(nn.Module):
    """-> Dynamics. Delta = softplus(delta); arXiv 2606.18208 eq. 4, made concrete as Parcae does (2604.12946).

    Delta * exp(a) is clamped to [1e-4, 20]: without it float32 rounds Abar to exactly 1 or 0. The decays start
    log-uniformly spread over [0.5, 0.995], so that some channels hold and others follow.

    With the gain Delta the loop has nearly settled after three loops, whatever it is asked. `leaky` moves x
    towards B e instead of adding it up, and later loops have work left.
    """

    def __init__(self, width: int, gain: str = "euler", kind: str = "constrained"):
        super().__init__()
        self.gain, self.free = gain, kind == "free"
        delta = 0.8047  # softplus(delta) of Parcae: exp(-0.8047) = sqrt(1/5)
        decay = torch.exp(torch.linspace(math.log(0.5), math.log(0.995), width))
        log_rate = torch.log(-torch.log(decay) / delta)
        if self.free:
            self.decay = nn.Parameter(decay)
            self.register_buffer("log_rate", log_rate)  # the gain does not follow the free decay
        else:
            self.log_rate = nn.Parameter(log_rate)
        self.delta = nn.Parameter(torch.full((width,), math.log(math.expm1(delta))))
        self.matrix = nn.Parameter(torch.eye(width))

    def forward(self) -> Dynamics:
        delta = F.softplus(self.delta.float())
        speed = self.log_rate.float().clamp(max=60.0).exp()  # beyond 60, exp would overflow
        forgotten = (delta * speed).clamp(1e-4, 20.0)
        gain = delta if self.gain == "euler" else -torch.expm1(-forgotten)
        decay = self.decay if self.free else torch.exp(-forgotten).to(self.matrix.dtype)  # (D,)
        return Dynamics(decay, gain.to(self.matrix.dtype)[:, None] * self.matrix)  # (D, D)
