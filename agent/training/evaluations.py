"""The evaluations of a training run: played, logged, and the best agent kept. A failure of one never ends training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import numpy as np

from agent.data.checkpoint import Store
from agent.errors import Interrupted, WorkerFailure
from agent.evaluation.episodes import Episode
from agent.logs.logger import Logger

Evaluate = Callable[[bool, Callable[[], bool]], list[Episode]]
"""evaluate(final, stop) plays the episodes and raises Interrupted when stop() becomes true."""

Report = Callable[[int, str, Exception], None]
"""report(step, what, error): `what` failed and training goes on."""


class Saved(Protocol):
    """An agent, as far as a checkpoint needs it."""

    def state_dict(self) -> dict[str, Any]: ...


class Evaluations:
    """Evaluates `agent` during training and at its end."""

    def __init__(self, agent: Saved, evaluate: Evaluate, logger: Logger, store: Store, report: Report):
        self.agent, self.evaluate, self.logger, self.store, self.report = agent, evaluate, logger, store, report
        self.episodes: list[Episode] = []
        """Of the final evaluation; none where it failed."""
        self.means: dict[int, float] = {}
        """Step -> mean return, of the evaluations before the end."""
        self.tried = 0
        """Step of the last evaluation, whether it failed or not."""
        self.best = -np.inf

    def interim(self, step: int, stop: Callable[[], bool]) -> None:
        """Evaluate during training and keep the best agent. Raises Interrupted when stop() becomes true."""
        episodes = self.play(step, False, stop)
        self.tried = step
        if not episodes:
            return
        mean = self.means[step] = mean_of(episodes, "return")
        if mean >= self.best:
            self.best = mean
            self.save_best(step)

    def final(self, step: int, stop: Callable[[], bool]) -> None:
        """Evaluate at the end. It judges and does not choose: it plays other episodes, and more of them."""
        self.means.pop(step, None)  # during training, and then the time was over
        self.episodes = self.play(step, True, stop)
        self.tried = step
        if self.best == -np.inf:  # nothing was evaluated before
            self.save_best(step)

    def play(self, step: int, final: bool, stop: Callable[[], bool]) -> list[Episode]:
        """Play and log one evaluation; [] where it failed, which is reported."""
        try:
            episodes = self.evaluate(final, stop)
        except (Interrupted, WorkerFailure):
            raise
        except Exception as error:
            self.report(step, "the final evaluation" if final else "an evaluation", error)
            return []
        if not episodes:  # another rank has played them
            return []
        self.logger.evaluation(step, cast(list[dict[str, float]], episodes))
        self.logger.scalars(
            step, {"eval/return": mean_of(episodes, "return"), "eval/loops": mean_of(episodes, "mean_loops")}
        )
        return episodes

    def save_best(self, step: int) -> None:
        """Write checkpoints/best.pt."""
        self.store("best", {"step": step, "agent": self.agent.state_dict()})

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return {"means": self.means, "tried": self.tried, "best": float(self.best)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Undo what happened since `state_dict`."""
        self.means, self.tried, self.best = dict(saved["means"]), saved["tried"], saved["best"]


def mean_of(episodes: list[Episode], name: str) -> float:
    """The mean of one column of the episodes."""
    return float(np.mean([cast(dict[str, float], episode)[name] for episode in episodes]))


def recent(evaluations: Evaluations, returns: list[float]) -> dict[str, float]:
    """Steadier numbers beside the final evaluation, from the returns of training episodes too; those without episodes
    are left out."""
    means = {
        "last_3_evaluations": list(evaluations.means.values())[-3:], "last_10_training_episodes": returns[-10:]
    }  # fmt: skip
    return {name: float(np.mean(values)) for name, values in means.items() if values}
