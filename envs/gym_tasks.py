"""Gymnasium's tasks, and those of users' own modules: their names, and how they are made.

A name is ID, MODULE:ID or either with @grid or @image, @repeat4 or both behind it.
"""

import importlib
import sys
import warnings
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator

from envs import variants
from envs.errors import TaskError
from envs.gym_adapter import GymAdapter
from envs.observations import VARIANTS
from envs.rendering import prepare_rendering
from envs.suggestions import near

EPISODE_LIMIT = 10_000
"""Steps after which an episode is cut off where a Gymnasium task names no limit of its own."""

EXAMPLE = "gym:Pendulum-v1"
OUR_NAMES = ("agent", "benchmarks", "docs", "envs", "evaluate", "experiments", "train_agent", "world_model")
"""Modules and folders of this program: a user's module of such a name is not found."""


# ---------------------------------------------------------------------- names


def registered(name: str) -> EnvSpec:
    """Gymnasium's entry of a task whose module is imported."""
    return gym.spec(name.partition("@")[0].rpartition(":")[2])


def check(name: str) -> str:
    """The name, whose module is then imported. Raises TaskError where there is no such task."""
    whole = name.partition("@")[0]
    module, colon, env_id = whole.rpartition(":")
    about = f"gym:{whole}@grid reads grids and images number by number, gym:{whole}@image shows them as images"
    parts = variants.check("gym", name, VARIANTS, about)
    if colon:
        _import_registering_module(module, env_id)
    if env_id not in gym.registry:
        _refuse_our_name(module, env_id)
        hint = f"a task of another package is written gym:its_module:{env_id or 'MyEnv-v0'}; "
        suggestion = near(env_id, list(gym.registry), f"gym:{module}" if colon else "gym", EXAMPLE)
        raise TaskError(f"there is no Gymnasium task {env_id!r}; {'' if colon else hint}{suggestion}")
    return parts.name


def _import_registering_module(module: str, env_id: str) -> None:
    if module.endswith(".py") or "/" in module:
        *folders, file = module.removesuffix(".py").split("/")
        where = f", with PYTHONPATH={'/'.join(folders) or '/'} in front of the command" if folders else ""
        raise TaskError(
            f"{module!r} is a file, and a task names a module: did you mean gym:{file}:{env_id or 'MyEnv-v0'}{where}?"
        )
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise TaskError(f"the module {module!r} needs {error.name!r}, which is not installed") from error
        _refuse_our_name(module, env_id)
        raise TaskError(
            f"the module {module!r} cannot be found; it must be importable: run from the folder that holds "
            "it with that folder on PYTHONPATH (PYTHONPATH=.), or install it"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        raise TaskError(f"importing {module!r} failed: {type(error).__name__}: {error}; look at that module") from error


def _refuse_our_name(module: str, env_id: str) -> None:
    """Raise TaskError where a module that holds no such task has the name of one of ours, which hides it."""
    top, dot, rest = module.partition(".")
    if top in OUR_NAMES:
        raise TaskError(
            f"the module {module!r} holds no task {env_id!r}: this program has a package {top!r} of its own, which "
            f"hides yours; rename yours, for example gym:my_{top}{dot}{rest}:{env_id}"
        )


# ---------------------------------------------------------------------- environments


def make(name: str, render_mode: str | None) -> gym.Env[Any, Any]:
    """One environment in this package's format. Raises TaskError where it cannot be made or drawn."""
    whole, variant, repeat = variants.split(name)
    if render_mode is not None and render_mode not in _render_modes(whole):
        raise TaskError(f"gym:{whole} cannot be drawn: it does not offer the render mode {render_mode!r}")
    # Many custom environments have no argument render_mode: it is given only where frames are asked for.
    wanted = {} if render_mode is None else {"render_mode": render_mode}
    limit = registered(whole).max_episode_steps
    try:
        # Without Gymnasium's checks and time limit, which fail in words of their own before GymAdapter could look.
        env = gym.make(whole.rpartition(":")[2], max_episode_steps=-1, disable_env_checker=True, **wanted)  # type: ignore[arg-type]
    except gym.error.Error as error:  # missing packages of Gymnasium's own tasks come with an install line
        raise TaskError(f"gym:{whole} cannot be made: {error}") from error
    except ImportError as error:
        hint = f"; install the package that holds it: pip install {error.name}" if error.name else ""
        raise TaskError(f"gym:{whole} cannot be made: {error}{hint}") from error
    except (Exception, SystemExit) as error:  # whatever the environment's own constructor does
        raise TaskError(f"gym:{whole} cannot be made: {type(error).__name__}: {error}; look at its code") from error
    if limit is None and (env.spec is None or env.spec.max_episode_steps is None):
        limit = EPISODE_LIMIT  # an episode without end would be an evaluation without end
    try:
        if render_mode is not None:
            _prepare_drawing(env)
        adapted: gym.Env[Any, Any] = GymAdapter(env, variant, f"gym:{whole}")
    except TaskError:
        try:
            env.close()
        except (Exception, SystemExit) as error:  # the first reason counts
            print(f"note: closing gym:{whole} failed: {type(error).__name__}: {error}", file=sys.stderr)
        raise
    # The limit counts simulator steps, so that a task lasts as long with @repeatN as without.
    limited = adapted if limit is None else gym.wrappers.TimeLimit(adapted, limit)
    return limited if repeat is None else variants.Repeat(limited, repeat)


def _render_modes(name: str) -> list[str]:
    """What the environment's class says that it can draw; "rgb_array" where that shows only when it is made."""
    entry = registered(name).entry_point
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            creator = load_env_creator(entry) if isinstance(entry, str) else entry
        metadata = getattr(creator, "metadata", None)
    except Exception:  # making it says what is wrong
        metadata = None
    return list(metadata.get("render_modes") or []) if isinstance(metadata, dict) else ["rgb_array"]


def _prepare_drawing(env: gym.Env[Any, Any]) -> None:
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise TaskError(f"{env.spec.id if env.spec else env} cannot be drawn: it needs the render mode 'rgb_array'")
    # Gymnasium's MuJoCo tasks open OpenGL at the first frame, so the choice can wait until here.
    mujoco_env = sys.modules.get("gymnasium.envs.mujoco.mujoco_env")
    uses_mujoco = mujoco_env is not None and isinstance(env.unwrapped, mujoco_env.MujocoEnv)
    if uses_mujoco and (problem := prepare_rendering(True)):
        raise TaskError(problem)
