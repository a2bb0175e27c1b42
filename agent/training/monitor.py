"""What a training run logs beside its losses: episodes, speeds, shares of time, and the health of the loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch

from agent.evaluation.rounds import say
from agent.execution import Eager
from agent.learning.dreamer import Dreamer, Update
from agent.logs.logger import Logger
from agent.runtime import Stopwatch
from world_model import Batch, stability


class EpisodeCounter:
    """Returns and lengths of the episodes under way in E environments; `repeat` simulator steps per agent step."""

    def __init__(self, envs: int, repeat: int, logger: Logger):
        self.repeat, self.logger = repeat, logger
        self.totals = np.zeros((2, envs))  # return and length
        self.returns: deque[float] = deque(maxlen=10)  # of the last finished episodes

    def begin(self) -> None:
        """New episodes begin everywhere."""
        self.totals[:] = 0.0

    def add(self, row: Mapping[str, np.ndarray], step: int) -> None:
        """Add a row of the replay and log the episodes that it ends."""
        self.totals[:, row["is_first"]] = 0.0
        self.totals += np.stack([row["reward"], self.repeat * ~row["is_first"]])
        self.end(row["is_last"], step)

    def cut(self, which: np.ndarray, step: int, skipped: int) -> None:
        """Log the episodes `which` (E,) that ended because a step was not finite; skipped: such steps so far."""
        self.end(which, step)
        self.logger.scalars(step, {"episode/bad_steps": float(skipped)})
        if str(skipped).strip("0") == "1":  # 1, 10, 100, ..
            say(f"note: step {step:,}: a reward or an observation was not finite; {skipped:,} such rows skipped so far")

    def end(self, which: np.ndarray, step: int) -> None:
        """Log the episodes `which` (E,)."""
        for env in np.flatnonzero(which):
            ret, length = self.totals[:, env]
            self.log(step, int(env), float(ret), int(length))

    def log(self, step: int, env: int, ret: float, length: int) -> None:
        """Log one episode: of environment number `env`, which may be that of another rank."""
        self.returns.append(ret)
        self.logger.episode(step, env, ret, length)
        self.logger.scalars(step, {"episode/return": ret, "episode/length": length})


class Monitor:
    """Speeds, shares of time and loop stability since the last line of metrics."""

    def __init__(self, agent: Dreamer, execution: Eager, logger: Logger, clock: Stopwatch):
        self.agent, self.execution, self.logger, self.clock = agent, execution, logger, clock
        self.last = (time.perf_counter(), 0, 0, dict[str, float]())  # time, step, updates, seconds by part

    def start(self, step: int) -> None:
        """Measure from here on."""
        self.last = (time.perf_counter(), step, self.agent.updates, self.seconds())

    def seconds(self) -> dict[str, float]:
        """Seconds by part of the loop and of the update."""
        return {**self.clock.seconds, **self.agent.clock.seconds}

    def write(self, step: int, batch: Batch | None, update: Update | None) -> None:
        """One line of metrics; batch and update are the last ones."""
        since, last_step, last_updates, spent = self.last
        self.start(step)
        now, _, updates, seconds = self.last
        wall, done = max(1e-9, now - since), updates - last_updates
        values = {"speed/updates": done / wall, "speed/steps": (step - last_step) / wall}
        values |= {f"time/{name}": (total - spent.get(name, 0.0)) / wall for name, total in seconds.items()}
        with self.clock.timed("log"):
            self.logger.scalars(step, values)
            if done and batch is not None and update is not None:
                with torch.random.fork_rng(), self.execution.uncompiled():  # logging does not change the run
                    self.logger.scalars(step, stability(self.agent.world, batch))
                self.logger.histogram(step, "loop/dream_depth", update.dream_depth.float().numpy(force=True))
            self.logger.write(step)
