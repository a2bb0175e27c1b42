"""The training loop: one row of experience from each environment, then the updates that are due."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agent.data.checkpoint import Store
from agent.data.replay import FLAGS, ReplayBuffer
from agent.env_stepper import EnvStepper
from agent.errors import EnvironmentFailure, Interrupted, WorkerFailure
from agent.evaluation.episodes import Episode
from agent.evaluation.plots import log_open_loop
from agent.execution import Eager
from agent.learning.dreamer import Dreamer, Update
from agent.learning.policy import Memory
from agent.learning.sampling import rows_needed, sample
from agent.logs.logger import Logger
from agent.runtime import Stopwatch, random_states, restore_random_states
from agent.seeds import TRAINING
from agent.training.evaluations import Evaluations, recent
from agent.training.monitor import EpisodeCounter, Monitor
from agent.training.schedule import SAVE_SECONDS, Every, Progress, Ratio
from agent.training.signals import end_on_signals
from agent.training.train_config import TrainConfig
from world_model import Batch


class Trainer:
    """Trains `agent` in `envs`, which step `repeat` simulator steps per action.

    execution runs the updates; store(name, content, beside) saves a checkpoint.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        agent: Dreamer,
        execution: Eager,
        envs: gym.vector.VectorEnv[Any, Any, Any],
        replay: ReplayBuffer,
        logger: Logger,
        evaluations: Evaluations,
        store: Store,
        seed: int,
        repeat: int = 1,
    ):
        self.cfg, self.agent, self.execution, self.envs, self.replay = cfg, agent, execution, envs, replay
        self.logger, self.evaluations, self.store, self.seed, self.repeat = logger, evaluations, store, seed, repeat
        self.step, self.stepper = 0, EnvStepper(envs, cfg.on_bad_step == "skip")
        self.train_ratio = Ratio(cfg.ratio, cfg.prefill)
        self.progress = Progress(cfg.steps, cfg.minutes, cfg.slice, self.now)
        self.row: dict[str, np.ndarray] = {}  # what was seen last and is not in the replay yet
        self.memory: Memory | None = None
        self.last_batch: Batch | None = None
        self.last_update: Update | None = None
        self.counter = EpisodeCounter(envs.num_envs, repeat, logger)
        self.clock = Stopwatch()
        self.monitor = Monitor(agent, execution, logger, self.clock)
        self.finished = self.stopping = self.sliced = False  # sliced: this part of the run has had its minutes
        self.signal = signal.SIGINT  # what stopped it, where it was no slice
        self.saved_at = self.now()

    # ------------------------------------------------------------------ the loop

    def run(self) -> bool:
        """Train to the last step or minute and evaluate. False when a signal or the end of a slice of time came before,
        with everything saved.

        Raises EnvironmentFailure and WorkerFailure, with everything saved where this process still can, OSError when a
        checkpoint cannot be written, and NonFiniteError, without saving, when a loss or gradient is not finite.
        """
        self.saved_at = self.now()
        with end_on_signals(self.stop):
            try:
                if not self.step:
                    self.save()  # from here on there is something to go on with
                self.loop()
                if not self.stopping:
                    self.finish()
            except Interrupted:
                pass  # in an evaluation; it is played anew when the run goes on
            except (EnvironmentFailure, WorkerFailure):
                self.save()
                raise
            except KeyboardInterrupt:
                if self.stopping:
                    raise  # a second Ctrl-C
                self.stopping = True
            if not self.finished:
                self.save()
        return self.finished

    def loop(self) -> None:
        """Interact and learn to the last step, or until somebody stops it."""
        cfg = self.cfg
        due_log, due_save = Every(cfg.log_every, self.step), Every(cfg.save_every, self.step)
        due_eval = Every(cfg.eval_every, self.evaluations.tried)
        self.monitor.start(self.step)
        if self.step and not self.stepper.asynchronous:
            self.learn()  # what a signal left undone, before anything else draws random numbers
        if self.step and due_eval(self.step) and self.progress(self.step) < 1.0:
            self.evaluate_between()  # the process was killed in it
        if self.progress(self.step) < 1.0:  # it may have been killed in the final evaluation
            self.begin_episodes()
        while self.progress(self.step) < 1.0 and not self.stopping:
            self.interact()
            over = self.progress(self.step) == 1.0  # `finish` evaluates, logs and saves
            if over or not self.stepper.asynchronous:
                self.learn()
            if due_eval(self.step) and not over:
                self.evaluate_between()
            if due_log(self.step) and not over:
                self.monitor.write(self.step, self.last_batch, self.last_update)
            if (due_save(self.step) or self.unsaved_seconds() >= SAVE_SECONDS) and not over:
                self.save(beside=True)
            self.logger.progress(self.step, self.progress(self.step))
            if not self.stopping and self.progress.over_for_now(0.5 if over else 1.0):
                self.sliced = self.stopping = True  # half: the final evaluation wants a slice of its own

    def stop(self, number: int = signal.SIGINT) -> None:
        """End the run after what it is doing now; number: of the signal that asks for it."""
        self.stopping, self.signal = True, signal.Signals(number)

    # What several ranks do otherwise, see `rank_trainer.py`.

    def now(self) -> float:
        """Seconds on the clock by which things are decided."""
        return time.monotonic()

    def moved(self, steps: int) -> None:
        """Count simulator steps that were made here, before their row is in the replay."""
        self.step += steps

    def goes_on(self) -> bool:
        """Whether another update is to be made before the next step."""
        return not self.stopping

    # ------------------------------------------------------------------ interaction

    def begin_episodes(self) -> None:
        """Start new episodes. Those that a stopped run left open end where they were, truncated.

        Of several environments some may have been at the first row of an episode: it stays a row without a successor.
        """
        count = self.envs.num_envs
        # Mixed, so that runs with neighbouring seeds share no episode; a resumed run sees new ones.
        seed = np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0] % TRAINING.size
        obs, _ = self.stepper.reset(int(min(seed, TRAINING.size - count)))  # one seed for each environment
        if self.left_open():
            _, self.memory, _ = self.act()
            if self.prefilling:  # the random numbers of a run that never stopped
                _, self.memory = self.agent.act_randomly(self.memory)
            self.replay.add({**self.row, "is_last": ~self.row["is_first"]}, self.memory.state)
        none = np.zeros(count, bool)
        action = np.zeros((count, self.agent.spaces.action.size), np.float32)
        self.row = self.make_row(obs, action, np.zeros(count, np.float32), ~none, none, none)
        self.counter.begin()

    def left_open(self) -> bool:
        """Whether a stopped run was in the middle of episodes."""
        return bool(self.row) and not self.row["is_first"].all()

    @property
    def prefilling(self) -> bool:
        """Whether actions are still random."""
        return self.step // self.repeat < self.cfg.prefill

    def act(self) -> tuple[np.ndarray, Memory, np.ndarray]:
        """`agent.act` on the row at hand."""
        obs = {name: self.row[f"obs/{name}"] for name in self.agent.spaces.obs}
        with self.execution.acting():
            return self.agent.act(obs, self.memory, self.row["is_first"])

    def interact(self) -> None:
        """One step of every environment, and the updates that are due meanwhile, where environments are asynchronous.

        `self.row` and `self.memory` are replaced after the old row is in the replay: an interrupt before loses no row.
        """
        row = self.row
        with self.clock.timed("act"):
            action, memory, _ = self.act()
            if self.prefilling:
                action, memory = self.agent.act_randomly(memory)
        with self.clock.timed("env"):
            self.stepper.send(action)
        if self.stepper.asynchronous:
            self.learn()
        with self.clock.timed("env"):
            obs, reward, terminated, truncated, _ = self.stepper.receive()
        before, bad = self.step, self.stepper.bad
        first = row["is_last"] | bad
        self.moved(self.repeat * int((~first).sum()))
        with self.clock.timed("replay"):
            if bad.any():  # they have begun anew: the row at hand is the last one of their episode
                self.counter.cut(bad & ~row["is_first"] & ~row["is_last"], before, self.stepper.bad_steps)
                row = {**row, "is_last": row["is_last"] | (bad & ~row["is_first"])}
            self.replay.add(row, memory.state)
            # Where `first`, this call was the reset: no action, no reward (NEXT_STEP).
            action = memory.action.clamp(-1.0, 1.0).numpy(force=True)  # (E, A), one-hot where it is a choice
            prev_action = np.where(first[:, None], np.float32(0.0), action)  # a product would give -0.0 too
            last = (terminated | truncated) & ~first
            self.memory = memory
            self.row = self.make_row(obs, prev_action, np.where(first, 0.0, reward), first, last, terminated & ~first)
        self.counter.add(self.row, self.step)

    def make_row(
        self, obs: Mapping[str, np.ndarray], prev_action: np.ndarray, reward: np.ndarray, *flags: np.ndarray
    ) -> dict[str, np.ndarray]:
        """A row of the replay, every value (E, ...); observations are copied, environments reuse theirs."""
        row = {f"obs/{name}": value for name, value in self.agent.spaces.arrays(obs).items()}
        row |= {"prev_action": prev_action, "reward": np.asarray(reward, np.float32)}
        return row | dict(zip(FLAGS, flags, strict=True))

    # ------------------------------------------------------------------ learning

    def learn(self) -> None:
        """The updates that are due, each with fresh latents for the replay."""
        enough = self.replay.held >= rows_needed(self.cfg.length, self.agent.world.cfg.jump)
        while enough and self.train_ratio.due(self.step // self.repeat) and self.goes_on():
            self.train_ratio.done += 1
            self.agent.fit_image_normaliser(self.replay.sample, self.execution.ranks.size, self.execution.average)
            with self.clock.timed("replay"):
                batch, where = sample(self.agent, self.replay, self.cfg.batch, self.cfg.length)
            update = self.execution.update(batch, self.progress(self.step))
            with self.clock.timed("replay"):
                self.replay.write_back(where, update.states, update.errors)
            self.logger.add(update.metrics)
            self.last_batch, self.last_update = batch, update
            if self.unsaved_seconds() >= SAVE_SECONDS:  # there may be hundreds, right after the prefill
                self.save(beside=True)

    # ------------------------------------------------------------------ evaluation

    def evaluate_between(self) -> None:
        """Evaluate during training. It may take long: what is new by more than a minute is saved before."""
        if self.unsaved_seconds() >= 0.25 * SAVE_SECONDS:
            self.save(beside=True)
        with self.clock.timed("evaluate"):
            self.evaluations.interim(self.step, lambda: self.stopping)
        self.draw()

    def finish(self) -> None:
        """After the last step: save, evaluate, and save that it is done."""
        self.save()
        self.envs.close()  # of some environments there can be one copy only: a robot, a port
        with self.clock.timed("evaluate"):
            self.evaluations.final(self.step, lambda: self.stopping)
        self.draw()
        self.monitor.write(self.step, self.last_batch, self.last_update)
        self.finished = True
        self.save()

    def draw(self) -> None:
        """Log an open-loop prediction."""
        with self.clock.timed("log"):
            try:
                log_open_loop(self.logger, self.step, self.agent, self.replay, self.seed)
            except Exception as error:
                self.evaluations.report(self.step, "drawing an open-loop prediction", error)

    @property
    def episodes(self) -> list[Episode]:
        """Of the final evaluation; none where it failed."""
        return self.evaluations.episodes

    def recent(self) -> dict[str, float]:
        """Steadier numbers beside the final evaluation."""
        return recent(self.evaluations, list(self.counter.returns))

    # ------------------------------------------------------------------ persistence

    def unsaved_seconds(self) -> float:
        """Time since the last checkpoint."""
        return self.now() - self.saved_at

    def save(self, beside: bool = False) -> None:
        """Write latest.pt; beside: while training goes on, where it takes long."""
        with self.clock.timed("save"):
            content = {"step": self.step, "agent": self.agent.state_dict(), "replay": self.replay.state_dict()}
            self.store("latest", content | {"trainer": self.state_dict()}, beside=beside)
            self.saved_at = self.now()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs beside agent and replay; loads with weights_only."""
        return {
            "finished": self.finished,
            "updates_done": self.train_ratio.done,
            "seconds": self.progress.seconds(),
            "row": {name: torch.from_numpy(value) for name, value in self.row.items()},
            "memory": self.memory and self.memory.plain(),
            "returns": list(self.counter.returns),
            "evaluations": self.evaluations.state_dict(),
            "bad_steps": self.stepper.bad_steps,
            "execution": self.execution.state_dict(),
            "random": random_states(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from the checkpoint `latest`; raises ValueError when its replay does not fit."""
        self.replay.load_state_dict(saved["replay"])
        self.agent.load_state_dict(saved["agent"])
        mine = saved["trainer"]
        self.step, self.train_ratio.done = saved["step"], mine["updates_done"]
        self.progress.resume(mine["seconds"])
        self.row = {name: value.numpy() for name, value in mine["row"].items()}
        if mine["memory"]:
            self.memory = Memory.of(mine["memory"], self.agent.device)
        self.counter.returns.extend(mine["returns"])
        self.evaluations.load_state_dict(mine["evaluations"])
        self.stepper.bad_steps = mine["bad_steps"]
        self.execution.load_state_dict(mine["execution"])
        restore_random_states(mine["random"])
