"""Training of a baseline by stable-baselines3, with the evaluations and log files of every run."""

from __future__ import annotations

import signal
import time
from collections import deque
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from agent.data.checkpoint import Store
from agent.errors import EnvironmentFailure, Interrupted
from agent.evaluation.episodes import Episode
from agent.interop.baselines import Baseline
from agent.logs.logger import Logger
from agent.training.evaluations import Evaluations, recent
from agent.training.schedule import Every
from agent.training.signals import end_on_signals
from agent.training.train_config import TrainConfig


class BaselineTrainer:
    """Trains a `Baseline`. The interface is that of `Trainer`, but a run cannot be resumed.

    store(name, content) saves a checkpoint; repeat: simulator steps per action.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        agent: Baseline,
        logger: Logger,
        evaluations: Evaluations,
        store: Store,
        repeat: int = 1,
    ):
        self.cfg, self.agent, self.logger, self.evaluations, self.store = cfg, agent, logger, evaluations, store
        self.repeat, self.step = repeat, 0
        self.returns: deque[float] = deque(maxlen=10)  # of the last training episodes
        self.finished = self.stopping = False
        self.signal = signal.SIGINT  # what stopped it

    def run(self) -> bool:
        """Train to the last step or minute and evaluate. False when a signal ended it before, with the agent saved.

        Raises EnvironmentFailure, with the agent saved.
        """
        with end_on_signals(self.stop):
            try:
                self.agent.model.learn(self.cfg.steps // self.repeat, callback=TrainerCallback(self))
                if not self.stopping:
                    self.evaluations.final(self.step, lambda: self.stopping)
                    self.finished = True
            except Interrupted:  # in an evaluation
                pass
            except EnvironmentFailure:
                self.save()
                raise
            self.save()
        return self.finished

    def stop(self, number: int = signal.SIGINT) -> None:
        """End the run after the current step; number: of the signal that asks for it."""
        self.stopping, self.signal = True, signal.Signals(number)

    @property
    def episodes(self) -> list[Episode]:
        """Of the final evaluation; none where it failed."""
        return self.evaluations.episodes

    def save(self) -> None:
        """Write checkpoints/latest.pt."""
        self.store("latest", {"step": self.step, "agent": self.agent.state_dict()})

    def recent(self) -> dict[str, float]:
        """As `Trainer.recent`."""
        return recent(self.evaluations, list(self.returns))


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
            trainer.evaluations.interim(step, lambda: trainer.stopping)
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
