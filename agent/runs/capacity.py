"""Whether a run's replay fits into memory and onto the disk, looked at before the first step.

Memory is promised before it is there: without this check a replay that is too large would end the run by the system's
hand, hours later.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agent.data.checkpoint import tensor_bytes
from agent.errors import UsageError
from agent.numbers import byte_size
from agent.runs.config import Config
from agent.runtime import available_memory
from agent.spaces import Spaces

IN_MEMORY = 2
"""The rows, and their copy while a checkpoint is written."""
ON_DISK = 3
"""latest.pt, previous.pt and the file that is being written hold the rows each; images lie there once."""
SHARE = 0.9
"""Of what is free, for a replay that is suggested: networks and environments need some too."""


def rows_held(config: Config, repeat: int) -> int:
    """Rows that the replay will hold at the end, one for each step; repeat: simulator steps of one action.

    Episodes of a few steps add a row each, for their first observation. A data set may fill all of it.
    """
    rows = config.train.replay_rows
    return rows if config.dataset else min(rows, config.train.steps // repeat + config.train.envs)


def row_bytes(config: Config, spaces: Spaces) -> tuple[int, int]:
    """Bytes of one row in memory, and of its images, which lie on the disk. As `ReplayBuffer` keeps them."""
    model, sizes = config.model, spaces.obs.values()
    vectors = sum(size for size in sizes if isinstance(size, int)) + spaces.action.size + 1  # 1: the reward
    flags, deter = 3, 2 * model.loop.tokens * model.loop.width
    stoch = model.groups * (1 if model.latents == "categorical" else 2 * model.classes)
    priority = 4 if config.train.sampling.endswith("-error") else 0
    images = sum(math.prod(size) for size in sizes if not isinstance(size, int))
    return 4 * vectors + flags + deter + stoch + priority, images


def check_capacity(config: Config, spaces: Spaces, repeat: int, saved: Mapping[str, Any] | None = None) -> None:
    """Raise UsageError, with a number of rows that fits, where the replay needs more than is free.

    saved: the checkpoint from which the run goes on, whose replay is in memory already, until it is loaded.
    """
    rows, (vector, image) = rows_held(config, repeat), row_bytes(config, spaces)
    folder = Path(config.run_dir or "runs")
    memory, disk = available_memory() + tensor_bytes((saved or {}).get("replay")), _free_on_disk(folder)
    needs = {"memory": (IN_MEMORY * vector, memory), "disk": (ON_DISK * vector + image, disk)}
    for name, (size, free) in needs.items():
        if rows * size <= free:
            continue
        told = f"the replay of {rows:,} rows needs {byte_size(rows * size)} of {name} and {byte_size(free)} are free"
        if saved:
            raise UsageError(f"{told}: free some, or go on with the run on a machine that has more")
        fits = _rounded(min(SHARE * free / size for size, free in needs.values()))
        if fits < (config.train.length + 1) * config.train.envs:
            raise UsageError(f"{told}: too little for any replay of this task, which needs another machine")
        raise UsageError(f"{told}: --train.replay-rows {fits} fits")


def _rounded(rows: float) -> int:
    """Down to two digits."""
    unit = 10 ** max(0, len(str(int(rows))) - 2)
    return int(rows) // unit * unit


def _free_on_disk(folder: Path) -> float:
    """Free bytes where the folder is or will be, with what its replay and checkpoints occupy already."""
    try:
        kept = [path for part in ("replay", "checkpoints") for path in (folder / part).rglob("*") if path.is_file()]
        occupied = sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in kept)
        here = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        return float(shutil.disk_usage(here).free + occupied)
    except (OSError, StopIteration):  # a name that cannot be is refused where the folder is made
        return math.inf


def out_of_memory(error: BaseException, remedy: str) -> str | None:
    """The line for an error that says that memory is full; None for another. remedy: what to type."""
    told = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: {remedy}"
    refused = isinstance(error, RuntimeError) and ("allocate memory" in told or "not enough memory" in told)
    if isinstance(error, MemoryError) or refused:
        return f"memory is full ({told or 'no more is to be had'}): {remedy}"
    return None
