"""What states know of the true one: a linear read-out, which serves models with and without a decoder alike.

Ridge regression from the features of posterior states to the true state: the vector that is observed, or that the same
task of dm_control shows without images. It is fitted on one half of the recorded episodes and judged on the other, at
posterior states, and at dreams of them, which are given the recorded actions alone. R^2 is the share of the variance
that is explained, of each number that varies; the mean over them is reported.

Symbols: E episodes, T rows, L rows of all together, F features, P numbers of the true state, H steps ahead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agent.errors import UsageError
from agent.evaluation.open_loop import SAMPLES, choose_windows, context_rows, posterior_states
from agent.evaluation.recording import Recording
from agent.evaluation.tables import save_tables
from world_model import LatentState, WorldModel

RIDGE = 1e-3
"""Weight of the squared coefficients, relative to the mean variance of the features."""
STEPS = (1, 5, 15, 50)
WINDOWS = 256


class Probe(NamedTuple):
    """truth: what is read out; numbers: how many of it vary. r2: mean over these at posterior states, of deter and
    stoch, and of deter alone; ahead {H: r2 after H imagined steps}; entries (P,): r2 of each, None for a constant.
    """

    truth: str
    numbers: int
    r2: float
    r2_deter: float
    ahead: dict[int, float]
    entries: list[float | None]

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON, which has no NaN: None."""
        known = {h: value if math.isfinite(value) else None for h, value in self.ahead.items()}
        return {**self._asdict(), "ahead": known}


class Readout:
    """A linear map with intercept, by ridge regression of y (L, P) on x (L, F)."""

    def __init__(self, x: Tensor, y: Tensor):
        x, y = x.double(), y.double()
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        centred = x - self.x_mean
        gram = centred.t() @ centred
        ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
        gram.diagonal().add_(ridge)
        self.weight = torch.linalg.solve(gram, centred.t() @ (y - self.y_mean))

    def __call__(self, x: Tensor) -> Tensor:
        return (x.double() - self.x_mean) @ self.weight + self.y_mean


def r_squared(prediction: Tensor, y: Tensor) -> Tensor:
    """(L, P) twice -> (P,) share of the variance explained; NaN for what hardly varies."""
    variance = (y - y.mean(0)).square().mean(0)
    found = 1.0 - (prediction - y).square().mean(0) / variance.clamp(min=1e-300)
    return torch.where(variance > 1e-6 * variance.max(), found, torch.nan)


def true_state(world: WorldModel, recording: Recording) -> tuple[str, Tensor]:
    """What is called so, and its numbers (E, T, P). Raises UsageError where nothing but images is known."""
    if recording.hidden is not None:
        return "the vector that images show", recording.hidden
    vectors = [recording.episodes.obs[name] for name in world.observation_model.vectors]
    if not vectors:
        raise UsageError("images are all that is seen, and no true state is told: give a run of dmc: or of vectors")
    return "the observed vector", torch.cat(vectors, -1)


@torch.no_grad()
def probe_states(world: WorldModel, recording: Recording, steps: Sequence[int] = STEPS, seed: int = 0) -> Probe:
    """Fit and judge. Raises UsageError where there are too few episodes, or they are too short."""
    episodes = recording.episodes
    count, length = episodes.reward.shape
    name, truth = true_state(world, recording)
    if count < 2:
        raise UsageError("a read-out is fitted on half of the episodes and judged on the others: record at least two")
    steps = [h for h in steps if context_rows(episodes) + h <= int(episodes.length.max())]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        states, _ = posterior_states(world, episodes)
        device = episodes.length.device
        real = torch.arange(length, device=device) < episodes.length[:, None]  # (E, T)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)
        half = torch.zeros(count, dtype=torch.bool, device=device)
        half[order[: count // 2]] = True
        fitted, judged = half[:, None] & real, ~half[:, None] & real
        feat, deter = states.feat(), states.deter.flatten(-2)
        both, alone = Readout(feat[fitted], truth[fitted]), Readout(deter[fitted], truth[fitted])
        entries = r_squared(both(feat[judged]), truth[judged].double())
        of_deter = r_squared(alone(deter[judged]), truth[judged].double())
        others = (~half).nonzero().squeeze(1)
        ahead = {h: dreamed(world, recording, states, both, truth, others, h, seed) for h in steps}
    if not entries.isfinite().any():
        raise UsageError("the true state never changes in these episodes: give another --seed, or another run")
    varied = int(entries.isfinite().sum())
    plain = [value if math.isfinite(value) else None for value in entries.tolist()]
    return Probe(name, varied, float(entries.nanmean()), float(of_deter.nanmean()), ahead, plain)


def dreamed(
    world: WorldModel, recording: Recording, states: LatentState, readout: Readout, truth: Tensor, chosen: Tensor,
    steps: int, seed: int,
) -> float:  # fmt: skip
    """Mean R^2 of the read-out after `steps` imagined steps, from rows of the `chosen` episodes."""
    every = recording.episodes
    episodes = every._replace(
        obs={name: value[chosen] for name, value in every.obs.items()}, prev_action=every.prev_action[chosen],
        reward=every.reward[chosen], length=every.length[chosen],
    )  # fmt: skip
    if int(episodes.length.max()) < context_rows(episodes) + steps:
        return float("nan")
    episode, row, ahead = choose_windows(episodes, steps, WINDOWS, seed)
    start = states.map(lambda leaf: leaf[chosen][episode, row].repeat_interleave(SAMPLES, 0))
    actions = episodes.prev_action[episode[:, None], ahead].repeat_interleave(SAMPLES, 0)
    feat = world.imagine(start, actions, steps).feat[-1].unflatten(0, (-1, SAMPLES)).mean(1)  # (W, F)
    return float(r_squared(readout(feat), truth[chosen][episode, ahead[:, -1]].double()).nanmean())


def format_probe(found: Probe) -> str:
    """Lines for the terminal."""
    lines = [
        f"{found.numbers} numbers of the true state ({found.truth}), read out linearly, share of variance explained",
        f"posterior states  {found.r2:.4f}   deter alone  {found.r2_deter:.4f}",
    ]
    if found.ahead:
        lines.append("dreams            " + "   ".join(f"{value:.4f} after {h}" for h, value in found.ahead.items()))
    return "\n".join(lines)


def save_probe(found: Probe, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write probe.json. Raises UsageError when it cannot be written."""
    save_tables(folder, "probe", {**metadata, **found.plain()}, {})
