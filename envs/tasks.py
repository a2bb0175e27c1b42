"""Task names such as "dmc:walker_walk", and the environments they stand for."""

import difflib
import multiprocessing
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs import atari, dmc, gym_tasks, toy, variants
from envs.errors import TaskError
from envs.gym_adapter import SeedFirstReset
from envs.processes import MANY_CORES, SIGNALS, ClosableAsyncVectorEnv, cores, quiet_worker, without_signals
from envs.rendering import prepare_rendering
from envs.suggestions import did_you_mean, near

EXAMPLES = {
    "dmc": "dmc:walker_walk",
    "gym": "gym:Pendulum-v1",
    "toy": "toy:cue",
    "atari": "atari:breakout",
    "atari100k": "atari100k:pong",
}
PIXELS = {"pixels": "field", "fast_pixels": "fast"}
"""Variants of dmc tasks with image observations, and their `pixels` argument of `dmc.DMControl`."""
_SUITES = "the suites are " + ", ".join(f"{suite} ({example})" for suite, example in EXAMPLES.items())


@dataclass(frozen=True)
class TaskId:
    """The name of a task. Make it with `TaskId.parse`, which checks that the task exists.

    Attributes:
        suite: "dmc", "gym", "toy", "atari" or "atari100k".
        name: the suite's own name of the task, for example "walker_walk" or "my_package:MyEnv-v0".
    """

    suite: str
    name: str

    @classmethod
    def parse(cls, text: str) -> "TaskId":
        """Read "suite:name", split at the first colon. In dmc names '-' may stand for '_', and behind one
        "@nov" leaves the velocities out of the observation ("dmc:walker_walk@nov"), "@pixels" gives 64 x 64 images
        instead, and "@fast_pixels" images without shadows and reflections, rendered 7 to 10 times as fast.

        A Gymnasium id may be led by the module that registers it, "gym:my_package:MyEnv-v0"; the module is
        imported. Behind an id "@grid" reads images number by number, and "@image" shows grids as images. Behind both
        kinds of names "@repeat8" applies every action for 8 simulator steps, alone or beside one of the others.
        dm_control is not imported here, so drawing can still be prepared after this call.

        Raises:
            TaskError: no such suite or task, with suggestions; or a package is missing, with its name.
        """
        suite, colon, name = text.strip().partition(":")
        check = _CHECKS.get(suite.lower())
        if not colon or check is None:
            problem = f"there is no suite {suite!r}" if colon else f"the task {text!r} names no suite"
            raise TaskError(f"{problem}; {did_you_mean(_with_suites(text.strip(), name))}{_SUITES}")
        return cls(suite.lower(), check(name))

    def __str__(self) -> str:
        return f"{self.suite}:{self.name}"

    @property
    def slug(self) -> str:
        """The name in a form that is safe for folders: "dmc-walker_walk"."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", str(self))

    @property
    def action_repeat(self) -> int:
        """Simulator steps per agent step, @repeatN or the suite's; budgets are counted in simulator steps."""
        return self._parts.repeat or (dmc.ACTION_REPEAT if self.suite == "dmc" else 1)

    @property
    def base(self) -> str:
        """The name without what stands behind it: "walker_walk" of "walker_walk@repeat4@nov"."""
        return self._parts.base

    @property
    def variant(self) -> str:
        """How the task is seen: nov, pixels, fast_pixels of dmc, grid, image of gym, or nothing."""
        return self._parts.view

    @property
    def _parts(self) -> variants.Parts:
        return variants.split(self.name) if self.suite in ("dmc", "gym") else variants.Parts(self.name)

    @property
    def is_slow(self) -> bool:
        """Whether a step takes long enough for copies to run in processes of their own."""
        return self.draws or self.suite in atari.STICKY

    @property
    def is_parallel(self) -> bool:
        """Whether evaluations run its copies in processes: a step takes long, and there are enough cores."""
        return self.is_slow and cores() >= MANY_CORES

    @classmethod
    def shows_images(cls, text: str) -> bool:
        """Whether `text` names a task with image observations: an Atari game, dmc:TASK@pixels, or gym:ID@image."""
        suite, colon, name = text.lower().replace("-", "_").partition(":")
        shown = {"gym": {"image"}, "dmc": {*PIXELS}}.get(suite, set())
        return bool(colon) and (suite in atari.STICKY or not shown.isdisjoint(name.split("@")[1:]))

    @property
    def unit(self) -> str:
        """What is counted as a step: agent steps (of four frames) for Atari games, simulator steps for the others."""
        return "agent steps" if self.suite in atari.STICKY else "simulator steps"

    @property
    def evaluation_episodes(self) -> int:
        """Episodes of the final evaluation, as is usual for the suite."""
        return 100 if self.suite == "atari100k" else 10

    @property
    def draws(self) -> bool:
        """Whether the observations of this task are rendered with OpenGL."""
        return self.suite == "dmc" and self.variant in PIXELS


def make_env(
    task: TaskId | str, seed: int | None = None, render: bool = False, lives_end: bool = False
) -> gym.Env[Any, Any]:
    """Build one environment.

    Observations are `{"state": (S,) float32}`, or images `{"image": (64, 64, 3) uint8}`, or both. Actions are (A,)
    float32 in [-1, 1] or an integer from 0.
    `GymAdapter` says how the spaces of a Gymnasium task are converted, unbounded actions among them.

    Args:
        task: a `TaskId` or its text.
        seed: for the first `reset` without a seed; also seeds `action_space.sample`.
        render: make `env.render()` return frames, (H, W, 3) uint8.
        lives_end: end an Atari episode with the loss of a life (for training alone).

    Returns:
        An environment whose `close` must be called by whoever made it.

    Raises:
        TaskError: no such task, its spaces are not supported, a package is missing, or it cannot be drawn.
    """
    task = TaskId.parse(str(task))
    mode = "rgb_array" if render else None
    env: gym.Env[Any, Any]
    if task.suite == "dmc":
        look = PIXELS.get(task.variant)
        env = dmc.DMControl(
            *dmc.TASKS[task.base], seed, task.action_repeat, mode, velocities=task.variant != "nov", pixels=look
        )
    elif task.suite in atari.STICKY:
        env = atari.Atari(task.suite, task.name, mode, lives_end)
    elif task.suite == "toy":
        env = toy.make_toy(task.name, mode)
    else:
        env = gym_tasks.make(task.name, mode)
    if seed is None:
        return env
    env.action_space.seed(seed)
    return SeedFirstReset(env, seed)


def position_entries(task: TaskId | str) -> np.ndarray:
    """(S,) booleans: the numbers of a dmc task's observation that its "@nov" variant has too.

    Raises:
        TaskError: the task has no such variant.
    """
    task = TaskId.parse(str(task))
    TaskId.parse(f"{task}@nov")
    env = dmc.DMControl(*dmc.TASKS[task.base])
    env.close()
    return env.is_position


def make_vector_env(
    task: TaskId | str, num_envs: int, seed: int, lives_end: bool = False, asynchronous: bool = False
) -> gym.vector.VectorEnv[Any, Any, Any]:
    """Build `num_envs` copies that step together, in this process if not `asynchronous`.

    Observations are `{"state": (E, S) float32}`, or `{"image": (E, 64, 64, 3) uint8}`, or both; rewards (E,) float64.
    After the last row of an episode the next `step` ignores that copy's action and returns the reset observation
    with reward 0.

    Args:
        task: a `TaskId` or its text.
        num_envs: number of copies E, at least 1.
        seed: copy i is seeded with `seed` + i, as `reset(seed=seed)` of the result would do.
        lives_end: as in `make_env`.
        asynchronous: run each copy in a process of its own, which pays where a step takes long (images, Atari) and
            there is more than one copy, or a second core on which it steps while the caller does something else.

    Raises:
        ValueError: `num_envs` is less than 1.
        TaskError: as `make_env`.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")

    made: list[gym.Env[Any, Any]] = []  # in this process

    def maker(index: int) -> Callable[[], gym.Env[Any, Any]]:
        def make() -> gym.Env[Any, Any]:
            if asynchronous and multiprocessing.parent_process() is not None:
                for number in SIGNALS:  # the parent process handles them, and saves
                    signal.signal(number, signal.SIG_IGN)
            env = make_env(task, seed + index, lives_end=lives_end)
            made.append(env)
            return env

        return make

    makers = [maker(i) for i in range(num_envs)]
    if asynchronous and max(num_envs, cores()) > 1:
        if TaskId.parse(str(task)).draws and (problem := prepare_rendering(True)):
            raise TaskError(problem)  # once, and not in every process
        try:
            with without_signals():
                mode = AutoresetMode.NEXT_STEP
                return ClosableAsyncVectorEnv(makers, context="spawn", autoreset_mode=mode, worker=quiet_worker)
        except (EOFError, ConnectionError) as error:
            raise TaskError(
                f"a process of {task} ended while it began: it was killed, or memory is full; give fewer --train.envs "
                "or the command again"
            ) from error
    try:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    except BaseException:
        for env in made:
            env.close()
        raise


def endless(task: TaskId) -> bool:
    """Whether the task names no time limit, so that its episodes are cut off after EPISODE_LIMIT steps."""
    return task.suite == "gym" and gym_tasks.registered(task.name).max_episode_steps is None


def how_shown(envs: gym.vector.VectorEnv[Any, Any, Any]) -> list[str]:
    """Lines for a person about observations that are shown otherwise than they might expect: grids and images."""
    copies = getattr(envs, "envs", None)  # those in processes are tasks of ours, which need no such line
    if not copies or not copies[0].has_wrapper_attr("how_shown"):
        return []
    return list(copies[0].get_wrapper_attr("how_shown"))


def _check_dmc(name: str) -> str:
    if not dmc.installed():
        raise TaskError("dmc tasks need dm_control: pip install dm-control==1.0.50 mujoco==3.17.0")
    name = name.replace("-", "_")
    base = name.partition("@")[0]
    if base not in dmc.TASKS:
        raise TaskError(f"there is no dmc task {base!r}; {near(base, dmc.TASKS, 'dmc', EXAMPLES['dmc'])}")
    about = f"dmc:{base}@nov has positions without velocities, @pixels and @fast_pixels have images"
    parts = variants.check("dmc", name, ("nov", *PIXELS), about)
    if parts.view == "nov" and base not in dmc.WITHOUT_VELOCITIES:
        raise TaskError(f"dmc:{base} mixes positions and velocities, so there is no dmc:{base}@nov")
    return parts.name


def _check_toy(name: str) -> str:
    variants.refuse("toy", name)
    toy.make_toy(name)  # cheap, and the only place that knows which numbers are allowed
    return name


def _check_game(suite: str, name: str) -> str:
    variants.refuse(suite, name)
    return atari.check_game(suite, name)


_CHECKS: dict[str, Callable[[str], str]] = {
    "dmc": _check_dmc,
    "gym": gym_tasks.check,
    "toy": _check_toy,
    **{suite: partial(_check_game, suite) for suite in atari.STICKY},
}


def _with_suites(text: str, name: str) -> list[str]:
    """Full task names that a text without a known suite may have meant."""
    names = []
    for candidate in dict.fromkeys((text, name)):
        if candidate.replace("-", "_") in dmc.TASKS:
            names.append(f"dmc:{candidate.replace('-', '_')}")
        if candidate in gym.registry:
            names.append(f"gym:{candidate}")
        if toy.is_name(candidate):
            names.append(f"toy:{candidate}")
    if not names and name and re.search(r"-v\d+$", name):
        names.append(f"gym:{text}")  # "my_package:MyEnv-v0" without its suite
    return names or [f"dmc:{match}" for match in difflib.get_close_matches(name or text, dmc.TASKS, n=1)]
