"""The update as CUDA graphs: recorded once for each training depth, then replayed.

An update is thousands of small kernels, and launching them one by one takes longer than running them. A graph launches
all of them at once. It holds memory addresses and no decisions: batches are copied to where it reads, rates that change
are tensors, dreams run all loops and freeze the samples that have left, and whether the losses were finite is looked at
afterwards. Where they were not, the optimisers have not moved a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from agent.errors import NonFiniteError
from agent.learning.gradients import Losses
from world_model import Batch, LatentState

if TYPE_CHECKING:
    from agent.learning.learner import Learner

WARM = 3
"""Updates of a depth that run kernel by kernel before it is recorded: allocations and choices of kernels settle."""


class Outcome(NamedTuple):
    """What a recorded update leaves behind, overwritten by the next: as in `Losses`, metrics (M,) and their names."""

    states: LatentState
    depths: Tensor
    lengths: Tensor | None
    names: list[str]
    values: Tensor


def leaves(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, always in the same order."""
    rows = [batch.obs[name] for name in sorted(batch.obs)]
    rows += [batch.prev_action, batch.reward, batch.is_first, batch.is_last, batch.is_terminal]
    return rows + list(batch.start or ())


def copied(batch: Batch) -> Batch:
    """The same batch in memory of its own."""
    rows = {name: value.clone() for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    obs = {name: value.clone() for name, value in batch.obs.items()}
    start = None if batch.start is None else batch.start.map(torch.clone)
    return batch._replace(obs=obs, start=start, **rows)


class UpdateGraphs:
    """(batch, loops, progress) -> `Losses` of a learner's update, done. On a CPU the same steps run unrecorded.

    Raises NonFiniteError when a loss or a gradient is not finite; no weight has moved then.
    """

    def __init__(self, learner: Learner):
        self.learner = learner
        self.gpu = learner.device.type == "cuda"
        self.batch: Batch | None = None  # where the graphs read
        self.depth: Tensor | None = None  # likewise, where every sequence has a depth of its own
        self.warm: Counter[int] = Counter()
        self.recorded: dict[int, tuple[Callable[[], None], Outcome]] = {}
        self.bad = torch.zeros((), device=learner.device)
        for adam in learner.adams.values():
            adam.skip_where(self.bad)
        learner.world.core.static_shapes = True

    def __call__(self, batch: Batch, loops: int, progress: float) -> Losses:
        self.take(batch, loops)
        self.learner.advance(progress)
        key = loops if isinstance(loops, int) else 0
        if key in self.recorded:
            replay, outcome = self.recorded[key]
            replay()
        elif self.warm[key] < WARM or not self.gpu:
            self.warm[key] += 1
            outcome = self.on_side_stream(key)
        else:
            outcome = self.record(key)
        values = outcome.values.clone()
        if self.bad.item():
            wrong = [name for name, value in zip(outcome.names, values.tolist(), strict=True) if value - value != 0]
            raise NonFiniteError(wrong[0] if wrong else "total loss")
        metrics = dict(zip(outcome.names, values.unbind(), strict=True))
        return Losses(self.bad, self.bad, outcome.states, outcome.depths, outcome.lengths, metrics)

    def take(self, batch: Batch, loops: int) -> None:
        """Copy the batch to where the graphs read it."""
        if self.batch is None:
            self.batch, self.depth = copied(batch), loops.clone() if isinstance(loops, Tensor) else None
            return
        for mine, new in zip(leaves(self.batch), leaves(batch), strict=True):
            mine.copy_(new, non_blocking=True)
        if self.depth is not None and isinstance(loops, Tensor):
            self.depth.copy_(loops)

    def run(self, key: int) -> Outcome:
        """An update that looks at no number."""
        assert self.batch is not None
        learner = self.learner
        losses = learner.losses(self.batch, key)
        learner.differentiate(losses)
        norms = torch.stack(list(learner.clip(losses.metrics).values()))
        self.bad.copy_(~torch.isfinite(losses.total + losses.policy + norms.sum()))
        learner.move()
        values = torch.stack([value.detach().float() for value in losses.metrics.values()])
        return Outcome(losses.states, losses.depths, losses.lengths, list(losses.metrics), values)

    def on_side_stream(self, key: int) -> Outcome:
        """As it is demanded before a recording: autograd's work must not be bound to the default stream."""
        if not self.gpu:
            return self.run(key)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outcome = self.run(key)
        torch.cuda.current_stream().wait_stream(stream)
        return outcome

    def record(self, key: int) -> Outcome:
        """Record the update of a depth, and run it."""
        graph = torch.cuda.CUDAGraph()
        seconds = dict(self.learner.seconds)  # recording is not computing
        with torch.cuda.graph(graph):
            outcome = self.run(key)
        self.learner.seconds = seconds
        self.recorded[key] = graph.replay, outcome
        graph.replay()
        return outcome
