"""Environments in processes of their own: when that pays, and how they leave Ctrl-C to the one who steps them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

MANY_CORES = 8
"""Cores from which evaluations of slow tasks start processes: that takes seconds, and memory."""


def cores() -> int:
    """Processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


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
