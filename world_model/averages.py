"""Statistics of a batch that several processes share: each has a part of it, of equal size."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Average = Callable[[Tensor], Tensor]
"""average(x) is the mean of x over the processes, with its gradient; every process gives a tensor of the same shape."""


def alone(x: Tensor) -> Tensor:
    """The `Average` of a process that has the whole batch."""
    return x


def moments(x: Tensor, average: Average = alone) -> tuple[Tensor, Tensor]:
    """x (M, U) of every process -> mean and variance (U,) of the rows of all of them.

    The variance is that inside of the parts and that between their means: a difference of squares would lose digits.
    """
    mine = x.mean(0)
    mean = average(mine)
    return mean, average(x.var(0, correction=0) + (mine - mean).square())
