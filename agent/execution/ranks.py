"""The ranks of a run: processes that share its updates, and the few messages between them (torch.distributed).

A rank is a number from 0 to size - 1. Every rank holds the same weights and takes the same steps. Messages are
collective: all ranks send the same ones in the same order. Where a rank has died, its connections close, and the next
message raises `RankLost` on every other rank. Where its machine has vanished, that takes TIMEOUT.
"""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agent.errors import RankLost

TIMEOUT = datetime.timedelta(minutes=30)
"""For a message: longer than a checkpoint, an open-loop film or a step takes. Evaluations send some on their way."""


class Ranks:
    """The interface, and a run of one process: nothing is sent."""

    rank, size, lost = 0, 1, False
    """lost: whether a message has failed, so that no other can follow."""

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, written into it."""
        return x

    def average(self, x: Tensor) -> Tensor:
        """The mean of x over the ranks; its gradient is averaged too, as the gradients of the losses are afterwards."""
        return x

    def broadcast(self, *values: float) -> list[float]:
        """The values of rank 0."""
        return list(values)

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank."""
        return [list(values)]

    def gather(self, value: Any) -> list[Any]:
        """On rank 0 what every rank gives; on the others nothing. Tensors and plain values."""
        return [value]

    def broadcast_object(self, value: Any = None) -> Any:
        """What rank 0 gives."""
        return value

    def barrier(self) -> None:
        """Until every rank is here."""

    def wait_for_rank_0(self) -> None:
        """Until rank 0 has ended, which sends nothing more."""

    def close(self) -> None:
        """No message will follow."""


class ProcessRanks(Ranks):
    """Several processes. group: a process group of torch.distributed with this process in it."""

    def __init__(self, group: Any, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size

    @contextmanager
    def talking(self) -> Iterator[None]:
        """What torch.distributed raises becomes RankLost."""
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            raise RankLost("a rank has ended (killed, or out of memory?), or cannot be reached") from error

    def all_reduce_(self, x: Tensor) -> Tensor:
        with self.talking():
            self.group.allreduce(x).wait()
        return x

    def average(self, x: Tensor) -> Tensor:
        mean: Tensor = _Average.apply(x, self)
        return mean

    def broadcast(self, *values: float) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        with self.talking():
            self.group.broadcast(numbers, 0).wait()
        return numbers.tolist()

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with self.talking():
            self.group.allgather([rows], [mine]).wait()
        return [row.tolist() for row in rows]

    def gather(self, value: Any) -> list[Any]:
        if self.rank == 0:
            return [value, *(self.receive(source) for source in range(1, self.size))]
        self.send(value, 0)
        return []

    def broadcast_object(self, value: Any = None) -> Any:
        if self.rank:
            return self.receive(0)
        for target in range(1, self.size):
            self.send(value, target)
        return value

    def send(self, value: Any, target: int) -> None:
        """Send a value to one rank, which must `receive` it."""
        data = torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)
        with self.talking():
            self.group.send([torch.tensor([len(data)])], target, 0).wait()
            self.group.send([data], target, 0).wait()

    def receive(self, source: int) -> Any:
        """What a rank sends."""
        size = torch.zeros(1, dtype=torch.int64)
        with self.talking():
            self.group.recv([size], source, 0).wait()
            data = torch.empty(int(size), dtype=torch.uint8)
            self.group.recv([data], source, 0).wait()
        return pickle.loads(data.numpy().tobytes())

    def barrier(self) -> None:
        self.all_gather([0.0])

    def wait_for_rank_0(self) -> None:
        with suppress(RankLost):
            self.receive(0)

    def close(self) -> None:
        if dist.is_initialized() and self.group is dist.group.WORLD:
            dist.destroy_process_group()


class _Average(torch.autograd.Function):
    """The mean over ranks. A loss is the mean of those of the ranks: the gradient of a rank's part is the mean too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:  # type: ignore[override]
        ctx.ranks = ranks
        return ranks.all_reduce_(x.detach().clone(memory_format=torch.contiguous_format)).div_(ranks.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.ranks.average(grad), None


def started_as_rank() -> tuple[int, int]:
    """Rank and number of ranks that torchrun, or a launcher like it, gave to this process; 0 and 1 without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device: torch.device) -> Ranks:
    """Join the other ranks that torchrun has started: by gloo, and between GPUs by NCCL. Alone without torchrun.

    Raises RankLost where they do not come.
    """
    rank, size = started_as_rank()
    if size == 1:
        return Ranks()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        what = str(error).partition("\n")[0][:200]
        raise RankLost(f"the {size} ranks did not come together ({what}): start all of them by torchrun") from error
    return ProcessRanks(dist.group.WORLD, rank, size)


def local_ranks(store: Any, rank: int, size: int, timeout: datetime.timedelta = TIMEOUT) -> ProcessRanks:
    """Ranks on this machine that meet in a TCPStore; several such groups may be open in a process."""
    with _own_machine():
        group = dist.ProcessGroupGloo(store, rank, size, timeout)
    return ProcessRanks(group, rank, size)


@contextmanager
def _own_machine() -> Iterator[None]:
    """Inside of this gloo listens on the loopback device, whatever the machine's name stands for."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    if before is None and os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
