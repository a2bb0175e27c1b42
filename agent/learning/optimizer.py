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


class FlatAdam:
    """Adam with linear warm-up and a clipped global norm, over one flat parameter.

    On a GPU the rate is a tensor and nothing looks at a number, so that a CUDA graph can hold a step.
    """

    def __init__(
        self, name: str, parameters: Iterable[nn.Parameter], lr: float, clip: float, warmup: int, eps: float = 1e-8
    ):
        self.name, self.lr, self.clip, self.warmup = name, lr, clip, warmup
        self.flat = flatten(parameters)
        self.gpu = self.flat.is_cuda
        self.rate = torch.tensor(lr, device=self.flat.device)
        rate = self.rate if self.gpu else lr
        self.adam = torch.optim.Adam([self.flat], lr=rate, eps=eps, fused=True, capturable=self.gpu)
        self.updates = 0

    def skip_where(self, bad: Tensor) -> None:
        """Let a step do nothing while `bad` (0-d) is 1; the gradient scaler of PyTorch asks the fused Adam the same."""
        self.adam.found_inf = bad  # type: ignore[attr-defined]

    @property
    def gradient(self) -> Tensor:
        """The flat gradient."""
        assert self.flat.grad is not None
        return self.flat.grad

    def zero_grad(self) -> None:
        self.gradient.zero_()

    def clip_gradient(self) -> Tensor:
        """Scale the gradient to at most `clip`; returns its norm before that (0-d)."""
        grad = self.gradient
        norm = grad.norm()
        grad.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def set_rate(self, factor: float = 1.0) -> None:
        """Count a step, and let it be taken at `factor` times the rate."""
        self.updates += 1
        rate = self.lr * factor * min(1.0, self.updates / max(1, self.warmup))
        if self.gpu:
            self.rate.fill_(rate)
        else:
            self.adam.param_groups[0]["lr"] = rate

    def step(self) -> None:
        """One Adam step."""
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "updates": self.updates}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.adam.load_state_dict(saved["adam"])
        group = self.adam.param_groups[0]  # the run may have been on another kind of device
        group["capturable"], group["lr"] = self.gpu, self.rate if self.gpu else float(group["lr"])
        self.updates = saved["updates"]
