"""stable-baselines3's SAC, PPO and DQN through the same environments, evaluation and files.

They run with the library's own settings, except where a run is shorter than one of them. A baseline acts like a
`Dreamer` (one loop per step), so that evaluation, video and reports are the same code.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from agent.data.checkpoint import Store
from agent.errors import Interrupted, UsageError
from agent.evaluation.episodes import Episode
from agent.interop.dream_env import HORIZON, Dreams, dream_spaces, fall_asleep
from agent.learning.policy import Memory
from agent.logs.logger import Logger
from agent.runtime import resolve_device
from agent.settings import from_dict
from agent.spaces import Spaces, gym_spaces
from agent.training.schedule import Every, ctrl_c
from agent.training.trainer import TrainConfig

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"sac": SAC, "ppo": PPO, "dqn": DQN}


class Vector(gym.ObservationWrapper[np.ndarray, Any, dict[str, np.ndarray]]):
    """The entries of the observation side by side, as the library's MlpPolicy wants them."""

    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        assert isinstance(env.observation_space, gym.spaces.Dict)
        size = sum(gym.spaces.flatdim(space) for space in env.observation_space.values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate(list(observation.values()), dtype=np.float32)


class DreamVecEnv(VecEnv):
    """Many dreams of one run side by side, for any algorithm of the library; observations as `Vector` has them.

    run: folder of a finished run, and its task if that is to be checked; count: how many; horizon: steps of a dreamt
    episode. Raises UsageError.
    """

    def __init__(
        self, run: str | Path, task: str | None = None, count: int = 16, horizon: int = HORIZON, seed: int = 0
    ):
        sleeper = fall_asleep(run, vectors_only=True)
        if task not in (None, sleeper.task):
            raise UsageError(f"{run} dreams of {sleeper.task}, not of {task}")
        agent = sleeper.agent
        self.dreams = Dreams(agent.averaged.world, agent.spaces.action, sleeper.starts, count, horizon, seed)
        self.render_mode = None
        size, action = width_of(agent.spaces), dream_spaces(agent)[1]
        super().__init__(count, gym.spaces.Box(-np.inf, np.inf, (size,), np.float32), action)
        self.totals, self.actions = np.zeros(count), np.zeros(0)

    @staticmethod
    def flat(obs: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate(list(obs.values()), -1)

    def reset(self) -> np.ndarray:
        if self._seeds[0] is not None:
            self.dreams.seed(self._seeds[0])
            self._reset_seeds()
        self.totals[:] = 0.0
        return self.flat(self.dreams.begin(torch.ones(self.num_envs, dtype=torch.bool)))

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """The library's contract: where an episode is over, the next one's first observation is returned."""
        obs, reward, terminated, truncated = self.dreams.step(self.actions)
        done, last = terminated | truncated, self.flat(obs)
        self.totals += reward
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            episode = {"r": self.totals[i], "l": int(self.dreams.age[i])}
            infos[i] = {"terminal_observation": last[i], "TimeLimit.truncated": bool(truncated[i]), "episode": episode}
        if done.any():
            last = self.flat(self.dreams.begin(torch.from_numpy(done)))
            self.totals[done] = 0.0
        return last, reward.astype(np.float32), done, infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def one_env(make_env: Callable[[], gym.Env[Any, Any]]) -> VecEnv:
    """The real environment as the library wants it."""
    return DummyVecEnv([lambda: Monitor(Vector(make_env()))])


def width_of(spaces: Spaces) -> int:
    """Numbers of an observation, side by side. Raises UsageError where there are images."""
    sizes = list(spaces.obs.values())
    vectors = [size for size in sizes if isinstance(size, int)]
    if len(vectors) < len(sizes):
        raise UsageError("the baselines see vectors only, and this task shows images; leave --agent out")
    return sum(vectors)


class Baseline:
    """One algorithm of stable-baselines3 on spaces like ours. Raises UsageError where it cannot act in them."""

    run_cap = 1

    def __init__(
        self, name: str, spaces: Spaces, env: VecEnv | None, cfg: TrainConfig,
        seed: int = 0, device: str | torch.device = "cpu", repeat: int = 1,
    ):  # fmt: skip
        kinds = {"sac": "continuous", "dqn": "discrete"}
        mine = "discrete" if spaces.action.discrete else "continuous"
        if kinds.get(name, mine) != mine:
            fitting = "ppo or dqn" if spaces.action.discrete else "ppo or sac"
            raise UsageError(f"--agent {name} cannot act here: the task's actions are {mine}; use {fitting}")
        width_of(spaces)
        self.name, self.spaces = name, spaces
        env = env or one_env(lambda: Blank(spaces))
        settings: dict[str, Any] = {"seed": seed, "device": device}
        if name == "ppo":  # it learns only after so many steps, which may be all that a short run has
            settings["n_steps"] = min(2048, max(64, cfg.steps // repeat // 256 * 64)) // env.num_envs
        else:
            settings["buffer_size"] = min(1_000_000, cfg.steps // repeat + 1)  # the library's, or all there will be
        self.model = ALGORITHMS[name]("MlpPolicy", env, **settings)

    def act(
        self,
        obs: Mapping[str, np.ndarray],
        memory: Memory | None,
        is_first: np.ndarray,
        explore: bool = True,
        max_loops: int | None = None,
    ) -> tuple[np.ndarray, None, np.ndarray]:
        """As `Dreamer.act`: the mean action (E, ...) unless exploring, no memory, one loop."""
        flat = np.concatenate([np.asarray(obs[name], np.float32) for name in self.spaces.obs], -1)
        action, _ = self.model.predict(flat, deterministic=not explore)
        return action, None, np.ones(len(flat), int)

    def parameter_counts(self) -> dict[str, int]:
        """Trained numbers of the policy with all its networks."""
        return {self.name: sum(p.numel() for p in self.model.policy.parameters())}

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.model.policy.state_dict()}

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], device: str = "cpu") -> Baseline:
        """The agent of a checkpoint, to act. Raises UsageError."""
        train = from_dict(TrainConfig, saved["config"].get("train", {}), "train.")
        spaces = Spaces.of(saved["spaces"])
        agent = cls(saved["config"]["agent"], spaces, None, train, device=resolve_device(device))
        try:
            agent.model.policy.load_state_dict(saved["agent"]["policy"])
        except (KeyError, RuntimeError) as error:
            raise UsageError("the checkpoint is of another version of stable-baselines3") from error
        return agent

    @classmethod
    def from_library(cls, path: str, spaces: Spaces) -> Baseline:
        """An agent that the library has saved, to act. Raises UsageError."""
        if not Path(path).is_file():
            raise UsageError(f"there is no file {path}; give what an agent's save() wrote")
        for kind in (PPO, A2C, SAC, TD3, DDPG, DQN):
            try:
                model = kind.load(path, device="cpu")
            except Exception:  # of another algorithm; each fails in its own way
                continue
            if model.observation_space.shape != (width_of(spaces),):
                raise UsageError(f"{path} sees {model.observation_space}, the task shows {width_of(spaces)} numbers")
            if isinstance(model.action_space, gym.spaces.Discrete) != spaces.action.discrete:
                raise UsageError(f"{path} acts in {model.action_space}, which is not the task's")
            agent = cls.__new__(cls)
            agent.name, agent.spaces, agent.model = kind.__name__.lower(), spaces, model
            return agent
        raise UsageError(f"{path} is no agent of stable-baselines3 (PPO, A2C, SAC, TD3, DDPG or DQN)")


class Blank(gym.Env[dict[str, np.ndarray], Any]):
    """Spaces without a world, for an agent that only acts."""

    def __init__(self, spaces: Spaces):
        seen, self.action_space = gym_spaces(spaces)
        self.observation_space = cast(gym.Space[dict[str, np.ndarray]], seen)


class BaselineTrainer:
    """Trains a `Baseline` and leaves the files of a run. The interface is that of `Trainer`; there is no resuming."""

    def __init__(
        self,
        cfg: TrainConfig,
        agent: Baseline,
        logger: Logger,
        evaluate: Callable[[bool, Callable[[], bool]], list[Episode]],
        store: Store,
        repeat: int = 1,
    ):
        self.cfg, self.agent, self.logger, self.evaluate, self.store = cfg, agent, logger, evaluate, store
        self.repeat, self.step = repeat, 0
        self.returns: deque[float] = deque(maxlen=10)
        self.episodes: list[Episode] = []
        self.evaluations: list[float] = []
        self.best = -np.inf
        self.finished = self.stopping = False

    def run(self) -> bool:
        """Train to the last step or minute and evaluate. False when Ctrl-C ended it before."""
        with ctrl_c(self.stop):
            try:
                self.agent.model.learn(self.cfg.steps // self.repeat, callback=Watch(self))
                if not self.stopping:
                    self.finish()
            except Interrupted:
                pass
            self.save("latest")
        return self.finished

    def stop(self) -> None:
        self.stopping = True

    def finish(self) -> None:
        """Evaluate for the last time."""
        self.episodes = self.log_episodes(final=True)
        self.finished = True

    def log_episodes(self, final: bool) -> list[Episode]:
        episodes = self.evaluate(final, lambda: self.stopping)
        mean = float(np.mean([episode["return"] for episode in episodes]))
        self.logger.evaluation(self.step, cast(list[dict[str, float]], episodes))
        self.logger.scalars(self.step, {"eval/return": mean})
        if mean >= self.best:
            self.best = mean
            self.save("best")
        if not final:
            self.evaluations.append(mean)
        return episodes

    def save(self, name: str) -> None:
        self.store(name, {"step": self.step, "agent": self.agent.state_dict()})

    def recent(self) -> dict[str, float]:
        """As `Trainer.recent`."""
        means = {"last_3_evaluations": self.evaluations[-3:], "last_10_training_episodes": list(self.returns)}
        return {name: float(np.mean(values)) for name, values in means.items() if values}


class Watch(BaseCallback):
    """After every step of the library's loop: logs, evaluations, and the end."""

    def __init__(self, trainer: BaselineTrainer):
        super().__init__()
        self.trainer, self.start = trainer, time.perf_counter()
        cfg = trainer.cfg
        self.should_log, self.should_eval = Every(cfg.log_every), Every(cfg.eval_every)
        self.marks = (self.start, 0)

    def _on_step(self) -> bool:
        trainer, cfg = self.trainer, self.trainer.cfg
        step = trainer.step = self.num_timesteps * trainer.repeat
        share = max(step / cfg.steps, (time.perf_counter() - self.start) / (60 * cfg.minutes) if cfg.minutes else 0.0)
        for info in self.locals["infos"]:
            if "episode" in info:
                ret, length = float(info["episode"]["r"]), int(info["episode"]["l"]) * trainer.repeat
                trainer.returns.append(ret)
                trainer.logger.episode(step, 0, ret, length)
        if self.should_eval(step) and share < 1.0:
            trainer.log_episodes(final=False)
        if self.should_log(step):
            self.log(step)
        trainer.logger.progress(step, min(1.0, share))
        return share < 1.0 and not trainer.stopping

    def log(self, step: int) -> None:
        """The library's own numbers and ours, since the last call."""
        now, before = time.perf_counter(), self.marks
        self.marks = (now, step)
        values = {name: float(v) for name, v in self.model.logger.name_to_value.items() if isinstance(v, int | float)}
        values = {name: value for name, value in values.items() if not name.startswith("time/")}
        speed = (step - before[1]) / max(1e-9, now - before[0])
        self.trainer.logger.scalars(step, values | {"speed/steps": speed})
        self.trainer.logger.write(step)
