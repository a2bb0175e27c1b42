"""Whether a stopped run can go on from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.data.checkpoint import images_folder, ranks_of
from agent.data.replay import ReplayBuffer
from agent.errors import UsageError
from agent.execution import Ranks
from agent.learning.dreamer import Dreamer
from agent.learning.noise import TIME_SCALES
from agent.runtime import restore_random_states
from agent.training.parts import deal_images, dealt, intact, part_of

RESUMED = (
    "finished", "updates_done", "seconds", "row", "memory", "returns", "evaluations", "bad_steps", "execution",
    "random",
)  # fmt: skip
"""What a checkpoint holds of the trainer, for a run that goes on."""


def open_replay(
    replay: ReplayBuffer, run_dir: Path, saved: dict[str, Any] | None, agent: Dreamer, ranks: Ranks | None = None
) -> dict[str, Any] | None:
    """Open the images of the replay in the run's folder, and see whether a run can go on from the checkpoint `saved`.

    The agent and the replay are then in its state. Returns the part of the checkpoint from which this rank goes on.
    Raises UsageError, and touches nothing, where it cannot.
    """
    ranks = ranks or Ranks()
    if ranks.rank == 0:
        saved = open_part(replay, run_dir, saved, agent, ranks)
    ranks.barrier()  # the files are there
    if ranks.rank:
        saved = open_part(replay, run_dir, saved, agent, ranks)
    ranks.barrier()  # all have read what rank 0 is about to write anew
    return saved


def open_part(
    replay: ReplayBuffer, run_dir: Path, saved: dict[str, Any] | None, agent: Dreamer, ranks: Ranks
) -> dict[str, Any] | None:
    """`open_replay` of one rank."""
    folder, rings = images_folder(run_dir, ranks.size), ranks.size * replay.envs
    first = ranks.rank * replay.envs
    if saved is None:
        replay.open_image_store(folder, ranks.rank > 0, first, rings)
        return None
    missing = [name for name in RESUMED if not isinstance(saved["trainer"], dict) or name not in saved["trainer"]]
    try:
        if missing or saved["step"] < 0 or saved["agent"]["updates"] < 0:
            raise KeyError(", ".join(missing) or "step or updates")
        agent.load_state_dict(saved["agent"])
        if ranks_of(saved) != ranks.size:
            saved = intact(saved, replay, run_dir)
            if ranks.rank == 0 and replay.image_sizes:
                deal_images(saved, replay, run_dir, rings, ranks.size)
            saved = dealt(saved, ranks.rank, ranks.size, replay.envs, replay.length)
        else:
            saved = part_of(saved, ranks.rank, replay.envs)
        replay.open_image_store(folder, True, first, rings)
        replay.load_state_dict(saved["replay"])
        check_trainer(saved["trainer"], replay, agent.behavior.cfg.plan_horizon)
    except OSError:  # a full disk
        raise
    except Exception as error:  # any kind: the values in a file may be of any kind
        what = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the run {run_dir} cannot go on: its latest.pt is incomplete, damaged or of another version ({what}); the "
            "agent may still be good: evaluate.py policy RUN"
        ) from error
    return saved


def forget_replay(*saved: dict[str, Any] | None) -> None:
    """Let go of the replay in checkpoints, once it is loaded: it would take as much memory again for the whole run."""
    for each in saved:
        if each is not None:
            each.pop("replay", None)


def check_trainer(mine: Mapping[str, Any], replay: ReplayBuffer, plan_horizon: int) -> None:
    """Raise an error of some kind where the trainer could not go on from its part of a checkpoint."""
    restore_random_states(mine["random"])
    shapes = {name: value.shape[2:] for name, value in replay.rows.items()} | replay.image_sizes
    shapes.pop("priority", None)
    stoch = shapes.pop("stoch")
    latents = {"deter": shapes.pop("deter"), "stoch": (*stoch, replay.classes) if replay.onehot else stoch}
    latents["action"] = shapes["prev_action"]
    optional = {"noise": (len(TIME_SCALES), *latents["action"]), "plan": (plan_horizon, *latents["action"])}
    optional["holds"] = ()
    latents |= {name: shape for name, shape in optional.items() if name in (mine["memory"] or ())}
    for name, values, wanted in (("row", mine["row"], shapes), ("memory", mine["memory"], latents)):
        if values and {key: tuple(value.shape) for key, value in values.items()} != {
            key: (replay.envs, *shape) for key, shape in wanted.items()
        }:
            raise ValueError(f"{name} has other shapes")
    evaluations = mine["evaluations"]
    numbers = [mine["updates_done"], mine["bad_steps"], mine["seconds"], evaluations["best"], evaluations["tried"]]
    numbers += [*mine["returns"], *evaluations["means"], *evaluations["means"].values()]
    good = all(isinstance(number, int | float) for number in numbers) and min(numbers[:3]) >= 0
    if not good or not isinstance(mine["execution"], dict):
        raise ValueError("a counter is no number")
