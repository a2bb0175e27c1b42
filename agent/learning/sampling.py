"""What an update learns from: sequences of the replay, of single decisions or of jumps."""

from __future__ import annotations

import numpy as np
import torch

from agent.data.replay import ReplayBuffer
from agent.learning.dreamer import Dreamer
from world_model import Batch
from world_model.jumps import jump_rows


def rows_needed(length: int, longest: int) -> int:
    """Rows that the replay must hold for T = `length` jumps of up to J = `longest` decisions."""
    return length * longest + 1


def sample(agent: Dreamer, replay: ReplayBuffer, size: int, length: int) -> tuple[Batch, np.ndarray]:
    """B = `size` sequences of T = `length` rows, and their places (2, B, T) in the replay.

    Where the world model knows jumps, each row is a jump, of a number of decisions drawn for the batch (of a rank).
    """
    longest = agent.world.cfg.jump
    if longest == 1:
        return replay.sample(size, length, agent.device)
    jump = int(torch.randint(1, longest + 1, ()))
    batch, where = replay.sample(size, length * jump, agent.device)
    batch, last = jump_rows(batch, jump, longest, agent.behavior.cfg.gamma)
    return batch, np.take_along_axis(where, last.numpy(force=True)[None], 2)
