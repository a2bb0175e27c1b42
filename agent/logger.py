"""Where a run writes what happens: TensorBoard, metrics.jsonl, episodes.csv, eval.csv and the terminal.

`step` counts environment steps everywhere. The trainer hands losses to `add` as they come; `write`
averages them, copies them to the host once, and stores them.
"""

import csv
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from agent.video import encode_gif

EPISODE_COLUMNS = ("step", "env", "return", "length")
EVAL_COLUMNS = ("step", "episode", "seed", "return", "length", "mean_loops")
FILES = {"metrics.jsonl": None, "episodes.csv": EPISODE_COLUMNS, "eval.csv": EVAL_COLUMNS}
LOOPS_METRIC = "loop/dream_depth"  # shown in the terminal as "loops"

FOLD = 256  # adds kept apart before they are summed; bounds memory between two writes


class Logger:
    """Log of one run. Call `close` at the end.

    `run_dir` is made when missing, `total_steps` is the goal that progress is measured against.
    `start_step` > 0 continues a run: what was logged after that step is dropped, so that curves do
    not run back and forth. With `start_step` 0 logs found in the folder are kept as `*.old`.
    `console` False prints nothing. Raises ValueError when a log found there has other columns.
    """

    def __init__(
        self, run_dir: Path | str, total_steps: int, start_step: int = 0, console: bool = True
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        kept: dict[str, list[str]] = {}
        self._files: dict[str, TextIO] = {}
        for name, columns in FILES.items():
            kept[name] = _cut(self.run_dir / name, start_step, columns)
            self._files[name] = (self.run_dir / name).open("a", encoding="utf-8", newline="")
        # TensorBoard drops events from purge_step on; those of start_step itself stay, as in the files.
        purge_step = start_step + 1 if start_step else 0
        self._board: Any = SummaryWriter(str(self.run_dir), purge_step=purge_step, flush_secs=20)
        self._pending: list[Mapping[str, torch.Tensor | float]] = []
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._scalars: dict[str, float] = {}
        self._step = start_step
        # The clock goes on where the last kept line stopped, so time never runs backwards in a log.
        elapsed = json.loads(kept["metrics.jsonl"][-1])["wall"] if kept["metrics.jsonl"] else 0.0
        self._start = time.monotonic() - elapsed
        self._console = _Console(total_steps, start_step) if console else None
        if self._console:
            self._console.returns.extend(float(row.split(",")[2]) for row in kept["episodes.csv"][-40:])

    def add(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        """Take the metrics of one update into the means of the next `write`; never waits for the device.

        Values are numbers or detached 0-d tensors, which must not be overwritten afterwards; another shape
        raises ValueError when the mean is made. A metric that is missing from some calls is averaged over
        the calls that had it. Each call counts as one update in the terminal's updates per second.
        """
        self._pending.append(metrics)
        if self._console:
            self._console.updates += 1
        if len(self._pending) >= FOLD:
            self._fold()

    def _fold(self) -> None:
        """Sum the pending metrics by name, tensors on their device."""
        columns: dict[str, list] = {}
        for metrics in self._pending:
            for name, value in metrics.items():
                columns.setdefault(name, []).append(value)
        self._pending.clear()
        for name, values in columns.items():
            total: torch.Tensor | float
            if all(isinstance(value, torch.Tensor) for value in values):
                if any(value.ndim for value in values):
                    raise ValueError(f"metric {name} must be a number or a 0-d tensor")
                total = torch.stack([value.detach() for value in values]).float().sum()
            else:
                total = sum(float(value) for value in values)
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + len(values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers as they are: to TensorBoard at `step`, to metrics.jsonl with the next `write`."""
        for name, value in values.items():
            self._scalars[name] = float(value)
            self._board.add_scalar(name, float(value), step)
        self._step = max(self._step, step)

    def write(self, step: int) -> dict[str, float]:
        """Average what was added since the last call, store it under `step`, return it.

        The result also holds the numbers given to `scalars` since then. One copy from the device to the
        host. NaN is written to metrics.jsonl as null, infinities as "Infinity" and "-Infinity".
        """
        self._fold()
        on_device = {name: value for name, value in self._sums.items() if isinstance(value, torch.Tensor)}
        if on_device:
            device = next(iter(on_device.values())).device
            numbers = torch.stack([value.to(device) for value in on_device.values()]).tolist()
            self._sums.update(zip(on_device, numbers, strict=True))
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        for name, value in means.items():
            self._board.add_scalar(name, value, step)
        result = means | self._scalars
        line: dict[str, Any] = {"step": step, "wall": round(time.monotonic() - self._start, 3)}
        line |= {name: _jsonable(value) for name, value in result.items()}
        self._files["metrics.jsonl"].write(json.dumps(line, allow_nan=False) + "\n")
        self._files["metrics.jsonl"].flush()
        self._sums, self._counts, self._scalars = {}, {}, {}
        self._step = step
        if self._console:
            self._console.loops = result.get(LOOPS_METRIC, self._console.loops)
            self._console.show(step)
        return result

    def progress(self, step: int) -> None:
        """Refresh the terminal's line; cheap enough for every step, nothing else is logged."""
        if self._console:
            self._console.show(step)

    def episode(self, step: int, env: int, ret: float, length: int) -> None:
        """Log a finished training episode of environment number `env`: its return and length in steps."""
        self._rows("episodes.csv", [(step, env, float(ret), length)])
        if self._console:
            self._console.returns.append(float(ret))
            self._console.show(step)

    def evaluation(self, step: int, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the episodes of one evaluation after `step` training steps.

        Each row has episode, seed, return, length and mean_loops; further keys are ignored.
        Raises KeyError when one is missing.
        """
        rows = list(rows)
        self._rows("eval.csv", [(step, *(row[key] for key in EVAL_COLUMNS[1:])) for row in rows])
        if self._console and rows:
            self._console.eval_return = float(np.mean([row["return"] for row in rows]))
            self._console.show(step)

    def _rows(self, name: str, rows: list[tuple]) -> None:
        # .item() turns numpy numbers into plain ones, so that float32 is not cut to its short form
        plain = [[value.item() if isinstance(value, np.generic) else value for value in row] for row in rows]
        csv.writer(self._files[name], lineterminator="\n").writerows(plain)
        self._files[name].flush()

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Log the distribution of `values`, an array of any shape; NaN and infinities are left out."""
        values = np.asarray(values, dtype=np.float64)
        if (values := values[np.isfinite(values)]).size:
            self._board.add_histogram(tag, values, step)

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Log one picture, uint8 (H, W, 3). Raises ValueError for anything else."""
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"pictures must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
        self._board.add_image(tag, picture, step, dataformats="HWC")

    def gif(self, step: int, tag: str, frames: np.ndarray, fps: float) -> None:
        """Log a moving picture, uint8 (T, H, W, 3), that TensorBoard plays at `fps` frames per second.

        Written as an image summary by hand: SummaryWriter.add_video does not work with moviepy 2.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        encoded = encode_gif(frames, fps)
        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._board.file_writer.add_summary(summary, step)

    def hparams(self, settings: Mapping[str, object], metrics: Mapping[str, float | None]) -> None:
        """Fill TensorBoard's HParams page: `settings` of the run beside the named `metrics`.

        A metric given as None is only named, its column then shows what `scalars` or `write` log later.
        SummaryWriter.add_hparams is not used: it opens a second event file in the folder, after which
        TensorBoard may stop reading the first one.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            self._board.file_writer.add_summary(summary)
        self.scalars(self._step, {name: value for name, value in metrics.items() if value is not None})

    def message(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        if self._console:
            self._console.message(text)

    def close(self) -> None:
        """Write what is pending and close all files; a second call does nothing."""
        if self._files["metrics.jsonl"].closed:
            return
        try:
            if self._pending or self._sums or self._scalars:
                self.write(self._step)
        finally:
            for file in self._files.values():
                file.close()
            self._board.close()
            if self._console:
                self._console.finish()


def _jsonable(value: float) -> float | str | None:
    """JSON has no NaN and no infinity; float() reads the strings back."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _cut(path: Path, start_step: int, columns: tuple[str, ...] | None) -> list[str]:
    """Cut a log back to rows up to `start_step` and return these rows; make a CSV with its header.

    `columns` names the columns of a CSV whose first is the step, None stands for lines of JSON. The last
    line is dropped when it has no line end: the run was stopped while writing it.
    """
    header = [",".join(columns)] if columns else []
    lines = []
    if path.exists() and path.stat().st_size > 0:
        if start_step == 0:
            os.replace(path, path.with_name(path.name + ".old"))
        else:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    if lines and lines[: len(header)] != header:
        raise ValueError(f"{path} has the columns {lines[0]}, expected {header[0]}")
    rows = lines[len(header) :]
    steps = [int(row.split(",")[0]) if columns else json.loads(row)["step"] for row in rows]
    kept = [row for row, step in zip(rows, steps, strict=True) if step <= start_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(row + "\n" for row in header + kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept


class _Console:
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
        # (time, step, updates) of the last minute: speeds follow the present
        self._past: deque[tuple[float, int, int]] = deque([(time.monotonic(), start_step, 0)], maxlen=256)

    def show(self, step: int, force: bool = False) -> None:
        self._step = max(self._step, step)
        now = time.monotonic()
        if now - self._shown_at < self._pause and not force:
            return
        self._shown_at, self._shown_step = now, self._step
        self._past.append((now, self._step, self.updates))
        while len(self._past) > 2 and now - self._past[0][0] > 60:
            self._past.popleft()
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a full row would wrap
            print("\r" + self.line()[:width] + "\x1b[K", end="", flush=True)
        else:
            print(self.line(), flush=True)

    def line(self) -> str:
        then, step, updates = self._past[0]
        seconds = max(1e-9, self._past[-1][0] - then)
        speed = (self._past[-1][1] - step) / seconds
        parts = [f"{100 * self._step / self._total:3.0f}%  {_short(self._step)}/{_short(self._total)}"]
        if self.returns:
            recent = list(self.returns)
            bars = sparkline(recent, 8, self._blocks)
            parts.append(f"return {bars} {np.mean(recent[-10:]):.4g}")
        if self.eval_return is not None:
            parts.append(f"eval {self.eval_return:.4g}")
        if self.loops is not None:
            parts.append(f"loops {self.loops:.1f}")
        if speed > 0:
            left = max(0, self._total - self._step) / speed
            rate = (self._past[-1][2] - updates) / seconds
            parts += [f"{rate:.1f} updates/s", f"{_short(speed)} steps/s", f"eta {_clock(left)}"]
        return "  ".join(parts)

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
