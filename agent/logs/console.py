"""What a run says in the terminal: one live line, or plain lines now and then in a file or pipe."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import deque

import numpy as np


class Console:
    """One line in the terminal that is drawn over and over; plain lines now and then in a file or pipe."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.returns: deque[float] = deque(maxlen=40)  # of training episodes
        self.eval_return: float | None = None
        self.loops: float | None = None
        self.updates = 0
        self._total = max(1, total_steps)
        self._step = start_step
        self._live = sys.stdout.isatty()
        self._blocks = "utf" in (sys.stdout.encoding or "").lower()  # other encodings lack the characters
        self._pause = 0.25 if self._live else 10.0  # seconds between two lines
        self._shown_at = -math.inf
        self._shown_step: int | None = None
        self._share = start_step / self._total
        # (time, step, updates, share) of the last minute: speeds follow the present
        self._past: deque[tuple[float, int, int, float]] = deque(maxlen=256)
        self._past.append((time.monotonic(), start_step, 0, self._share))

    def show(self, step: int, share: float | None = None, force: bool = False) -> None:
        """Draw the line, if it is time; share in [0, 1] is how much of the run is over, by default of its steps."""
        self._step = max(self._step, step)
        self._share = max(self._share, self._step / self._total if share is None else share)
        now = time.monotonic()
        if now - self._shown_at < self._pause and not force:
            return
        self._shown_at, self._shown_step = now, self._step
        self._past.append((now, self._step, self.updates, self._share))
        while len(self._past) > 2 and now - self._past[0][0] > 60:
            self._past.popleft()
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a full row would wrap
            print("\r" + self.line(width) + "\x1b[K", end="", flush=True)
        else:
            print(self.line(), flush=True)

    def line(self, width: int | None = None) -> str:
        """The line; where it is wider than `width`, without what matters least."""
        then, step, updates, share = self._past[0]
        now, step_now, updates_now, share_now = self._past[-1]
        seconds = max(1e-9, now - then)
        speed = (step_now - step) / seconds
        parts = [f"{100 * self._share:3.0f}%  {_short(self._step)}/{_short(self._total)}"]
        if self.returns:
            recent = list(self.returns)
            bars = sparkline(recent, 8, self._blocks)
            parts.append(f"return {bars} {np.mean(recent[-10:]):.4g}")
        if self.eval_return is not None:
            parts.append(f"eval {self.eval_return:.4g}")
        if self.loops is not None:
            parts.append(f"loops {self.loops:.1f}")
        if speed > 0:
            left = (1.0 - self._share) * seconds / max(1e-9, share_now - share)
            parts += [f"{(updates_now - updates) / seconds:.1f} updates/s", f"{_short(speed)} steps/s"]
            parts.append(f"eta {_clock(left)}")
        for least in ("steps/s", "updates/s", "loops", "eval", "eta"):
            if width is not None and len("  ".join(parts)) > width:
                parts = [part for part in parts if least not in part]
        return "  ".join(parts)[:width]

    def message(self, text: str) -> None:
        if self._live and self._shown_step is not None:
            print("\r\x1b[K" + text)
            self.show(self._step, force=True)
        else:
            print(text, flush=True)

    def finish(self) -> None:
        """Show the final state and leave the live line."""
        if self._shown_step not in (None, self._step):
            self.show(self._step, force=True)
        if self._live and self._shown_step is not None:
            print(flush=True)


def sparkline(values: list[float], width: int, blocks: bool = True) -> str:
    """Draw the last values as `width` or fewer characters of growing height, each the mean of its share."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    groups = np.array_split(np.asarray(finite), min(width, len(finite)))
    means = np.array([group.mean() for group in groups])
    marks = "▁▂▃▄▅▆▇█" if blocks else "_.-~=+*#"
    low, high = means.min(), means.max()
    places = (means - low) / (high - low) if high > low else np.full(len(means), 0.5)
    return "".join(marks[int(round(place * (len(marks) - 1)))] for place in places)


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
