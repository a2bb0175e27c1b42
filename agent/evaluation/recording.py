"""Whole episodes played to be looked at: observations, actions, rewards and contacts, row by row."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.dataset import Episodes
from agent.evaluation.episodes import EVAL_SEEDS, Actor, MakeEnvs
from agent.spaces import Spaces, from_env

PolicyName = Literal["agent", "random"]

RECORDING_SEEDS = EVAL_SEEDS + 2_000_000
"""Recordings start from this seed: neither training nor an evaluation plays these episodes."""


class Recording(NamedTuple):
    """E episodes of at most T rows, played by an agent or at random.

    contacts (E, T): how many contacts the simulator saw on arrival at each row; None where it does not say.
    terminal (E,): whether the episode ended for good, and was not cut off by a time limit.
    """

    policy: PolicyName
    episodes: Episodes
    contacts: Tensor | None
    terminal: Tensor


def record(
    actor: Actor | None, spaces: Spaces, make_envs: MakeEnvs, count: int, seed: int = 0, explore: bool = False
) -> Recording:
    """Play `count` episodes side by side; the generators of training are left as they were.

    actor None acts at random; explore samples the actor's actions, by default it takes the mean ones.
    """
    envs = make_envs(count)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*spaces.obs, "/action", "/reward", "/contacts")}
    lengths, terminal, under_way = np.zeros(count, int), np.zeros(count, bool), np.ones(count, bool)
    action, reward, last = np.zeros((count, spaces.action.size), np.float32), np.zeros(count), np.zeros(count, bool)
    memory: Any = None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            envs.action_space.seed(seed)
            seeds = [RECORDING_SEEDS + seed + i for i in range(count)]
            obs, info = envs.reset(seed=seeds)  # type: ignore[arg-type]
            while True:
                row: dict[str, np.ndarray] = {**spaces.arrays(obs), "/action": action, "/reward": reward}
                row["/contacts"] = np.asarray(info.get("contacts", np.zeros(0)))
                for name, value in row.items():
                    columns[name].append(value)
                lengths += under_way
                under_way &= ~last
                if not under_way.any():
                    break
                if actor is None:
                    taken = envs.action_space.sample()
                else:
                    taken, memory, _ = actor.act(obs, memory, np.full(count, len(columns["/action"]) == 1), explore)
                action = from_env(torch.as_tensor(taken), spaces.action).clamp(-1.0, 1.0).numpy()
                obs, reward, terminated, truncated, info = envs.step(taken)
                last = terminated | truncated
                terminal |= under_way & terminated
    finally:
        envs.close()

    def joined(name: str) -> Tensor:
        """(E, T, ...), zero behind the end of an episode; the parts are let go, images take much room."""
        whole = torch.from_numpy(np.stack(columns.pop(name), 1))
        whole = whole if whole.dtype == torch.uint8 else whole.float()
        for env, length in enumerate(lengths):
            whole[env, length:] = 0
        return whole

    counted = all(part.size for part in columns["/contacts"])
    observations = {name: joined(name) for name in spaces.obs}
    episodes = Episodes(observations, joined("/action"), joined("/reward"), torch.from_numpy(lengths))
    contacts = joined("/contacts") if counted else None
    policy: PolicyName = "random" if actor is None else "agent"
    return Recording(policy, episodes, contacts, torch.from_numpy(terminal))
