"""Progress of a run in the terminal: one live line, or plain lines every ten seconds in a file or pipe."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import deque

import numpy as np

from agent.numbers import number


class Console:
    """Progress line of one run; the logger sets `returns`, `eval_return`, `loops` and `updates`."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.returns: deque[float] = deque(maxlen=40)  # of training episodes
        self.eval_return: float | None = None
        self.loops: float | None = None
        self.updates = 0
        self._total = max(1, total_steps)
        self._step = start_step
        self._live = sys.stdout.isatty()
        self._unicode = "utf" in (sys.stdout.encoding or "").lower()  # other encodings lack the characters
        self._interval = 0.25 if self._live else 10.0  # seconds between two lines
        self._shown_at = -math.inf
        self._shown_step: int | None = None
        self._share = start_step / self._total
        # (time, step, updates, share) over the last minute, from which speeds are computed
        self._history: deque[tuple[float, int, int, float]] = deque(maxlen=256)
        self._history.append((time.monotonic(), start_step, 0, self._share))

    def show(self, step: int, share: float | None = None, force: bool = False) -> None:
        """Draw the line if it is time, or with `force`.

        share in [0, 1]: the done part of the run, by default the fraction of its steps.
        """
        self._step = max(self._step, step)
        self._share = max(self._share, self._step / self._total if share is None else share)
        now = time.monotonic()
        if now - self._shown_at < self._interval and not force:
            return
        self._shown_at, self._shown_step = now, self._step
        self._history.append((now, self._step, self.updates, self._share))
        while len(self._history) > 2 and now - self._history[0][0] > 60:
            self._history.popleft()
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a full row would wrap
            print("\r" + self.line(width) + "\x1b[K", end="", flush=True)
        else:
            print(self.line(), flush=True)

    def line(self, width: int | None = None) -> str:
        """The line; where it is wider than `width`, the least important parts are left out."""
        then, step, updates, share = self._history[0]
        now, step_now, updates_now, share_now = self._history[-1]
        seconds = max(1e-9, now - then)
        speed = (step_now - step) / seconds
        parts = [f"{100 * self._share:3.0f}%  {_short(self._step)}/{_short(self._total)}"]
        if self.returns:
            recent = list(self.returns)
            parts.append(f"return {sparkline(recent, 8, self._unicode)} {number(float(np.mean(recent[-10:])))}")
        if self.eval_return is not None:
            parts.append(f"eval {number(self.eval_return)}")
        if self.loops is not None:
            parts.append(f"loops {self.loops:.1f}")
        if speed > 0:
            left = (1.0 - self._share) * seconds / max(1e-9, share_now - share)
            parts += [f"{(updates_now - updates) / seconds:.1f} updates/s", f"{_short(speed)} steps/s"]
            parts.append(f"eta {_clock(left)}")
        for optional in ("steps/s", "updates/s", "loops", "eval", "eta"):  # least important first
            if width is not None and len("  ".join(parts)) > width:
                parts = [part for part in parts if optional not in part]
        return "  ".join(parts)[:width]

    def finish(self) -> None:
        """Show the final state and leave the live line."""
        if self._shown_step not in (None, self._step):
            self.show(self._step, force=True)
        if self._live and self._shown_step is not None:
            print(flush=True)


def sparkline(values: list[float], width: int, blocks: bool = True) -> str:
    """Draw the values as at most `width` bars, each the mean of equally many of them; blocks False: in ASCII."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    groups = np.array_split(np.asarray(finite), min(width, len(finite)))
    means = np.array([group.mean() for group in groups])
    bars = "▁▂▃▄▅▆▇█" if blocks else "_.-~=+*#"
    low, high = means.min(), means.max()
    heights = (means - low) / (high - low) if high > low else np.full(len(means), 0.5)
    return "".join(bars[int(round(height * (len(bars) - 1)))] for height in heights)


def _short(number: float) -> str:
    """12345 -> 12.3k"""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
