"""What an agent is worth: evaluation episodes with fixed seeds, a video of one, and pictures of a run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import gymnasium as gym
import numpy as np
import torch

from agent.dreamer import Dreamer, Memory
from agent.logger import LOOPS_METRIC
from agent.replay import ReplayBuffer
from agent.statistics import summary
from agent.video import depth_strip, write_video
from world_model import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EVAL_SEEDS = 1_000_000_000
"""Training environments draw their seeds below this number, evaluations start from it."""
INTERIM_OFFSET = 1_000_000  # the evaluations that choose best.pt see other episodes than those that judge it
MAX_PARALLEL = 10
MAX_FPS = 30.0  # faster tasks are shown with steps left out: drawing without a GPU is slow

MakeEnvs = Callable[[int], gym.vector.VectorEnv[Any, Any, Any]]


# Written as a call because "return" is a word of the language.
Episode = TypedDict(  # noqa: UP013
    "Episode", {"episode": int, "seed": int, "return": float, "length": int, "mean_loops": float}
)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation episodes, played with averaged weights, mean actions, and seeds that training never sees."""

    episodes: int = 10
    """Episodes of the final evaluation."""
    interim_episodes: int = 5
    """Episodes of each evaluation during training."""
    seed: int = 0
    """Which episodes: the first has the seed 1,000,000,000 + this number, the others count up from it."""
    max_loops: int | None = None
    """Most loops per step; by default as the model is configured."""
    video_frames: int = 500
    """Most frames of the video."""

    def __post_init__(self) -> None:
        for name in ("episodes", "interim_episodes", "max_loops", "video_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--eval.{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 <= self.seed <= EVAL_SEEDS:
            raise ValueError(f"--eval.seed must lie between 0 and {EVAL_SEEDS}, got {self.seed}")

    @property
    def first_seed(self) -> int:
        """Seed of the first episode of the final evaluation."""
        return EVAL_SEEDS + self.seed


@dataclass(frozen=True)
class Evaluator:
    """The evaluations of a training run: call it with `final` True at the end and False on the way."""

    cfg: EvalConfig
    agent: Dreamer
    make_envs: MakeEnvs
    repeat: int

    def __call__(self, final: bool) -> list[Episode]:
        count, seed = self.cfg.episodes, self.cfg.first_seed
        if not final:
            count, seed = self.cfg.interim_episodes, seed + INTERIM_OFFSET
        return run_episodes(self.agent, self.make_envs, count, seed, self.cfg.max_loops, repeat=self.repeat)


# ---------------------------------------------------------------------- episodes


def run_episodes(
    agent: Dreamer,
    make_envs: MakeEnvs,
    episodes: int,
    seed: int,
    max_loops: int | None = None,
    explore: bool = False,
    repeat: int = 1,
    parallel: int = MAX_PARALLEL,
) -> list[Episode]:
    """Play `episodes` episodes, number i with the seed `seed` + i, and return one row for each.

    Up to `parallel` environments play one episode each per round and wait for the longest, so that short
    episodes count no more than long ones. Lengths are in simulator steps, `repeat` per action. The
    generators of training are left as they were. Raises ValueError when `episodes` is below 1.
    """
    if episodes < 1:
        raise ValueError(f"an evaluation needs at least 1 episode, got {episodes}")
    count = min(episodes, parallel)
    envs = make_envs(count)
    rows: list[Episode] = []
    try:
        with torch.random.fork_rng():
            for start in range(0, episodes, count):
                torch.manual_seed(seed + start)
                returns, steps, loops = _play_round(agent, envs, seed + start, max_loops, explore)
                for i in range(min(count, episodes - start)):
                    rows.append(
                        {
                            "episode": start + i,
                            "seed": seed + start + i,
                            "return": float(returns[i]),
                            "length": int(steps[i]) * repeat,
                            "mean_loops": float(loops[i] / steps[i]),
                        }
                    )
    finally:
        envs.close()
    return rows


def _play_round(
    agent: Dreamer,
    envs: gym.vector.VectorEnv[Any, Any, Any],
    seed: int,
    max_loops: int | None,
    explore: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One episode in each environment: returns, agent steps and summed loops, each (E,)."""
    count = envs.num_envs
    obs, _ = envs.reset(seed=[seed + i for i in range(count)])  # type: ignore[arg-type]
    memory: Memory | None = None
    first, live = np.ones(count, bool), np.ones(count, bool)
    returns, steps, loops = np.zeros(count), np.zeros(count, int), np.zeros(count)
    while live.any():
        action, memory, depth = agent.act(obs, memory, first, explore, max_loops)
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += np.where(live, reward, 0.0)
        loops += np.where(live, depth, 0.0)
        steps += live
        live &= ~(terminated | truncated)
        first = np.zeros(count, bool)
    return returns, steps, loops


def summarise(episodes: Iterable[Episode]) -> dict[str, float]:
    """The statistics of `agent.statistics.summary` over rows of `run_episodes`."""
    rows = list(episodes)
    return summary([row["return"] for row in rows], [row["mean_loops"] for row in rows])


# ---------------------------------------------------------------------- video


def record_episode(
    agent: Dreamer, env: gym.Env[Any, Any], cfg: EvalConfig
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Play one episode in an environment that renders: frames (T, H, W, 3), loops (T,), fps, return.

    A frame shows what the agent saw when it chose an action, its loops are those of that choice. Of a task
    with more than MAX_FPS steps per second every second or third is shown.
    """
    fps = float(env.metadata.get("render_fps") or MAX_FPS)
    stride = math.ceil(fps / MAX_FPS)
    frames: list[np.ndarray] = []
    depths: list[float] = []
    total, step, over = 0.0, 0, False
    memory: Memory | None = None
    with torch.random.fork_rng():
        obs, _ = env.reset(seed=cfg.first_seed)
        while not over:
            batch = {name: np.asarray(value)[None] for name, value in obs.items()}
            action, memory, depth = agent.act(batch, memory, np.array([step == 0]), False, cfg.max_loops)
            if step % stride == 0 and len(frames) < cfg.video_frames:
                frames.append(np.asarray(env.render()))
                depths.append(float(depth[0]))
            obs, reward, terminated, truncated, _ = env.step(action[0])
            total, step, over = total + float(reward), step + 1, terminated or truncated
    return np.stack(frames), np.array(depths), fps / stride, total


def save_video(
    path: Path, agent: Dreamer, make_env: Callable[[], gym.Env[Any, Any]], cfg: EvalConfig
) -> str:
    """Record an episode, its loop depths in a strip below. Returns a line that says what came of it.

    Never raises: a video is worth less than the run it belongs to.
    """
    try:
        env = make_env()
        try:
            frames, loops, fps, total = record_episode(agent, env, cfg)
        finally:
            env.close()
        most = cfg.max_loops or agent.world.run_cap
        written = write_video(path, depth_strip(frames, loops, most), fps)
        return f"video  {written} (return {total:.4g})"
    except Exception as error:  # drivers, codecs and people's own environments fail in many ways
        return f"no video: {error}"


# ---------------------------------------------------------------------- pictures


def open_loop_picture(agent: Dreamer, replay: ReplayBuffer, seed: int, length: int = 48) -> np.ndarray | None:
    """What the world model predicts with closed eyes, beside what happened: (H, W, 3) uint8.

    It sees the first rows of a replayed episode and then only the actions. None while the replay is short.
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
        states = world.observe_sequence(part).states
        actions = batch.prev_action[pick : pick + 1, context:span]
        rollout = world.imagine(states.map(lambda leaf: leaf[:, -1]), actions, span - context)
        dreamt = world.decode(rollout.states.map(lambda leaf: leaf[:, 1:]))
    lines: list[tuple[str, np.ndarray, np.ndarray]] = []
    for name, value in batch.obs.items():
        truth, guess = value[pick, :span].numpy(force=True), dreamt[name][0].numpy(force=True)
        order = np.argsort(-truth.std(0), kind="stable")[:4]  # the parts that move most
        lines += [(f"{name}[{i}]", truth[:, i], guess[:, i]) for i in sorted(order)]
    reward = batch.reward[pick, :span].numpy(force=True)
    lines.append(("reward", reward, rollout.rewards[0].numpy(force=True)))
    return _draw_lines(lines, context)


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


def _figure(width: float, height: float, rows: int) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` plots that share the x axis, without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _draw_lines(lines: list[tuple[str, np.ndarray, np.ndarray]], context: int) -> np.ndarray:
    figure, axes = _figure(7.0, 1.2 * len(lines) + 0.6, len(lines))
    for axis, (name, truth, guess) in zip(axes, lines, strict=True):
        axis.plot(np.arange(len(truth)), truth, color="0.2", label="what happened")
        axis.plot(context + np.arange(len(guess)), guess, color="tab:orange", label="open loop")
        axis.axvline(context - 1, color="0.7", linestyle=":")
        axis.set_ylabel(name)
    axes[0].legend(loc="upper right", frameon=False, ncols=2)
    axes[-1].set_xlabel("step (left of the dotted line the model sees)")
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def draw_curves(run_dir: Path, title: str) -> Path:
    """Draw the logs of a run: training and evaluation returns over steps, loops below. -> curve.png"""
    figure, (top, bottom) = _figure(7.0, 5.0, 2)
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
    bottom.set(ylabel="loops per step", xlabel="simulator steps")
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
