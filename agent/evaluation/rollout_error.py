"""Open-loop errors of dreams against recorded episodes, by imagination step and number of loops.

Every error stands beside those of two predictors without dynamics: the last observation repeated, and the mean of the
recorded rows. A dream can be stable and still wrong, so the norm of the state is reported beside the errors.

Symbols: E episodes, T rows, W windows, Q = SAMPLES dreams per window, H horizon, N latent tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.errors import UsageError
from agent.evaluation.normalised_error import NormalisedError, targets_at
from agent.evaluation.open_loop import SAMPLES, Windows, choose_windows, context_rows, exit_rule, posterior_states
from agent.evaluation.recording import Recording
from agent.evaluation.tables import Row, save_tables
from agent.learning.actor_critic import ActorCritic, lambda_return
from world_model import ExitRule, LatentState, WorldModel

NORM_STEPS = 1000
"""Steps of the dreams along which the norm of the state is measured."""
NORM_DREAMS = 16
"""Number of these dreams."""
MAX_DREAM_ROWS = 25_600
"""Windows times steps that are held in memory at once."""
VALUE_STEPS = (0, 1, 2, 5, 10, 15, 30)
"""Imagined steps after which the return that a dream predicts is compared with the return of the episode."""
NAIVE = {"copy": "last state", "mean": "mean"}
"""Predictors without dynamics: name of their column, and how the table calls them."""

@dataclass
class RolloutErrors:
    """The tables: errors by policy, loops and imagination step; values by imagined step; norms by loops and step.

    crossings: see `crossings`; notes: lines for the reader.
    """

    crossings: list[Row] = field(default_factory=list)
    errors: list[Row] = field(default_factory=list)
    values: list[Row] = field(default_factory=list)
    norms: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def curve(self, policy: str, loops: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and the named column of `errors`."""
        rows = [row for row in self.errors if row["policy"] == policy and row["loops"] == loops]
        return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows])

    def to_dict(self) -> dict[str, Any]:
        """All tables as plain values, for JSON, which has no infinite numbers: they are None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(part) for name, part in value.items()}
            if isinstance(value, list):
                return [plain(part) for part in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}


def recorded_rewards(recording: Recording) -> Tensor:
    """(L,) all rewards of the recorded rows, without padding."""
    episodes = recording.episodes
    return episodes.reward[torch.arange(episodes.reward.shape[1]) < episodes.length[:, None]]


def longest_horizon(recordings: Sequence[Recording]) -> int:
    """The most steps for which each recording has a long enough episode."""
    all_episodes = [recording.episodes for recording in recordings]
    return min(int(episodes.length.max()) - context_rows(episodes) for episodes in all_episodes)


@torch.no_grad()
def rollout_errors(
    world: WorldModel,
    behavior: ActorCritic,
    recordings: Sequence[Recording],
    horizon: int,
    loops: Sequence[int] = (),
    windows: int = 128,
    seed: int = 0,
) -> RolloutErrors:
    """Predict from `windows` rows of each recording, with the exit rule and with each fixed number of loops.

    All predictions start from the same posterior states, inferred with the exit rule. Raises UsageError when no
    episode is long enough for any prediction, or no number of the observations ever changes.
    """
    results = RolloutErrors()
    metric = NormalisedError.fit(world.observation_model, [recording.episodes for recording in recordings])
    mean_reward = float(torch.cat([recorded_rewards(recording) for recording in recordings]).mean())
    usable = longest_horizon(recordings)
    if usable < 1:
        raise UsageError("the recorded episodes are too short to predict anything: a prediction needs two rows or more")
    if not metric.varies.any():
        raise UsageError("the recorded observations never change, so there is nothing to predict")
    if horizon > usable:
        results.notes.append(f"the episodes are long enough for {usable} steps, not for {horizon}")
        horizon = usable
    if windows > MAX_DREAM_ROWS // horizon:
        windows = max(1, MAX_DREAM_ROWS // horizon)
        results.notes.append(f"{windows} windows of each recording, so that {horizon} steps of each fit into memory")
    with torch.random.fork_rng():
        for recording in recordings:
            torch.manual_seed(seed)
            chosen = choose_windows(recording.episodes, horizon, windows, seed)
            states, _ = posterior_states(world, recording.episodes)
            for max_loops in (None, *loops):
                with exit_rule(world, None if max_loops is None else ExitRule()):
                    results.errors += step_errors(world, recording, states, chosen, metric, mean_reward, max_loops)
            if recording.policy == "agent":
                results.values = value_errors(world, behavior, recording, states, chosen)
                if behavior.cfg.plans:
                    results.notes.append("values are of the actor, and the recorded episodes were planned")
                start = start_states(states, chosen, NORM_DREAMS)
                for max_loops in (None, *loops):
                    with exit_rule(world, None if max_loops is None else ExitRule()):
                        results.norms += state_norms(world, behavior, start, max_loops)
    results.crossings = crossings(results.errors)
    results.notes += not_finite_notes(results)
    return results


def not_finite_notes(results: RolloutErrors) -> list[str]:
    """A line for each policy and number of loops whose predictions are not finite, with the first such step."""
    first: dict[str, int] = {}
    for row in results.errors:
        if not all(math.isfinite(row[name]) for name in ("observation", "reward")):
            first.setdefault(f"{row['policy']}, {loops_in_words(row['loops'])}", row["step"])
    return [f"the predictions are not finite from step {step} on ({label})" for label, step in first.items()]


def start_states(states: LatentState, windows: Windows, most: int) -> LatentState:
    """(E, T, ...) -> (W, ...): the states in which the predictions of the first `most` windows start."""
    episode, row = windows.episode[:most], windows.row[:most]
    return states.map(lambda leaf: leaf[episode, row])


def loops_label(max_loops: int | None) -> str:
    """The column `loops` of a row: a number, or "exit" for the run's exit rule."""
    return "exit" if max_loops is None else str(max_loops)


# ---------------------------------------------------------------------- errors


def step_errors(
    world: WorldModel, recording: Recording, states: LatentState, windows: Windows, metric: NormalisedError,
    mean_reward: float, max_loops: int | None,
) -> list[Row]:  # fmt: skip
    """Errors by imagination step of dreams with the recorded actions."""
    episode, row, ahead = windows
    count, horizon = ahead.shape
    # (E, T, ...) -> (W * Q, ...)
    start = states.map(lambda leaf: leaf[episode, row].repeat_interleave(SAMPLES, 0))
    actions = recording.episodes.prev_action[episode[:, None], ahead].repeat_interleave(SAMPLES, 0)
    dream = world.imagine(start, actions, horizon, max_loops=max_loops)
    episodes, observation_model = recording.episodes, world.observation_model
    last, rewards = targets_at(observation_model, episodes, episode, row), episodes.reward
    by_step = []
    for k in range(horizon):  # one step at a time, because images of all steps would fill the memory
        targets = targets_at(observation_model, episodes, episode, ahead[:, k])
        error, _ = metric.score(observation_model, dream.feat[k + 1], SAMPLES, targets)
        by_step.append(torch.stack([error, metric.error(last, targets), metric.error(metric.mean, targets)]))
    # H tensors (3, W) -> 3 of (W, H)
    observation, copy, mean = torch.stack(by_step, -1)
    # (W * Q, H) -> (W, H)
    reward, target_reward = dream.rewards.unflatten(0, (count, SAMPLES)).mean(1), rewards[episode[:, None], ahead]
    # (W * Q, H + 1, N, D) -> (W, Q, H, N * D)
    deter = dream.states.deter[:, 1:].flatten(2).unflatten(0, (count, SAMPLES))
    posterior = states.deter[episode[:, None], ahead].flatten(2)
    columns = {
        "observation": observation,
        "copy": copy,
        "mean": mean,
        "reward": (reward - target_reward).abs(),
        "reward_copy": (rewards[episode, row][:, None] - target_reward).abs(),
        "reward_mean": (mean_reward - target_reward).abs(),
        "drift": (deter - posterior[:, None]).norm(dim=-1).mean(1) / posterior.norm(dim=-1),
        "norm": deter.norm(dim=-1).mean(1),
        "depth": dream.loops.depth.float().unflatten(0, (count, SAMPLES)).mean(1),
    }
    means = {name: value.mean(0).tolist() for name, value in columns.items()}
    label = {"policy": recording.policy, "loops": loops_label(max_loops)}
    return [{**label, "step": k + 1} | {name: value[k] for name, value in means.items()} for k in range(horizon)]


def crossings(errors: Sequence[Row]) -> list[Row]:
    """For each policy and number of loops, the first step at which the model is no better than each naive predictor.

    None where it is better at every step measured. An error that is not finite is no better than anything.
    """
    lines = []
    for policy, loops in dict.fromkeys((row["policy"], row["loops"]) for row in errors):
        rows = [row for row in errors if row["policy"] == policy and row["loops"] == loops]
        line: Row = {"policy": policy, "loops": loops, "steps": len(rows)}
        for name in ("observation", "reward"):
            for predictor in NAIVE:
                column = predictor if name == "observation" else f"reward_{predictor}"
                no_better = [row["step"] for row in rows if not row[name] < row[column]]  # NaN too
                line[f"{name}_{predictor}"] = no_better[0] if no_better else None
        lines.append(line)
    return lines


def value_errors(
    world: WorldModel, behavior: ActorCritic, recording: Recording, states: LatentState, windows: Windows
) -> list[Row]:
    """The return predicted by dreams of k steps and the critic at their end, against the return of the episode.

    Dreams follow the mean action, held as in the recording. After a truncated episode stands the critic's value.
    """
    episode, row, ahead = windows
    gamma = behavior.cfg.gamma
    horizon = min(ahead.shape[1], max(VALUE_STEPS))
    start = states.map(lambda leaf: leaf[episode, row].repeat_interleave(SAMPLES, 0))
    taken = recording.episodes.prev_action[episode, row].repeat_interleave(SAMPLES, 0)
    dream = world.imagine(start, mean_actions(behavior, taken, row.repeat_interleave(SAMPLES, 0)), horizon)
    # (H + 1, W * Q) -> (W * Q, H + 1)
    value = behavior.critic.value(dream.feat).t()
    realised = realised_return(behavior, recording, states)[episode, row]
    rows = []
    for k in (step for step in VALUE_STEPS if step <= horizon):
        imagined = value[:, 0]
        if k:
            cut = dream.rewards[:, :k], dream.continues[:, :k], value[:, : k + 1]
            imagined = lambda_return(*cut, gamma, 1.0)[:, 0]
        imagined = imagined.view(-1, SAMPLES).mean(1)  # (W * Q,) -> (W,)
        both = torch.stack([imagined, realised])
        varies = bool((both.std(1) > 0).all())
        rows.append({
            "step": k, "imagined": float(imagined.mean()), "realised": float(realised.mean()),
            "bias": float((imagined - realised).mean()), "error": float((imagined - realised).abs().mean()),
            "correlation": float(torch.corrcoef(both)[0, 1]) if varies else None,
        })  # fmt: skip
    return rows


def mean_actions(behavior: ActorCritic, taken: Tensor, row: Tensor) -> Callable[[Tensor], Tensor]:
    """The policy of a recording from rows (B,) of its episodes on, at which the last actions were `taken` (B, A): the
    actor decides at every `behavior.jump`-th row."""
    held, at, jump = taken, row, behavior.cfg.jump

    def act(feat: Tensor) -> Tensor:
        nonlocal held, at
        held = torch.where((at % jump == 0)[:, None], behavior.actor.act(feat, sample=False), held)
        at = at + 1
        return held

    return act


def realised_return(behavior: ActorCritic, recording: Recording, states: LatentState) -> Tensor:
    """(E, T) discounted return from each row to the end of its episode."""
    reward, length = recording.episodes.reward, recording.episodes.length
    gamma, rows = behavior.cfg.gamma, torch.arange(len(reward))
    end = behavior.critic.value(states.map(lambda leaf: leaf[rows, length - 1]).feat())
    returns = torch.zeros_like(reward)
    returns[rows, length - 1] = end * ~recording.terminal
    for t in range(reward.shape[1] - 2, -1, -1):
        ahead = reward[:, t + 1] + gamma * returns[:, t + 1]
        returns[:, t] += ahead * (t < length - 1)
    return returns


def state_norms(world: WorldModel, behavior: ActorCritic, start: LatentState, max_loops: int | None) -> list[Row]:
    """Mean and largest norm of the deterministic state along dreams of NORM_STEPS steps."""
    dream = world.imagine(start, lambda feat: behavior.actor.act(feat), NORM_STEPS, max_loops=max_loops)
    norm = dream.states.deter.flatten(2).norm(dim=-1)  # (W, H + 1)
    kept = [k for k in range(NORM_STEPS + 1) if k < 20 or k % 10 == 0]
    label = loops_label(max_loops)
    return [
        {"loops": label, "step": k, "mean": float(norm[:, k].mean()), "largest": float(norm[:, k].max())} for k in kept
    ]


# ---------------------------------------------------------------------- results


def loops_in_words(loops: str) -> str:
    """How the column `loops` of a row is shown."""
    return {"exit": "with exits", "1": "1 loop"}.get(loops, f"{loops} loops")


def save_results(results: RolloutErrors, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write errors.csv, values.csv, norms.csv and model.json. Raises UsageError when they cannot be written."""
    tables = {"errors": results.errors, "values": results.values, "norms": results.norms}
    save_tables(folder, "model", {**metadata, **results.to_dict()}, tables)


def format_results(results: RolloutErrors) -> str:
    """The table for the terminal: errors after a few steps, value of dreams, norm of the state."""
    lines, policies = [f"note: {note}" for note in results.notes], list[str]()
    last = max(row["step"] for row in results.errors)
    shown = [k for k in (1, 5, 15, 50, 150) if k <= last]
    shown += [last] * (last not in shown)
    steps = ", ".join(f"{k}" for k in shown)
    lines.append(f"observation error, over the variance of all recorded rows, after {steps} steps")
    for crossing in results.crossings:
        policy, loops = crossing["policy"], crossing["loops"]
        rows = {row["step"]: row for row in results.errors if (row["policy"], row["loops"]) == (policy, loops)}
        if policy not in policies:
            policies.append(policy)
            for predictor, words in NAIVE.items():
                lines.append(f"  {policy:6s} {words:10s}  " + "  ".join(f"{rows[k][predictor]:7.4f}" for k in shown))
        numbers = "  ".join(f"{rows[k]['observation']:7.4f}" for k in shown)
        limits = [
            f"no better than the {words} from step {crossing[f'observation_{predictor}']} on"
            for predictor, words in NAIVE.items()
            if crossing[f"observation_{predictor}"]
        ]
        verdict = ", ".join(limits) or f"better than both to step {last}"
        lines.append(f"  {policy:6s} {loops_in_words(loops):10s}  {numbers}   {verdict}")
    if results.values:
        row = results.values[-1]
        lines.append(
            f"value of a dream of {row['step']} steps {row['imagined']:.4g}, realised {row['realised']:.4g} "
            f"(mean error {row['error']:.3g})"
        )
    for loops in dict.fromkeys(row["loops"] for row in results.norms):
        norms = {row["step"]: row for row in results.norms if row["loops"] == loops}
        start, end, largest = norms[0]["mean"], norms[NORM_STEPS]["mean"], max(row["largest"] for row in norms.values())
        lines.append(
            f"norm of the state, {loops_in_words(loops)}: {start:.3g} at the start, {end:.3g} after {NORM_STEPS} "
            f"steps, largest {largest:.3g}"
        )
    return "\n".join(lines)
