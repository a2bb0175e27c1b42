"""Recorded episodes: observations, actions, rewards and contacts, row by row.

Symbols: E episodes, played side by side, T rows, A dimensions of the policy's action.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.dataset import Episodes
from agent.evaluation.episodes import Agent, MakeEnvs
from agent.spaces import Spaces, from_env

PolicyName = Literal["agent", "random"]

BATCH = 10
"""Episodes of a data set that are recorded side by side."""


class Recording(NamedTuple):
    """E episodes of at most T rows, played by an agent or at random.

    contacts (E, T): number of contacts in the simulator on arrival at each row; None where it does not tell.
    terminal (E,): whether the episode terminated, rather than being truncated by a time limit.
    """

    policy: PolicyName
    episodes: Episodes
    contacts: Tensor | None
    terminal: Tensor


def record(
    agent: Agent | None, spaces: Spaces, make_envs: MakeEnvs, seeds: range, explore: bool = False
) -> Recording:
    """Play one episode per seed, side by side; the random state of training is restored afterwards.

    agent None acts at random; explore samples the agent's actions, by default it takes the mean ones. Random actions
    depend on the first seed, so those of two purposes differ even where an environment ignores its seed.
    """
    count = len(seeds)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*spaces.obs, "/action", "/reward", "/contacts")}
    lengths, terminal, running = np.zeros(count, int), np.zeros(count, bool), np.ones(count, bool)
    # The row at hand, on arrival: (E, A), (E,), (E,)
    action, reward, is_last = np.zeros((count, spaces.action.size), np.float32), np.zeros(count), np.zeros(count, bool)
    memory: Any = None
    envs = make_envs(count)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seeds.start)
            envs.action_space.seed(seeds.start)
            obs, info = envs.reset(seed=list(seeds))  # type: ignore[arg-type]
            while True:
                row: dict[str, np.ndarray] = {**spaces.arrays(obs), "/action": action, "/reward": reward}
                row["/contacts"] = np.asarray(info.get("contacts", np.zeros(0)))
                for name, value in row.items():
                    columns[name].append(value)
                lengths += running
                running &= ~is_last
                if not running.any():
                    break
                if agent is None:
                    env_action = envs.action_space.sample()
                else:
                    is_first = np.full(count, len(columns["/action"]) == 1)
                    env_action, memory, _ = agent.act(obs, memory, is_first, explore)
                action = from_env(torch.as_tensor(env_action), spaces.action).clamp(-1.0, 1.0).numpy()
                obs, reward, terminated, truncated, info = envs.step(env_action)
                is_last = terminated | truncated
                terminal |= running & terminated
    finally:
        envs.close()

    def stacked(name: str) -> Tensor:
        """(E, T, ...), zero after the end of an episode; removes the column, because images take much memory."""
        whole = torch.from_numpy(np.stack(columns.pop(name), 1))
        whole = whole if whole.dtype == torch.uint8 else whole.float()
        for env, length in enumerate(lengths):
            whole[env, length:] = 0
        return whole

    has_contacts = all(part.size for part in columns["/contacts"])
    observations = {name: stacked(name) for name in spaces.obs}
    episodes = Episodes(observations, stacked("/action"), stacked("/reward"), torch.from_numpy(lengths))
    contacts = stacked("/contacts") if has_contacts else None
    policy: PolicyName = "random" if agent is None else "agent"
    return Recording(policy, episodes, contacts, torch.from_numpy(terminal))


def record_batches(
    agent: Agent | None, spaces: Spaces, make_envs: MakeEnvs, seeds: range
) -> Iterator[Recording]:
    """Recordings of BATCH episodes each, for a data set; an agent plays every second one, with sampled actions."""
    for start in range(0, len(seeds), BATCH):
        player = agent if start // BATCH % 2 == 0 else None
        yield record(player, spaces, make_envs, seeds[start : start + BATCH], explore=True)
