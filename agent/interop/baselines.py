"""stable-baselines3's SAC, PPO and DQN as agents of this project, and its interface to our environments.

They run with the library's own settings, except where a run is shorter than one of them. A `Baseline` acts like a
`Dreamer` with one loop per step, so evaluation, video and reports are the same code.

Symbols: E environments that step together, O entries of the flattened observation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from agent.env_stepper import require_finite
from agent.errors import UsageError, failures
from agent.interop.dream_env import HORIZON, DreamBatch, load_dream
from agent.runtime import resolve_device
from agent.settings import from_dict
from agent.spaces import Spaces, gym_spaces
from agent.training.train_config import TrainConfig

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"sac": SAC, "ppo": PPO, "dqn": DQN}
"""Algorithms that can be trained, by the name of --agent."""
LOADABLE: tuple[type[BaseAlgorithm], ...] = (PPO, A2C, SAC, TD3, DDPG, DQN)
"""Algorithms whose saved agents can be evaluated."""


# ---------------------------------------------------------------------- environments


def make_sb3_env(make_env: Callable[[], gym.Env[Any, Any]]) -> VecEnv:
    """One environment as the library's MlpPolicy takes it: observations flattened to a vector (1, O)."""
    env = make_env()
    try:
        return DummyVecEnv([lambda: Monitor(gym.wrappers.FlattenObservation(Named(env)))])
    except BaseException:
        env.close()
        raise


class Named(gym.Wrapper[Any, Any, Any, Any]):
    """What goes wrong inside the environment is an EnvironmentFailure, and what is not finite a BadStep."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        with failures():
            obs, info = self.env.reset(seed=seed, options=options)
        require_finite({name: np.asarray(value)[None] for name, value in obs.items()})
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with failures():
            obs, reward, *rest = self.env.step(action)
        require_finite({name: np.asarray(value)[None] for name, value in obs.items()}, np.array([reward], np.float64))
        return obs, reward, *rest


def observation_size(spaces: Spaces) -> int:
    """Entries of the flattened observation. Raises UsageError where there are images."""
    sizes = list(spaces.obs.values())
    vectors = [size for size in sizes if isinstance(size, int)]
    if len(vectors) < len(sizes):
        raise UsageError("the baselines see vectors only, and this task shows images; leave --agent out")
    return sum(vectors)


class DreamVecEnv(VecEnv):
    """Dreams of one run side by side, for any algorithm of the library; observations are flattened, (E, O).

    run: folder of a finished run; task: raise where the run is of another one; count: number of dreams E; horizon:
    steps of an episode. Raises UsageError.
    """

    def __init__(
        self, run: str | Path, task: str | None = None, count: int = 16, horizon: int = HORIZON, seed: int = 0
    ):
        source = load_dream(run, vectors_only=True)
        if task not in (None, source.task):
            raise UsageError(f"{run} dreams of {source.task}, not of {task}: give a run of that task")
        world, spaces = source.agent.averaged.world, source.agent.spaces
        self.dreams = DreamBatch(world, spaces.action, source.start_states, count, horizon, seed)
        self.render_mode = None
        observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_size(spaces),), np.float32)
        super().__init__(count, observation_space, gym_spaces(spaces)[1])
        self.returns, self.actions = np.zeros(count), np.zeros(0)

    def reset(self) -> np.ndarray:
        """Start new episodes in all dreams; `seed` before it makes them reproducible."""
        if self._seeds[0] is not None:
            self.dreams.seed(self._seeds[0])
            self._reset_seeds()
        self.returns[:] = 0.0
        return self._flat(self.dreams.reset(torch.ones(self.num_envs, dtype=torch.bool)))

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """As the library defines it: where an episode ends, the first observation of the next one is returned."""
        decoded, reward, terminated, truncated = self.dreams.step(self.actions)
        done, obs = terminated | truncated, self._flat(decoded)
        self.returns += reward
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            episode = {"r": self.returns[i], "l": int(self.dreams.elapsed[i])}
            infos[i] = {"terminal_observation": obs[i], "TimeLimit.truncated": bool(truncated[i]), "episode": episode}
        if done.any():
            obs = self._flat(self.dreams.reset(torch.from_numpy(done)))
            self.returns[done] = 0.0
        return obs, reward.astype(np.float32), done, infos

    @staticmethod
    def _flat(obs: dict[str, np.ndarray]) -> np.ndarray:
        """{name: (E, ...)} -> (E, O)"""
        return np.concatenate(list(obs.values()), -1)

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


class PlaceholderEnv(gym.Env[dict[str, np.ndarray], Any]):
    """Spaces alone, from which the library builds an algorithm that will only act."""

    def __init__(self, spaces: Spaces):
        observation_space, self.action_space = gym_spaces(spaces)
        self.observation_space = cast(gym.Space[dict[str, np.ndarray]], observation_space)


# ---------------------------------------------------------------------- the agent


def check_algorithm(name: str, spaces: Spaces) -> None:
    """Raise UsageError where the algorithm cannot act in these spaces."""
    needed = {"sac": "continuous", "dqn": "discrete"}
    actions = "discrete" if spaces.action.discrete else "continuous"
    if needed.get(name, actions) != actions:
        fitting = "ppo or dqn" if spaces.action.discrete else "ppo or sac"
        raise UsageError(f"--agent {name} cannot act here: the task's actions are {actions}; use {fitting}")
    observation_size(spaces)


class Baseline:
    """One algorithm of stable-baselines3. env: where it learns, None where it only acts.

    The baseline owns `env`: `close` closes it, and so does a constructor that fails. repeat: simulator steps per
    action. Raises UsageError where the algorithm does not fit the task's spaces.
    """

    run_cap = 1
    env: VecEnv | None = None

    def __init__(
        self, name: str, spaces: Spaces, env: VecEnv | None, cfg: TrainConfig,
        seed: int = 0, device: str | torch.device = "cpu", repeat: int = 1,
    ):  # fmt: skip
        self.name, self.spaces, self.env = name, spaces, env
        try:
            check_algorithm(name, spaces)
            env = env or make_sb3_env(lambda: PlaceholderEnv(spaces))
            settings: dict[str, Any] = {"seed": seed, "device": device}
            if name == "ppo":  # its first update comes after n_steps, which a short run may not reach
                settings["n_steps"] = min(2048, max(64, cfg.steps // repeat // 256 * 64)) // env.num_envs
            else:  # the library's default, or all steps of the run
                settings["buffer_size"] = min(1_000_000, cfg.steps // repeat + 1)
            self.model = ALGORITHMS[name]("MlpPolicy", env, **settings)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the environment where it learns."""
        if self.env is not None:
            self.env.close()

    def act(
        self,
        obs: Mapping[str, np.ndarray],
        memory: None,
        is_first: np.ndarray,
        explore: bool = True,
        max_loops: int | None = None,
    ) -> tuple[np.ndarray, None, np.ndarray]:
        """As `Dreamer.act`: actions (E, ...), the mean ones unless exploring; no memory; one loop (E,)."""
        flat = np.concatenate([np.asarray(obs[name], np.float32) for name in self.spaces.obs], -1)  # (E, O)
        action, _ = self.model.predict(flat, deterministic=not explore)
        return action, None, np.ones(len(flat), int)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the policy with all its networks."""
        return {self.name: sum(p.numel() for p in self.model.policy.parameters())}

    def state_dict(self) -> dict[str, Any]:
        """The policy's weights: enough to act, not to continue training."""
        return {"policy": self.model.policy.state_dict()}

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], device: str = "cpu") -> Baseline:
        """The agent of a checkpoint of this project, to act. Raises UsageError."""
        train = from_dict(TrainConfig, saved["config"]["train"], "train.")
        spaces = Spaces.of(saved["spaces"])
        agent = cls(saved["config"]["agent"], spaces, None, train, device=resolve_device(device))
        try:
            agent.model.policy.load_state_dict(saved["agent"]["policy"])
        except (KeyError, RuntimeError) as error:
            raise UsageError("the checkpoint is of another version of stable-baselines3") from error
        return agent

    @classmethod
    def from_sb3(cls, path: str, spaces: Spaces) -> Baseline:
        """An agent saved by stable-baselines3, to act. Raises UsageError where it does not fit the spaces."""
        if not Path(path).is_file():
            raise UsageError(f"there is no file {path}; give what an agent's save() wrote")
        for algorithm in LOADABLE:
            try:
                model = algorithm.load(path, device="cpu")
            except Exception:  # a file of another algorithm; each fails in its own way
                continue
            if model.observation_space.shape != (observation_size(spaces),):
                raise UsageError(
                    f"{path} takes {model.observation_space}, and the task shows {observation_size(spaces)} numbers: "
                    "give an agent of this task"
                )
            acts = gym_spaces(spaces)[1]
            if model.action_space != acts:
                raise UsageError(
                    f"{path} acts in {model.action_space}, the task in {acts}: give an agent that was trained in "
                    "envs.make_env(task), or in a run's dream"
                )
            agent = cls.__new__(cls)
            agent.name, agent.spaces, agent.model = algorithm.__name__.lower(), spaces, model
            return agent
        raise UsageError(f"{path} is no agent of stable-baselines3: expected one of PPO, A2C, SAC, TD3, DDPG or DQN")
