"""Training of the world model alone, on a fixed data set: cores are compared on equal data in minutes."""

from __future__ import annotations

import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from agent.data.checkpoint import Store
from agent.data.dataset import Dataset, pad_episodes
from agent.data.replay import ReplayBuffer
from agent.errors import UsageError
from agent.evaluation.normalised_error import NormalisedError
from agent.evaluation.open_loop import exit_rule, open_loop, posterior_rows, usable_horizons
from agent.evaluation.probe import probe_states
from agent.evaluation.recording import Recording
from agent.execution import Eager
from agent.execution.fused import fused_layers
from agent.learning.dreamer import Dreamer, Update, check_finite
from agent.learning.sampling import rows_needed, sample
from agent.learning.sequence_errors import sequence_errors
from agent.logs.logger import Logger
from agent.training.schedule import Every, Progress
from world_model import Batch, ExitRule, stability

LOG_EVERY = 100  # updates between two lines of metrics
WINDOWS = 256  # open-loop predictions per measurement, each the mean of eight dreams
HORIZONS = (1, 5, 15, 50)  # steps ahead at which errors are taken, where an episode is long enough
COLUMNS = ("update", "depth", "loops", "horizon", "error", "reward_error", "energy")


@dataclass(frozen=True)
class OfflineConfig:
    """Training of the world model alone (--dataset DIR --model-only). Batches are as in `train`."""

    updates: int = 5000
    """Updates of the whole run."""
    eval_every: int = 1000
    """Updates between two measurements on the held-out episodes."""

    def __post_init__(self) -> None:
        for name in ("updates", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--offline.{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


def check_lengths(dataset: Dataset, length: int, jump: int = 1) -> None:
    """Raise UsageError when the data set's episodes or rows are too few for the horizons or for sequences of `length`
    jumps of up to `jump` decisions."""
    episodes = pad_episodes(dataset.held_out)
    if episodes.length.max() < 2:
        raise UsageError(
            f"the data set's episodes have at most {int(episodes.length.max())} rows: too few to predict anything"
        )
    rows = len(dataset.train["reward"])
    if rows < rows_needed(length, jump):
        jumps = f" with --model.jump {jump}" if jump > 1 else ""
        raise UsageError(f"--train.length {length}{jumps} needs more than the {rows} rows of the data set")


@fused_layers()
def update_world(agent: Dreamer, batch: Batch, progress: float) -> Update:
    """`Dreamer.update` of the world model alone. Raises NonFiniteError before any weight is moved."""
    depth, adam, world = agent.begin_update(progress), agent.optimizers["world"], agent.world
    adam.gradient.zero_()
    world.observation_model.track(batch.obs)
    posterior = world.observe_sequence(batch, depth)
    loss, metrics = world.loss(posterior, batch)
    check_finite(loss, metrics)
    loss.backward(inputs=agent.policy.parts()["world"])
    norm = metrics["world/grad_norm"] = adam.clip_gradient()
    check_finite(norm, {"world/grad_norm": norm})
    adam.step()
    agent.average_flats["world"].lerp_(adam.flat.detach(), agent.average_rate)
    errors = sequence_errors(posterior.kl(), batch.is_first)
    return Update(posterior.states.detach(), torch.full((), depth), metrics, errors)


class OfflineTrainer:
    """Trains the world model of `agent` on `dataset` and measures it on the held-out episodes.

    execution: the agent's, for what must not be compiled; batch: B sequences of T rows; minutes: a limit,
    or 0.
    """

    def __init__(
        self,
        cfg: OfflineConfig,
        agent: Dreamer,
        execution: Eager,
        dataset: Dataset,
        logger: Logger,
        store: Store,
        batch: tuple[int, int],
        seed: int,
        sampling: str = "uniform",
        minutes: float = 0.0,
    ):
        self.progress = Progress(cfg.updates, minutes)
        self.cfg, self.agent, self.execution, self.batch = cfg, agent, execution, batch
        self.logger, self.store = logger, store
        loop, model = agent.world.cfg.loop, agent.world.cfg
        latent = (loop.tokens, loop.width), (model.groups, model.classes)
        rows = len(dataset.train["reward"])
        sizes = dataset.spaces.obs, dataset.spaces.action.size
        self.replay = ReplayBuffer(rows, 1, *sizes, *latent, seed, sampling, model.latents == "categorical")
        with execution.uncompiled():
            self.replay.fill(dataset.train, posterior_rows(agent.world, dataset.train, agent.device))
        self.episodes = pad_episodes(dataset.held_out).to(agent.device)
        self.metric = NormalisedError.fit(agent.world.observation_model, [self.episodes]) if self.decodes else None
        self.horizons = usable_horizons(self.episodes, HORIZONS)
        self.step, self.finished = 0, False
        self.results: dict[str, float] = {}

    def run(self) -> None:
        """Train to the last update and measure at every depth. Raises NonFiniteError as `Dreamer.update` does."""
        for name in ("open_loop.csv", "probe.csv"):  # of a run in this folder that was stopped, and begins anew
            if (path := Path(self.logger.run_dir) / name).exists():
                os.replace(path, path.with_name(f"{name}.old"))
        log, measure = Every(LOG_EVERY), Every(self.cfg.eval_every)
        self.agent.fit_image_normaliser(self.replay.sample)
        clock, done = time.perf_counter(), 0
        while (progress := self.progress(self.step)) < 1.0:
            batch, where = sample(self.agent, self.replay, *self.batch)
            update = update_world(self.agent, batch, progress)
            self.replay.write_back(where, update.states, update.errors)
            self.step += 1
            self.logger.add(update.metrics)
            if log(self.step):
                now = time.perf_counter()
                with torch.random.fork_rng(), self.execution.uncompiled():
                    self.logger.scalars(self.step, stability(self.agent.world, batch))
                self.logger.scalars(self.step, {"speed/updates": (self.step - done) / (now - clock)})
                self.logger.write(self.step)
                clock, done = time.perf_counter(), self.step
            if measure(self.step) and self.step < self.cfg.updates:
                self.measure(None)
            self.logger.progress(self.step)
        self.finish()

    def finish(self) -> None:
        """Measure with exits and, where observations are decoded, at every fixed depth up to twice that of training."""
        self.results = self.measure(None)
        if self.agent.world.core.looping and self.decodes:
            for depth in range(1, 2 * self.agent.world.cfg.loop.train_cap + 1):
                self.measure(depth)
        self.logger.write(self.step)
        self.store("latest", {"step": self.step, "agent": self.agent.state_dict()})
        self.finished = True

    def measure(self, depth: int | None) -> dict[str, float]:
        """Open-loop errors of the averaged weights, at a fixed depth or with the exit rule, into open_loop.csv.

        With the rule also the linear read-out of the observation from the latents, into probe.csv; without a decoder
        that alone.
        """
        read = self.probe() if depth is None else {}
        return read | self.errors(depth) if self.decodes else read

    @property
    def decodes(self) -> bool:
        """Whether there are errors of observations."""
        return self.agent.world.observation_model.decodes

    def probe(self) -> dict[str, float]:
        """R^2 of the read-out, at posterior states and after imagined steps."""
        recording = Recording("agent", self.episodes, None, torch.zeros(len(self.episodes.length), dtype=torch.bool))
        try:
            with self.execution.uncompiled():
                found = probe_states(self.agent.averaged.world, recording, self.horizons)
        except UsageError:  # images alone, or too few episodes
            return {}
        values = {"probe": found.r2, "probe_deter": found.r2_deter}
        values |= {f"probe_{h}": value for h, value in found.ahead.items()}
        path = Path(self.logger.run_dir) / "probe.csv"
        fresh = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(("update", *values))
            writer.writerow((self.step, *(f"{value:.6g}" for value in values.values())))
        self.logger.scalars(self.step, {f"open_loop/{name}": value for name, value in values.items()})
        return values

    def errors(self, depth: int | None) -> dict[str, float]:
        """What `measure` says, of observations and rewards."""
        world = self.agent.averaged.world
        with exit_rule(world, None if depth is None else ExitRule()), self.execution.uncompiled():
            errors = open_loop(
                world, self.episodes, self.horizons, WINDOWS, max_loops=depth, metric=self.metric
            ).means()
        path = Path(self.logger.run_dir) / "open_loop.csv"
        fresh = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(COLUMNS)
            for h in self.horizons:
                values = errors["loops"], h, errors[f"error_{h}"], errors[f"reward_{h}"], errors[f"energy_{h}"]
                writer.writerow((self.step, depth or "exit", *(f"{value:.6g}" for value in values)))
        if depth is None:
            self.logger.scalars(self.step, {f"open_loop/{name}": value for name, value in errors.items()})
        return errors
