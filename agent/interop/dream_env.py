"""The learned world model as a Gymnasium environment, in which other agents can be trained.

    import gymnasium
    env = gymnasium.make("agent:LoopedDreamer/Dream-v0", run="runs/dmc-cartpole_swingup/small-s0-20261123-1456")

Observations are what the model's decoder predicts, in the units and with the names of the real task, so that an agent
trained here can act there. Episodes start from a posterior state of the run's own replay and last `horizon` steps, or
until the model predicts their end.

Symbols: E dreams that step together, L start states.
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
from agent.evaluation.open_loop import posterior_rows
from agent.learning.dreamer import Dreamer
from agent.spaces import ActionSpec, from_env, gym_spaces
from world_model import LatentState, WorldModel

HORIZON = 50
"""Steps of an episode, by default: with more, errors of small models grow larger than what they predict."""


# ---------------------------------------------------------------------- a batch of dreams


class DreamStep(NamedTuple):
    """What a step of a batch of dreams returns: obs {name: (E, O)}, and (E,) reward, terminated, truncated."""

    obs: dict[str, np.ndarray]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class DreamBatch:
    """`count` dreams that step together. start_states (L, ...): those in which episodes may start."""

    def __init__(
        self, world: WorldModel, spec: ActionSpec, start_states: LatentState, count: int, horizon: int, seed: int
    ):
        if horizon < 1 or count < 1:
            raise UsageError(f"dreams need a horizon and a number of at least 1, got {horizon} and {count}")
        self.world, self.spec, self.start_states, self.horizon = world, spec, start_states, horizon
        self.generator = torch.Generator().manual_seed(seed)
        self.prepared = world.core.prepare()
        self.elapsed = torch.zeros(count, dtype=torch.long)  # steps of the running episodes
        self.state = start_states.map(lambda leaf: leaf[:1].repeat_interleave(count, 0))
        self.reset(torch.ones(count, dtype=torch.bool))

    def seed(self, seed: int) -> None:
        """Seed the start states and everything that is sampled from now on."""
        self.generator.manual_seed(seed)

    def reset(self, which: Tensor) -> dict[str, np.ndarray]:
        """Start new episodes where which (E,) is True; returns the observations of all dreams."""
        count = int(which.sum())
        picks = torch.randint(len(self.start_states.deter), (count,), generator=self.generator)
        self.state = self.state.map(torch.Tensor.clone)
        for leaf, start in zip(self.state, self.start_states, strict=True):
            leaf[which] = start[picks]
        self.elapsed[which] = 0
        return self.observations()

    @torch.no_grad()
    def step(self, actions: np.ndarray) -> DreamStep:
        """One imagined step of every dream. actions (E, A), or (E,) indices, as the real task takes them."""
        policy_action = from_env(torch.as_tensor(actions), self.spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=self.generator)))
            self.state, _ = self.world.dream_step(self.state, policy_action, self.prepared)
        feat = self.state.feat()
        reward = self.world.twohot.mean(self.world.reward(feat))
        continue_prob = torch.sigmoid(self.world.cont(feat).squeeze(-1))
        terminated = torch.rand(len(continue_prob), generator=self.generator) > continue_prob
        self.elapsed += 1
        truncated = (self.elapsed >= self.horizon) & ~terminated
        return DreamStep(self.observations(), reward.numpy().astype(np.float64), terminated.numpy(), truncated.numpy())

    @torch.no_grad()
    def observations(self) -> dict[str, np.ndarray]:
        """Decoded observations {name: (E, ...)}; images are uint8, as in the task."""
        decoded = {name: value.numpy() for name, value in self.world.decode(self.state).items()}
        images = self.world.observation_model.images.shapes if self.world.observation_model.images else {}
        return decoded | {name: np.rint(255.0 * decoded[name]).astype(np.uint8) for name in images}


# ---------------------------------------------------------------------- a run to dream with


class DreamSource(NamedTuple):
    """A run to dream with: its task, its agent, and the posterior states (L, ...) of its replay."""

    task: str
    agent: Dreamer
    start_states: LatentState


def load_dream(run: str | Path, vectors_only: bool = False) -> DreamSource:
    """Load a finished run and its replay. Raises UsageError where it has none, or is no run of a Dreamer."""
    path = find_checkpoint(run)
    saved = read_checkpoint(path)
    if saved["config"]["agent"] != "dreamer":
        raise UsageError(f"{run} is a run of {saved['config']['agent']}, which has no world model to dream with")
    agent = Dreamer.from_checkpoint(saved, "cpu")
    images = agent.world.observation_model.images
    if images and vectors_only:
        raise UsageError(f"{run} dreams of images, and the baselines see vectors only")
    if not agent.world.observation_model.decodes:
        raise UsageError(f"{run} was trained without a decoder, so its dreams show nothing: give another run")
    rows = whole_episodes(replay_of(saved, path))
    if not len(rows["reward"]):
        raise UsageError(f"{run} holds no whole episode in which dreams could start")
    states = posterior_rows(agent.averaged.world, rows, "cpu")
    not_last = torch.from_numpy(~rows["is_last"])  # nothing follows the last row of an episode
    return DreamSource(saved["task"], agent, states.map(lambda leaf: leaf[not_last]))


# ---------------------------------------------------------------------- the environment


class DreamEnv(gym.Env[dict[str, np.ndarray], Any]):
    """One dream at a time, with the spaces of the real task.

    run: folder of a finished run; horizon: steps of an episode. Raises UsageError as `load_dream`.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, run: str | Path, horizon: int = HORIZON):
        source = load_dream(run)
        agent = source.agent
        self.observation_space, self.action_space = gym_spaces(agent.spaces)  # type: ignore[assignment]
        self.dreams = DreamBatch(agent.averaged.world, agent.spaces.action, source.start_states, 1, horizon, seed=0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; the same `seed` starts the same one."""
        super().reset(seed=seed)
        if seed is not None:
            self.dreams.seed(seed)
        return self._first(self.dreams.reset(torch.ones(1, dtype=torch.bool))), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One imagined step."""
        obs, reward, terminated, truncated = self.dreams.step(np.asarray(action)[None])
        return self._first(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    @staticmethod
    def _first(obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """(1, ...) -> (...)"""
        return {name: value[0] for name, value in obs.items()}
