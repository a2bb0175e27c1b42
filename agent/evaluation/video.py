"""The video of one evaluation episode."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agent.evaluation.episodes import Agent, EvalConfig
from agent.evaluation.rounds import MAX_STEPS
from agent.logs.video import depth_strip, write_video

VIDEO_FRAMES = 500
"""Most frames of a video; the episode is played to its end (or MAX_STEPS) all the same, for its return."""
MAX_FPS = 30.0  # faster tasks are shown with steps left out: drawing without a GPU is slow


def record_episode(
    agent: Agent, env: gym.Env[Any, Any], cfg: EvalConfig, max_loops: int | None = None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Play the first evaluation episode in an environment that renders, with at most `max_loops` loops per step.

    Returns frames (T, H, W, 3) uint8, loops (T,), frames per second, and the return. A frame shows what the agent saw
    when it chose an action, its loops are those of that choice. Of a task with more than MAX_FPS steps per second
    every second or third is shown.
    """
    fps = float(env.metadata.get("render_fps") or MAX_FPS)
    stride = math.ceil(fps / MAX_FPS)
    frames: list[np.ndarray] = []
    depths: list[float] = []
    total, step, over = 0.0, 0, False
    memory: Any = None
    with torch.random.fork_rng():
        obs, _ = env.reset(seed=cfg.first_seed)
        while not over:
            batch = {name: np.asarray(value)[None] for name, value in obs.items()}
            action, memory, depth = agent.act(batch, memory, np.array([step == 0]), False, max_loops)
            if step % stride == 0 and len(frames) < VIDEO_FRAMES:
                frames.append(np.asarray(env.render()))
                depths.append(float(depth[0]))
            obs, reward, terminated, truncated, _ = env.step(action[0])
            total, step, over = total + float(reward), step + 1, terminated or truncated or step + 1 >= MAX_STEPS
    return np.stack(frames), np.array(depths), fps / stride, total


def save_video(
    path: Path, agent: Agent, make_env: Callable[[], gym.Env[Any, Any]], cfg: EvalConfig, max_loops: int | None = None
) -> str:
    """Record an episode with a strip of loops below the frames; returns one line for the terminal.

    Never raises: a failed video must not end the run that it belongs to.
    """
    try:
        env = make_env()
        try:
            frames, loops, fps, total = record_episode(agent, env, cfg, max_loops)
        finally:
            env.close()
        most = max_loops or agent.run_cap
        written = write_video(path, depth_strip(frames, loops, most), fps)
        return f"video  {written} (return {total:.4g})"
    except (Exception, SystemExit) as error:  # drivers, codecs and users' own environments fail in many ways
        return f"no video: {error}"
