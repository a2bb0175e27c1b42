"""Evaluation episodes with fixed seeds, and their statistics.

Symbols: E environments that step together, T steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
import torch

from agent.errors import Interrupted
from agent.evaluation.rounds import MakeEnvs, Progress, Round, Say, cut_note, open_copies, say
from agent.evaluation.statistics import summary
from agent.seeds import FINAL_EVALUATION, INTERIM_EVALUATION

MAX_PARALLEL = 10
"""Environments that play evaluation episodes side by side."""

# Written as a call because "return" is a keyword of Python.
Episode = TypedDict(  # noqa: UP013
    "Episode",
    {
        "episode": int,
        "seed": int,
        "return": float,
        "length": int,
        "mean_loops": float,
        "loop_counts": list[int],
        "cut": bool,
    },
)
"""One evaluation episode; loop_counts[i]: number of its steps that took i + 1 loops; cut: it did not end by itself."""


class Agent(Protocol):
    """What can be evaluated: a `Dreamer`, or anything with its `act` (see `Dreamer.act`)."""

    @property
    def run_cap(self) -> int:
        """Most loops of a step of acting."""

    def act(
        self, obs: Any, memory: Any, is_first: np.ndarray, explore: bool = True, max_loops: int | None = None
    ) -> tuple[np.ndarray, Any, np.ndarray]:
        """Observations {name: (E, ...)} -> actions (E, ...), memory for the next call, loops used (E,)."""


class Timed:
    """An agent whose decisions are timed: `milliseconds` per call, the mean of all but the first."""

    def __init__(self, agent: Agent):
        self.agent, self.seconds = agent, list[float]()

    @property
    def run_cap(self) -> int:
        return self.agent.run_cap

    @property
    def milliseconds(self) -> float:
        return 1e3 * float(np.mean(self.seconds[1:] or self.seconds))

    def act(self, *args: Any) -> tuple[np.ndarray, Any, np.ndarray]:
        start = time.perf_counter()
        result = self.agent.act(*args)
        self.seconds.append(time.perf_counter() - start)
        return result


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation episodes, played with averaged weights and mean actions, from seeds that training never uses."""

    episodes: int | None = None
    """Episodes of the final evaluation; by default 10, and 100 for atari100k."""
    interim_episodes: int = 5
    """Episodes of each evaluation during training."""
    seed: int = 0
    """Which episodes: the first final one has the seed 1,000,000,000 + this number, see agent/seeds.py."""

    def __post_init__(self) -> None:
        for name in ("episodes", "interim_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--eval.{name.replace('_', '-')} must be at least 1, got {value}")
        most = max(self.episodes or 100, self.interim_episodes)  # 100: the largest number of any task
        FINAL_EVALUATION.episodes(self.seed, most, "--eval.seed")

    @property
    def first_seed(self) -> int:
        """Seed of the first episode of the final evaluation."""
        return FINAL_EVALUATION.first + self.seed


def never() -> bool:
    """The `stop` of an evaluation that is never interrupted."""
    return False


@dataclass(frozen=True)
class Evaluator:
    """The evaluations of one training run: call it with final=False during training and final=True at its end."""

    cfg: EvalConfig
    agent: Agent
    make_envs: MakeEnvs
    repeat: int
    """Simulator steps per action."""
    default_episodes: int = 10
    """Episodes of the final evaluation where `cfg` names no number."""
    max_loops: int | None = None
    """Most loops per step; by default as the model is configured."""
    say: Say = say
    """Shows a line to a person."""

    def __call__(self, final: bool, stop: Callable[[], bool] = never) -> list[Episode]:
        """Play the episodes. Raises Interrupted as soon as stop() is true (Ctrl-C), else as `run_episodes`."""
        cfg = self.cfg
        purpose = FINAL_EVALUATION if final else INTERIM_EVALUATION
        count = (cfg.episodes or self.default_episodes) if final else cfg.interim_episodes
        first_seed = purpose.episodes(cfg.seed, count).start
        return run_episodes(
            self.agent, self.make_envs, count, first_seed, self.max_loops, repeat=self.repeat, stop=stop, say=self.say
        )


# ---------------------------------------------------------------------- episodes


def run_episodes(
    agent: Agent,
    make_envs: MakeEnvs,
    episodes: int,
    seed: int,
    max_loops: int | None = None,
    explore: bool = False,
    repeat: int = 1,
    parallel: int = MAX_PARALLEL,
    stop: Callable[[], bool] = never,
    say: Say = say,
) -> list[Episode]:
    """Play `episodes` episodes, number i with the seed `seed` + i, and return one row for each.

    Up to `parallel` environments play one episode each and wait for the longest, so that short episodes are not
    over-represented; where only one can be made, it plays all. An episode that has not ended after MAX_STEPS steps is
    cut off. Lengths are in simulator steps, `repeat` per action. The random state of training is restored afterwards.
    say: shows lines about long evaluations, cut episodes and environments that are hard to make or close.

    Raises:
        ValueError: `episodes` is below 1.
        Interrupted: stop() became true.
        EnvironmentFailure: the environment failed, or returned what is not finite in an episode that was not over.
    """
    if episodes < 1:
        raise ValueError(f"an evaluation needs at least 1 episode, got {episodes}")
    rows: list[Episode] = []
    progress = Progress(say, episodes)
    with open_copies(make_envs, min(episodes, parallel), say) as stepper, torch.random.fork_rng():
        count = stepper.envs.num_envs
        for start in range(0, episodes, count):
            torch.manual_seed(seed + start)
            seeds = range(seed + start, seed + start + count)
            played = Round(stepper, seeds, progress, min(count, episodes - start))
            loops = _play(agent, played, max_loops, explore, stop)
            for i in np.flatnonzero(played.wanted):
                # (T, E) -> (steps of this episode,)
                taken = loops[loops[:, i] > 0, i]
                rows.append(
                    {
                        "episode": start + int(i),
                        "seed": seeds[i],
                        "return": float(played.returns[i]),
                        "length": len(taken) * repeat,
                        "mean_loops": float(taken.mean()),
                        "loop_counts": np.bincount(taken)[1:].tolist(),
                        "cut": bool(played.cut[i]),
                    }
                )
            progress.over = len(rows)
    if cut := sum(row["cut"] for row in rows):
        say(cut_note(cut, episodes, played.limit))
    return rows


def _play(agent: Agent, episodes: Round, max_loops: int | None, explore: bool, stop: Callable[[], bool]) -> np.ndarray:
    """Play the round to its end: the loops (T, E) of every step, 0 after an episode's end."""
    obs, _ = episodes.reset()
    memory: Any = None
    is_first, loops = np.ones(len(episodes.running), bool), []
    while episodes.running.any():
        if stop():
            raise Interrupted
        action, memory, depth = agent.act(obs, memory, is_first, explore, max_loops)
        loops.append(np.where(episodes.running, depth, 0))
        obs, *_ = episodes.step(action)
        is_first = np.zeros(len(is_first), bool)
    return np.stack(loops)


# ---------------------------------------------------------------------- statistics


def loop_shares(episodes: Iterable[Episode]) -> list[float]:
    """Fractions of all steps that took 1, 2, .. loops, as --exit-histogram of the random exit takes them."""
    counts = [row["loop_counts"] for row in episodes]
    total = np.zeros(max(map(len, counts)))
    for episode_counts in counts:
        total[: len(episode_counts)] += episode_counts
    return [float(share) for share in total / total.sum()]


def summarise(episodes: Iterable[Episode]) -> dict[str, float]:
    """`agent.evaluation.statistics.summary` of the rows of `run_episodes`."""
    rows = list(episodes)
    return summary([row["return"] for row in rows], [row["mean_loops"] for row in rows])
