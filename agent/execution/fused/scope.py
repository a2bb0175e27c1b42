"""When layers are fused: inside of `fused_layers`, which an update enters.

Weights must not change there: their transposes are computed once. What an ordinary optimiser changes is noticed, what
is changed through `.data`, as by `FlatAdam`, is not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Scope(threading.local):
    """Whether layers are fused now, the transposed weights, and whether weights get gradients: of each thread alone."""

    kernels: Any = None
    """The compiled functions, once `fuse` has loaded them."""

    def __init__(self) -> None:
        self.active = self.frozen = False
        self.weights: dict[int, tuple[Tensor, int, Tensor]] = {}

    def transposed(self, weight: Tensor) -> Tensor:
        """(O, I) -> (I, O), or the same of each of several blocks (g, O, I), computed once."""
        found, version = self.weights.get(id(weight)), 0 if weight.is_inference() else weight._version
        if found is None or found[1] != version:
            *blocks, outputs, inputs = weight.shape
            t = weight.new_empty(*blocks, inputs, outputs)
            for one, other in zip(weight, t, strict=True) if blocks else [(weight, t)]:
                self.kernels.transpose(outputs, inputs, one.data_ptr(), other.data_ptr())
            # the weight is held: no other tensor gets its id
            found = self.weights[id(weight)] = weight, version, t
        return found[2]


SCOPE = Scope()


@contextmanager
def fused_layers() -> Iterator[None]:
    """Inside of this the modules that `fuse` has changed use the kernels."""
    before, SCOPE.active = SCOPE.active, SCOPE.kernels is not None
    if not before:
        SCOPE.weights.clear()
    try:
        yield
    finally:
        SCOPE.active = before
        if not before:
            SCOPE.weights.clear()


@contextmanager
def frozen_weights(frozen: bool = True) -> Iterator[None]:
    """Inside of this gradients pass through fused layers to their inputs alone."""
    before, SCOPE.frozen = SCOPE.frozen, frozen
    try:
        yield
    finally:
        SCOPE.frozen = before


def fusible(x: Tensor) -> bool:
    """Whether a layer of x is fused."""
    return SCOPE.active and x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
