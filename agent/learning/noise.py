"""Exploration noise that is correlated in time.

Independent noise pushes a body to and fro, and the pushes cancel: a pendulum stays down and a cart stays in the middle.
Noise that contains slow parts too moves it. Source: Eberhard et al. 2023, "Pink noise is all you need", where the power
falls like 1/f. Here it is the sum of processes with one time scale each, which needs no episode of known length.

Shapes: E environments, A actions, P processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIME_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Steps after which a process has forgotten all but 1/e of its value."""
_DECAY = torch.exp(-1.0 / torch.tensor(TIME_SCALES))[:, None]  # (P, 1)


def begin_noise(action: Tensor) -> Tensor:
    """Processes (E, P, A) for actions like (E, A): independent and standard normal, as they are at any time."""
    return torch.randn(len(action), len(TIME_SCALES), action.shape[1], device=action.device)


def next_noise(processes: Tensor) -> Tensor:
    """The processes (E, P, A) one step later: first-order autoregressive, with unit variance at any time."""
    decay = _DECAY.to(processes.device)
    return decay * processes + (1.0 - decay.square()).sqrt() * torch.randn_like(processes)


def noise_of(processes: Tensor) -> Tensor:
    """Their sum (E, A), standard normal at any time."""
    return processes.sum(1) * processes.shape[1] ** -0.5
