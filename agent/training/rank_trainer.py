"""The training loop of one of several ranks, each with its own environments and its own part of the replay.

All ranks run the same loop and decide alike, because what they decide by is the same everywhere: the steps of all ranks
together, the clock of rank 0, and signals, wherever they arrive. These travel in one small message, `exchange`, after
every step, before every update and every two seconds of an evaluation. Nothing else makes ranks differ, so each knows
which message comes next.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from agent.data.checkpoint import copied
from agent.errors import EnvironmentFailure, Interrupted, WorkerFailure
from agent.evaluation.episodes import Episode
from agent.execution.ranks import Ranks
from agent.logs.silent import SilentLogger
from agent.training.evaluations import Evaluate
from agent.training.parts import joined
from agent.training.trainer import Trainer

BEAT = 2.0
"""Seconds of an evaluation after which rank 0 listens to the others."""


class RankTrainer(Trainer):
    """A `Trainer` beside those of other ranks. `step` counts the steps of all of them.

    Where the environment of one rank fails, the others raise WorkerFailure, and everything is saved. Where a rank ends
    without a word, they raise RankLost, and the last checkpoint stays as it is: the rows of the lost rank are gone.
    """

    def __init__(self, ranks: Ranks, *arguments: Any):
        self.ranks, self.asked, self.failed, self.shared_time = ranks, 0, False, 0.0
        self.waiting: list[tuple[int, int, float, int]] = []  # episodes of this rank that rank 0 has not logged
        (self.shared_time,) = ranks.broadcast(time.monotonic())
        super().__init__(*arguments)
        if isinstance(self.logger, SilentLogger):
            self.waiting = self.logger.waiting
        self.evaluations.evaluate = partial(self.evaluate_on_rank_0, self.evaluations.evaluate)
        if not all(row[0] for row in ranks.all_gather([self.stepper.asynchronous])):  # not so on another machine
            self.stepper.asynchronous = False

    # ------------------------------------------------------------------ what all ranks know

    def exchange(self, steps: int = 0, over: bool = False) -> bool:
        """Tell the others of `steps` made here, and hear of theirs; whether rank 0 says that what it does is over.

        Raises WorkerFailure where the environment of another rank failed.
        """
        mine = steps, self.asked, self.failed, len(self.waiting), time.monotonic(), over
        made, asked, failed, episodes, clocks, ends = zip(*self.ranks.all_gather(mine), strict=True)
        self.shared_time = clocks[0]
        if any(episodes):
            self.fetch_episodes()
        if signals := [int(number) for number in asked if number]:
            super().stop(signals[0])
        if any(failed):  # no rank keeps this step: all parts of the replay are equally long
            if self.failed:
                return False
            raise WorkerFailure(f"the environment of rank {failed.index(1.0)} failed, which says why")
        self.step += int(sum(made))
        return bool(ends[0])

    def fetch_episodes(self) -> None:
        """Log on rank 0 the episodes that have ended on the others."""
        parts = self.ranks.gather(list(self.waiting))
        self.waiting.clear()
        for rank, episodes in enumerate(parts):
            for step, env, ret, length in episodes:
                self.counter.log(step, rank * self.envs.num_envs + env, ret, length)

    def now(self) -> float:
        return self.shared_time

    def stop(self, number: int = signal.SIGINT) -> None:
        """Ask all ranks to end the run, at the next `exchange`."""
        self.asked = number

    def moved(self, steps: int) -> None:
        self.exchange(steps)

    def goes_on(self) -> bool:
        self.exchange()
        return not self.stopping

    def left_open(self) -> bool:
        """Of any rank: all parts of the replay are equally long. Raises WorkerFailure where a reset has failed."""
        self.exchange()
        return any(row[0] for row in self.ranks.all_gather([super().left_open()]))

    # ------------------------------------------------------------------ what differs by rank

    def loop(self) -> None:
        try:
            super().loop()
        except EnvironmentFailure:
            self.failed = True
            self.exchange()
            self.failed = False
            raise

    def evaluate_on_rank_0(self, evaluate: Evaluate, final: bool, stop: Callable[[], bool]) -> list[Episode]:
        """Rank 0 plays, the others wait. Raises Interrupted on all ranks where one of them was asked to end."""
        if self.ranks.rank:
            while not self.exchange():
                if self.stopping:
                    raise Interrupted
            return []

        def listen() -> bool:
            if time.monotonic() - self.shared_time > BEAT:
                self.exchange()
            return self.stopping

        failure, episodes = None, list[Episode]()
        try:
            episodes = evaluate(final, listen)
        except Exception as error:
            failure = error
        if self.stopping:
            raise Interrupted
        self.exchange(over=True)
        if failure is not None:
            raise failure
        return episodes

    def draw(self) -> None:
        if self.ranks.rank == 0:
            super().draw()

    def save(self, beside: bool = False) -> None:
        """Rank 0 writes latest.pt, with the rows and random numbers of every rank."""
        if self.ranks.lost:
            return
        with self.clock.timed("save"):
            self.exchange()
            parts = self.ranks.gather(copied({"replay": self.replay.state_dict(), "trainer": self.state_dict()}))
            if parts:
                content = {"step": self.step, "agent": self.agent.state_dict(), **joined(parts)}
                self.store("latest", content, beside=beside)
            self.saved_at = self.now()
