"""Environments in processes of their own: when that pays, and how they leave Ctrl-C to the one who steps them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from gymnasium.vector import AsyncVectorEnv

MANY_CORES = 8
"""Cores from which evaluations of slow tasks start processes: that takes seconds, and memory."""


def cores() -> int:
    """Processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class Processes(AsyncVectorEnv):
    """Environments in processes of their own that can be closed whatever has become of them."""

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """As Gymnasium's; but where a process died without a word, the others are ended by force instead of waiting
        for its answer."""
        known = zip(self.processes, self.parent_pipes, strict=True)  # no pipe: it told of an error before it ended
        if all(process.is_alive() for process, pipe in known if pipe is not None):
            super().close_extras(timeout, terminate)
            return
        for process in self.processes:
            process.terminate()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()
        for process in self.processes:
            process.join()


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes that begin inside of this never hear Ctrl-C, not even while they import what they need: it is for the
    one who steps them, and who saves."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would allow the signal again when it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
