"""How well a world model predicts with closed eyes: held-out episodes, errors by horizon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.dataset import Episodes, Rows, pad_episodes
from agent.evaluation.normalised_error import Yardstick, truth_at
from world_model import ExitRule, LatentState, LoopedCore, WorldModel

CONTEXT = 20
"""Rows of an episode that are seen before the eyes close, at least; half of the longest episode where that is less."""

WATCHED = 1 << 28
"""Bytes of observations that are watched at once."""

SAMPLES = 8
"""Dreams per prediction; their mean is scored, or a model would be punished for knowing what it does not know."""


class OpenLoop(NamedTuple):
    """Errors of W predictions at each horizon h, and the loops they used.

    error    {h: (W,)}   squared error of the mean over SAMPLES dreams, in symlog units, over the variance of the
                         entry of the observation, mean over the entries: 1 is as good as knowing the mean
    energy   {h: (W,)}   energy score of the dreams, see `Yardstick.judge`
    reward   {h: (W,)}   absolute error of the reward's mean
    depth    (W * SAMPLES, H)   loops of each step
    """

    error: dict[int, Tensor]
    energy: dict[int, Tensor]
    reward: dict[int, Tensor]
    depth: Tensor

    def means(self) -> dict[str, float]:
        """error_H, energy_H, reward_H and loops."""
        found = {f"error_{h}": float(value.mean()) for h, value in self.error.items()}
        found |= {f"energy_{h}": float(value.mean()) for h, value in self.energy.items()}
        found |= {f"reward_{h}": float(value.mean()) for h, value in self.reward.items()}
        return found | {"loops": float(self.depth.float().mean())}


class Places(NamedTuple):
    """Where predictions start: episode and row (W,), and the rows after it, ahead (W, H)."""

    episode: Tensor
    row: Tensor
    ahead: Tensor


@contextmanager
def exit_rule(world: WorldModel, rule: ExitRule | None) -> Iterator[None]:
    """Use another exit rule inside the `with`; None, and a core without loops, keep their own."""
    core = world.core
    if rule is None or not isinstance(core, LoopedCore):
        yield
        return
    before, core.rule = core.rule, rule
    try:
        yield
    finally:
        core.rule = before


def context_of(episodes: Episodes) -> int:
    """Rows that are seen before a prediction."""
    return min(CONTEXT, int(episodes.length.max()) // 2)


def usable_horizons(episodes: Episodes, horizons: Sequence[int]) -> list[int]:
    """Those for which the longest episode is long enough."""
    return sorted({h for h in horizons if context_of(episodes) + h <= int(episodes.length.max())})


def choose_places(episodes: Episodes, horizon: int, windows: int, seed: int = 0) -> Places:
    """`windows` places drawn from `seed`, the same for every model; all of them again and again where they are fewer.

    Raises ValueError when episodes are too short.
    """
    context = context_of(episodes)
    places = [
        (episode, row)
        for episode, length in enumerate(episodes.length.tolist())
        for row in range(context - 1, length - horizon)
    ]
    if not places:
        raise ValueError(f"no held-out episode has {context + horizon} rows")
    rng, rounds = np.random.default_rng(seed), [np.arange(len(places))] * (windows // len(places))
    chosen = np.concatenate([*rounds, rng.choice(len(places), windows % len(places), replace=False)])
    device = episodes.reward.device
    episode, row = torch.tensor([places[i] for i in chosen], device=device).unbind(1)
    return Places(episode, row, row[:, None] + torch.arange(1, horizon + 1, device=device))


@torch.no_grad()
def open_loop(
    world: WorldModel,
    episodes: Episodes,
    horizons: Sequence[int],
    windows: int,
    seed: int = 0,
    max_loops: int | None = None,
    watched: LatentState | None = None,
    yardstick: Yardstick | None = None,
) -> OpenLoop:
    """Watch whole episodes, and from `windows` places in them predict on from the actions alone.

    Latents are the most probable ones while watching and sampled while predicting, as in dreams; depth is by the
    world model's exit rule in both. watched and yardstick: states of `watch` and variances, if known. Raises
    ValueError when no episode is long enough for the longest horizon.
    """
    longest = max(horizons)
    episode, row, ahead = choose_places(episodes, longest, windows, seed)
    actions = episodes.prev_action[episode[:, None], ahead]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        states = watch(world, episodes, max_loops)[0] if watched is None else watched
        start = states.map(lambda leaf: leaf[episode, row].repeat_interleave(SAMPLES, 0))
        dream = world.imagine(start, actions.repeat_interleave(SAMPLES, 0), longest, max_loops=max_loops)
    yardstick = yardstick or Yardstick.of(world.observation_model, [episodes])
    wrong, energy = {}, {}
    for h in horizons:
        truth = truth_at(world.observation_model, episodes, episode, ahead[:, h - 1])
        wrong[h], energy[h] = yardstick.judge(world.observation_model, dream.feat[h], SAMPLES, truth)
    reward = dream.rewards.unflatten(0, (windows, SAMPLES)).mean(1)
    missed = (reward - episodes.reward[episode[:, None], ahead]).abs()
    return OpenLoop(wrong, energy, {h: missed[:, h - 1] for h in horizons}, dream.loops.depth)


def watch_rows(world: WorldModel, rows: Rows, device: torch.device | str) -> LatentState:
    """Whole episodes, (L, ...) rows one after the other -> the states (L, ...) of an agent that sees them.

    A few episodes at a time, as many as fit into WATCHED bytes when they are padded.
    """
    starts = [*np.flatnonzero(rows["is_first"]), len(rows["is_first"])]
    longest = max(np.diff(starts))
    seen = sum(value[0].nbytes for name, value in rows.items() if name.startswith("obs/"))
    step = max(1, int(WATCHED // (longest * max(1, seen))))
    parts = []
    for first in range(0, len(starts) - 1, step):
        begin, end = starts[first], starts[min(first + step, len(starts) - 1)]
        episodes = pad_episodes({name: value[begin:end] for name, value in rows.items()}).to(device)
        real = torch.arange(episodes.reward.shape[1], device=episodes.reward.device) < episodes.length[:, None]
        parts.append([leaf[real] for leaf in watch(world, episodes)[0]])
    return LatentState(*(torch.cat(leaves) for leaves in zip(*parts, strict=True)))


@torch.no_grad()
def watch(world: WorldModel, episodes: Episodes, max_loops: int | None = None) -> tuple[LatentState, Tensor]:
    """States (E, T, ...) and loops (E, T) of an agent that sees the episodes from their beginning."""
    count, length = episodes.reward.shape
    state = world.initial(count)
    states, depths = [], []
    for row in range(length):
        obs = {name: value[:, row] for name, value in episodes.obs.items()}
        first = torch.full((count,), row == 0, device=episodes.reward.device)
        state, stats = world.observe(obs, episodes.prev_action[:, row], first, state, False, max_loops)
        states.append(state)
        depths.append(stats.depth)
    return LatentState(*(torch.stack(leaves, 1) for leaves in zip(*states, strict=True))), torch.stack(depths, 1)
