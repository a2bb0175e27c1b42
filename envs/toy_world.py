"""What the toy worlds share."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.errors import TaskError

_FRAME = 64  # pixels


class ToyWorld(gym.Env[dict[str, Any], Any]):
    """What the toy worlds share: the observation `{"state": (S,) float32}` and a drawing of it.

    `optimal_return` and `random_return` are the expected undiscounted returns of one episode under the
    best policy and under uniformly random actions.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}
    optimal_return: float
    random_return: float

    def __init__(self, low: Any, high: Any, size: int, render_mode: str | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise TaskError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.render_mode = render_mode
        self.observation_space = spaces.Dict({"state": spaces.Box(low, high, (size,), np.float32)})
        self._state = np.zeros(size, np.float32)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Draw the state in grey, black 0 to white 1: columns, one per number, (64, W, 3) uint8, or a board of cells.

        Raises:
            TaskError: the world was made without `render_mode`.
        """
        if self.render_mode is None:
            raise TaskError("this environment was made without drawing; make it with render=True")
        shades = (255 * np.clip(self._shades(), 0.0, 1.0)).astype(np.uint8)
        side = max(4, _FRAME // shades.shape[-1] // 2 * 2)  # an even width, which video formats ask for
        rows = np.repeat(np.atleast_2d(shades), side, 1)
        rows = np.repeat(rows, _FRAME if shades.ndim == 1 else side, 0)
        return np.repeat(rows[:, :, None], 3, 2)

    def _shades(self) -> np.ndarray:
        """What to draw, in [0, 1]: (S,) as columns, or (rows, columns) as a board."""
        return self._state

    def _observe(self) -> dict[str, np.ndarray]:
        return {"state": self._state.copy()}  # a copy, so that a kept observation never changes
