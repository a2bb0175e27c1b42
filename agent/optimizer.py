"""One Adam per part of the agent, over one flat buffer of its parameters.

With a few hundred small tensors the optimiser step, the gradient norm and the running average are bound by
the number of calls, not by arithmetic. Here the parameters of a part are views into one tensor, and so are
their gradients, so that each of those operations is one call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def flatten(parameters: Iterable[nn.Parameter], grad: bool = True) -> nn.Parameter:
    """Make the parameters (and, with `grad`, their gradients) views into one flat parameter, which is returned."""
    params = list(parameters)
    with torch.no_grad():
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params]), requires_grad=grad)
        if grad:
            flat.grad = torch.zeros_like(flat)
        offset = 0
        for p in params:
            p.requires_grad_(grad)
            p.data = flat.data[offset : offset + p.numel()].view_as(p)
            if flat.grad is not None:
                p.grad = flat.grad[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
    return flat


class NonFiniteError(RuntimeError):
    """A gradient or a loss is not finite; the message names it."""


class FlatAdam:
    """Adam with linear warm-up and a clipped global norm, over one flat parameter."""

    def __init__(
        self, name: str, parameters: Iterable[nn.Parameter], lr: float, clip: float, warmup: int, eps: float = 1e-8
    ):
        self.name, self.lr, self.clip, self.warmup = name, lr, clip, warmup
        self.flat = flatten(parameters)
        self.adam = torch.optim.Adam([self.flat], lr=lr, eps=eps, fused=True)
        self.updates = 0

    def zero_grad(self) -> None:
        assert self.flat.grad is not None
        self.flat.grad.zero_()

    def clip_gradient(self) -> Tensor:
        """Scale the gradient to at most `clip`; returns its norm before that (0-d). Raises NonFiniteError."""
        grad = self.flat.grad
        assert grad is not None
        norm = grad.norm()
        if not torch.isfinite(norm):
            raise NonFiniteError(f"{self.name}/grad_norm")
        grad.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, factor: float = 1.0) -> None:
        """One Adam step at `factor` times the rate."""
        self.updates += 1
        self.adam.param_groups[0]["lr"] = self.lr * factor * min(1.0, self.updates / max(1, self.warmup))
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.adam.load_state_dict(saved["adam"])
        self.updates = saved["updates"]
