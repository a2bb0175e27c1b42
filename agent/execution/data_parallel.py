"""Processes that share the updates on a CPU: each computes the gradient of its part of the sequences.

Most operations of an update are too small for several threads to share, but sequences and dreams know nothing of each
other until their losses are averaged. Parameters lie in memory that all processes see, so that nothing but the batch
goes there and nothing but gradients, a few numbers and fresh latents comes back. Only the process that acts changes
anything: what the others would change (the running scales of the actor-critic) is lent to them with every batch.
"""

from __future__ import annotations

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
from torch import Tensor, nn

from agent.errors import NonFiniteError
from agent.learning.gradients import Gradients, Losses, finite
from agent.learning.policy import Policy
from world_model import Batch, LatentState


def part_of(batch: Batch, part: slice) -> Batch:
    """Some of the sequences, as views."""
    rows = {name: value[part] for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    obs = {name: value[part] for name, value in batch.obs.items()}
    start = None if batch.start is None else batch.start.map(lambda leaf: leaf[part])
    return batch._replace(obs=obs, start=start, **rows)


def plain(value: Any) -> Any:
    """Tensors, in tuples and dictionaries too, as arrays: a tensor would travel in shared memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().numpy()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(each) for each in value)
    return value


def tensors(value: Any) -> Any:
    """The inverse of `plain`."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: tensors(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(tensors(each) for each in value)
    return value


def running(policy: Policy) -> list[nn.Module]:
    """The modules that an update changes though nothing is learned by them."""
    behavior = policy.behavior
    return [module for module in (behavior.scale, behavior.entropy, behavior.budget) if module is not None]


class Crew:
    """`count` processes beside this one, which must have done no update yet with them.

    policy is moved to shared memory; flats are the flat gradients that end up with everybody's. seed: of the random
    numbers of the first; the next ones have the next.
    """

    def __init__(self, policy: Policy, flats: list[Tensor], half: bool, count: int, seed: int):
        self.policy, self.flats = policy, flats
        for tensor in (*policy.parameters(), *policy.buffers()):
            tensor.share_memory_()
        self.theirs = [[torch.zeros_like(flat).share_memory_() for flat in flats] for _ in range(count)]
        context = torch.multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for number, grads in enumerate(self.theirs):
            mine, other = context.Pipe()
            settings = policy, grads, half, count + 1, seed + number
            self.processes.append(context.Process(target=serve, args=(other, *settings), daemon=True))
            with without_ctrl_c():
                self.processes[-1].start()
            other.close()
            self.pipes.append(mine)

    def begin(self, batch: Batch, loops: int) -> tuple[Batch, int]:
        """Send everybody's part of the batch, and return ours, with the loops of its sequences."""
        size = len(batch.reward) // (len(self.pipes) + 1)
        lent = tuple(plain(module.state_dict()) for module in running(self.policy))
        parts = [slice(first, first + size) for first in range(0, len(batch.reward), size)]
        depths = [loops[part] if isinstance(loops, Tensor) else loops for part in parts]
        for pipe, part, depth in zip(self.pipes, parts[1:], depths[1:], strict=True):
            self.send(pipe, "update", (tuple(map(plain, part_of(batch, part))), plain(depth), lent))
        return part_of(batch, parts[0]), depths[0]

    def end(self, losses: Losses) -> Losses:
        """Wait for the others: average gradients and metrics with ours, and put their states behind ours.

        Raises NonFiniteError where one of their losses is not finite.
        """
        others = [self.answer(pipe) for pipe in self.pipes]
        for bad in (other["bad"] for other in others):
            if bad:
                raise NonFiniteError(bad)
        count = len(others) + 1
        for flat, *theirs in zip(self.flats, *self.theirs, strict=True):
            for each in theirs:
                flat.add_(each)
            flat.div_(count)
        metrics = {
            name: (value + sum(other["metrics"].get(name, 0.0) for other in others)) / count
            for name, value in losses.metrics.items()
        }
        states = [losses.states, *(LatentState(*tensors(other["states"])) for other in others)]
        depths = torch.cat([losses.depths, *(tensors(other["depths"]) for other in others)])
        lengths = losses.lengths
        if lengths is not None:
            lengths = torch.cat([lengths, *(tensors(other["lengths"]) for other in others)])
        whole = LatentState(*(torch.cat(leaves) for leaves in zip(*states, strict=True)))
        return losses._replace(metrics=metrics, states=whole, depths=depths, lengths=lengths)

    def random_states(self) -> list[Tensor]:
        """Where the random numbers of the others are."""
        for pipe in self.pipes:
            self.send(pipe, "random", None)
        return [tensors(self.answer(pipe)) for pipe in self.pipes]

    def restore(self, states: list[Tensor]) -> None:
        """Let the random numbers go on from there; of a crew of another size as many as there are."""
        for pipe, state in zip(self.pipes, states, strict=False):
            self.send(pipe, "restore", plain(state))
            self.answer(pipe)

    def send(self, pipe: Connection, word: str, content: Any) -> None:
        try:
            pipe.send((word, content))
        except OSError:
            raise gone() from None

    def answer(self, pipe: Connection) -> Any:
        try:
            found = pipe.recv()
        except (OSError, EOFError):
            raise gone() from None
        if isinstance(found, str):
            raise RuntimeError(f"a process that shares the updates failed:\n{found}")
        return found

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()  # which ends them
        for process in self.processes:
            process.join(5.0)
            process.terminate()


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes that begin inside of this never hear Ctrl-C: it is for the one who acts, and who saves."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would allow the signal again when it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def gone() -> OSError:
    return OSError("a process that shares the updates (--optimizer.workers) has ended")


def serve(pipe: Connection, policy: Policy, grads: list[Tensor], half: bool, parts: int, seed: int) -> None:
    """The life of such a process: until the pipe is closed."""
    from agent.runtime import keep_memory  # it imports the learner

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(seed)
    for params, flat in zip(policy.parts().values(), grads, strict=True):
        offset = 0
        for p in params:
            p.grad = flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
    for module in running(policy):
        for name, buffer in module.named_buffers():
            setattr(module, name, buffer.clone())  # what others see is not ours to change
    gradients = Gradients(policy, grads, half, parts)
    while True:
        try:
            word, content = pipe.recv()
        except (OSError, EOFError):
            return
        try:
            if word == "random":
                found: Any = plain(torch.get_rng_state())
            elif word == "restore":
                torch.set_rng_state(tensors(content))
                found = None
            else:
                found = contribute(gradients, *tensors(content))
        except Exception:
            found = traceback.format_exc()
        pipe.send(found)


def contribute(
    gradients: Gradients, batch: tuple[Any, ...], loops: int, lent: tuple[dict[str, Tensor], ...]
) -> dict[str, Any]:
    """Gradients of one part, and what `Losses` says of it as plain values; bad names a metric that is not finite."""
    for module, values in zip(running(gradients.policy), lent, strict=True):
        module.load_state_dict(values)
    whole = Batch._make(batch)
    losses = gradients.losses(whole._replace(start=whole.start and LatentState(*whole.start)), loops)
    found = {
        "bad": "", "metrics": {name: float(value) for name, value in losses.metrics.items()},
        "states": plain(tuple(losses.states)), "depths": plain(losses.depths), "lengths": plain(losses.lengths),
    }  # fmt: skip
    try:
        finite(losses)
    except NonFiniteError as error:
        return found | {"bad": str(error)}
    gradients.differentiate(losses)
    return found
