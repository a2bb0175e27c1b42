"""The agent of a checkpoint, whatever trained it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import UsageError
from agent.evaluation.episodes import Agent
from agent.learning.dreamer import Dreamer
from agent.spaces import Spaces


def load_agent(saved: dict[str, Any], device: str) -> Agent:
    """The agent of a checkpoint that `read_checkpoint` returned, a Dreamer or a baseline. Raises UsageError, also for a
    world model that was trained alone."""
    require_policy(saved)
    with _contents():
        if saved["config"]["agent"] == "dreamer":
            return Dreamer.from_checkpoint(saved, device)
        from agent.interop.baselines import Baseline  # takes a second to import

        return Baseline.from_checkpoint(saved, device)


def require_policy(saved: Mapping[str, Any]) -> None:
    """Raise UsageError for a world model that was trained alone: its actor has learned nothing."""
    if saved["config"].get("model_only"):
        raise UsageError("this run trained the world model alone and has no policy: use evaluate.py model")


def require_loops(agent: Agent, loops: Any, run: str) -> None:
    """Raise UsageError where numbers of loops are given for an agent that has none."""
    if loops and not (isinstance(agent, Dreamer) and agent.world.core.looping):
        raise UsageError(f"the agent of {run} has no loops: leave --max-loops out")


def load_sb3_agent(file: str, saved: Mapping[str, Any]) -> Agent:
    """An agent saved by stable-baselines3, to act in the task of a checkpoint. Raises UsageError."""
    from agent.interop.baselines import Baseline  # takes a second to import

    return Baseline.from_sb3(file, Spaces.of(saved["spaces"]))


def load_player(name: str | None, saved: Mapping[str, Any], agent: Agent) -> Agent | None:
    """Who plays for `agent`, of the checkpoint `saved`: itself (None), nobody (random: None), or the agent of a run.

    Raises UsageError for a run of another task.
    """
    if name in (None, "random"):
        return None if name else agent
    other = read_checkpoint(find_checkpoint(name))
    if other["task"] != saved["task"]:
        raise UsageError(f"{name} is a run of {other['task']}: give a player of {saved['task']}")
    return load_agent(other, "cpu")


def load_dreamer(saved: dict[str, Any], run: str) -> Dreamer:
    """The Dreamer of a checkpoint, on the CPU. Raises UsageError for a baseline, which has no world model."""
    with _contents():
        kind = saved["config"]["agent"]
        if kind != "dreamer":
            raise UsageError(f"{run} is a run of {kind}, which has no world model")
        return Dreamer.from_checkpoint(saved, "cpu")


@contextmanager
def _contents() -> Iterator[None]:
    """Inside of this, values of a checkpoint that do not fit each other raise UsageError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the checkpoint is incomplete or of another version ({type(error).__name__}: {what}); use the commit in "
            "the run's meta.json, or another checkpoint"
        ) from error
