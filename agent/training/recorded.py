"""A recorded data set in the replay of a run: what others have experienced is learned from beside the run's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agent.data.dataset import Dataset, Rows, check_dataset, load_dataset
from agent.data.replay import ReplayBuffer
from agent.errors import UsageError
from agent.evaluation.open_loop import posterior_rows
from agent.learning.dreamer import Dreamer
from agent.spaces import Spaces


def load_recorded(folder: Path | str, task: str, spaces: Spaces) -> Dataset:
    """The data set, if it is of this task. Raises UsageError."""
    dataset = load_dataset(folder)
    check_dataset(dataset, task)
    if dataset.spaces != spaces:
        raise UsageError(
            f"the data set {folder} has other observations or actions ({dataset.spaces.plain()}) than the task has now "
            f"({spaces.plain()}): record it anew"
        )
    return dataset


def add_recorded(replay: ReplayBuffer, dataset: Dataset, agent: Dreamer) -> int:
    """Put the training episodes of a data set into an empty replay; returns the number of rows.

    They are laid end to end and cut into a piece for each environment, where an episode ends, truncated, and another
    begins. Of what is too much the last rows stay. Their latents are those of the agent as it is.
    Raises UsageError where there are too few rows.
    """
    rows, envs = dataset.train, replay.envs
    each = min(len(rows["reward"]) // envs, replay.length)
    if each < 2:
        raise UsageError(f"the data set has {len(rows['reward'])} rows, too few for {envs} environments: give fewer")
    begin = len(rows["reward"]) - each * envs
    pieces = {name: value[begin:].reshape(envs, each, *value.shape[1:]).copy() for name, value in rows.items()}
    pieces["is_last"][:, -1] |= ~pieces["is_first"][:, -1]  # no row is both
    for name, value in cut(pieces).items():
        pieces[name][:, 0] = value
    whole = {name: value.reshape(envs * each, *value.shape[2:]) for name, value in pieces.items()}
    states = posterior_rows(agent.world, whole, agent.device).map(lambda leaf: leaf.unflatten(0, (envs, each)))
    for place in range(each):
        row = {name: value[:, place] for name, value in pieces.items()}
        replay.add(row, states.map(lambda leaf, at=place: leaf[:, at]))  # type: ignore[misc]
    return each * envs


def recorded_line(dataset: Dataset, rows: int) -> str:
    """What of a data set lies in the replay, for the head of a run."""
    held = len(dataset.held_out["reward"])
    lost = len(dataset.train["reward"]) - rows
    note = f"; {lost:,} do not fit, a larger --train.replay-rows holds them" if lost else ""
    return f"data set     {rows:,} recorded rows lie in the replay, {held:,} are held out{note}"


def cut(pieces: Rows) -> Rows:
    """What the first rows of the pieces become: those of an episode that begins there."""
    first = {name: np.zeros_like(pieces[name][:, 0]) for name in ("prev_action", "reward", "is_terminal")}
    none = np.zeros(len(pieces["is_first"]), bool)
    return {**first, "is_first": ~none, "is_last": none}
