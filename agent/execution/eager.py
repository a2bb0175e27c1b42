"""The plain execution: one process, one kernel after the other. The other executions differ from it in what they
override."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from agent.execution.fused import fused_layers
from agent.learning.dreamer import Dreamer, Update, check_finite
from world_model import Batch


class Eager:
    """execution.update(batch, progress) is one update of the agent. compiled: whether torch.compile is in use."""

    processes = 1
    takes_step = True

    def __init__(self, agent: Dreamer, compiled: bool = False):
        self.agent, self.compiled = agent, compiled

    def update(self, batch: Batch, progress: float = 0.0) -> Update:
        """One update on (B, T) rows; progress in [0, 1] is the share of the run that is over (learning rates).

        The states are good until the next update. Raises NonFiniteError before any weight is moved.
        """
        return self.compute(batch, self.agent.begin_update(progress))

    def compute(self, batch: Batch, depth: int) -> Update:
        """The update at a given depth, with layers fused where they can be."""
        with fused_layers():
            return self.agent.update(batch, depth, self)

    # ------------------------------------------------------------------ inside of `Dreamer.update`

    def scatter(self, batch: Batch) -> Batch:
        return batch

    def gather(self, update: Update) -> Update:
        return update

    def check(self, total: Tensor, metrics: dict[str, Tensor]) -> None:
        check_finite(total, metrics)

    # ------------------------------------------------------------------ beside the updates

    def acting(self) -> AbstractContextManager[Any]:
        """Inside of this the agent acts; where it plans, with fused layers. For a single row they are no faster."""
        return fused_layers() if self.agent.behavior.cfg.plan else nullcontext()

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
