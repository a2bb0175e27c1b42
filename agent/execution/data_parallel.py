"""Data-parallel updates on a CPU: worker processes compute the gradients of their part of the sequences.

Most operations of an update are too small for several threads to share, but sequences and rollouts are independent
until their losses are averaged. Parameters lie in shared memory: only the batch goes to the workers, and only
gradients, metrics and latents come back. The first process alone moves weights and running statistics; the workers get
the running statistics with every batch. What is a statistic of a batch (the advantage scale, the decorrelating
objective of images) is one of its part here: the gradient is the mean of those of the parts, which for these two is
not that of the whole batch.
"""

from __future__ import annotations

import operator
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from agent.errors import NonFiniteError, WorkerFailure
from agent.execution.eager import Eager
from agent.execution.fused import fuse
from agent.learning.dreamer import Dreamer, Update
from agent.runtime import SIGNALS, keep_memory
from world_model import Batch, LatentState


class DataParallel(Eager):
    """Updates shared by several processes, this one included; the workers start with the first update."""

    def __init__(self, agent: Dreamer, processes: int):
        super().__init__(agent)
        self.processes = processes
        self.workers: Workers | None = None
        self.random_states: list[Tensor] = []  # where the workers' random numbers go on, as a checkpoint had them
        self.depth = 0
        self.broken = False  # an update was given up: what the workers answer next belongs to nothing

    def update(self, batch: Batch, progress: float = 0.0) -> Update:
        if self.workers is None:
            seed = torch.initial_seed() + 1_000_000_007  # far from those of other runs
            self.workers = Workers(self.agent, self.processes - 1, seed)
            self.workers.restore(self.random_states)
        self.depth, self.broken = self.agent.begin_update(progress), True
        update = self.compute(batch, self.depth)
        self.broken = False
        return update

    def scatter(self, batch: Batch) -> Batch:
        """Send every worker its sequences, and return ours."""
        assert self.workers is not None
        size = len(batch.reward) // self.processes
        slices = [slice(first, first + size) for first in range(0, len(batch.reward), size)]
        self.workers.send_update([batch.map(operator.itemgetter(part)) for part in slices[1:]], self.depth)
        return batch.map(operator.itemgetter(slices[0]))

    def gather(self, update: Update) -> Update:
        """Wait for the workers; average their gradients and metrics with ours, and join the states.

        Raises NonFiniteError where one of their losses is not finite.
        """
        assert self.workers is not None
        answers = self.workers.answers()
        for answer in answers:
            if answer["bad"]:
                raise NonFiniteError(answer["bad"])
        for adam, *others in zip(self.agent.optimizers.values(), *self.workers.gradients, strict=True):
            for other in others:
                adam.gradient.add_(other)
            adam.gradient.div_(self.processes)
        metrics = {
            name: (value + sum(answer["metrics"].get(name, 0.0) for answer in answers)) / self.processes
            for name, value in update.metrics.items()
        }
        states = [update.states, *(LatentState(*to_tensors(answer["states"])) for answer in answers)]
        joined = LatentState(*(torch.cat(leaves) for leaves in zip(*states, strict=True)))
        depths = torch.cat([update.dream_depth, *(to_tensors(answer["dream_depth"]) for answer in answers)])
        self.agent.clock.lap("workers")
        return Update(joined, depths, metrics)

    def state_dict(self) -> dict[str, Any]:
        if self.workers is not None and not self.broken:
            self.random_states = self.workers.random_states()
        return {"random": self.random_states}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.random_states = saved.get("random", [])  # none where the run had one process
        if self.workers is not None:
            self.workers.restore(self.random_states)

    def close(self) -> None:
        if self.workers is not None:
            self.workers.close()
            self.workers = None


# ---------------------------------------------------------------------- the first process's side


class Workers:
    """`count` worker processes. The agent's parameters move to shared memory.

    seed: of the random numbers of the first worker; the others have the next ones.
    """

    def __init__(self, agent: Dreamer, count: int, seed: int):
        self.agent = agent
        for tensor in (*agent.policy.parameters(), *agent.policy.buffers()):
            tensor.share_memory_()
        flats = [adam.gradient for adam in agent.optimizers.values()]
        self.gradients = [[torch.zeros_like(flat).share_memory_() for flat in flats] for _ in range(count)]
        context = torch.multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for number, gradients in enumerate(self.gradients):
            mine, other = context.Pipe()
            arguments = other, agent, gradients, count + 1, seed + number
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            with without_signals():
                self.processes[-1].start()
            other.close()
            self.pipes.append(mine)

    def send_update(self, parts: list[Batch], depth: int) -> None:
        """Let every worker begin with its part of a batch."""
        running = to_arrays(self.agent.behavior.scale.state_dict())
        for pipe, part in zip(self.pipes, parts, strict=True):
            self.send(pipe, "update", (to_arrays(part), depth, running))

    def answers(self) -> list[Any]:
        """What every worker answers to the last message."""
        return [self.receive(pipe) for pipe in self.pipes]

    def random_states(self) -> list[Tensor]:
        """Where the random numbers of the workers are."""
        for pipe in self.pipes:
            self.send(pipe, "random", None)
        return [to_tensors(answer) for answer in self.answers()]

    def restore(self, states: list[Tensor]) -> None:
        """Let the random numbers go on from there, of as many workers as there are states."""
        for pipe, state in zip(self.pipes, states, strict=False):
            self.send(pipe, "restore", to_arrays(state))
            self.receive(pipe)

    def send(self, pipe: Connection, word: str, content: Any) -> None:
        try:
            pipe.send((word, content))
        except OSError:
            raise ended() from None

    def receive(self, pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except (OSError, EOFError):
            raise ended() from None
        if isinstance(answer, str):
            raise WorkerFailure(f"a process of --optimizer.workers failed:\n{answer}")
        return answer

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()  # which ends them
        for process in self.processes:
            process.join(5.0)
            process.kill()


@contextmanager
def without_signals() -> Iterator[None]:
    """Processes that begin inside of this never hear the signals that end a run: they are for the first process, which
    saves. They end when it closes their pipe, or dies."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # it lives on its own, and unblocks some of them when it begins
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ended() -> WorkerFailure:
    return WorkerFailure("a process of --optimizer.workers has ended (killed, or out of memory?)")


def to_arrays(value: Any) -> Any:
    """Tensors, in tuples and dictionaries too, as arrays: a tensor would travel in shared memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().numpy()
    if isinstance(value, dict):
        return {name: to_arrays(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(to_arrays(part) for part in value)
    return value


def to_tensors(value: Any) -> Any:
    """The inverse of `to_arrays`."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: to_tensors(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(to_tensors(part) for part in value)
    return value


# ---------------------------------------------------------------------- a worker's side


class Worker(Eager):
    """`Dreamer.update` up to the gradients, on one part of the batch."""

    takes_step = False

    def __init__(self, agent: Dreamer, gradients: list[Tensor], processes: int):
        super().__init__(agent)
        fuse(agent)
        self.processes = processes
        for adam, flat in zip(agent.optimizers.values(), gradients, strict=True):
            adam.gradient = flat
        scale = agent.behavior.scale
        scale.size = scale.size.clone()  # the shared one is the first process's to change

    def answer(self, word: str, content: Any) -> Any:
        """The answer to one message: update, random or restore."""
        if word == "random":
            return to_arrays(torch.get_rng_state())
        if word == "restore":
            torch.set_rng_state(to_tensors(content))
            return None
        rows, depth, running = to_tensors(content)
        self.agent.behavior.scale.load_state_dict(running)
        batch = Batch._make(rows)
        batch = batch._replace(start=batch.start and LatentState(*batch.start))
        try:
            update = self.compute(batch, depth)
        except NonFiniteError as error:
            return {"bad": str(error)}
        metrics = {name: float(value) for name, value in update.metrics.items()}
        states, depths = to_arrays(tuple(update.states)), to_arrays(update.dream_depth)
        return {"bad": "", "metrics": metrics, "states": states, "dream_depth": depths}


def serve(pipe: Connection, agent: Dreamer, gradients: list[Tensor], processes: int, seed: int) -> None:
    """The life of a worker: until the pipe is closed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(seed)
    worker = Worker(agent, gradients, processes)
    while True:
        try:
            word, content = pipe.recv()
        except (OSError, EOFError):
            return
        try:
            answer: Any = worker.answer(word, content)
        except Exception:
            answer = traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:  # the first process gave the update up
            return
