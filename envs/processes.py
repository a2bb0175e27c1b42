"""Environments in processes of their own: when that pays, and how signals are left to the parent process."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker

MANY_CORES = 8
"""Evaluations of slow tasks use processes from this many cores on: starting them takes seconds, and memory."""


def cores() -> int:
    """Processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def quiet_worker(*arguments: Any) -> None:
    """Gymnasium's loop of a process, which ends without a traceback where the parent process is gone."""
    with suppress(EOFError, ConnectionError):
        _async_worker(*arguments)


class ClosableAsyncVectorEnv(AsyncVectorEnv):
    """An AsyncVectorEnv that can be closed even after one of its processes died."""

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """As Gymnasium's; but where a process was killed, the others are terminated instead of waiting for its answer,
        which never comes."""
        # A process without a pipe has reported an error before it ended.
        workers = zip(self.processes, self.parent_pipes, strict=True)
        if all(process.is_alive() for process, pipe in workers if pipe is not None):
            super().close_extras(timeout, terminate)
            return
        for process in self.processes:
            process.kill()  # they do not hear SIGTERM
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()
        for process in self.processes:
            process.join()


SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
"""Signals that ask a program to end. A terminal or a scheduler sends them to every process of a job."""


@contextmanager
def without_signals() -> Iterator[None]:
    """Processes started inside this block ignore SIGNALS from their first moment, imports included: the parent process
    handles them, and saves."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # started later, it would unblock some of them again
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
