"""Plain building blocks: linear layers with fan-in initialisation, normalisation, the MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CUT_OFF_STD = 0.8796
"""Standard deviation of a unit normal that is cut off at two deviations."""


def truncated_normal(weight: Tensor, std: float) -> None:
    """Fill in place from a normal cut off at two of its deviations, so that what is left has this deviation."""
    std = std / CUT_OFF_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def linear(inputs: int, outputs: int, bias: bool = False, scale: float = 1.0) -> nn.Linear:
    """Linear layer with a truncated-normal fan-in initialisation times `scale`, and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        if scale == 0.0:
            layer.weight.zero_()
        else:
            truncated_normal(layer.weight, scale / math.sqrt(inputs))
        if bias:
            layer.bias.zero_()
    return layer


def balanced_linear(sizes: Sequence[int], squared_norms: Sequence[float], outputs: int) -> nn.Linear:
    """A linear layer of several inputs, which start with an equal say; squared_norms: the squares of their norms."""
    layer = linear(sum(sizes), outputs)
    with torch.no_grad():
        for columns, squared_norm in zip(layer.weight.split(list(sizes), 1), squared_norms, strict=True):
            columns.mul_((layer.in_features / squared_norm / len(sizes)) ** 0.5)
    return layer


class Norm(nn.Module):
    """Layer normalisation with a gain and no offset.

    PyTorch fuses layer_norm on CPU but not rms_norm: the whole update is about 14 % faster with this one.
    A vector of zeros passes its gradient on multiplied by 1/sqrt(eps), and a loop does that again and again:
    no state may be exactly zero (see `Core.start`), and eps is not tiny.
    """

    eps = 1e-3

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gain.shape, self.gain, None, self.eps)


class MLP(nn.Module):
    """`layers` times (linear, norm, silu), then a linear output with bias unless `outputs` is None.

    (..., inputs) -> (..., outputs or units)
    """

    def __init__(self, inputs: int, units: int, layers: int, outputs: int | None = None, out_scale: float = 1.0):
        super().__init__()
        hidden: list[nn.Module] = []
        for i in range(layers):
            hidden += [linear(inputs if i == 0 else units, units), Norm(units), nn.SiLU()]
        self.hidden = nn.Sequential(*hidden)
        self.out = None if outputs is None else linear(units, outputs, bias=True, scale=out_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x)
        return x if self.out is None else self.out(x)


def clipped(action: Tensor) -> Tensor:
    """Actions beyond 1 count as 1, as in the environment, but keep their gradient (DreamerV3)."""
    return action / action.detach().abs().clamp(min=1.0)
