"""Adam for each part of the agent, over one flat buffer of its parameters.

With a few hundred small tensors the optimiser step, the gradient norm and the running average of the weights are
bound by the number of calls, not by arithmetic. Here the parameters of a part are views into one tensor, and so are
their gradients: each of those operations is one call. The learning rate follows the share of the run that is over, of
its steps or its minutes, which a scheduler of PyTorch, that counts its own steps, does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from world_model.ranges import AT_LEAST_ONE, NOT_NEGATIVE, require

CLIP = 100.0  # largest global gradient norm of each part
WARMUP = 100  # updates over which the rates rise from zero
DECAY_START = 0.5  # share of the run after which the learning rates decay linearly
FINAL_RATE = 0.1  # share of the learning rates that is left at the end of the run
EMA_DECAY = 0.998  # per update, of the averaged weights that evaluation uses


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rate, and how an update runs."""

    lr: float = 1e-3
    """Learning rate of the world model, the actor and the critic."""
    gpu: Literal["eager", "graphs", "compiled"] = "graphs"
    """How an update runs on a GPU: kernel by kernel, as a CUDA graph for each training depth, or as such a graph whose
    loops and steps are fused by torch.compile (half a minute at the start)."""
    workers: int = 1
    """Data-parallel processes on a CPU, each with its part of the sequences (--train.batch must divide evenly);
    a GPU, --model-only and torchrun use one."""

    def __post_init__(self) -> None:
        require(self, "--optimizer.", workers=AT_LEAST_ONE, lr=NOT_NEGATIVE)


def rate_factor(progress: float) -> float:
    """Factor of the learning rates at a share of the run: 1 until DECAY_START, then linear to FINAL_RATE."""
    if progress <= DECAY_START:
        return 1.0
    decayed = min(1.0, (progress - DECAY_START) / (1.0 - DECAY_START))
    return 1.0 + (FINAL_RATE - 1.0) * decayed


def flatten(parameters: Iterable[nn.Parameter], grad: bool = True) -> nn.Parameter:
    """Make the parameters (and, with `grad`, their gradients) views into one flat parameter, which is returned."""
    params = list(parameters)
    with torch.no_grad():
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params]), requires_grad=grad)
        offset = 0
        for p in params:
            p.requires_grad_(grad)
            p.data = flat.data[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        if grad:
            flat.grad = torch.zeros_like(flat)
            view_gradients(params, flat.grad)
    return flat


def view_gradients(parameters: Iterable[nn.Parameter], flat: Tensor) -> None:
    """Make the gradients of the parameters views into the flat tensor."""
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()


class FlatAdam:
    """Adam with linear warm-up and a clipped global norm, over one flat parameter.

    On a GPU the rate is a tensor and no number is read back, so that a CUDA graph can hold a step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, clip: float = CLIP, warmup: int = WARMUP):
        self.parameters, self.lr, self.clip, self.warmup = list(parameters), lr, clip, warmup
        self.flat = flatten(self.parameters)
        self.gpu = self.flat.is_cuda
        self.rate = torch.tensor(lr, device=self.flat.device)
        rate = self.rate if self.gpu else lr
        self.adam = torch.optim.Adam([self.flat], lr=rate, fused=True, capturable=self.gpu)
        self.updates = 0

    def skip_step_where(self, bad: Tensor) -> None:
        """Let a step do nothing while `bad` (0-d) is 1, as PyTorch's gradient scaler asks the fused Adam."""
        self.adam.found_inf = bad  # type: ignore[attr-defined]

    @property
    def gradient(self) -> Tensor:
        """The flat gradient."""
        assert self.flat.grad is not None
        return self.flat.grad

    @gradient.setter
    def gradient(self, flat: Tensor) -> None:
        self.flat.grad = flat
        view_gradients(self.parameters, flat)

    def clip_gradient(self) -> Tensor:
        """Scale the gradient to at most `clip`; returns its norm before that (0-d)."""
        return nn.utils.clip_grad_norm_(self.flat, self.clip)

    def set_rate(self, factor: float = 1.0) -> None:
        """Count a step, and let it be taken at `factor` times the learning rate."""
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
        """Moments and counts; the rate is set before every step, and is no state."""
        return {"adam": {"state": self.adam.state_dict()["state"]}, "updates": self.updates}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take the moments; settings are those of this object. Raises an error of some kind where they do not fit."""
        for moments in saved["adam"]["state"].values():
            if any(moments[name].shape != self.flat.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the moments of Adam have another shape")
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": saved["adam"]["state"], "param_groups": groups})
        self.adam.param_groups[0]["lr"] = self.rate if self.gpu else self.lr
        self.updates = int(saved["updates"])
