"""Suites: named lists of tasks, for sweeps (--sweep task=@dmc18) and comparisons (--suite dmc18). Names alone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from agent.errors import UsageError
from agent.evaluation.atari_scores import scores
from agent.settings import text_of

MARK = "@"
"""In front of the name of a list, where tasks may stand."""


class Suite(NamedTuple):
    """A list of tasks under a name."""

    name: str
    tasks: tuple[str, ...]
    """As suite:name, each once, in the order of the tables."""
    source: str
    """Who compares agents on it, or why these tasks."""

    @property
    def marked(self) -> str:
        """As it stands among tasks: @dmc18."""
        return MARK + self.name


def _dmc(names: str) -> tuple[str, ...]:
    return tuple(f"dmc:{name}" for name in names.split())


_EASY_6 = "cartpole_balance cartpole_swingup reacher_easy ball_in_cup_catch walker_stand walker_walk"
_MORE_6 = "cheetah_run finger_spin pendulum_swingup walker_run hopper_stand acrobot_swingup"
_DMC_18 = """
acrobot_swingup ball_in_cup_catch cartpole_balance cartpole_balance_sparse cartpole_swingup cartpole_swingup_sparse
cheetah_run finger_spin finger_turn_easy finger_turn_hard hopper_hop hopper_stand pendulum_swingup reacher_easy
reacher_hard walker_run walker_stand walker_walk
"""

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "dmc18", _dmc(_DMC_18),
            "the proprioceptive tasks of DreamerV3's figures (Hafner et al., arXiv 2301.04104)",
        ),
        Suite(
            "easy6", _dmc(_EASY_6),
            "chosen here from dmc18: TD-MPC2, BRO, SimbaV2 and MR.Q all reach 830 on them within 100,000 steps",
        ),
        Suite(
            "easy12", _dmc(f"{_EASY_6} {_MORE_6}"),
            "chosen here from dmc18: easy6 and six more, so that each of its nine bodies is there",
        ),
        Suite(
            "atari26", tuple(f"atari100k:{game}" for game in scores()),
            "the games of Atari 100k (Kaiser et al., arXiv 1903.00374)",
        ),
    )
}  # fmt: skip
"""{name: list}. A new one is a new entry; `python -m docs.configuration` and docs/sweeps.md name them too."""


def find_suite(name: str) -> Suite:
    """The list of that name, with or without the @. Raises UsageError, with the nearest name and all that exist."""
    bare = name.strip().removeprefix(MARK)
    if bare in SUITES:
        return SUITES[bare]
    near = difflib.get_close_matches(bare.lower(), SUITES, n=1)
    meant = f"did you mean {MARK}{near[0]}? " if near else ""
    every = ", ".join(f"{suite.marked} ({len(suite.tasks)} tasks)" for suite in SUITES.values())
    raise UsageError(f"there is no list of tasks {MARK}{text_of(bare)}; {meant}the lists are {every}")


def expand(values: Sequence[str]) -> list[str]:
    """Tasks and lists of tasks -> tasks; what several of them hold is there once. Raises UsageError."""
    tasks = dict[str, None]()  # an ordered set
    for value in values:
        tasks |= dict.fromkeys(find_suite(value).tasks if value.startswith(MARK) else (value,))
    return list(tasks)


def refuse_list(task: str) -> None:
    """Raise UsageError where a list is given as the task of one run."""
    if task.startswith(MARK):
        suite = find_suite(task)
        raise UsageError(
            f"{suite.marked} is a list of {len(suite.tasks)} tasks and a run has one: sweep it with "
            f"--sweep task={suite.marked} --run-dir DIR"
        )
