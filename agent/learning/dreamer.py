"""The agent: world model and actor-critic behind the verbs act, update, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import UsageError
from agent.learning.actor_critic import ActorCritic, BehaviorConfig
from agent.learning.learner import Learner, OptimizerConfig
from agent.learning.policy import Memory, Policy
from agent.runtime import resolve_device
from agent.settings import from_dict
from agent.spaces import Spaces, to_env
from world_model import LoopedCore, ModelConfig, WorldModel, make_rule
from world_model.distributions import BIN_LIMIT, BINS


class Dreamer(Learner):
    """World model + actor-critic + optimisers on one device."""

    def __init__(
        self,
        model: ModelConfig,
        behavior: BehaviorConfig,
        optimizer: OptimizerConfig,
        spaces: Spaces,
        device: torch.device | str = "cpu",
    ):
        self.spaces = spaces
        world = WorldModel(model, spaces.obs, spaces.action.size)
        actor_critic = ActorCritic(behavior, world.feat_size, spaces.action, BINS, BIN_LIMIT)
        super().__init__(Policy(world, actor_critic), optimizer, device)

    # ------------------------------------------------------------------ acting

    def act(
        self,
        obs: dict[str, np.ndarray],
        memory: Memory | None,
        is_first: np.ndarray,
        explore: bool = True,
        max_loops: int | None = None,
    ) -> tuple[np.ndarray, Memory, np.ndarray]:
        """obs {name: (E, O) or (E, H, W, C)} -> environment actions (E, A) or (E,), memory, loops used (E,).

        Exploring acts with the newest weights and samples; otherwise the averaged weights give the mean
        action from the most probable latents.
        """
        policy = self.policy if explore or self.optimizer.average == 0.0 else self.averaged
        # A drawn frame may be a view that is upside down, which torch does not take.
        whole = {name: np.ascontiguousarray(obs[name]) for name in self.spaces.obs}
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in whole.items()}
        first = torch.as_tensor(is_first, device=self.device)
        action, memory, depth = policy.act(tensors, memory, first, explore, max_loops)
        return to_env(action, self.spaces.action).numpy(force=True), memory, depth.numpy(force=True)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: Memory | None = None,
        episode_start: np.ndarray | bool | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Memory]:
        """action, state = agent.predict(observation, state), the protocol of stable-baselines3's models.

        observation: a vector (O,) or image (H, W, C), many of them, or a dictionary of such; state: what the last
        call returned, None to begin;
        episode_start: True, or (E,) booleans, where an episode begins (not needed where state is None).
        deterministic: averaged weights and the mean action, or newest weights and a sample.
        """
        given = observation if isinstance(observation, dict) else {next(iter(self.spaces.obs)): observation}
        obs = self.spaces.arrays(given)
        name, size = next(iter(self.spaces.obs.items()))
        single = obs[name].ndim == (1 if isinstance(size, int) else 3)
        if single:
            obs = {name: value[None] for name, value in obs.items()}
        count = len(next(iter(obs.values())))
        start = np.broadcast_to(state is None if episode_start is None else episode_start, (count,))
        action, memory, _ = self.act(obs, state, np.array(start, bool), explore=not deterministic)
        return action[0] if single else action, memory

    def use_exit(self, name: str, cap: int, threshold: float | None = None, histogram: tuple[float, ...] = ()) -> None:
        """Leave the loop by another rule than the trained one, in acting and dreams, newest and averaged weights.

        cap: the most loops, up to which the random exit's histogram is even by default. Raises ValueError when
        there is no such rule, or the core has no loops to leave.
        """
        loop = self.world.cfg.loop
        for world in (self.world, self.averaged.world):
            if not isinstance(world.core, LoopedCore):
                raise ValueError(f"the core {world.cfg.core} has no loops: leave the exit rule out")
            rule = make_rule(name, loop.tokens * loop.width, cap, threshold, histogram)
            world.core.rule = rule.to(self.device)

    def parameter_counts(self) -> dict[str, int]:
        """Trained numbers of each part; the core is also in the world model's."""
        counts = {name: sum(p.numel() for p in parameters) for name, parameters in self.policy.parts().items()}
        core = sum(p.numel() for p in self.world.core.parameters())
        return {"world": counts.pop("world"), "core": core, **counts}

    @property
    def run_cap(self) -> int:
        """Most loops of a step of acting."""
        return self.world.run_cap

    # ------------------------------------------------------------------ persistence

    @classmethod
    def load(cls, path: Path | str, device: str = "auto") -> Dreamer:
        """The agent of a run folder or checkpoint file; nothing else is needed.

        Raises UsageError when the file is missing, damaged or not a checkpoint, or the device is absent.
        """
        return cls.from_checkpoint(read_checkpoint(find_checkpoint(path)), device)

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any], device: str = "auto") -> Dreamer:
        """The agent of a checkpoint that `read_checkpoint` returned. Raises UsageError."""
        kinds = {"model": ModelConfig, "behavior": BehaviorConfig, "optimizer": OptimizerConfig}
        configs = {name: from_dict(kind, saved["config"].get(name, {}), f"{name}.") for name, kind in kinds.items()}
        try:
            agent = cls(**configs, spaces=Spaces.of(saved["spaces"]), device=resolve_device(device))
        except ValueError as error:
            raise UsageError(str(error)) from error
        try:
            agent.load_state_dict(saved["agent"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UsageError(
                "the checkpoint is of another version of the model; use the commit in the run's meta.json"
            ) from error
        return agent
