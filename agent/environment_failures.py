"""Failures of an environment as its author wants to see them."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import gymnasium as gym

from agent.env_stepper import EnvStepper
from agent.errors import EnvironmentFailure, UsageError, made_to_be_read
from agent.runtime import PROJECT

OURS = [PROJECT / name for name in ("agent", "envs", "world_model", "train_agent.py", "evaluate.py")]
OURS.append(Path(gym.__file__).parent)


def environment_traceback(failure: EnvironmentFailure) -> str:
    """The traceback of its cause, from the first frame on that belongs neither to this program nor to Gymnasium.

    Empty where there is none: a check of this program has found what is wrong, or a process has ended, and the message
    is enough.
    """
    cause = failure.__cause__
    if cause is None or made_to_be_read(cause) or isinstance(cause, EOFError | ConnectionError):  # of a pipe
        return ""
    shown = traceback.TracebackException.from_exception(cause)
    frames = list(shown.stack)
    while frames and any(Path(frames[0].filename).is_relative_to(ours) for ours in OURS):
        frames.pop(0)
    if not frames:
        return ""
    shown.stack = traceback.StackSummary.from_list(frames)
    return "".join(shown.format())


def first_reset(envs: gym.vector.VectorEnv[Any, Any, Any], seed: int) -> None:
    """Reset the environments before anything is written. Raises UsageError where that cannot work."""
    try:
        EnvStepper(envs).reset(seed)
    except EnvironmentFailure as error:
        print(environment_traceback(error), end="", file=sys.stderr)
        raise UsageError(f"the environment fails in its first reset: {error}; look at the lines above") from error
