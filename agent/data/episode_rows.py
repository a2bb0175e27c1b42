"""Episodes that others recorded, as rows of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch

from agent.data.dataset import Rows
from agent.errors import UsageError
from agent.spaces import Spaces, from_env


class RecordedEpisode(Protocol):
    """T steps: obs {name: (T + 1, ...)}, action (T, A) or (T,), reward (T,); whether it terminated."""

    @property
    def obs(self) -> Mapping[str, np.ndarray]: ...
    @property
    def action(self) -> np.ndarray: ...
    @property
    def reward(self) -> np.ndarray: ...
    @property
    def terminated(self) -> bool: ...


def rows_of_episodes(episodes: Iterable[RecordedEpisode], spaces: Spaces) -> Rows:
    """Arrival rows (L, ...) of all episodes, one after the other. Raises UsageError where there are none."""
    parts = [arrivals(episode, spaces) for episode in episodes]
    if not parts:
        raise UsageError("there are no episodes in it: give another data set")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def arrivals(episode: RecordedEpisode, spaces: Spaces) -> Rows:
    """T + 1 rows: each observation with the action and the reward that led to it."""
    action = from_env(torch.as_tensor(episode.action), spaces.action).numpy()
    first, last = np.zeros(len(episode.reward) + 1, bool), np.zeros(len(episode.reward) + 1, bool)
    first[0] = last[-1] = True
    return {
        **{f"obs/{name}": episode.obs[name] for name in spaces.obs},
        "prev_action": np.concatenate([np.zeros_like(action[:1]), action]),
        "reward": np.concatenate([np.zeros(1, np.float32), episode.reward.astype(np.float32)]),
        "is_first": first, "is_last": last, "is_terminal": last & episode.terminated,
    }  # fmt: skip
