"""The log of a run: TensorBoard, metrics.jsonl, episodes.csv, eval.csv and the terminal.

`step` counts simulator steps everywhere. The trainer gives the metrics of each update to `add`; `write` averages
them, copies them to the host once, and stores them.
"""

import csv
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from agent.logs.console import Console
from agent.logs.video import encode_gif

EPISODE_COLUMNS = ("step", "env", "return", "length")
EVAL_COLUMNS = ("step", "episode", "seed", "return", "length", "mean_loops")
FILES = {"metrics.jsonl": None, "episodes.csv": EPISODE_COLUMNS, "eval.csv": EVAL_COLUMNS}
LOOPS_METRIC = "loop/dream_depth"  # shown in the terminal as "loops"

CUSTOM_SCALARS = {
    "Looped Dreamer": {
        "Return": ["episode/return", "eval/return"],
        "Loops per step": [LOOPS_METRIC, "eval/loops"],
        "World model": ["world/reconstruction_loss", "world/kl", "world/reward_loss"],
        "Actor and critic": ["behavior/entropy", "behavior/spread", "behavior/advantage_scale"],
        "Imagined return and value": ["behavior/imagined_return", "behavior/value"],
        "Speed": ["speed/updates", "speed/steps"],
    }
}
"""Layout of TensorBoard's Custom Scalars page: {title: {chart: tags}}."""

MAX_PENDING = 256
"""Calls of `add` that are kept before they are summed: bounds memory between two writes."""


class Logger:
    """Log of one run. Call `close` at the end.

    `run_dir` is made when missing; progress is shown relative to `total_steps`.
    `start_step` > 0 continues a run: what was logged after that step is removed, so that steps increase throughout.
    With `start_step` 0 logs that lie in the folder are renamed to `*.old`.
    `console` False prints nothing. Raises ValueError when a log in the folder has other columns.
    """

    def __init__(self, run_dir: Path | str, total_steps: int, start_step: int = 0, console: bool = True) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[str]] = {}
        self._files: dict[str, TextIO] = {}
        for name, columns in FILES.items():
            rows[name] = _truncate_log(self.run_dir / name, start_step, columns)
            self._files[name] = (self.run_dir / name).open("a", encoding="utf-8", newline="")
        # TensorBoard drops events from purge_step on; those of start_step itself stay, as in the files.
        self._eval_step = int(rows["eval.csv"][-1].split(",")[0]) if rows["eval.csv"] else -1
        purge_step = start_step + 1 if start_step else 0
        threading.excepthook = _excepthook
        self._board: Any = SummaryWriter(str(self.run_dir), purge_step=purge_step, flush_secs=20)
        if not start_step:
            layout = {
                title: {chart: ["Multiline", tags] for chart, tags in charts.items()}
                for title, charts in CUSTOM_SCALARS.items()
            }
            self._board.add_custom_scalars(layout)
        self._pending: list[Mapping[str, torch.Tensor | float]] = []
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._scalars: dict[str, float] = {}
        self._step = start_step
        # The clock continues from the last line that was kept, so that wall time increases throughout the log.
        elapsed = json.loads(rows["metrics.jsonl"][-1])["wall"] if rows["metrics.jsonl"] else 0.0
        self._start = time.monotonic() - elapsed
        self._console = Console(total_steps, start_step) if console else None
        if self._console:
            self._console.returns.extend(float(row.split(",")[2]) for row in rows["episodes.csv"][-40:])

    def add(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        """Add the metrics of one update to the means of the next `write`; does not synchronise with the device.

        Values are numbers or detached 0-d tensors, which must not be overwritten afterwards; another shape
        raises ValueError when the mean is computed. A metric that is missing from some calls is averaged over
        the calls that had it. Each call counts as one update in the terminal's updates per second.
        """
        self._pending.append(metrics)
        if self._console:
            self._console.updates += 1
        if len(self._pending) >= MAX_PENDING:
            self._sum_pending()

    def _sum_pending(self) -> None:
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
        """Log numbers without averaging: to TensorBoard at `step`, to metrics.jsonl with the next `write`."""
        for name, value in values.items():
            self._scalars[name] = float(value)
            self._board.add_scalar(name, float(value), step)
        self._step = max(self._step, step)

    def write(self, step: int) -> dict[str, float]:
        """Average what was added since the last call, store it at `step`, return it.

        The result also holds the numbers given to `scalars` since then. Copies from the device to the host once.
        NaN is written to metrics.jsonl as null, infinities as "Infinity" and "-Infinity".
        """
        self._sum_pending()
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

    def progress(self, step: int, share: float | None = None) -> None:
        """Refresh the terminal's line and log nothing; cheap enough for every step.

        share in [0, 1]: the done part of the run, where that is not the fraction of its steps.
        """
        if self._console:
            self._console.show(step, share)

    def episode(self, step: int, env: int, ret: float, length: int) -> None:
        """Log a finished training episode of environment number `env`: its return and its length in simulator steps."""
        self._append("episodes.csv", [(step, env, float(ret), length)])
        if self._console:
            self._console.returns.append(float(ret))
            self._console.show(step)

    def evaluation(self, step: int, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the episodes of one evaluation after `step` training steps; they replace those of the same step.

        Each row has episode, seed, return, length and mean_loops; further keys are ignored.
        Raises KeyError when one is missing.
        """
        rows = list(rows)
        if step == self._eval_step:  # the final evaluation, at the step of the last interim one
            self._files["eval.csv"].close()
            path = self.run_dir / "eval.csv"
            _truncate_log(path, step - 1, EVAL_COLUMNS, move_aside=False)
            self._files["eval.csv"] = path.open("a", encoding="utf-8", newline="")
        self._eval_step = step
        self._append("eval.csv", [(step, *(row[key] for key in EVAL_COLUMNS[1:])) for row in rows])
        if self._console and rows:
            self._console.eval_return = float(np.mean([row["return"] for row in rows]))
            self._console.show(step)

    def _append(self, name: str, rows: list[tuple]) -> None:
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
        """Log one image, uint8 (H, W, 3). Raises ValueError for anything else."""
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"pictures must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
        self._board.add_image(tag, picture, step, dataformats="HWC")

    def gif(self, step: int, tag: str, frames: np.ndarray, fps: float) -> None:
        """Log a GIF, uint8 (T, H, W, 3), that TensorBoard plays at `fps` frames per second.

        It is written as an image summary, because SummaryWriter.add_video does not work with moviepy 2.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_gif(frames, fps))
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._board.file_writer.add_summary(summary, step)

    def hparams(self, settings: Mapping[str, object], metrics: Mapping[str, float | None]) -> None:
        """Fill TensorBoard's HParams page: `settings` of the run beside the named `metrics`.

        A metric given as None is only declared; its column shows what `scalars` or `write` log.
        SummaryWriter.add_hparams is not used: it opens a second event file in the folder, after which
        TensorBoard may stop reading the first one.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            self._board.file_writer.add_summary(summary)
        self.scalars(self._step, {name: value for name, value in metrics.items() if value is not None})

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


def _excepthook(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread, and raises a full disk's error again where the next event is added: it is not to
    be printed twice, the first time as a traceback."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _jsonable(value: float) -> float | str | None:
    """JSON has no NaN and no infinity; float() reads the strings back."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _truncate_log(path: Path, start_step: int, columns: tuple[str, ...] | None, move_aside: bool = True) -> list[str]:
    """Remove the rows of a log after `start_step` and return the others; make the file where there is none.

    `columns`: the columns of a CSV whose first is the step, None for lines of JSON. The last line is removed when it
    has no line end: the run was stopped while writing it. With start_step 0 an old file is renamed to *.old if
    `move_aside`. Of a file with other lines that cannot be read a copy *.damaged is kept, and a line is printed.
    Raises ValueError when the columns are others.
    """
    header = [",".join(columns)] if columns else []
    lines = []
    if path.exists() and path.stat().st_size > 0:
        if start_step == 0 and move_aside:
            os.replace(path, path.with_name(path.name + ".old"))
        else:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if lines and lines[: len(header)] != header:
        raise ValueError(f"{path} has the columns {lines[0]}, expected {header[0]}")
    rows = lines[len(header) :]
    steps = [_step_of(row, columns) for row in rows]
    if None in steps:
        copy = path.with_name(path.name + ".damaged")
        shutil.copyfile(path, copy)
        count = steps.count(None)
        print(f"note: {path} has {count} damaged lines, which are left out; {copy} has them", file=sys.stderr)
    kept = [row for row, step in zip(rows, steps, strict=True) if step is not None and step <= start_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(row + "\n" for row in header + kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept


def _step_of(row: str, columns: tuple[str, ...] | None) -> int | None:
    """The step of a CSV row with these columns, or of a line of JSON; None where it is damaged."""
    try:
        if columns is None:
            line = json.loads(row)
            float(line["wall"])
            return int(line["step"])
        numbers = [float(number) for number in row.split(",")]
        return int(row.split(",")[0]) if len(numbers) == len(columns) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
