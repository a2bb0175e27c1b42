"""Where a loop goes when it is not stopped: the orbit of each sample under one input, far beyond the training depth.

Symbols as in `types.py`; R loops, M samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from world_model.attack import Points, StateMap

LOOPS = 64
"""R, loops of an orbit."""
SETTLED = 1e-3
"""Relative to the norm of the state: an orbit that moves less, or returns more closely, has arrived."""
LONGEST_PERIOD = 8

KINDS = ("fixed point", "cycle", "drift", "unsettled")


class Orbits(NamedTuple):
    """states (R+1, M, N*D); kind (M,): index into KINDS; period (M,): of a cycle, else 0.

    fixed point  the last loop moved the state by less than SETTLED of its norm
    cycle        the state is back where it was `period` loops ago
    drift        neither, and the last changes point the same way: their cosine is above 0.9
    unsettled    neither of all these
    """

    states: Tensor
    kind: Tensor
    period: Tensor

    def shares(self) -> dict[str, float]:
        """Share of the samples of each kind."""
        return {name: float((self.kind == place).double().mean()) for place, name in enumerate(KINDS)}


@torch.no_grad()
def orbits(f: StateMap, points: Points, loops: int = LOOPS) -> Orbits:
    """Apply `f` again and again, and classify where each sample ends."""
    x, states = points.state, [points.state.flatten(1)]
    for _ in range(loops):
        x = f(x, points.given)
        states.append(x.flatten(1))
    whole = torch.stack(states)
    return Orbits(whole, *classify(whole))


def classify(states: Tensor) -> tuple[Tensor, Tensor]:
    """Orbits (R+1, M, N*D) -> kind and period (M,)."""
    end, longest = states[-1], min(LONGEST_PERIOD, len(states) - 1)
    back = torch.stack([(end - states[-1 - lag]).norm(dim=1) for lag in range(1, longest + 1)])  # (lags, M)
    returned = back <= SETTLED * end.norm(dim=1).clamp(min=1e-12)
    change = states.diff(dim=0)
    cosine = torch.cosine_similarity(change[-1], change[-2], dim=1) if len(change) > 1 else torch.zeros_like(end[:, 0])
    period = torch.where(returned.any(0), returned.long().argmax(0) + 1, 0)  # (M,) first lag at which it is back
    kind = torch.where(cosine > 0.9, 2, 3)
    kind = torch.where(period > 1, 1, torch.where(period == 1, 0, kind))
    return kind, torch.where(period > 1, period, 0)


def spectral_radius(f: StateMap, points: Points, iterations: int = 100) -> Tensor:
    """(M,) spectral radius of df/dx at each point: the growth of a random direction under the Jacobian, again and
    again, over the second half of the iterations. Below 1 a fixed point attracts what is near it."""
    x, given = points
    direction, growth = torch.randn_like(x), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for step in range(iterations):
        size = direction.flatten(1).norm(dim=1).clamp(min=1e-300)
        growth = growth + size.log() * (step > iterations // 2)
        direction = direction / size[:, None, None]
        direction = torch.func.jvp(lambda state: f(state, given), (x,), (direction,))[1].detach()
    return torch.exp(growth / (iterations - iterations // 2 - 1))
