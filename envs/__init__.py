"""Environments: task names in, Gymnasium environments with one observation format out.

Every environment made here has the observations `{"state": float32 vector}`, or uint8 images, or both, and the actions
`Box(-1, 1)` or `Discrete(start=0)`, so that the other packages need not know where a task comes from.
"""

from envs.errors import TaskError
from envs.gym_tasks import EPISODE_LIMIT
from envs.minari_data import MinariData
from envs.rendering import prepare_rendering, rendering_backend
from envs.tasks import TaskId, endless, how_shown, make_env, make_vector_env, position_entries

__all__ = [
    "EPISODE_LIMIT",
    "MinariData",
    "TaskError",
    "TaskId",
    "endless",
    "how_shown",
    "make_env",
    "make_vector_env",
    "position_entries",
    "prepare_rendering",
    "rendering_backend",
]
