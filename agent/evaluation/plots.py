"""Pictures of a run: its learning curves, and open-loop predictions of its world model from the replay."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.replay import ReplayBuffer
from agent.learning.dreamer import Dreamer
from agent.logs.logger import LOOPS_METRIC, Logger
from agent.logs.video import depth_strip, write_video
from world_model import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, rows: int, columns: int = 1, share_x: bool = False) -> tuple[Figure, Any]:
    """A figure of that size in inches and its array of axes (rows, columns); needs no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share_x)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def pixels_of(figure: Figure) -> np.ndarray:
    """The drawn figure, (H, W, 3) uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- open-loop prediction

GIF_FPS = 5.0
"""Frames per second of open-loop GIFs: slow enough to see where a dream departs from the recorded episode."""


class Prediction(NamedTuple):
    """An open-loop prediction beside what happened.

    picture (H, W, 3) uint8: curves of the numbers, and some frames of the images; clips {name of an image:
    (T, H, W, 3) uint8}: recorded, dreamed and difference side by side, with the loops of each step below.
    """

    picture: np.ndarray
    clips: dict[str, np.ndarray]


def predict_open_loop(agent: Dreamer, replay: ReplayBuffer, seed: int, length: int = 48) -> Prediction | None:
    """Predict part of a replayed episode from the actions that were taken in it.

    The model observes the first rows of the part and then only the actions. None while the replay holds too little.
    """
    length = min(length, len(replay) // replay.envs - 1)
    if length < 4:
        return None
    training_rng, replay.rng = replay.rng, np.random.default_rng(seed)
    try:
        batch, _ = replay.sample(32, length, agent.device)
    finally:
        replay.rng = training_rng
    resets = batch.is_first[:, 1:].float()
    spans = torch.where(resets.any(1), resets.argmax(1) + 1, length)  # (B,) rows before the next episode
    pick, span = int(spans.argmax()), int(spans.max())
    if span < 4:
        return None
    context = min(8, span // 2)
    observed = _rows_of(batch, pick, context)
    world = agent.averaged.world
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        states = world.observe_sequence(observed, world.sample_depth()).states
        actions = batch.prev_action[pick : pick + 1, context:span]
        dream = world.imagine(states.map(lambda leaf: leaf[:, -1]), actions, span - context)
        decoded = world.decode(dream.states.map(lambda leaf: leaf[:, 1:]))
    curves: list[tuple[str, np.ndarray, np.ndarray]] = []
    strips, clips, loops = [], {}, dream.loops.depth[0].numpy(force=True)
    for name, value in batch.obs.items():
        if name not in world.observation_model.vectors:
            if name in decoded:
                parts = image_comparison(value[pick, context:span], decoded[name][0])
                strips.append(frame_strip(parts))
                clips[name] = comparison_clip(parts, loops, world.run_cap)
            continue
        if name not in decoded:
            continue
        recorded, dreamed = value[pick, :span].numpy(force=True), decoded[name][0].numpy(force=True)
        most_varying = np.argsort(-recorded.std(0), kind="stable")[:4]
        curves += [(f"{name}[{i}]", recorded[:, i], dreamed[:, i]) for i in sorted(most_varying)]
    reward = batch.reward[pick, :span].numpy(force=True)
    curves.append(("reward", reward, dream.rewards[0].numpy(force=True)))
    return Prediction(_stacked([*strips, _draw_prediction(curves, context)]), clips)


def log_open_loop(logger: Logger, step: int, agent: Dreamer, replay: ReplayBuffer, seed: int) -> None:
    """Log a prediction to TensorBoard; its clips also as videos/open_loop_NAME.gif, which the next one replaces."""
    prediction = predict_open_loop(agent, replay, seed)
    if prediction is None:
        return
    logger.image(step, "open_loop", prediction.picture)
    for name, frames in prediction.clips.items():
        logger.gif(step, f"open_loop/{name}", frames, GIF_FPS)
        write_video(Path(logger.run_dir) / "videos" / f"open_loop_{name}.gif", frames, GIF_FPS)


def image_comparison(recorded: Tensor, dreamed: Tensor) -> list[np.ndarray]:
    """Recorded (T, H, W, C) uint8 and dreamed in [0, 1] -> recorded, dreamed, difference, each (T, H, W, 3) uint8.

    Grey is no difference.
    """
    real, dream = recorded.numpy(force=True) / 255.0, dreamed.numpy(force=True)
    parts = real, dream, (dream - real + 1.0) / 2.0
    return [np.broadcast_to(np.rint(255.0 * x).astype(np.uint8), (*x.shape[:3], 3)) for x in parts]


def frame_strip(parts: list[np.ndarray], frames: int = 10) -> np.ndarray:
    """Up to `frames` of the frames side by side, the parts below each other: (H, W, 3)."""
    pick = np.unique(np.linspace(0, len(parts[0]) - 1, frames).round().astype(int))
    return np.concatenate([np.concatenate(list(part[pick]), 1) for part in parts])


def comparison_clip(parts: list[np.ndarray], loops: np.ndarray, most: int, scale: int = 3) -> np.ndarray:
    """The parts side by side, `scale` times as large, the loops of each step (at most `most`) below: (T, H, W, 3)."""
    frames = np.concatenate(parts, 2).repeat(scale, 1).repeat(scale, 2)
    return depth_strip(frames, loops, most)


def _stacked(pictures: list[np.ndarray]) -> np.ndarray:
    """The pictures below each other, on white."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(picture, ((0, 4), (0, width - picture.shape[1]), (0, 0)), constant_values=255) for picture in pictures
    ]
    return np.concatenate(padded)


def _rows_of(batch: Batch, pick: int, length: int) -> Batch:
    """The first `length` rows of sequence number `pick`, as a batch of one."""
    rows = slice(pick, pick + 1), slice(0, length)
    obs = {name: value[rows] for name, value in batch.obs.items()}
    start = batch.start.map(lambda leaf: leaf[pick : pick + 1]) if batch.start else None
    return Batch(
        obs,
        batch.prev_action[rows],
        batch.reward[rows],
        batch.is_first[rows],
        batch.is_last[rows],
        batch.is_terminal[rows],
        start,
    )


def _draw_prediction(curves: list[tuple[str, np.ndarray, np.ndarray]], context: int) -> np.ndarray:
    """Curves (name, recorded (T,), dreamed (T - context,)) below each other, (H, W, 3) uint8."""
    figure, grid = new_figure(7.0, 1.2 * len(curves) + 0.6, len(curves), share_x=True)
    axes = grid[:, 0]
    for axis, (name, recorded, dreamed) in zip(axes, curves, strict=True):
        axis.plot(np.arange(len(recorded)), recorded, color="0.2", label="recorded")
        axis.plot(context + np.arange(len(dreamed)), dreamed, color="tab:orange", label="open loop")
        axis.axvline(context - 1, color="0.7", linestyle=":")
        axis.set_ylabel(name)
    axes[0].legend(loc="upper right", frameon=False, ncols=2)
    axes[-1].set_xlabel("step (observed left of the dotted line)")
    return pixels_of(figure)


# ---------------------------------------------------------------------- learning curves


def draw_curves(run_dir: Path, title: str, unit: str = "steps") -> Path:
    """Draw training and evaluation returns over steps, and loops below them, from the logs; returns RUN/curve.png."""
    figure, grid = new_figure(7.0, 5.0, 2, share_x=True)
    top, bottom = grid[:, 0]
    steps, returns = _columns(run_dir / "episodes.csv", "return")
    top.plot(steps, returns, ".", color="0.75", markersize=3, label="training episodes")
    steps, returns = _columns(run_dir / "eval.csv", "return")
    _, loops = _columns(run_dir / "eval.csv", "mean_loops")
    evaluated = np.unique(steps)
    if evaluated.size:
        groups = [returns[steps == step] for step in evaluated]
        low, high = [group.min() for group in groups], [group.max() for group in groups]
        top.fill_between(evaluated, low, high, color="tab:blue", alpha=0.2, linewidth=0)
        top.plot(evaluated, [group.mean() for group in groups], "o-", color="tab:blue", label="evaluation")
        means = [loops[steps == step].mean() for step in evaluated]
        bottom.plot(evaluated, means, "o-", color="tab:blue", label="evaluation")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if LOOPS_METRIC in row]
    if rows:
        dreams = [row["step"] for row in rows], [row[LOOPS_METRIC] for row in rows]
        bottom.plot(*dreams, color="tab:orange", label="dreams")
    top.set(title=title, ylabel="return")
    bottom.set(ylabel="loops per step", xlabel=unit)
    for axis in (top, bottom):
        if axis.has_data():
            axis.legend(loc="best", frameon=False)
    path = run_dir / "curve.png"
    figure.savefig(path, dpi=120)
    return path


def _columns(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The step and the named column of a CSV, as two arrays."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([float(row["step"]) for row in rows]), np.array([float(row[name]) for row in rows])
