"""One-hot vectors of categorical variables: drawn at a level, or of the most probable class. K classes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.lru_cache
@torch.inference_mode(False)  # kept from acting, used where there are gradients too
def _steps(classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix (K, K) that sums a vector up to each place; weight (K, K-1) and bias (K,) that undo 0 .. 0 1 .. 1.

    The last of those ones is always there and needs no column: it is the bias.
    """
    unit = torch.eye(classes, dtype=dtype, device=device)
    sums = torch.ones_like(unit).triu_()
    return sums, (unit - torch.roll(unit, 1, 0))[:, :-1].contiguous(), unit[-1]


def onehot_at(probs: Tensor, level: Tensor) -> Tensor:
    """One-hot of the class in which the cumulative probability passes `level`.

    probs (..., K), not necessarily normalised; level (..., 1) uniform in [0, 1). Inverse-CDF sampling needs
    one random number per variable; the sums and differences along K are products with small matrices,
    several times faster on CPU than cumsum, argmax and scatter. (torch.compile fuses the sum with what surrounds it.)
    """
    if torch.compiler.is_compiling():
        cumulative = probs.cumsum(-1)
        before = (cumulative <= level * cumulative[..., -1:]).sum(-1, keepdim=True)  # a GPU's sums may fall a little
        return (torch.arange(probs.shape[-1], device=probs.device) == before).to(probs.dtype)
    sums, weight, bias = _steps(probs.shape[-1], probs.dtype, probs.device)
    with torch.autocast(probs.device.type, enabled=False):  # sums in bfloat16 would lose the rare classes
        cumulative = probs @ sums
    passed = cumulative[..., :-1] > level * cumulative[..., -1:]  # 0 .. 0 1 .. 1
    return F.linear(passed.to(probs.dtype), weight, bias)


def onehot_mode(probs: Tensor) -> Tensor:
    """One-hot of the most probable class."""
    return torch.zeros_like(probs).scatter_(-1, probs.argmax(-1, keepdim=True), 1.0)
