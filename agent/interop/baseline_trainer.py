"""Training of a baseline by stable-baselines3, with the evaluations and log files of every run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agent.data.checkpoint import Store
from agent.errors import Interrupted
from agent.evaluation.episodes import Episode
from agent.interop.baselines import Baseline
from agent.logs.logger import Logger
from agent.training.schedule import Every, ctrl_c
from agent.training.trainer import TrainConfig


class BaselineTrainer:
    """Trains a `Baseline`. The interface is that of `Trainer`, but a run cannot be resumed.

    evaluate(final, stop) plays the evaluation episodes and raises Interrupted when stop() becomes true;
    store(name, content) saves a checkpoint; repeat: simulator steps per action.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        agent: Baseline,
        logger: Logger,
        evaluate: Callable[[bool, Callable[[], bool]], list[Episode]],
        store: Store,
        repeat: int = 1,
    ):
        self.cfg, self.agent, self.logger, self.evaluate, self.store = cfg, agent, logger, evaluate, store
        self.repeat, self.step = repeat, 0
        self.returns: deque[float] = deque(maxlen=10)  # of the last training episodes
        self.episodes: list[Episode] = []  # of the final evaluation
        self.evaluations: list[float] = []  # means of the evaluations before the end
        self.best = -np.inf
        self.finished = self.stopping = False

    def run(self) -> bool:
        """Train to the last step or minute and evaluate. False when Ctrl-C ended it before, with the agent saved."""
        with ctrl_c(self.stop):
            try:
                self.agent.model.learn(self.cfg.steps // self.repeat, callback=TrainerCallback(self))
                if not self.stopping:
                    self.finish()
            except Interrupted:  # Ctrl-C during an evaluation
                pass
            self.save("latest")
        return self.finished

    def stop(self) -> None:
        """End the run after the current step."""
        self.stopping = True

    def finish(self) -> None:
        """The final evaluation."""
        self.episodes = self.log_evaluation(final=True)
        if self.best == -np.inf:  # nothing was evaluated before
            self.save("best")
        self.finished = True

    def log_evaluation(self, final: bool) -> list[Episode]:
        """Evaluate, log the episodes, and save the agent where it is the best so far; the final evaluation judges and
        does not choose."""
        episodes = self.evaluate(final, lambda: self.stopping)
        mean = float(np.mean([episode["return"] for episode in episodes]))
        self.logger.evaluation(self.step, cast(list[dict[str, float]], episodes))
        self.logger.scalars(self.step, {"eval/return": mean})
        if not final and mean >= self.best:
            self.best = mean
            self.save("best")
        if not final:
            self.evaluations.append(mean)
        return episodes

    def save(self, name: str) -> None:
        """Write checkpoints/NAME.pt."""
        self.store(name, {"step": self.step, "agent": self.agent.state_dict()})

    def recent(self) -> dict[str, float]:
        """As `Trainer.recent`: mean returns of the last evaluations and training episodes."""
        means = {"last_3_evaluations": self.evaluations[-3:], "last_10_training_episodes": list(self.returns)}
        return {name: float(np.mean(values)) for name, values in means.items() if values}


class TrainerCallback(BaseCallback):
    """Called by the library after every step: logs, evaluates, and ends the training."""

    def __init__(self, trainer: BaselineTrainer):
        super().__init__()
        self.trainer, self.start = trainer, time.perf_counter()
        cfg = trainer.cfg
        self.should_log, self.should_eval = Every(cfg.log_every), Every(cfg.eval_every)
        self.last_log = (self.start, 0)  # time and step

    def _on_step(self) -> bool:
        trainer, cfg = self.trainer, self.trainer.cfg
        step = trainer.step = self.num_timesteps * trainer.repeat
        minutes = (time.perf_counter() - self.start) / 60
        share = max(step / cfg.steps, minutes / cfg.minutes if cfg.minutes else 0.0)
        for info in self.locals["infos"]:
            if "episode" in info:
                self._log_episode(step, info["episode"])
        if self.should_eval(step) and share < 1.0:
            trainer.log_evaluation(final=False)
        if self.should_log(step):
            self._log(step)
        trainer.logger.progress(step, min(1.0, share))
        return share < 1.0 and not trainer.stopping

    def _log_episode(self, step: int, episode: dict[str, Any]) -> None:
        """A finished training episode, as the library's Monitor describes it."""
        ret, length = float(episode["r"]), int(episode["l"]) * self.trainer.repeat
        self.trainer.returns.append(ret)
        self.trainer.logger.episode(step, 0, ret, length)
        self.trainer.logger.scalars(step, {"episode/return": ret, "episode/length": length})

    def _log(self, step: int) -> None:
        """The library's own metrics, and the speed since the last call."""
        now, (before, step_before) = time.perf_counter(), self.last_log
        self.last_log = (now, step)
        values = {name: float(v) for name, v in self.model.logger.name_to_value.items() if isinstance(v, int | float)}
        values = {name: value for name, value in values.items() if not name.startswith("time/")}
        speed = (step - step_before) / max(1e-9, now - before)
        self.trainer.logger.scalars(step, values | {"speed/steps": speed})
        self.trainer.logger.write(step)
