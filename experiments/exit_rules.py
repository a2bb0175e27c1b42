"""Two other answers to "is another loop worth it?", studied beside the gate and not made the default.

Symbols as in `world_model/types.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from world_model.exits import (
    GAIN_LIMIT,
    ExitRule,
    Gate,
    HaltingBatch,
    HaltingState,
    Metrics,
    RuleMemory,
    gain_regression,
)
from world_model.nets import linear


class Lookahead(Gate):
    """Go on while the loops ahead are predicted to bring more than `threshold` nats each, even if the next one alone
    does not: a loop may only prepare what a later one brings.

    The value of going on, learned backwards as in optimal stopping: what the next loop brought, plus the value of going
    on from there beyond the price of the loop after it, if that is positive.
    """

    def target(self, gain: Tensor, predicted: Tensor) -> Tensor:
        ahead = torch.zeros_like(gain)  # nothing was seen behind the last loop: a guess about it would feed on itself
        ahead[:-1] = (predicted[1:] - self.threshold).clamp(min=0.0)
        return gain + ahead


class Forecast(ExitRule):
    """Decide the depth before the first loop: the gain of each loop is predicted from the input e of the loops.

    A linear read-out of e predicts for every loop of training by how many nats it lowers KL(posterior || prior). The
    depth is the one that brings most, if each loop behind the first costs `threshold` nats: a loop that brings nothing
    is run where the next ones make up for it.
    """

    stops_early = trained = needs_gain = True

    def __init__(self, flat: int, cap: int, threshold: float | None = None):
        super().__init__()
        self.threshold = 0.05 if threshold is None else threshold
        # Zeros: a loop that training never ran is never planned.
        self.read = linear(flat, max(cap - 1, 1), bias=True, scale=0.0)

    def begin(self, e: Tensor, cap: int) -> RuleMemory:
        """The planned depth (B,)."""
        with torch.no_grad():
            worth = (self.read(e.flatten(1))[:, : cap - 1] - self.threshold).cumsum(1)  # (B, cap-1) of loops 2..
            return (torch.cat([worth.new_zeros(len(e), 1), worth], 1).argmax(1) + 1,)

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        return now.loop >= memory[0], memory

    def loss(self, batch: HaltingBatch) -> tuple[Tensor, Metrics]:
        if batch.e is None:
            raise ValueError("Forecast reads the input of the loops, which this core does not trace: extend LoopedCore")
        gain = batch.gain.clamp(-GAIN_LIMIT, GAIN_LIMIT)[: self.read.out_features]  # (R-1, B, T)
        predicted = self.read(batch.e.flatten(2)).movedim(-1, 0)[: len(gain)]
        return gain_regression(predicted, gain, batch)
