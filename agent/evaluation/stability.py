"""How stable a world model is, and how faithful: bounds beside attacks, and long dreams beside the simulator.

The number of loops is fixed, as a bound of a step holds for two states that loop equally often.

Symbols: E episodes, T rows, W dreams, H steps, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agent.data.dataset import Episodes
from agent.errors import UsageError
from agent.evaluation.normalised_error import NormalisedError
from agent.evaluation.open_loop import choose_windows, context_rows, exit_rule, posterior_states
from agent.evaluation.plots import new_figure
from agent.evaluation.recording import Recording
from agent.evaluation.rollout_error import recorded_rewards, start_states, step_errors
from agent.evaluation.tables import Row, save_tables
from agent.learning.actor_critic import ActorCritic
from world_model import Batch, ExitRule, LatentState, LoopedCore, WorldModel, certificate
from world_model.attack import expansion, loop_map, step_map, visited_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 512
"""Most rows of an episode from which the points of attacks are drawn."""
NEAR = 0.01
"""Distance of the neighbouring start of a dream, relative to the norm of the state."""


@dataclass(frozen=True)
class StabilityReport:
    """bounds: one row for each map, what is certified beside what was visited and attacked; dreams: one row for each
    step, norm and distance of dreams; errors: one row for each step, as of `step_errors`; loops: their fixed number."""

    loops: int
    bounds: list[Row]
    dreams: list[Row]
    errors: list[Row]

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON, which has no infinite numbers: they are None."""
        content = asdict(self)
        for rows in (content["bounds"], content["dreams"], content["errors"]):
            for row in rows:
                row.update({k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)})
        return content


def batch_of(episodes: Episodes, rows: int = ROWS) -> Batch:
    """The first rows of recorded episodes, as a training batch."""
    length = min(rows, int(episodes.length.min()))
    obs = {name: value[:, :length] for name, value in episodes.obs.items()}
    reward = episodes.reward[:, :length]
    off = torch.zeros_like(reward, dtype=torch.bool)
    first = off.clone()
    first[:, 0] = True
    return Batch(obs, episodes.prev_action[:, :length], reward, first, off, off)


def stability_report(
    world: WorldModel, behavior: ActorCritic, recording: Recording, loops: int, *, points: int = 256,
    attack_steps: int = 200, steps: int = 1000, dreams: int = 16, seed: int = 0,
) -> StabilityReport:  # fmt: skip
    """Bounds and attacks, `steps` dreamed steps, and the errors of dreams over half of a recorded episode.

    Raises UsageError where the core has no loops, or the episodes are too short.
    """
    if not isinstance(world.core, LoopedCore):
        raise UsageError(f"the core {world.cfg.core} has no loops: give a run of a core that has")
    episodes = recording.episodes
    # Dreams of half an episode may start anywhere in the other half; longer ones would all start at its beginning.
    horizon = min(steps, (int(episodes.length.max()) - context_rows(episodes)) // 2)
    if horizon < 1:
        raise UsageError("the recorded episodes are too short for a prediction, which needs three rows or more")
    with torch.random.fork_rng(), exit_rule(world, ExitRule()):
        torch.manual_seed(seed)
        bounds = attacked_bounds(world, batch_of(episodes), loops, points, attack_steps)
        windows = choose_windows(episodes, horizon, dreams, seed)
        states, _ = posterior_states(world, episodes, loops)
        start = start_states(states, windows, dreams)
        long = long_dreams(world, behavior, start, steps, loops)
        metric = NormalisedError.fit(world.observation_model, [episodes])
        mean_reward = float(recorded_rewards(recording).mean())
        with torch.no_grad():
            errors = step_errors(world, recording, states, windows, metric, mean_reward, loops)
    real = torch.arange(episodes.reward.shape[1]) < episodes.length[:, None]  # (E, T): no padding
    dreamed = max(row["channel"] for row in long)
    bounds.append({
        "map": "largest |deter|; in dreams", "certificate": certificate(world.core).box,
        "visited": float(states.deter[real].abs().max()), "worst": None, "attacked": dreamed,
    })  # fmt: skip
    return StabilityReport(loops, bounds, long, errors)


def attacked_bounds(world: WorldModel, batch: Batch, loops: int, points: int, steps: int) -> list[Row]:
    """One row for the loop and one for the environment step: certificate, largest singular value at visited points
    (median and worst), and the largest expansion that a search from there finds."""
    core, bound = world.core, certificate(world.core)
    assert isinstance(core, LoopedCore)
    of_loop, of_step = visited_points(world, batch, loops, points)
    rows = []
    for name, certified, f, where in (
        ("one loop", bound.loop, loop_map(core), of_loop),
        (f"environment step, {loops} loops", bound.step, step_map(core, loops), of_step),
    ):
        found = expansion(f, where, steps)
        rows.append({
            "map": name, "certificate": certified, "visited": float(found.visited.median()),
            "worst": float(found.visited.max()), "attacked": float(found.attacked.max()),
        })  # fmt: skip
    return rows


@torch.no_grad()
def long_dreams(world: WorldModel, behavior: ActorCritic, start: LatentState, steps: int, loops: int) -> list[Row]:
    """Norm along dreams of the policy (W, ...), and their distance to neighbours that are given the same actions and
    latents, relative to the distance at the start."""
    prepared, state, near = world.core.prepare(), start, neighbours(start.deter)
    first = distance(start.deter, near)  # (W,)
    rows = []
    for step in range(steps + 1):
        norm, apart = state.deter.flatten(1).norm(dim=1), distance(state.deter, near) / first
        rows.append({
            "step": step, "norm": float(norm.mean()), "largest": float(norm.max()),
            "channel": float(state.deter.abs().max()), "distance": float(apart.median()),
            "farthest": float(apart.max()),
        })  # fmt: skip
        action = behavior.actor.act(state.feat())
        near = world.dream_step(LatentState(near, state.stoch), action, prepared, loops)[0].deter
        state, _ = world.dream_step(state, action, prepared, loops)
    return rows


def neighbours(deter: Tensor) -> Tensor:
    """(W, N, D) -> states at a distance of NEAR times the norm, in a random direction."""
    direction = torch.randn_like(deter)
    size = NEAR * deter.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
    return deter + size[:, None, None] * direction


def distance(one: Tensor, other: Tensor) -> Tensor:
    """(W, N, D) twice -> (W,)"""
    return (one - other).flatten(1).norm(dim=1)


# ---------------------------------------------------------------------- results


def format_stability(report: StabilityReport) -> str:
    """The tables for the terminal."""
    lines = [f"{'':28s} {'certificate':>12s} {'visited':>9s} {'worst':>9s} {'attacked':>9s}"]
    for row in report.bounds:
        values = [row[name] for name in ("visited", "worst", "attacked")]
        shown = [f"{'':9s}" if value is None else f"{value:9.4g}" for value in values]
        bound = f"{row['certificate']:.4g}" if math.isfinite(row["certificate"]) else "none"
        lines.append(f"{row['map']:28s} {bound:>12s} {' '.join(shown)}")
    last = report.dreams[-1]
    lines.append(
        f"norm of the state: {report.dreams[0]['norm']:.3g} at the start, {last['norm']:.3g} after {last['step']} "
        f"dreamed steps, largest {max(row['largest'] for row in report.dreams):.3g}"
    )
    shown_steps = [row for row in report.dreams if row["step"] in (1, 10, 100, 1000)]
    apart = ", ".join(f"{row['distance']:.2g} (farthest {row['farthest']:.2g}) at {row['step']}" for row in shown_steps)
    lines.append(f"distance of neighbouring dreams, over that of their starts: {apart}")
    errors = [row for row in report.errors if row["step"] in (1, 5, 15, 50, 150, 400)]
    wrong = ", ".join(f"{row['observation']:.3g} at {row['step']}" for row in errors)
    lines.append(f"observation error against the simulator, 1 = as good as the mean: {wrong}")
    return "\n".join(lines)


def save_stability(report: StabilityReport, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write bounds.csv, dreams.csv, errors.csv, stability.json and stability.png. Raises UsageError when they cannot be
    written."""
    tables = {"bounds": report.bounds, "dreams": report.dreams, "errors": report.errors}
    save_tables(folder, "stability", {**metadata, **report.plain()}, tables, draw_stability(report))


def draw_stability(report: StabilityReport) -> Figure:
    """Norm, distance of neighbours and error, by dreamed step."""
    figure, axes = new_figure(12.0, 3.6, 1, 3)
    norms, apart, wrong = axes[0]
    steps = [row["step"] for row in report.dreams]
    norms.plot(steps, [row["norm"] for row in report.dreams], label="mean")
    norms.plot(steps, [row["largest"] for row in report.dreams], linewidth=0.7, label="largest")
    norms.set(title="stable: norm of the state", xlabel="dreamed steps", ylim=(0, None))
    apart.plot(steps, [max(row["distance"], 1e-16) for row in report.dreams], label="median")
    apart.plot(steps, [max(row["farthest"], 1e-16) for row in report.dreams], linewidth=0.7, label="farthest")
    apart.set(title="distance of neighbouring dreams / at the start", xlabel="dreamed steps", yscale="log")
    ahead = [row["step"] for row in report.errors]
    wrong.plot(ahead, [row["observation"] for row in report.errors], label="dream")
    wrong.plot(ahead, [row["copy"] for row in report.errors], "--", color="0.45", label="last state")
    wrong.plot(ahead, [row["mean"] for row in report.errors], ":", color="0.65", label="mean")
    wrong.set(title="faithful: squared error / variance", xlabel="dreamed steps", ylim=(0, None))
    for axis in axes[0]:
        axis.legend(frameon=False, fontsize=8)
    return figure
