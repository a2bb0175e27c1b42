"""When things happen in a run: every so many steps, so many updates per step, and when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable


class Every:
    """True when `step` has passed another multiple of `period` since the last time; never for period 0."""

    def __init__(self, period: int, start: int = 0):
        self.period, self.passed = period, start // period if period else 0

    def __call__(self, step: int) -> bool:
        if not self.period or step // self.period <= self.passed:
            return False
        self.passed = step // self.period
        return True


PRETRAIN = 0.1
"""Updates per agent step of the prefill, right after it."""


class Ratio:
    """Updates that are due: at the end of the prefill PRETRAIN * prefill at once, then `ratio` per agent step; with a
    ratio of 0 none."""

    def __init__(self, ratio: float, prefill: int):
        self.ratio, self.prefill = ratio, prefill
        self.pretrain = round(PRETRAIN * prefill) if ratio > 0.0 else 0
        self.done = 0

    def due(self, agent_steps: int) -> bool:
        """Whether fewer updates are done than `agent_steps` ask for."""
        if agent_steps < self.prefill:
            return False
        return self.done < self.pretrain + int((agent_steps - self.prefill) * self.ratio)


SAVE_SECONDS = 240.0
"""Longest time between two checkpoints: with what the last update or step before one takes, a run that is killed loses
less than five minutes."""

UNFINISHED = 75
"""Status of a run that has saved after its slice, and wants to go on."""


def clock() -> float:
    """Seconds."""
    return time.monotonic()


class Progress:
    """The share of a run that is behind us: of its steps or, with a limit of `minutes`, of its time.

    Whichever is larger counts. A part of the run is `over_for_now` after `slice_minutes`. 0 minutes are no limit.
    now() is the clock, in seconds.
    """

    def __init__(self, steps: int, minutes: float, slice_minutes: float = 0.0, now: Callable[[], float] = clock):
        self.steps, self.limit, self.slice, self.now = steps, 60.0 * minutes, 60.0 * slice_minutes, now
        self.before, self.start = 0.0, now()

    def over_for_now(self, share: float = 1.0) -> bool:
        """Whether this part of the run has had so large a share of its minutes."""
        return 0.0 < share * self.slice <= self.now() - self.start

    def seconds(self) -> float:
        return self.before + self.now() - self.start

    def resume(self, seconds: float) -> None:
        """Go on after `seconds` of an earlier part."""
        self.before, self.start = seconds, self.now()

    def __call__(self, step: int) -> float:
        """In [0, 1]; 1 when the run is over."""
        share = step / self.steps
        return min(1.0, max(share, self.seconds() / self.limit) if self.limit else share)
