"""Open-loop prediction: filter the first rows of recorded episodes, then predict from the actions alone.

Symbols: E episodes, T rows, L rows of all episodes together, W windows, Q = SAMPLES dreams per window, H horizon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.dataset import Episodes, Rows, pad_episodes
from agent.evaluation.normalised_error import NormalisedError, targets_at
from agent.learning.dreamer import Dreamer
from world_model import CertifiedCore, ExitRule, LatentState, LoopedCore, WorldModel, make_rule

CONTEXT_ROWS = 20
"""Rows of an episode that are observed before a prediction starts, at least; half of the longest episode where that is
less."""

BLOCK_BYTES = 1 << 28
"""Bytes of padded observations that `posterior_rows` filters at once."""

ALIKE_ROWS = 25
"""Rows in a row of an episode that count as one in a standard error: neighbours are alike."""

SAMPLES = 8
"""Dreams per prediction. Their mean is scored: a single sample would count the model's own uncertainty as error."""


class OpenLoop(NamedTuple):
    """Errors of W predictions at each horizon h, and the loops they used.

    error    {h: (W,)}   squared error of the mean over SAMPLES dreams, in symlog units, over the variance of the
                         entry of the observation, mean over the entries: 1 is as good as knowing the mean
    energy   {h: (W,)}   energy score of the dreams, see `NormalisedError.score`
    reward   {h: (W,)}   absolute error of the reward's mean
    depth    (W * SAMPLES, H)   loops of each step
    places   where the predictions start
    """

    error: dict[int, Tensor]
    energy: dict[int, Tensor]
    reward: dict[int, Tensor]
    depth: Tensor
    places: Windows

    def means(self) -> dict[str, float]:
        """error_H, energy_H, reward_H and loops."""
        means = {f"error_{h}": float(value.mean()) for h, value in self.error.items()}
        means |= {f"energy_{h}": float(value.mean()) for h, value in self.energy.items()}
        means |= {f"reward_{h}": float(value.mean()) for h, value in self.reward.items()}
        return means | {"loops": float(self.depth.float().mean())}


class Windows(NamedTuple):
    """Where predictions start: episode and row (W,), the last row observed; ahead (W, H), the rows predicted."""

    episode: Tensor
    row: Tensor
    ahead: Tensor

    def groups(self) -> np.ndarray:
        """(W,) numbers for `standard_error`: windows that overlap, and rows that are alike, have mostly the same."""
        rows = max(ALIKE_ROWS, 2 * self.ahead.shape[1])
        count = int(self.row.max()) // rows + 1
        return (self.episode * count + self.row // rows).numpy(force=True)


@contextmanager
def exit_rule(world: WorldModel, rule: ExitRule | None) -> Iterator[None]:
    """Use another exit rule inside the `with`; None, and a core without loops, change nothing."""
    core = world.core
    if rule is None or not isinstance(core, LoopedCore):
        yield
        return
    before, core.rule = core.rule, rule
    try:
        yield
    finally:
        core.rule = before


# ---------------------------------------------------------------------- windows


def use_exit(agent: Dreamer, name: str, cap: int, threshold: float | None, histogram: tuple[float, ...]) -> None:
    """Let the agent use another exit rule than the trained one, with the newest and the averaged weights.

    cap: the most loops, up to which the random exit's histogram is even by default. Raises ValueError when there is
    no such rule, or the core has no loops.
    """
    loop = agent.world.cfg.loop
    for world in (agent.world, agent.averaged.world):
        if not isinstance(world.core, LoopedCore):
            raise ValueError(f"the core {world.cfg.core} has no loops: leave the exit rule out")
        if name == "kl" and world.cfg.latents == "gaussian":
            raise ValueError("the rule kl compares probabilities; gaussian latents have none: give another rule")
        if name == "certified" and not isinstance(world.core, CertifiedCore):
            raise ValueError(f"the core {world.cfg.core} has no certificate: give another rule")
        world.core.rule = make_rule(name, loop.tokens * loop.width, cap, threshold, histogram).to(agent.device)


def context_rows(episodes: Episodes) -> int:
    """Rows that are observed before a prediction, at least."""
    return min(CONTEXT_ROWS, int(episodes.length.max()) // 2)


def usable_horizons(episodes: Episodes, horizons: Sequence[int]) -> list[int]:
    """Those for which the longest episode is long enough."""
    return sorted({h for h in horizons if context_rows(episodes) + h <= int(episodes.length.max())})


def choose_windows(episodes: Episodes, horizon: int, count: int, seed: int = 0) -> Windows:
    """Draw `count` windows with `seed`, the same for every model; where there are fewer, each comes up repeatedly.

    Raises ValueError when no episode is long enough.
    """
    context = context_rows(episodes)
    places = [
        (episode, row)
        for episode, length in enumerate(episodes.length.tolist())
        for row in range(context - 1, length - horizon)
    ]
    if not places:
        raise ValueError(f"no held-out episode has {context + horizon} rows")
    rng, rounds = np.random.default_rng(seed), [np.arange(len(places))] * (count // len(places))
    chosen = np.concatenate([*rounds, rng.choice(len(places), count % len(places), replace=False)])
    device = episodes.reward.device
    episode, row = torch.tensor([places[i] for i in chosen], device=device).unbind(1)
    # (W, 1) + (H,) -> (W, H)
    return Windows(episode, row, row[:, None] + torch.arange(1, horizon + 1, device=device))


# ---------------------------------------------------------------------- posterior states


@torch.no_grad()
def posterior_states(world: WorldModel, episodes: Episodes, max_loops: int | None = None) -> tuple[LatentState, Tensor]:
    """Filter the episodes from their first rows: posterior states (E, T, ...) and loops (E, T)."""
    count, length = episodes.reward.shape
    state = world.initial(count)
    states, depths = [], []
    for row in range(length):
        obs = {name: value[:, row] for name, value in episodes.obs.items()}
        is_first = torch.full((count,), row == 0, device=episodes.reward.device)
        state, stats = world.observe(obs, episodes.prev_action[:, row], is_first, state, False, max_loops)
        states.append(state)
        depths.append(stats.depth)
    # T states (E, ...) -> (E, T, ...)
    return LatentState(*(torch.stack(leaves, 1) for leaves in zip(*states, strict=True))), torch.stack(depths, 1)


def posterior_rows(world: WorldModel, rows: Rows, device: torch.device | str) -> LatentState:
    """`posterior_states` of whole episodes stored one after the other: rows (L, ...) -> states (L, ...).

    Episodes are filtered a few at a time, as many as fit into BLOCK_BYTES when they are padded.
    """
    starts = [*np.flatnonzero(rows["is_first"]), len(rows["is_first"])]
    longest = max(np.diff(starts))
    row_bytes = sum(value[0].nbytes for name, value in rows.items() if name.startswith("obs/"))
    block = max(1, int(BLOCK_BYTES // (longest * max(1, row_bytes))))
    parts = []
    for first in range(0, len(starts) - 1, block):
        begin, end = starts[first], starts[min(first + block, len(starts) - 1)]
        episodes = pad_episodes({name: value[begin:end] for name, value in rows.items()}).to(device)
        # (E, T): True for rows that are not padding
        real = torch.arange(episodes.reward.shape[1], device=episodes.reward.device) < episodes.length[:, None]
        parts.append([leaf[real] for leaf in posterior_states(world, episodes)[0]])
    return LatentState(*(torch.cat(leaves) for leaves in zip(*parts, strict=True)))


# ---------------------------------------------------------------------- predictions


@torch.no_grad()
def open_loop(
    world: WorldModel,
    episodes: Episodes,
    horizons: Sequence[int],
    windows: int | Windows,
    seed: int = 0,
    max_loops: int | None = None,
    states: LatentState | None = None,
    metric: NormalisedError | None = None,
    jump: int = 1,
    gamma: float = 1.0,
) -> OpenLoop:
    """Filter whole episodes, and from `windows` rows of them predict on from the actions alone, in steps of `jump` k.
    windows: how many, or which.

    Horizons count decisions, and those that steps of k do not end on are left out. The reward of a step of several
    decisions is their sum, discounted by `gamma`, as it was in training; the error is that of the last step.

    Latents are the most probable ones while filtering and sampled while predicting, as in dreams; the world model's
    exit rule decides the depth in both. states (E, T, ...): the posterior states of the episodes, and metric: fitted
    to them, if known. Raises ValueError when no episode is long enough for the longest horizon.
    """
    horizons = [h for h in horizons if h % jump == 0]
    longest = max(horizons)
    places = choose_windows(episodes, longest, windows, seed) if isinstance(windows, int) else windows
    episode, row, ahead = places._replace(ahead=places.ahead[:, :longest])
    actions = episodes.prev_action[episode[:, None], ahead].unflatten(1, (-1, jump))  # (W, H/k, k, A)
    actions = actions.squeeze(2) if jump == 1 else actions
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if states is None:
            states, _ = posterior_states(world, episodes, max_loops)
        # (E, T, ...) -> (W, ...) -> (W * Q, ...)
        start = states.map(lambda leaf: leaf[episode, row].repeat_interleave(SAMPLES, 0))
        dream = world.imagine(start, actions.repeat_interleave(SAMPLES, 0), longest // jump, max_loops=max_loops)
    metric = metric or NormalisedError.fit(world.observation_model, [episodes])
    error, energy = {}, {}
    for h in horizons:
        targets = targets_at(world.observation_model, episodes, episode, ahead[:, h - 1])
        error[h], energy[h] = metric.score(world.observation_model, dream.feat[h // jump], SAMPLES, targets)
    # (W * Q, H/k) -> (W, H/k)
    reward = dream.rewards.unflatten(0, (len(row), SAMPLES)).mean(1)
    true = episodes.reward[episode[:, None], ahead].unflatten(1, (-1, jump))  # (W, H/k, k)
    reward_error = (reward - (true * gamma ** torch.arange(jump, device=true.device)).sum(-1)).abs()
    return OpenLoop(error, energy, {h: reward_error[:, h // jump - 1] for h in horizons}, dream.loops.depth, places)
