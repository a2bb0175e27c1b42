"""Updates that several processes of one machine share, for a run whose environments and replay are in one of them.

Rank 0 is the run. The other ranks only compute: with every update rank 0 sends each its sequences of the batch, all
ranks take the same step (`Eager` with `Ranks`), and the latent states come back for the replay. So the run, its files
and its checkpoints are those of one process, whatever the number of ranks.
"""

from __future__ import annotations

import datetime
import io
import operator
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agent.errors import NonFiniteError, RankLost, WorkerFailure
from agent.execution.eager import Eager, joined_gradients
from agent.execution.fused import fuse
from agent.execution.ranks import ProcessRanks, Ranks, local_ranks
from agent.learning.dreamer import Dreamer, Update
from agent.runtime import SIGNALS, keep_memory
from world_model import Batch, LatentState

WHILE_IDLE = datetime.timedelta(days=1000)
"""For a message from rank 0, which may evaluate for hours. Where it ends, the connection closes at once."""


class DataParallel(Eager):
    """Rank 0 of `processes` ranks on this machine; the others start with the first update."""

    def __init__(self, agent: Dreamer, processes: int):
        super().__init__(agent)
        self.processes, self.message = processes, joined_gradients(list(agent.optimizers.values()))
        self.workers: list[BaseProcess] = []
        self.random_states: list[Tensor] = []  # where the workers' random numbers go on, as a checkpoint had them
        self.broken = False  # an update was given up: what the workers send next belongs to nothing

    def update(self, batch: Batch, progress: float = 0.0) -> Update:
        """As `Eager.update`, of the whole batch. Raises WorkerFailure too, where a worker has ended."""
        try:
            if not self.workers:
                self.start()
            self.broken = True
            mine = super().update(self.scatter(batch, progress), progress)
            answers = self.connection.gather(None)[1:]
        except RankLost as error:
            raise WorkerFailure("a process of --optimizer.workers has ended (killed, or out of memory?)") from error
        self.broken = False
        parts = [(*mine.states, mine.dream_depth, mine.errors), *(map(torch.from_numpy, each) for each in answers)]
        deter, stoch, depth, errors = map(torch.cat, zip(*parts, strict=True))
        self.agent.clock.lap("workers")
        return Update(LatentState(deter, stoch), depth, mine.metrics, errors)

    def scatter(self, batch: Batch, progress: float) -> Batch:
        """Send every worker its sequences, and return ours."""
        size = len(batch.reward) // self.processes
        slices = [slice(first, first + size) for first in range(0, len(batch.reward), size)]
        for worker, part in enumerate(slices[1:], 1):
            self.connection.send(("update", to_arrays(batch.map(operator.itemgetter(part))), progress), worker)
        return batch.map(operator.itemgetter(slices[0]))

    @property
    def connection(self) -> ProcessRanks:
        assert isinstance(self.ranks, ProcessRanks)
        return self.ranks

    def start(self) -> None:
        """Start the workers, and give each a copy of the agent and its random numbers."""
        size, seed = self.processes, torch.initial_seed() + 1_000_000_007  # far from those of other runs
        store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
        context = get_context("spawn")
        with without_signals():
            for rank in range(1, size):
                self.workers.append(context.Process(target=serve, args=(store.port, rank, size), daemon=True))
                self.workers[-1].start()
        while not store.check([f"worker {rank}" for rank in range(1, size)]):
            if not all(worker.is_alive() for worker in self.workers):
                raise RankLost("a worker did not start")
            time.sleep(0.02)
        self.ranks = local_ranks(store, 0, size)
        agent = io.BytesIO()
        torch.save(self.agent, agent)  # keeps what is a view a view
        for rank, random in zip(range(1, size), self.random_states + [None] * size, strict=False):
            self.connection.send((agent.getvalue(), seed + rank if random is None else random.numpy()), rank)

    def state_dict(self) -> dict[str, Any]:
        """The workers' random numbers; those of the last checkpoint where a worker has ended, which the next update
        reports."""
        if isinstance(self.ranks, ProcessRanks) and not self.broken:
            self.broken = True
            with suppress(RankLost):
                for worker in range(1, self.processes):
                    self.ranks.send(("random",), worker)
                self.random_states = [torch.from_numpy(state) for state in self.ranks.gather(None)[1:]]
                self.broken = False
        return {"random": self.random_states}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there: the workers start anew, with the agent as it is at the next update."""
        self.close()
        self.random_states = saved.get("random", [])  # none where the run had one process

    def close(self) -> None:
        if not self.broken and isinstance(self.ranks, ProcessRanks):
            for worker in range(1, self.processes):
                with suppress(RankLost):
                    self.ranks.send(("end",), worker)
        self.ranks, self.broken = Ranks(), False  # closes the connections, which ends those that wait
        for process in self.workers:
            process.join(5.0)
            process.kill()
        self.workers = []


@contextmanager
def without_signals() -> Iterator[None]:
    """Processes that begin inside of this never hear the signals that end a run: they are for the first process, which
    saves. They end when it ends them, or dies."""
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


def to_arrays(batch: Batch) -> Batch:
    """The batch as arrays, which pickle without a detour."""
    return batch.map(lambda leaf: leaf.detach().numpy())  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------------- a worker's side


def serve(port: int, rank: int, size: int) -> None:
    """The life of a worker: until rank 0 ends it, or ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_memory()
    try:
        store = dist.TCPStore("127.0.0.1", port, size, False)
        store.set(f"worker {rank}", "here")
        ranks = local_ranks(store, rank, size, WHILE_IDLE)
        content, random = ranks.receive(0)
        agent = torch.load(io.BytesIO(content), weights_only=False)  # of our own parent process
        torch.manual_seed(random) if isinstance(random, int) else torch.set_rng_state(torch.from_numpy(random))
        fuse(agent)
        execution = Eager(agent, ranks=ranks)
        while answer(execution, ranks, *ranks.receive(0)):
            pass
    except (RankLost, dist.DistError):  # rank 0 has ended, or gave the update up
        return


def answer(execution: Eager, ranks: ProcessRanks, word: str, batch: Any = None, progress: float = 0.0) -> bool:
    """Do what one message asks for: update, random or end. Whether another one may follow."""
    if word == "random":
        ranks.gather(torch.get_rng_state().numpy())
    elif word == "update":
        with suppress(NonFiniteError):  # which rank 0 raises too
            update = execution.update(batch.map(torch.from_numpy), progress)
            ranks.gather([part.numpy() for part in (*update.states, update.dream_depth, update.errors)])
    return word != "end"
