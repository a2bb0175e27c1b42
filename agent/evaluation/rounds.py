"""Episodes that copies of an environment play side by side, one each: made, reset, stepped and watched.

Symbols: E copies.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np

from agent.env_stepper import EnvStepper, Transition, not_finite, require_finite
from agent.errors import EnvironmentFailure, failures, in_words, made_to_be_read

MAX_STEPS = 100_000
"""Agent steps after which an episode is cut off, whatever the environment says."""
QUIET_SECONDS = 30.0
"""Seconds of playing after which a line says how far it has come."""

ANY_SEED = "reset(seed=...) must accept any whole number: use seed % 1000, say"

MakeEnvs = Callable[[int], gym.vector.VectorEnv[Any, Any, Any]]
"""make_envs(count) -> a vector environment of `count` copies; who calls it closes it."""

_said: set[str] = set()

Say = Callable[[str], None]
"""say(line) shows a line to a person."""


def say(line: str) -> None:
    """Print a line on standard error, over the live line of a run where there is one."""
    live = sys.stderr.isatty()
    print(f"\r{line}\x1b[K" if live else line, file=sys.stderr, flush=True)


@contextmanager
def open_copies(make_envs: MakeEnvs, count: int, say: Say = say) -> Iterator[EnvStepper]:
    """`count` copies, or one where no more can be made (a robot, a port), which is said; closed at the end.

    A close that fails is said too, and no error: the episodes are played. Raises EnvironmentFailure.
    """
    try:
        with failures():
            envs = make_envs(count)
    except EnvironmentFailure as many:
        if count == 1:
            raise
        try:
            with failures():
                envs = make_envs(1)
        except EnvironmentFailure:
            raise many from many.__cause__
        note = f"note: only one copy of the environment can be made, episodes are played one after the other ({many})"
        if note not in _said:  # and not in every evaluation of a run
            _said.add(note)
            say(note)
    try:
        yield EnvStepper(envs)
    finally:
        try:
            envs.close()
        except (Exception, SystemExit) as error:
            say(f"note: closing the environment failed: {in_words(error)}")


class Progress:
    """Says every QUIET_SECONDS how far the episodes have come.

    episodes: how many there will be, over all rounds; kind: "evaluation" or "recorded".
    """

    def __init__(self, say: Say, episodes: int, kind: str = "evaluation"):
        self.say, self.episodes, self.kind = say, episodes, kind
        self.over = 0  # episodes of the rounds before
        self.said_at = time.monotonic()

    def __call__(self, episodes: Round) -> None:
        now = time.monotonic()
        if now - self.said_at < QUIET_SECONDS:
            return
        self.said_at = now
        over = self.over + int((episodes.wanted & ~episodes.running).sum())
        low, high = (f"{end(episodes.returns[episodes.wanted]):.4g}" for end in (np.min, np.max))
        returns = low if low == high else f"{low} to {high}"
        self.say(
            f"{self.kind} episodes: {over} of {self.episodes} over, {episodes.steps:,} steps of the others played, "
            f"returns so far {returns}"
        )


class Round:
    """One episode in each copy. Copies whose episode is over go on, and what they return does not count.

    seeds: of the episodes, one for each copy; wanted: how many of the copies count, by default all; limit: steps after
    which episodes are cut off, by default MAX_STEPS.

    Attributes:
        running (E,): whose episode is not over; returns (E,); cut (E,): whose episode was cut off after `limit` steps.
        steps: how many were played.
    """

    def __init__(
        self, stepper: EnvStepper, seeds: range, progress: Progress,
        wanted: int | None = None, limit: int | None = None,
    ):  # fmt: skip
        count = len(seeds)
        self.stepper, self.seeds, self.progress = stepper, seeds, progress
        self.limit = limit or MAX_STEPS
        self.wanted = np.arange(count) < (count if wanted is None else wanted)
        self.running, self.returns = self.wanted.copy(), np.zeros(count)
        self.cut, self.steps = np.zeros(count, bool), 0

    def reset(self) -> tuple[Any, dict[str, Any]]:
        """The first observations and the info. Raises EnvironmentFailure, which names the seeds."""
        try:
            return self.stepper.reset(list(self.seeds))
        except EnvironmentFailure as error:
            first, last = self.seeds[0], self.seeds[-1]
            seeds = f"the seed {first}" if first == last else f"the seeds {first} to {last}"
            hint = "" if error.__cause__ is None or isinstance(error.__cause__, EOFError) else f"; {ANY_SEED}"
            raise placed(error, f"in the reset with {seeds}", hint) from error.__cause__

    def step(self, action: np.ndarray) -> Transition:
        """One step of all copies. Raises EnvironmentFailure, which names the step, and BadStep for a running copy."""
        self.steps += 1
        try:
            self.stepper.send(action)
            transition = self.stepper.receive_unchecked()
            obs, reward, terminated, truncated, _ = transition
            if (not_finite(obs, reward) & self.running).any():
                require_finite({name: value[self.running] for name, value in obs.items()}, reward[self.running])
        except EnvironmentFailure as error:
            kind = f"an {self.progress.kind}" if self.progress.kind == "evaluation" else f"a {self.progress.kind}"
            raise placed(error, f"in step {self.steps:,} of {kind} episode") from error.__cause__
        self.returns += np.where(self.running, reward, 0.0)
        self.running = self.running & ~(terminated | truncated)
        if self.steps >= self.limit:
            self.cut, self.running = self.running, np.zeros_like(self.running)
        self.progress(self)
        return transition


def placed(failure: EnvironmentFailure, where: str, hint: str = "") -> EnvironmentFailure:
    """The failure with its place in front of its message; that of a check of ours names the place itself."""
    cause = failure.__cause__
    return failure if cause and made_to_be_read(cause) else type(failure)(f"{where}: {failure}{hint}")


def cut_note(cut: int, episodes: int, limit: int) -> str:
    """A line about episodes that were cut off."""
    return (
        f"note: {cut} of {episodes} episodes did not end and were cut off after {limit:,} agent steps: "
        "their returns are of these steps"
    )
