"""Whether a stopped run can go on from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.data.checkpoint import images_folder
from agent.data.replay import ReplayBuffer
from agent.errors import UsageError
from agent.learning.dreamer import Dreamer

RESUMED = (
    "finished", "updates_done", "seconds", "row", "memory", "returns", "evaluations", "evaluated", "best", "actions",
    "execution", "random",
)  # fmt: skip
"""What a checkpoint holds of the trainer, for a run that goes on."""


def check_fits(saved: Mapping[str, Any], run_dir: Path, agent: Dreamer, replay: ReplayBuffer) -> None:
    """Raise UsageError where a run cannot go on from a checkpoint, before anything in its folder is touched.

    The agent and the replay are then in the checkpoint's state.
    """
    missing = [name for name in RESUMED if not isinstance(saved["trainer"], dict) or name not in saved["trainer"]]
    try:
        if missing or not isinstance(saved["step"], int):
            raise KeyError(", ".join(missing) or "step")
        agent.load_state_dict(saved["agent"])
        replay.open_image_store(images_folder(run_dir), exists=True)
        replay.load_state_dict(saved["replay"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        what = str(error).splitlines()[0]
        raise UsageError(
            f"the run {run_dir} cannot go on: its latest.pt is incomplete or of another version ({what}); the agent "
            "may still be good: evaluate.py policy RUN"
        ) from error
