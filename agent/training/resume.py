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
    "finished", "updates_done", "seconds", "row", "memory", "returns", "evaluations", "bad_steps", "actions",
    "execution", "random",
)  # fmt: skip
"""What a checkpoint holds of the trainer, for a run that goes on."""


def open_replay(replay: ReplayBuffer, run_dir: Path, saved: Mapping[str, Any] | None, agent: Dreamer) -> None:
    """Open the images of the replay in the run's folder, and see whether a run can go on from the checkpoint `saved`.

    The agent and the replay are then in its state. Raises UsageError, and touches nothing, where it cannot.
    """
    if saved is None:
        replay.open_image_store(images_folder(run_dir))
        return
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
