"""A looped core without memory: each step sees the action and nothing of the state before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from world_model.core import CoreSizes, LoopStats, Trace
from world_model.looped import LoopConfig, LoopedCore


class MemorylessCore(LoopedCore):
    """The previous deter is replaced by the learned start, the previous stoch by zeros, and there is no outer gate.

    What a model with this core predicts, it predicts without memory of earlier observations.
    """

    def __init__(self, loop: LoopConfig, sizes: CoreSizes):
        super().__init__(loop, sizes)
        self.latents = sizes.groups * sizes.classes

    def forget(self, deter: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """deter (B, N, D), inputs (B, S*K + A) -> the same shapes, with nothing left but the action."""
        action = inputs[:, self.latents :]
        return self.start.expand_as(deter), torch.cat([torch.zeros_like(inputs[:, : self.latents]), action], 1)

    def forward(self, deter: Tensor, inputs: Tensor, loops: int, prepared: Any) -> tuple[Tensor, Trace]:
        return super().forward(*self.forget(deter, inputs), loops, prepared)

    def adaptive_step(
        self, deter: Tensor, inputs: Tensor, prepared: Any, max_loops: int | None = None, **options: Any
    ) -> tuple[Tensor, LoopStats]:
        return super().adaptive_step(*self.forget(deter, inputs), prepared, max_loops, **options)

    def readout(self, deter: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return self.coda_norm(x @ self.coda.t()).to(deter.dtype)
