"""How far a dream can be trusted: open-loop prediction against recorded episodes, by imagination step and loops.

Every measure stands beside two predictors that know nothing of dynamics: the last state seen, and the mean of the
recorded rows. Stable is not faithful, so the size of the state is reported beside the errors.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.errors import UsageError
from agent.evaluation.normalised_error import Yardstick, truth_at
from agent.evaluation.open_loop import SAMPLES, Places, choose_places, context_of, exit_rule, watch
from agent.evaluation.recording import Recording
from agent.learning.actor_critic import ActorCritic, lambda_return
from world_model import ExitRule, LatentState, WorldModel

LONG = 1000
"""Steps over which the size of the state is watched."""
MOST_ROWS = 25_600
"""Predictions times steps that are held in memory at once."""
VALUE_STEPS = (0, 1, 2, 5, 10, 15, 30)
RIVALS = {"copy": "last state", "mean": "mean"}
"""Predictors that know nothing of dynamics."""


@dataclass
class RolloutErrors:
    """errors: one row per policy, loops and imagination step; values: per imagined step; norms: per loops and step."""

    errors: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    norms: list[dict[str, Any]] = field(default_factory=list)
    crossings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def curve(self, policy: str, loops: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and the named column of `errors`."""
        rows = [row for row in self.errors if row["policy"] == policy and row["loops"] == loops]
        return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows])


def rewards_of(recording: Recording) -> Tensor:
    """All rewards of the recorded rows."""
    episodes = recording.episodes
    return episodes.reward[torch.arange(episodes.reward.shape[1]) < episodes.length[:, None]]


def longest_horizon(recordings: Sequence[Recording]) -> int:
    """The most steps that every recording has an episode for."""
    return min(int(each.episodes.length.max()) - context_of(each.episodes) for each in recordings)


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
    """Predict on from `windows` places of each recording, with the exit rule and with each fixed number of loops.

    All predictions start from the same states, watched with the exit rule. Raises ValueError when no episode is
    long enough for any prediction.
    """
    found, yardstick = RolloutErrors(), Yardstick.of(world.observation_model, [each.episodes for each in recordings])
    mean_reward = float(torch.cat([rewards_of(each) for each in recordings]).mean())
    usable = longest_horizon(recordings)
    if usable < 1:
        raise ValueError("the recorded episodes are too short to predict anything")
    if horizon > usable:
        found.notes.append(f"the episodes are long enough for {usable} steps, not for {horizon}")
        horizon = usable
    if windows > MOST_ROWS // horizon:
        windows = max(1, MOST_ROWS // horizon)
        found.notes.append(f"{windows} places of each recording, so that {horizon} steps of them fit the memory")
    with torch.random.fork_rng():
        for recording in recordings:
            torch.manual_seed(seed)
            places = choose_places(recording.episodes, horizon, windows, seed)
            states, _ = watch(world, recording.episodes)
            for most in (None, *loops):
                with exit_rule(world, None if most is None else ExitRule()):
                    found.errors += measure(world, recording, states, places, yardstick, mean_reward, most)
            if recording.policy == "agent":
                found.values = values(world, behavior, recording, states, places)
                start = states_at(states, places, 16)
                for most in (None, *loops):
                    with exit_rule(world, None if most is None else ExitRule()):
                        found.norms += norms(world, behavior, start, most)
    found.crossings = crossings(found.errors)
    return found


def states_at(states: LatentState, places: Places, most: int) -> LatentState:
    """The states (W, ...) from which the first predictions start, at most so many."""
    episode, row = places.episode[:most], places.row[:most]
    return states.map(lambda leaf: leaf[episode, row])


def measure(
    world: WorldModel, recording: Recording, states: LatentState, places: Places, yardstick: Yardstick,
    mean_reward: float, max_loops: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Errors by step of dreams with the recorded actions."""
    episode, row, ahead = places
    windows, horizon = ahead.shape
    start = states.map(lambda leaf: leaf[episode, row].repeat_interleave(SAMPLES, 0))
    actions = recording.episodes.prev_action[episode[:, None], ahead].repeat_interleave(SAMPLES, 0)
    dream = world.imagine(start, actions, horizon, max_loops=max_loops)
    episodes, observation_model = recording.episodes, world.observation_model
    last, rewards = truth_at(observation_model, episodes, episode, row), episodes.reward
    real_reward, wrong = rewards[episode[:, None], ahead], []
    for k in range(horizon):  # step by step, because images of all steps would fill the memory
        real = truth_at(observation_model, episodes, episode, ahead[:, k])
        error, _ = yardstick.judge(observation_model, dream.feat[k + 1], SAMPLES, real)
        wrong.append(torch.stack([error, yardstick.error(last, real), yardstick.error(yardstick.mean, real)]))
    observation, copy, mean = torch.stack(wrong, -1)  # (W, H) each
    reward = dream.rewards.unflatten(0, (windows, SAMPLES)).mean(1)
    deter = dream.states.deter[:, 1:].flatten(2).unflatten(0, (windows, SAMPLES))  # (W, SAMPLES, H, N*D)
    posterior = states.deter[episode[:, None], ahead].flatten(2)
    drift = (deter - posterior[:, None]).norm(dim=-1).mean(1) / posterior.norm(dim=-1)
    columns = {
        "observation": observation,
        "copy": copy,
        "mean": mean,
        "reward": (reward - real_reward).abs(),
        "reward_copy": (rewards[episode, row][:, None] - real_reward).abs(),
        "reward_mean": (mean_reward - real_reward).abs(),
        "drift": drift,
        "norm": deter.norm(dim=-1).mean(1),
        "depth": dream.loops.depth.float().unflatten(0, (windows, SAMPLES)).mean(1),
    }
    means = {name: value.mean(0).tolist() for name, value in columns.items()}
    label = "exit" if max_loops is None else str(max_loops)
    return [
        {"policy": recording.policy, "loops": label, "step": k + 1} | {name: value[k] for name, value in means.items()}
        for k in range(horizon)
    ]


def crossings(errors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each policy and number of loops, the first step at which the model is no better than each predictor.

    None where it is better at every step measured.
    """
    found = []
    for policy, loops in dict.fromkeys((row["policy"], row["loops"]) for row in errors):
        rows = [row for row in errors if row["policy"] == policy and row["loops"] == loops]
        line: dict[str, Any] = {"policy": policy, "loops": loops, "steps": len(rows)}
        for name in ("observation", "reward"):
            for other in ("copy", "mean"):
                rival = other if name == "observation" else f"reward_{other}"
                late = [row["step"] for row in rows if row[name] >= row[rival]]
                line[f"{name}_{other}"] = late[0] if late else None
        found.append(line)
    return found


def values(
    world: WorldModel, behavior: ActorCritic, recording: Recording, states: LatentState, places: Places
) -> list[dict[str, Any]]:
    """Return that dreams of k steps promise (then the critic), against what the episode brought from there.

    Dreams follow the mean action, as the recording did. Behind an episode that was cut off stands the critic's value.
    """
    episode, row, ahead = places
    gamma = behavior.cfg.gamma
    horizon = min(ahead.shape[1], max(VALUE_STEPS))
    start = states.map(lambda leaf: leaf[episode, row].repeat_interleave(SAMPLES, 0))
    dream = world.imagine(start, lambda feat: behavior.actor.act(feat, sample=False), horizon)
    value = behavior.critic.value(dream.feat).t()  # (W * SAMPLES, H+1)
    realised = realised_return(behavior, recording, states)[episode, row]
    found = []
    for k in (step for step in VALUE_STEPS if step <= horizon):
        promised = value[:, 0]
        if k:
            cut = dream.rewards[:, :k], dream.continues[:, :k], value[:, : k + 1]
            promised = lambda_return(*cut, gamma, 1.0)[:, 0]
        promised = promised.view(-1, SAMPLES).mean(1)
        both = torch.stack([promised, realised])
        varies = bool((both.std(1) > 0).all())
        found.append({
            "step": k, "imagined": float(promised.mean()), "realised": float(realised.mean()),
            "bias": float((promised - realised).mean()), "error": float((promised - realised).abs().mean()),
            "correlation": float(torch.corrcoef(both)[0, 1]) if varies else None,
        })  # fmt: skip
    return found


def realised_return(behavior: ActorCritic, recording: Recording, states: LatentState) -> Tensor:
    """(E, T) discounted return from each row to the end of its episode."""
    reward, length = recording.episodes.reward, recording.episodes.length
    gamma, rows = behavior.cfg.gamma, torch.arange(len(reward))
    end = behavior.critic.value(states.map(lambda leaf: leaf[rows, length - 1]).feat())
    out = torch.zeros_like(reward)
    out[rows, length - 1] = end * ~recording.terminal
    for t in range(reward.shape[1] - 2, -1, -1):
        ahead = reward[:, t + 1] + gamma * out[:, t + 1]
        out[:, t] += ahead * (t < length - 1)
    return out


def norms(
    world: WorldModel, behavior: ActorCritic, start: LatentState, max_loops: int | None
) -> list[dict[str, Any]]:
    """Mean and largest size of the deterministic state along dreams of LONG steps."""
    dream = world.imagine(start, lambda feat: behavior.actor.act(feat), LONG, max_loops=max_loops)
    size = dream.states.deter.flatten(2).norm(dim=-1)  # (B, LONG+1)
    label = "exit" if max_loops is None else str(max_loops)
    kept = [k for k in range(LONG + 1) if k < 20 or k % 10 == 0]
    return [
        {"loops": label, "step": k, "mean": float(size[:, k].mean()), "largest": float(size[:, k].max())} for k in kept
    ]


# ---------------------------------------------------------------------- results


def in_words(loops: str) -> str:
    """How a row's column `loops` is shown."""
    return {"exit": "with exits", "1": "1 loop"}.get(loops, f"{loops} loops")


def content_of(found: RolloutErrors) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return {
        "crossings": found.crossings, "errors": found.errors, "values": found.values, "norms": found.norms,
        "notes": found.notes,
    }  # fmt: skip


def save_results(found: RolloutErrors, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write errors.csv, values.csv, norms.csv and model.json. Raises UsageError when they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("errors", found.errors), ("values", found.values), ("norms", found.norms)):
            if rows:
                with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
        content = json.dumps({**facts, **content_of(found)}, indent=1)
        (folder / "model.json").write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the results cannot be written to {folder}: {error.strerror}") from error


def describe(found: RolloutErrors) -> str:
    """What a person wants to know first, as lines."""
    lines, policies = [f"note: {note}" for note in found.notes], list[str]()
    last = max(row["step"] for row in found.errors)
    shown = [k for k in (1, 5, 15, 50, 150) if k <= last]
    shown += [last] * (last not in shown)
    steps = ", ".join(f"{k}" for k in shown)
    lines.append(f"observation error, over the variance of all recorded rows, after {steps} steps")
    for cross in found.crossings:
        rows = {row["step"]: row for row in found.errors
                if row["policy"] == cross["policy"] and row["loops"] == cross["loops"]}  # fmt: skip
        numbers = "  ".join(f"{rows[k]['observation']:7.4f}" for k in shown)
        if cross["policy"] not in policies:
            policies.append(cross["policy"])
            for rival in ("copy", "mean"):
                simple = "  ".join(f"{rows[k][rival]:7.4f}" for k in shown)
                lines.append(f"  {cross['policy']:6s} {RIVALS[rival]:10s}  {simple}")
        ends = [
            f"{words} from step {cross[f'observation_{rival}']} on" if cross[f"observation_{rival}"] else ""
            for rival, words in (("copy", "no better than the last state"), ("mean", "no better than the mean"))
        ]
        verdict = ", ".join(end for end in ends if end) or f"better than both to step {last}"
        lines.append(f"  {cross['policy']:6s} {in_words(cross['loops']):10s}  {numbers}   {verdict}")
    if found.values:
        row = found.values[-1]
        lines.append(
            f"value of a dream of {row['step']} steps {row['imagined']:.4g}, realised {row['realised']:.4g} "
            f"(mean error {row['error']:.3g})"
        )
    for loops in dict.fromkeys(row["loops"] for row in found.norms):
        sizes = {row["step"]: row for row in found.norms if row["loops"] == loops}
        start, end, most = sizes[0]["mean"], sizes[LONG]["mean"], max(row["largest"] for row in sizes.values())
        lines.append(
            f"size of the state, {in_words(loops)}: {start:.3g} at the start, {end:.3g} after {LONG} steps, "
            f"largest {most:.3g}"
        )
    return "\n".join(lines)
