"""The plain execution: one kernel after the other, in one process or in each of several ranks. The other executions
differ from it in what they override."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from agent.execution.fused import fused_layers
from agent.execution.ranks import Ranks
from agent.learning.dreamer import Dreamer, Update, check_finite
from agent.learning.optimizer import FlatAdam
from world_model import Batch

MOST_METRICS = 256
"""Numbers that travel with the gradients."""


class Eager:
    """execution.update(batch, progress) is one update of the agent. compiled: whether torch.compile is in use.

    ranks: the processes that share an update, each with its part of the batch.
    """

    def __init__(self, agent: Dreamer, compiled: bool = False, ranks: Ranks | None = None):
        self.agent, self.compiled, self.ranks = agent, compiled, ranks or Ranks()
        self.processes = self.ranks.size
        self.message = joined_gradients(list(agent.optimizers.values())) if self.processes > 1 else torch.zeros(0)

    def update(self, batch: Batch, progress: float = 0.0) -> Update:
        """One update on (B, T) rows; progress in [0, 1] is the share of the run that is over (learning rates).

        The states are good until the next update. Raises NonFiniteError, on every rank, before any weight is moved.
        """
        (depth,) = self.ranks.broadcast(self.agent.begin_update(progress))
        with fused_layers():
            return self.agent.update(batch, int(depth), self)

    # ------------------------------------------------------------------ inside of `Dreamer.update`

    def average(self, x: Tensor) -> Tensor:
        return self.ranks.average(x)

    def reduce(self, total: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """One message holds the gradients, the metrics and the total, which is finite only if it is so on all ranks."""
        if self.processes > 1:
            tail = self.message[-MOST_METRICS:]
            tail[: len(metrics) + 1] = torch.stack([total, *(value.detach().float() for value in metrics.values())])
            self.ranks.all_reduce_(self.message).div_(self.processes)
            self.agent.clock.lap("all_reduce")
            total, *values = tail[: len(metrics) + 1].clone().unbind()
            metrics = dict(zip(metrics, values, strict=True))
        self.check(total, metrics)
        return metrics

    def check(self, total: Tensor, metrics: dict[str, Tensor]) -> None:
        check_finite(total, metrics)

    # ------------------------------------------------------------------ beside the updates

    def acting(self) -> AbstractContextManager[Any]:
        """Inside of this the agent acts; where it plans, with fused layers. For a single row they are no faster."""
        return fused_layers() if self.agent.behavior.cfg.plans else nullcontext()

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Inside of this nothing compiled runs: for what is too rare to be compiled."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had never stopped."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""

    def close(self) -> None:
        """End what runs beside this process, if anything does."""


def joined_gradients(optimizers: list[FlatAdam]) -> Tensor:
    """Let the gradients of all optimisers be views into one tensor, which has MOST_METRICS more places at its end."""
    sizes = [adam.flat.numel() for adam in optimizers]
    message = torch.zeros(sum(sizes) + MOST_METRICS, device=optimizers[0].flat.device)
    for adam, part in zip(optimizers, message.split([*sizes, MOST_METRICS])[:-1], strict=True):
        adam.gradient = part
    return message
