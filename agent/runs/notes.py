"""What is checked of a task's steps, and the lines that tell a person what they might not expect."""

from __future__ import annotations

from typing import Protocol

import torch

from agent.errors import UsageError
from agent.runs.config import Config
from agent.runs.presets import FIRST_ACTIONS, unused
from agent.spaces import Spaces


class Task(Protocol):
    """What is known of a task's name; str(task) is suite:name."""

    @property
    def unit(self) -> str: ...

    @property
    def action_repeat(self) -> int: ...

    @property
    def slug(self) -> str: ...


def check_steps(config: Config, task: Task) -> None:
    """Raise UsageError where all steps of the run would be random ones."""
    ours = config.agent == "dreamer"
    actions = config.train.prefill if ours else FIRST_ACTIONS
    first, remedy = actions * task.action_repeat, ", a lower --train.prefill, or --preset debug" if ours else ""
    if config.train.steps <= first:
        raise UsageError(
            f"--steps {config.train.steps} end within the {actions} random actions ({first} steps of {task}), "
            f"and nothing would be learned: give more steps{remedy}"
        )


def headline(config: Config, task: Task) -> str:
    """Task, steps, limit of time and action repeat in one line."""
    limit = f", at most {config.train.minutes:g} minutes" if config.train.minutes else ""
    repeat = "4 frames each" if task.unit == "agent steps" else f"{task.action_repeat} per action"
    return f"{task}, {config.train.steps:,} {task.unit}{limit}, {repeat}"


def unused_options(config: Config) -> list[str]:
    """A line where options were given that this kind of training does not look at."""
    of = "a world model alone has --offline.*" if config.model_only else "they are of --model-only"
    return [f"unused       {words}: {of}" for words in [unused(config)] if words]


def notes(
    config: Config, spaces: Spaces, device: torch.device, episode_limit: int | None, cannot_draw: str | None,
    ranks: int = 1,
) -> list[str]:  # fmt: skip
    """Lines about what the person might not expect. episode_limit: where the task names none of its own."""
    lines = unused_options(config) if config.agent == "dreamer" else []
    if ranks > 1:
        train = config.train
        share = f"{train.envs} of {ranks * train.envs} environments, {train.batch // ranks} of {train.batch} sequences"
        lines.append(f"ranks        {ranks}, each with {share}")
    if episode_limit:
        lines.append(f"episodes     end after {episode_limit:,} steps at the latest: the task names no limit")
    if cannot_draw:
        lines.append(f"video        left out: {cannot_draw}")
    images = any(not isinstance(size, int) for size in spaces.obs.values())
    if config.agent == "dreamer" and images and config.preset == "small" and device.type == "cpu":
        lines.append("images       this task shows some: --preset pixels learns more from them in the same time")
    return lines
