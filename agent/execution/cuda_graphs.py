"""The update as CUDA graphs: recorded once for each training depth, then replayed.

An update is thousands of small kernels, and launching them one by one takes longer than running them. A graph launches
all of them at once. It holds memory addresses and no decisions: batches are copied to where it reads, rates that change
are tensors, imagination runs all loops and freezes the samples that have stopped, and whether the losses were finite is
looked at afterwards. Where they were not, no weight has moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agent.errors import NonFiniteError
from agent.execution.eager import Eager
from agent.learning.dreamer import Dreamer, Update
from world_model import Batch, LatentState

WARM_UPDATES = 3
"""Updates of a depth that run kernel by kernel before it is recorded: allocations and choices of kernels settle."""


class Recorded(NamedTuple):
    """What a recorded update writes, overwritten by the next: as in `Update`, with metrics (M,) and their names."""

    states: LatentState
    dream_depth: Tensor
    errors: Tensor
    names: list[str]
    values: Tensor


def leaves(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, always in the same order."""
    found: list[Tensor] = []
    batch.map(lambda leaf: found.append(leaf) or leaf)  # type: ignore[func-returns-value]
    return found


class CudaGraphs(Eager):
    """Updates by CUDA graphs. On a CPU, for tests, the same steps run unrecorded."""

    def __init__(self, agent: Dreamer, compiled: bool = False):
        super().__init__(agent, compiled)
        self.gpu = agent.device.type == "cuda"
        self.batch: Batch | None = None  # where the graphs read
        self.warm: Counter[int] = Counter()
        self.recorded: dict[int, tuple[Callable[[], None], Recorded]] = {}
        self.nonfinite = torch.zeros((), device=agent.device)  # 1 where a loss or a gradient is not finite
        agent.skip_step_where(self.nonfinite)
        agent.world.core.static_shapes = True

    def update(self, batch: Batch, progress: float = 0.0) -> Update:
        """As `Eager.update`; the states are overwritten by the next update."""
        clock = self.agent.clock
        with clock.timed("update"):
            self.copy_in(batch)
            depth = self.agent.begin_update(progress)
            if depth in self.recorded:
                replay, result = self.recorded[depth]
                replay()
            elif self.warm[depth] < WARM_UPDATES or not self.gpu:
                self.warm[depth] += 1
                result = self.on_side_stream(depth)
            else:
                result = self.record(depth)
            values = result.values.clone()
            if self.nonfinite.item():
                named = zip(result.names, values.tolist(), strict=True)
                wrong = [name for name, value in named if value - value != 0]  # NaN or infinite
                raise NonFiniteError(wrong[0] if wrong else "total loss")
        metrics = dict(zip(result.names, values.unbind(), strict=True))
        return Update(result.states, result.dream_depth, metrics, result.errors)

    def check(self, total: Tensor, metrics: dict[str, Tensor]) -> None:
        """Nothing is read back inside of a graph: remember it on the device."""
        self.nonfinite.copy_(torch.maximum(self.nonfinite, (~torch.isfinite(total)).to(self.nonfinite.dtype)))

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The tensors that a graph has recorded are not those that were loaded: record anew."""
        super().load_state_dict(saved)
        self.warm.clear()
        self.recorded.clear()

    def copy_in(self, batch: Batch) -> None:
        """Copy the batch to where the graphs read it."""
        if self.batch is None:
            self.batch = batch.map(torch.clone)
            return
        for mine, new in zip(leaves(self.batch), leaves(batch), strict=True):
            mine.copy_(new, non_blocking=True)

    def run(self, depth: int) -> Recorded:
        """An update that reads no number back."""
        assert self.batch is not None
        self.nonfinite.zero_()
        states, dream_depth, metrics, errors = self.agent.update(self.batch, depth, self)
        values = torch.stack([value.detach().float() for value in metrics.values()])
        return Recorded(states, dream_depth, errors, list(metrics), values)

    def on_side_stream(self, depth: int) -> Recorded:
        """As it is demanded before a recording: autograd's work must not be bound to the default stream."""
        if not self.gpu:
            return self.run(depth)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.run(depth)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def record(self, depth: int) -> Recorded:
        """Record the update of a depth, and run it."""
        graph = torch.cuda.CUDAGraph()
        seconds = dict(self.agent.clock.seconds)  # recording is not computing
        with torch.cuda.graph(graph):
            result = self.run(depth)
        self.agent.clock.seconds = seconds
        self.recorded[depth] = graph.replay, result
        graph.replay()
        return result
