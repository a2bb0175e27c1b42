"""The learned world model as an environment: others can learn inside the dream.

    import gymnasium
    env = gymnasium.make("agent:LoopedDreamer/Dream-v0", run="runs/dmc-cartpole_swingup/small-s0-20261123-1456")

Observations are what the model's decoder shows, in the units and with the names of the real task, so that whoever
learns here can act there. Episodes start at a state of the run's own experience and last `horizon` steps, or until the
model says that the episode is over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agent.data.checkpoint import find_checkpoint, read_checkpoint, replay_of
from agent.data.dataset import whole_episodes
from agent.errors import UsageError
from agent.evaluation.open_loop import watch_rows
from agent.learning.dreamer import Dreamer
from agent.spaces import ActionSpec, from_env, gym_spaces
from world_model import LatentState, WorldModel

HORIZON = 50
"""Steps of a dreamt episode, by default: further on, errors of small models outgrow what they predict."""


class Step(NamedTuple):
    """What a batch of dreams returns: obs {name: (E, O)}, and (E,) reward, terminated, truncated."""

    obs: dict[str, np.ndarray]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Dreams:
    """`count` dreams that step together. starts (L, ...): the states they may begin in."""

    def __init__(self, world: WorldModel, spec: ActionSpec, starts: LatentState, count: int, horizon: int, seed: int):
        if horizon < 1 or count < 1:
            raise UsageError(f"dreams need a horizon and a number of at least 1, got {horizon} and {count}")
        self.world, self.spec, self.starts, self.horizon = world, spec, starts, horizon
        self.generator = torch.Generator().manual_seed(seed)
        self.prepared = world.core.prepare()
        self.age = torch.zeros(count, dtype=torch.long)
        self.state = starts.map(lambda leaf: leaf[:1].repeat_interleave(count, 0))
        self.begin(torch.ones(count, dtype=torch.bool))

    def seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def begin(self, which: Tensor) -> dict[str, np.ndarray]:
        """New episodes where which (E,) is True; the observations of all."""
        count = int(which.sum())
        picks = torch.randint(len(self.starts.deter), (count,), generator=self.generator)
        self.state = self.state.map(torch.Tensor.clone)
        for leaf, source in zip(self.state, self.starts, strict=True):
            leaf[which] = source[picks]
        self.age[which] = 0
        return self.show()

    @torch.no_grad()
    def step(self, actions: np.ndarray) -> Step:
        """One imagined step of every dream; actions are those of the environment."""
        taken = from_env(torch.as_tensor(actions), self.spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=self.generator)))
            self.state, _ = self.world.dream_step(self.state, taken, self.prepared)
        feat = self.state.feat()
        reward = self.world.twohot.mean(self.world.reward(feat))
        goes_on = torch.sigmoid(self.world.cont(feat).squeeze(-1))
        ends = torch.rand(len(goes_on), generator=self.generator) > goes_on
        self.age += 1
        cut = (self.age >= self.horizon) & ~ends
        return Step(self.show(), reward.numpy().astype(np.float64), ends.numpy(), cut.numpy())

    @torch.no_grad()
    def show(self) -> dict[str, np.ndarray]:
        """The decoded observations; colours are 0 to 255, as in the task."""
        seen = {name: value.numpy() for name, value in self.world.decode(self.state).items()}
        images = self.world.observation_model.images.shapes if self.world.observation_model.images else {}
        return seen | {name: np.rint(255.0 * seen[name]).astype(np.uint8) for name in images}


class Sleeper(NamedTuple):
    """A run, ready to dream: its task, world model, spaces, and the states of its experience."""

    task: str
    agent: Dreamer
    starts: LatentState


def fall_asleep(run: str | Path, vectors_only: bool = False) -> Sleeper:
    """Load a finished run with its replay. Raises UsageError where there is none, or it is no run of a Dreamer."""
    path = find_checkpoint(run)
    saved = read_checkpoint(path)
    if saved["config"].get("agent", "dreamer") != "dreamer":
        raise UsageError(f"{run} is a run of {saved['config']['agent']}, which has no world model to dream with")
    agent = Dreamer.from_checkpoint(saved, "cpu")
    images = agent.world.observation_model.images
    if images and vectors_only:
        raise UsageError(f"{run} dreams of images, and the baselines see vectors only")
    if images and not images.decodes:
        raise UsageError(f"{run} was trained without a decoder of images: its dreams do not show them")
    rows = whole_episodes(replay_of(saved, path))
    if not len(rows["reward"]):
        raise UsageError(f"{run} holds no whole episode to begin dreams in")
    states = watch_rows(agent.averaged.world, rows, "cpu")
    goes_on = torch.from_numpy(~rows["is_last"])  # nothing follows the last row of an episode
    return Sleeper(saved["task"], agent, states.map(lambda leaf: leaf[goes_on]))


def dream_spaces(agent: Dreamer) -> tuple[gym.spaces.Dict, gym.Space[Any]]:
    """The spaces of observations and actions, those of the real task."""
    return gym_spaces(agent.spaces)


class DreamEnv(gym.Env[dict[str, np.ndarray], Any]):
    """One dream at a time. run: folder of a finished run; horizon: steps of an episode."""

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, run: str | Path, horizon: int = HORIZON):
        sleeper = fall_asleep(run)
        agent = sleeper.agent
        self.observation_space, self.action_space = dream_spaces(agent)  # type: ignore[assignment]
        self.dreams = Dreams(agent.averaged.world, agent.spaces.action, sleeper.starts, 1, horizon, seed=0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin a dream; the same `seed` begins the same one."""
        super().reset(seed=seed)
        if seed is not None:
            self.dreams.seed(seed)
        return self._first(self.dreams.begin(torch.ones(1, dtype=torch.bool))), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One imagined step."""
        obs, reward, terminated, truncated = self.dreams.step(np.asarray(action)[None])
        return self._first(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    @staticmethod
    def _first(obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value[0] for name, value in obs.items()}
