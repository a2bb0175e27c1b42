"""Recorded episodes: observations, actions, rewards, contacts and what images do not show, row by row.

Symbols: E episodes, played side by side, T rows, A dimensions of the policy's action.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.dataset import Episodes
from agent.evaluation.episodes import Agent
from agent.evaluation.rounds import MAX_STEPS, MakeEnvs, Progress, Round, Say, cut_note, open_copies, say
from agent.spaces import Spaces, from_env

PolicyName = Literal["agent", "random"]

BATCH = 10
"""Episodes of a data set that are recorded side by side."""
BESIDE = ("/action", "/reward", "/contacts", "/hidden")
"""Columns beside the observations."""
MOST_BYTES = 8 << 30
"""Bytes of observations that are recorded at once: all steps of ten episodes of an Atari game are 4 GB."""
CONTACTS = "dm_control.contacts"
"""Name of the number of contacts in the info of dm_control's tasks, which no other environment uses."""
STATE = "dm_control.state"
"""Name of the vector that its tasks with images do not show."""


class Recording(NamedTuple):
    """E episodes of at most T rows, played by an agent or at random.

    contacts (E, T): number of contacts in the simulator on arrival at each row; None where it does not tell.
    hidden (E, T, P): the vector that images show; None where the simulator does not tell, or no image is seen.
    terminal (E,): whether the episode terminated, rather than being truncated by a time limit.
    """

    policy: PolicyName
    episodes: Episodes
    contacts: Tensor | None
    terminal: Tensor
    hidden: Tensor | None = None


def record(
    agent: Agent | None, spaces: Spaces, make_envs: MakeEnvs, seeds: range, explore: bool = False, say: Say = say
) -> Recording:
    """Play one episode per seed, side by side; the random state of training is restored afterwards.

    agent None acts at random; explore samples the agent's actions, by default it takes the mean ones. Random actions
    depend on the first seed, so those of two purposes differ even where an environment ignores its seed. Copies,
    limits, `say` and what is raised are as in `run_episodes`; MOST_BYTES of observations cut episodes off too.
    """
    progress = Progress(say, len(seeds), "recorded")
    with open_copies(make_envs, len(seeds), say) as stepper, torch.random.fork_rng():
        count, parts = stepper.envs.num_envs, []
        for start in range(0, len(seeds), count):
            limit = max(2, min(MAX_STEPS, MOST_BYTES // (len(seeds) * bytes_per_row(spaces))))
            episodes = Round(stepper, seeds[start : start + count], progress, limit=limit)
            parts.append(_record_round(agent, spaces, episodes, explore))
            progress.over += count
            if episodes.cut.any():
                say(cut_note(int(episodes.cut.sum()), len(seeds), limit))
    return parts[0] if len(parts) == 1 else _joined(parts)


def bytes_per_row(spaces: Spaces) -> int:
    """Bytes of one recorded observation."""
    return sum(4 * size if isinstance(size, int) else math.prod(size) for size in spaces.obs.values())


def _record_round(agent: Agent | None, spaces: Spaces, episodes: Round, explore: bool) -> Recording:
    """Play the round to its end."""
    envs, count, first_seed = episodes.stepper.envs, len(episodes.running), episodes.seeds.start
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*spaces.obs, *BESIDE)}
    lengths, terminal, memory = np.zeros(count, int), np.zeros(count, bool), None
    torch.manual_seed(first_seed)
    envs.action_space.seed(first_seed)

    def add(obs: Any, action: np.ndarray, reward: np.ndarray, info: dict[str, Any], arrived: np.ndarray) -> None:
        """The row at hand, on arrival: action (E, A), reward (E,); arrived (E,): whose episode it belongs to."""
        row: dict[str, np.ndarray] = {**spaces.arrays(obs), "/action": action, "/reward": reward}
        row["/contacts"] = np.asarray(info.get(CONTACTS, np.zeros(0)))
        row["/hidden"] = np.asarray(info.get(STATE, np.zeros(0)))
        for name, value in row.items():
            columns[name].append(value)
        lengths[arrived] += 1

    obs, info = episodes.reset()
    add(obs, np.zeros((count, spaces.action.size), np.float32), np.zeros(count), info, episodes.running)
    while episodes.running.any():
        if agent is None:
            env_action = envs.action_space.sample()
        else:
            is_first = np.full(count, episodes.steps == 0)
            env_action, memory, _ = agent.act(obs, memory, is_first, explore)
        action = from_env(torch.as_tensor(env_action), spaces.action).clamp(-1.0, 1.0).numpy()
        arrived = episodes.running
        obs, reward, terminated, _, info = episodes.step(env_action)
        terminal |= arrived & terminated
        add(obs, action, reward, info, arrived)

    def stacked(name: str) -> Tensor:
        """(E, T, ...), zero after the end of an episode; removes the column, because images take much memory."""
        whole = torch.from_numpy(np.stack(columns.pop(name), 1))
        whole = whole if whole.dtype == torch.uint8 else whole.float()
        for env, length in enumerate(lengths):
            whole[env, length:] = 0
        return whole

    has_contacts = all(part.shape == (count,) for part in columns["/contacts"])
    has_hidden = all(part.ndim == 2 and len(part) == count for part in columns["/hidden"])
    observations = {name: stacked(name) for name in spaces.obs}
    rows = Episodes(observations, stacked("/action"), stacked("/reward"), torch.from_numpy(lengths))
    contacts = stacked("/contacts") if has_contacts else None
    policy: PolicyName = "random" if agent is None else "agent"
    return Recording(policy, rows, contacts, torch.from_numpy(terminal), stacked("/hidden") if has_hidden else None)


def _joined(parts: Sequence[Recording]) -> Recording:
    """Recordings of a few episodes each as one, padded to the longest."""
    all_rows = [part.episodes for part in parts]
    longest = max(rows.reward.shape[1] for rows in all_rows)

    def joined(leaves: Sequence[Tensor]) -> Tensor:
        """(E, T, ...) each -> (E, T, ...)"""
        whole = leaves[0].new_zeros(sum(map(len, leaves)), longest, *leaves[0].shape[2:])
        begin = 0
        for leaf in leaves:
            whole[begin : begin + len(leaf), : leaf.shape[1]] = leaf
            begin += len(leaf)
        return whole

    observations = {name: joined([rows.obs[name] for rows in all_rows]) for name in all_rows[0].obs}
    actions, rewards = joined([rows.prev_action for rows in all_rows]), joined([rows.reward for rows in all_rows])
    episodes = Episodes(observations, actions, rewards, torch.cat([rows.length for rows in all_rows]))
    terminal = torch.cat([part.terminal for part in parts])

    def told(leaves: list[Tensor | None]) -> Tensor | None:
        known = [leaf for leaf in leaves if leaf is not None]
        return joined(known) if len(known) == len(parts) else None

    contacts, hidden = told([part.contacts for part in parts]), told([part.hidden for part in parts])
    return Recording(parts[0].policy, episodes, contacts, terminal, hidden)


def record_batches(agent: Agent | None, spaces: Spaces, make_envs: MakeEnvs, seeds: range) -> Iterator[Recording]:
    """Recordings of BATCH episodes each, for a data set; an agent plays every second one, with sampled actions."""
    for start in range(0, len(seeds), BATCH):
        player = agent if start // BATCH % 2 == 0 else None
        yield record(player, spaces, make_envs, seeds[start : start + BATCH], explore=True)
