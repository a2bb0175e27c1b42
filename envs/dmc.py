"""The DeepMind Control Suite as Gymnasium environments with vector or image observations."""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.errors import TaskError
from envs.images import SIDE, image_space
from envs.rendering import explain_import_error, prepare_rendering

ACTION_REPEAT = 2

# Written out, because dm_control binds its drawing backend when it is imported, and a task name is read
# before it is known whether anything will be drawn. A test compares this with the suite's own list.
_DOMAINS = {
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse two_poles three_poles",
    "cheetah": "run",
    "dog": "stand walk trot run fetch",
    "finger": "spin turn_easy turn_hard",
    "fish": "upright swim",
    "hopper": "stand hop",
    "humanoid": "stand walk run run_pure_state",
    "humanoid_CMU": "stand walk run",
    "lqr": "lqr_2_1 lqr_6_2",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "walk run escape fetch",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "stand walk run",
}
# A table and not a split at '_': both halves of a name may hold one ("ball_in_cup_catch").
TASKS = {f"{domain}_{task}": (domain, task) for domain, tasks in _DOMAINS.items() for task in tasks.split()}

# lqr has no time limit of its own, and an episode without an end would stop training: 1000 steps of 0.03 s.
_TIME_LIMITS = {"lqr": 30.0}

CONTACTS = "dm_control.contacts"
"""Name of the number of contacts in the info; agent/evaluation/recording.py reads it by this name."""
STATE = "dm_control.state"
"""Name of the vector that a task with images does not show, in the info; recording.py reads it too."""

# What the names of the suite's velocity entries have in common ("velocity", "body_velocities", "arm_vel").
VELOCITY = "vel"
# Quadruped and dog lay velocities and other numbers into one entry.
WITHOUT_VELOCITIES = [name for name, (domain, _) in TASKS.items() if domain not in ("quadruped", "dog")]

# Which camera an agent looks through, where it is not the first one: the quadruped's follows it (as DreamerV3).
_CAMERAS = {"quadruped": 2}

# MuJoCo writes an actuator without limits as +-1e10; scaling [-1, 1] to that would blow up the simulation.
_UNLIMITED = 1e10


def installed() -> bool:
    """True if the package dm_control can be found; does not import it."""
    try:
        return importlib.util.find_spec("dm_control") is not None
    except ValueError:  # a half-made module; only the import can say what is wrong with it
        return True


def load_task(domain: str, task: str, random: np.random.RandomState, draw: bool) -> Any:
    """Import dm_control and build one `dm_env.Environment`.

    Args:
        domain, task: the suite's names.
        random: the generator of everything random in the task, which keeps this object.
        draw: whether the environment may open an OpenGL context.

    Raises:
        TaskError: dm_control cannot be imported here.
    """
    prepare_rendering(False)  # keeps an earlier choice; without one, state-only work needs no OpenGL
    try:
        from dm_control import suite
    except Exception as error:  # a wrong MUJOCO_GL shows as AttributeError, RuntimeError or ImportError
        raise explain_import_error(error) from error
    task_kwargs: dict[str, Any] = {"random": random}
    if domain in _TIME_LIMITS:
        task_kwargs["time_limit"] = _TIME_LIMITS[domain]
    logging.getLogger("absl").setLevel(logging.ERROR)  # deprecations inside of the suite, once for each copy
    env = suite.load(domain, task, task_kwargs=task_kwargs)
    if not draw:
        # quadruped_escape opens OpenGL at every reset to show its terrain, even where nobody looks, and
        # fails where there is none. It skips that if there is no context, so none is made.
        env.physics._make_rendering_contexts = lambda: None
    return env


class DMControl(gym.Env[dict[str, Any], np.ndarray]):
    """One Control Suite task.

    Observation: `{"state": (S,) float32}`, the suite's entries laid end to end in the suite's order, or
    `{"image": (64, 64, 3) uint8}` after the last simulator step of an action.
    Action: (A,) float32 in [-1, 1], scaled to each actuator's range and clipped. An actuator without
    limits gets the number in [-1, 1] as it is.
    Reward: the sum over the `repeat` simulator steps of one `step`; fewer where the episode ends between.
    `terminated` only where the task ends the episode with discount 0; the time limit gives `truncated`.
    Info: `dm_control.contacts`, how many the simulator sees; where images are observed, `dm_control.state`, the vector
    that would be observed without.

    Args:
        domain, task: the suite's names, for example "ball_in_cup" and "catch".
        seed: for what the suite draws while it builds the model; `reset(seed=...)` seeds the episodes.
        repeat: simulator steps per `step`, at least 1.
        render_mode: None or "rgb_array".
        height, width: size of a drawn frame in pixels.
        camera_id: which of the model's cameras draws.
        velocities: whether the observation has the entries that are velocities.
        pixels: None for a vector, "field" for images as in the DreamerV3 paper, or "fast" for images without shadows,
            reflections and antialiasing, which are rendered 7 to 10 times as fast.

    Attributes:
        is_position: (S,) booleans, which numbers of the observation are no velocities.

    Raises:
        TaskError: dm_control cannot be imported, or drawing is asked for and no backend works.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        domain: str,
        task: str,
        seed: int | None = None,
        repeat: int = ACTION_REPEAT,
        render_mode: str | None = None,
        height: int = 240,
        width: int = 320,
        camera_id: int = 0,
        velocities: bool = True,
        pixels: str | None = None,
    ) -> None:
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, not {repeat}")
        if render_mode not in (None, "rgb_array"):
            raise TaskError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        draws = render_mode is not None or pixels is not None
        if draws and (problem := prepare_rendering(True)):
            raise TaskError(problem)
        self.render_mode = render_mode
        self._repeat = repeat
        self._frame = {"height": height, "width": width, "camera_id": camera_id}
        self._cannot_draw: str | None = None
        self._random = np.random.RandomState(_fold(seed))  # reseeded in place, which reseeds the task
        self._env = load_task(domain, task, self._random, draw=draws)
        self._look: dict[str, Any] | None = None
        if pixels is not None:
            self._look = {"height": SIDE, "width": SIDE, "camera_id": _CAMERAS.get(domain, 0)}
            if pixels == "fast":
                self._env.physics.model.vis.quality.offsamples = 0  # read when the first frame is drawn
                self._look["render_flag_overrides"] = {"shadow": False, "reflection": False}

        sizes = {name: int(np.prod(entry.shape)) for name, entry in self._env.observation_spec().items()}
        self._entries = [name for name in sizes if velocities or VELOCITY not in name]
        self.is_position = np.concatenate([np.full(sizes[name], VELOCITY not in name) for name in self._entries])
        numbers = len(self.is_position)
        seen: dict[str, spaces.Space[Any]] = {"image": image_space()}
        if pixels is None:
            seen = {"state": spaces.Box(-np.inf, np.inf, shape=(numbers,), dtype=np.float32)}
        self.observation_space = spaces.Dict(seen)
        action = self._env.action_spec()
        low = np.broadcast_to(action.minimum, action.shape).astype(np.float64)
        high = np.broadcast_to(action.maximum, action.shape).astype(np.float64)
        limited = (low > -_UNLIMITED) & (high < _UNLIMITED)
        self._low, self._high = np.where(limited, low, -1.0), np.where(limited, high, 1.0)
        self.action_space = spaces.Box(-1.0, 1.0, shape=action.shape, dtype=np.float32)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 1.0 / (self._env.control_timestep() * repeat),
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode. The same `seed` starts the same sequence of episodes."""
        super().reset(seed=seed)
        if seed is not None:
            self._random.seed(_fold(seed))
        entries = self._env.reset().observation
        return self._observation(entries), self._info(entries)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for `repeat` simulator steps; see the class for reward and the two kinds of end."""
        unit = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        scaled = self._low + (unit + 1.0) * 0.5 * (self._high - self._low)
        scaled = np.clip(scaled, self._low, self._high)  # rounding may leave the range by one bit
        reward = 0.0
        for _ in range(self._repeat):
            timestep = self._env.step(scaled)
            reward += float(timestep.reward or 0.0)
            if timestep.last():
                break
        # Compared and not tested for truth: 0.0 is the one discount that means "terminated".
        terminated = bool(timestep.last() and timestep.discount == 0.0)
        truncated = bool(timestep.last() and not terminated)
        entries = timestep.observation
        return self._observation(entries), reward, terminated, truncated, self._info(entries)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Draw the scene: (height, width, 3) uint8.

        Raises:
            TaskError: the environment was made without `render_mode`, or OpenGL fails.
        """
        if self.render_mode is None:
            raise TaskError("this environment was made without drawing; make it with render=True")
        return self._draw(self._frame)

    def _draw(self, frame: Mapping[str, Any]) -> np.ndarray:
        if self._cannot_draw is None:
            try:
                physics = self._env.physics
                camera = frame["camera_id"] if physics.model.ncam else -1
                # OpenGL's rows go from the bottom up, so what render gives is an upside-down view.
                return np.ascontiguousarray(physics.render(**{**frame, "camera_id": camera}))
            except Exception as error:
                # Remembered, because a second try after a failed one can abort the whole process.
                self._cannot_draw = f"OpenGL cannot draw this scene: {error}"
        raise TaskError(self._cannot_draw)

    def _observation(self, entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Lay the suite's entries, scalars included, end to end: `{"state": (S,) float32}`; or draw them."""
        if self._look is not None:
            return {"image": self._draw(self._look)}
        return {"state": self._vector(entries)}

    def _vector(self, entries: Mapping[str, Any]) -> np.ndarray:
        return np.concatenate([np.ravel(entries[name]) for name in self._entries]).astype(np.float32)

    def _info(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        contacts = {CONTACTS: int(self._env.physics.data.ncon)}
        return contacts if self._look is None else {**contacts, STATE: self._vector(entries)}

    def close(self) -> None:
        """Free the simulation and its drawing context."""
        self._env.close()


def _fold(seed: int | None) -> int | None:
    """Gymnasium allows any non-negative seed, RandomState only 32 bits."""
    return None if seed is None else seed % 2**32
