"""Numbers that follow the training: the size of advantages, the weight of the entropy, the budget of a dream."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdvantageScale(nn.Module):
    """Running mean size of the advantages, at least `floor`.

    DreamerV3 divides by the 5-95 % range of returns. That range also holds how much better one start state is
    than another: when some dreams start upright and some fallen it grows, the advantages shrink against the
    entropy bonus, and the policy dissolves into noise (seen on walker_walk). The size of the advantages does not.
    The floor keeps what DreamerV3's max(1, range) does: small advantages are not blown up against the bonus, or
    a policy settles before it has found much (seen there too).
    """

    size: Tensor

    def __init__(self, rate: float, floor: float):
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("size", torch.zeros(()))

    @torch.no_grad()
    def update(self, advantage: Tensor) -> Tensor:
        """(...) advantages -> the scale, 0-d."""
        seen = advantage.abs().mean()
        self.size.lerp_(torch.where(seen.isfinite(), seen, self.size), self.rate)  # a bad dream raises later
        return self.size.clamp(min=self.floor)


class EntropyWeight(nn.Module):
    """The weight of the entropy bonus: fixed, or steered so that the policy's spread stays near a target.

    While little is won the bonus outweighs the advantages and the spread is large whatever the weight (it falls to a
    tenth); once the policy would settle below the target the weight rises and holds it there.
    """

    weight: Tensor

    def __init__(self, weight: float, target: float | None, rate: float = 3e-3):
        super().__init__()
        self.low, self.high, self.target, self.rate = 0.1 * weight, 10.0 * weight, target, rate
        self.register_buffer("weight", torch.tensor(weight))

    @torch.no_grad()
    def update(self, spread: Tensor) -> Tensor:
        """spread: the policy's mean standard deviation, 0-d -> the weight, 0-d."""
        if self.target is not None:
            change = torch.exp(self.rate * torch.log(self.target / spread))
            self.weight.copy_((self.weight * change).clamp(self.low, self.high))
        return self.weight


def trust_of(spent: Tensor, budget: Tensor) -> Tensor:
    """(B, H) what each step of a dream cost -> (B, H): 1 while the sum is within the budget, 0 from twice it on."""
    return (2.0 - spent.cumsum(1) / budget).clamp(0.0, 1.0)


class Budget(nn.Module):
    """Half of the horizon times the running mean of what a step of a dream costs."""

    pace: Tensor

    def __init__(self, rate: float, horizon: int):
        super().__init__()
        self.rate, self.horizon = rate, horizon
        self.register_buffer("pace", torch.zeros(()))

    @torch.no_grad()
    def update(self, cost: Tensor) -> Tensor:
        """(B, H) costs -> the budget of a dream, 0-d."""
        seen = cost.mean()
        self.pace.copy_(torch.where(self.pace == 0, seen, torch.lerp(self.pace, seen, self.rate)))
        return (0.5 * self.horizon * self.pace).clamp(min=1e-6)
