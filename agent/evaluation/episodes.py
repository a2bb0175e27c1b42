"""What an agent is worth: evaluation episodes with fixed seeds, and a video of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import gymnasium as gym
import numpy as np
import torch

from agent.errors import Interrupted, NonFiniteError, failures
from agent.evaluation.statistics import summary
from agent.learning.policy import Memory
from agent.logs.video import depth_strip, write_video

EVAL_SEEDS = 1_000_000_000
"""Training environments draw their seeds below this number, evaluations start from it."""
INTERIM_OFFSET = 1_000_000  # the evaluations that choose best.pt see other episodes than those that judge it
MAX_PARALLEL = 10
MAX_FPS = 30.0  # faster tasks are shown with steps left out: drawing without a GPU is slow

MakeEnvs = Callable[[int], gym.vector.VectorEnv[Any, Any, Any]]


# Written as a call because "return" is a word of the language.
Episode = TypedDict(  # noqa: UP013
    "Episode",
    {"episode": int, "seed": int, "return": float, "length": int, "mean_loops": float, "loop_counts": list[int]},
)
"""One evaluation episode; loop_counts: how many of its steps took 1, 2, .. loops, up to the most that one took."""


class Actor(Protocol):
    """Who can be evaluated: a `Dreamer`, or whatever acts like one (see `Dreamer.act`)."""

    @property
    def run_cap(self) -> int: ...

    def act(
        self, obs: Any, memory: Any, is_first: np.ndarray, explore: bool = True, max_loops: int | None = None
    ) -> tuple[np.ndarray, Any, np.ndarray]: ...


def never() -> bool:
    return False


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation episodes, played with averaged weights, mean actions, and seeds that training never sees."""

    episodes: int | None = None
    """Episodes of the final evaluation; by default 10, and 100 for atari100k."""
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
    agent: Actor
    make_envs: MakeEnvs
    repeat: int
    judged_by: int = 10
    """Episodes of the final evaluation where `cfg` names no number."""

    def __call__(self, final: bool, stop: Callable[[], bool] = never) -> list[Episode]:
        """Raises Interrupted as soon as stop() is true: a person pressed Ctrl-C."""
        count, seed = self.cfg.episodes or self.judged_by, self.cfg.first_seed
        if not final:
            count, seed = self.cfg.interim_episodes, seed + INTERIM_OFFSET
        cap = self.cfg.max_loops
        return run_episodes(self.agent, self.make_envs, count, seed, cap, repeat=self.repeat, stop=stop)


# ---------------------------------------------------------------------- episodes


def run_episodes(
    agent: Actor,
    make_envs: MakeEnvs,
    episodes: int,
    seed: int,
    max_loops: int | None = None,
    explore: bool = False,
    repeat: int = 1,
    parallel: int = MAX_PARALLEL,
    stop: Callable[[], bool] = never,
) -> list[Episode]:
    """Play `episodes` episodes, number i with the seed `seed` + i, and return one row for each.

    Up to `parallel` environments play one episode each per round and wait for the longest, so that short
    episodes count no more than long ones. Lengths are in simulator steps, `repeat` per action. The
    generators of training are left as they were. Raises ValueError when `episodes` is below 1, Interrupted when
    stop() becomes true, and NonFiniteError when the environment's rewards are not finite.
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
                returns, loops = _play_round(agent, envs, seed + start, max_loops, explore, stop)
                if not np.isfinite(returns).all():
                    raise NonFiniteError("the return of an evaluation episode")
                for i in range(min(count, episodes - start)):
                    taken = loops[loops[:, i] > 0, i]
                    rows.append(
                        {
                            "episode": start + i,
                            "seed": seed + start + i,
                            "return": float(returns[i]),
                            "length": len(taken) * repeat,
                            "mean_loops": float(taken.mean()),
                            "loop_counts": np.bincount(taken)[1:].tolist(),
                        }
                    )
    finally:
        envs.close()
    return rows


def _play_round(
    agent: Actor,
    envs: gym.vector.VectorEnv[Any, Any, Any],
    seed: int,
    max_loops: int | None,
    explore: bool,
    stop: Callable[[], bool],
) -> tuple[np.ndarray, np.ndarray]:
    """One episode in each environment: returns (E,), and the loops (T, E) of every step, 0 behind an episode's end."""
    count = envs.num_envs
    obs, _ = envs.reset(seed=[seed + i for i in range(count)])  # type: ignore[arg-type]
    memory: Memory | None = None
    first, live = np.ones(count, bool), np.ones(count, bool)
    returns, loops = np.zeros(count), []
    while live.any():
        if stop():
            raise Interrupted
        action, memory, depth = agent.act(obs, memory, first, explore, max_loops)
        with failures():
            obs, reward, terminated, truncated, _ = envs.step(action)
        returns += np.where(live, reward, 0.0)
        loops.append(np.where(live, depth, 0))
        live &= ~(terminated | truncated)
        first = np.zeros(count, bool)
    return returns, np.stack(loops)


def loop_shares(episodes: Iterable[Episode]) -> list[float]:
    """Shares of the steps that took 1, 2, .. loops: what --exit-histogram of a random exit wants."""
    counts = [row["loop_counts"] for row in episodes]
    total = np.zeros(max(map(len, counts)))
    for each in counts:
        total[: len(each)] += each
    return [float(share) for share in total / total.sum()]


def summarise(episodes: Iterable[Episode]) -> dict[str, float]:
    """The statistics of `agent.evaluation.statistics.summary` over rows of `run_episodes`."""
    rows = list(episodes)
    return summary([row["return"] for row in rows], [row["mean_loops"] for row in rows])


# ---------------------------------------------------------------------- video


def record_episode(
    agent: Actor, env: gym.Env[Any, Any], cfg: EvalConfig
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
    path: Path, agent: Actor, make_env: Callable[[], gym.Env[Any, Any]], cfg: EvalConfig
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
        most = cfg.max_loops or agent.run_cap
        written = write_video(path, depth_strip(frames, loops, most), fps)
        return f"video  {written} (return {total:.4g})"
    except Exception as error:  # drivers, codecs and people's own environments fail in many ways
        return f"no video: {error}"
