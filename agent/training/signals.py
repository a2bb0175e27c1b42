"""Signals that ask a run to end: the first one is answered by saving, the second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from agent.runtime import SIGNALS

SAME_EVENT = 0.2
"""Seconds in which a second signal still belongs to the first: a shell and its terminal often send one each."""


@contextlib.contextmanager
def end_on_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Inside of this the first signal calls stop(its number), and a second one has its usual effect.

    Does nothing outside of the main thread, where Python allows no handlers. SIGHUP stays ignored under `nohup`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first and now - first < SAME_EVENT:
            return
        if first:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
            signal.raise_signal(number)
            return
        first = now
        stop(number)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # print could be what was interrupted, and it cannot be entered twice; the terminal may be gone
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: saving, then the run ends; a second signal ends it without saving\n".encode())

    ignored = getattr(signal, "SIGHUP", None) if ignores_hangup() else None
    before = {number: signal.signal(number, handle) for number in SIGNALS if number != ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignores_hangup() -> bool:
    """Whether the loss of the terminal is to be ignored, as under nohup."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
