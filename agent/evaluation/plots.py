"""Pictures of a run: its curves, and what its world model predicts with closed eyes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from agent.data.replay import ReplayBuffer
from agent.learning.dreamer import Dreamer
from agent.logs.logger import LOOPS_METRIC, Logger
from agent.logs.video import depth_strip, write_video
from world_model import Batch, sample_depth

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, rows: int, columns: int = 1, share_x: bool = False) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes (rows, columns), without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share_x)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def pixels_of(figure: Figure) -> np.ndarray:
    """The drawn figure, (H, W, 3) uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


FILM_FPS = 5.0
"""Frames per second of open-loop films: slow enough to see where a dream leaves the truth."""


class Prediction(NamedTuple):
    """What a world model predicts with closed eyes, beside what happened.

    picture (H, W, 3) uint8: lines of numbers, and moments of images; films {name of an image: (T, H, W, 3) uint8}:
    truth, dream and difference side by side, with the loops of each step below.
    """

    picture: np.ndarray
    films: dict[str, np.ndarray]


def predict_open_loop(agent: Dreamer, replay: ReplayBuffer, seed: int, length: int = 48) -> Prediction | None:
    """Dream from a place in the replay with the actions that were taken there.

    The model sees the first rows of a replayed episode and then only the actions. None while the replay is short.
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
    spans = torch.where(resets.any(1), resets.argmax(1) + 1, length)  # rows up to the next episode
    pick, span = int(spans.argmax()), int(spans.max())
    if span < 4:
        return None
    context = min(8, span // 2)
    part = _rows_of(batch, pick, context)
    world = agent.averaged.world
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        states = world.observe_sequence(part, sample_depth(world.cfg.loop)).states
        actions = batch.prev_action[pick : pick + 1, context:span]
        rollout = world.imagine(states.map(lambda leaf: leaf[:, -1]), actions, span - context)
        dreamt = world.decode(rollout.states.map(lambda leaf: leaf[:, 1:]))
    lines: list[tuple[str, np.ndarray, np.ndarray]] = []
    strips, films, loops = [], {}, rollout.loops.depth[0].numpy(force=True)
    for name, value in batch.obs.items():
        if name not in world.observation_model.vectors:
            if name in dreamt:
                parts = compared(value[pick, context:span], dreamt[name][0])
                strips.append(film_strip(parts))
                films[name] = film(parts, loops, world.run_cap)
            continue
        truth, guess = value[pick, :span].numpy(force=True), dreamt[name][0].numpy(force=True)
        order = np.argsort(-truth.std(0), kind="stable")[:4]  # the parts that move most
        lines += [(f"{name}[{i}]", truth[:, i], guess[:, i]) for i in sorted(order)]
    reward = batch.reward[pick, :span].numpy(force=True)
    lines.append(("reward", reward, rollout.rewards[0].numpy(force=True)))
    return Prediction(_stacked([*strips, _draw_lines(lines, context)]), films)


def log_open_loop(logger: Logger, step: int, agent: Dreamer, replay: ReplayBuffer, seed: int) -> None:
    """Show a prediction in TensorBoard, its films also as videos/open_loop_NAME.gif, the newest only."""
    shown = predict_open_loop(agent, replay, seed)
    if shown is None:
        return
    logger.image(step, "open_loop", shown.picture)
    for name, frames in shown.films.items():
        logger.gif(step, f"open_loop/{name}", frames, FILM_FPS)
        write_video(Path(logger.run_dir) / "videos" / f"open_loop_{name}.gif", frames, FILM_FPS)


def compared(truth: torch.Tensor, guess: torch.Tensor) -> list[np.ndarray]:
    """(T, H, W, C) uint8 and from 0 to 1 -> truth, guess and their difference (grey: none), each (T, H, W, 3) uint8."""
    real, dreamt = truth.numpy(force=True) / 255.0, guess.numpy(force=True)
    parts = real, dreamt, (dreamt - real + 1.0) / 2.0
    return [np.broadcast_to(np.rint(255.0 * x).astype(np.uint8), (*x.shape[:3], 3)) for x in parts]


def film_strip(parts: list[np.ndarray], frames: int = 10) -> np.ndarray:
    """Up to `frames` moments side by side, the parts one above the other: (H, W, 3)."""
    pick = np.unique(np.linspace(0, len(parts[0]) - 1, frames).round().astype(int))
    return np.concatenate([np.concatenate(list(part[pick]), 1) for part in parts])


def film(parts: list[np.ndarray], loops: np.ndarray, most: int, scale: int = 3) -> np.ndarray:
    """The parts side by side, `scale` times as large, the loops of each step below: (T, H, W, 3)."""
    frames = np.concatenate(parts, 2).repeat(scale, 1).repeat(scale, 2)
    return depth_strip(frames, loops, most)


def _stacked(pictures: list[np.ndarray]) -> np.ndarray:
    """One above the other, on white."""
    width = max(picture.shape[1] for picture in pictures)
    space = [((0, 4), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.concatenate([np.pad(one, pad, constant_values=255) for one, pad in zip(pictures, space, strict=True)])


def _rows_of(batch: Batch, pick: int, length: int) -> Batch:
    """The first `length` rows of sequence number `pick`, as a batch of one."""
    where = (slice(pick, pick + 1), slice(0, length))
    obs = {name: value[where] for name, value in batch.obs.items()}
    start = batch.start.map(lambda leaf: leaf[pick : pick + 1]) if batch.start else None
    return Batch(
        obs,
        batch.prev_action[where],
        batch.reward[where],
        batch.is_first[where],
        batch.is_last[where],
        batch.is_terminal[where],
        start,
    )


def _draw_lines(lines: list[tuple[str, np.ndarray, np.ndarray]], context: int) -> np.ndarray:
    figure, grid = new_figure(7.0, 1.2 * len(lines) + 0.6, len(lines), share_x=True)
    axes = grid[:, 0]
    for axis, (name, truth, guess) in zip(axes, lines, strict=True):
        axis.plot(np.arange(len(truth)), truth, color="0.2", label="what happened")
        axis.plot(context + np.arange(len(guess)), guess, color="tab:orange", label="open loop")
        axis.axvline(context - 1, color="0.7", linestyle=":")
        axis.set_ylabel(name)
    axes[0].legend(loc="upper right", frameon=False, ncols=2)
    axes[-1].set_xlabel("step (left of the dotted line the model sees)")
    return pixels_of(figure)


def draw_curves(run_dir: Path, title: str, unit: str = "steps") -> Path:
    """Draw the logs of a run: training and evaluation returns over steps, loops below. -> curve.png"""
    figure, grid = new_figure(7.0, 5.0, 2, share_x=True)
    top, bottom = grid[:, 0]
    steps, returns = _columns(run_dir / "episodes.csv", "return")
    top.plot(steps, returns, ".", color="0.75", markersize=3, label="training episodes")
    steps, returns = _columns(run_dir / "eval.csv", "return")
    _, loops = _columns(run_dir / "eval.csv", "mean_loops")
    ticks = np.unique(steps)
    if ticks.size:
        groups = [returns[steps == tick] for tick in ticks]
        low, high = [group.min() for group in groups], [group.max() for group in groups]
        top.fill_between(ticks, low, high, color="tab:blue", alpha=0.2, linewidth=0)
        top.plot(ticks, [group.mean() for group in groups], "o-", color="tab:blue", label="evaluation")
        means = [loops[steps == tick].mean() for tick in ticks]
        bottom.plot(ticks, means, "o-", color="tab:blue", label="evaluation")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if LOOPS_METRIC in row]
    if rows:
        dreamt = [row["step"] for row in rows], [row[LOOPS_METRIC] for row in rows]
        bottom.plot(*dreamt, color="tab:orange", label="dreams")
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
