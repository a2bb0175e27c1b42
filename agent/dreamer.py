"""The agent: world model and actor-critic behind the verbs act, update, save and load."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agent.actor_critic import ActorCritic, BehaviorConfig, to_env
from agent.optimizer import FlatAdam, NonFiniteError, flatten
from agent.spaces import Spaces
from world_model import Batch, LatentState, LoopedCore, ModelConfig, WorldModel, make_rule
from world_model.ranges import ABOVE_ZERO, NOT_NEGATIVE, SHARE, require

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates and the averaged weights."""

    model_lr: float = 1e-3
    """Adam step of the world model."""
    actor_lr: float = 3e-4
    """Adam step of the actor."""
    critic_lr: float = 3e-4
    """Adam step of the critic."""
    clip: float = 100.0
    """Largest global gradient norm of each part."""
    warmup: int = 100
    """Updates over which the rates rise from zero."""
    hold: float = 0.5
    """Share of the run after which the rates fall, linearly."""
    final: float = 0.1
    """Share of the rates that is left at the end of the run."""
    average: float = 0.998
    """Decay per update of the averaged weights that evaluation uses; 0 evaluates the newest weights."""

    def __post_init__(self) -> None:
        rates = dict.fromkeys(("model_lr", "actor_lr", "critic_lr", "warmup"), NOT_NEGATIVE)
        require(self, "--optimizer.", **rates, clip=ABOVE_ZERO, hold=SHARE, final=SHARE, average=(0.0, 0.999999))


class Memory(NamedTuple):
    """What acting carries from step to step: the latent state and the last policy output (E, A)."""

    state: LatentState
    action: Tensor


class Policy(nn.Module):
    """The two networks that evaluation needs; the averaged weights are a copy of this."""

    def __init__(self, world: WorldModel, behavior: ActorCritic):
        super().__init__()
        self.world, self.behavior = world, behavior

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by optimiser."""
        modules = {"world": self.world, "actor": self.behavior.actor, "critic": self.behavior.critic.net}
        return {name: list(module.parameters()) for name, module in modules.items()}

    @torch.no_grad()
    def act(
        self,
        obs: dict[str, Tensor],
        memory: Memory | None,
        is_first: Tensor,
        explore: bool,
        max_loops: int | None = None,
    ) -> tuple[Tensor, Memory, Tensor]:
        """-> policy output (E, A), memory, loops used (E,). explore samples latents and actions."""
        if memory is None:
            action = torch.zeros(len(is_first), self.world.action_size, device=is_first.device)
            memory = Memory(self.world.initial(len(is_first)), action)
        state, stats = self.world.observe(obs, memory.action, is_first, memory.state, explore, max_loops)
        action = self.behavior.actor.act(state.feat(), explore)
        return action, Memory(state, action), stats.depth


def finite(loss: Tensor, metrics: Metrics) -> None:
    """Raise NonFiniteError with the name of the first metric that is not finite, if the loss is not."""
    if not torch.isfinite(loss):
        bad = [name for name, value in metrics.items() if not torch.isfinite(value).all()]
        raise NonFiniteError(bad[0] if bad else "total loss")


class Dreamer:
    """World model + actor-critic + optimisers on one device."""

    def __init__(
        self,
        model: ModelConfig,
        behavior: BehaviorConfig,
        optimizer: OptimizerConfig,
        spaces: Spaces,
        device: torch.device | str = "cpu",
    ):
        self.spaces, self.optimizer, self.device = spaces, optimizer, torch.device(device)
        world = WorldModel(model, spaces.obs, spaces.action.size)
        actor_critic = ActorCritic(behavior, world.feat_size, spaces.action, model.bins, model.bin_limit)
        self.policy = Policy(world, actor_critic).to(device)
        self.world, self.behavior = self.policy.world, self.policy.behavior
        rates = {"world": optimizer.model_lr, "actor": optimizer.actor_lr, "critic": optimizer.critic_lr}
        self.adams = {
            name: FlatAdam(name, params, rates[name], optimizer.clip, optimizer.warmup)
            for name, params in self.policy.parts().items()
        }
        self.averaged = copy.deepcopy(self.policy)
        self.average_flats = [flatten(params, grad=False) for params in self.averaged.parts().values()]
        self.updates = 0
        self.seconds: dict[str, float] = {}  # time spent in each part of the updates

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
        tensors = {name: torch.as_tensor(obs[name], device=self.device) for name in self.spaces.obs}
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

    def use_exit(
        self, name: str, cap: int, threshold: float | None = None, histogram: tuple[float, ...] = ()
    ) -> None:
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

    # ------------------------------------------------------------------ learning

    def update(self, batch: Batch, progress: float = 0.0) -> tuple[LatentState, Metrics]:
        """One update of everything on a (B, T) batch: world model, dreams, actor, critic.

        progress in [0, 1] is the share of the run behind us (learning-rate schedule). Returns the posterior
        states for the replay's write-back, and detached metrics. Raises NonFiniteError before any weight is
        touched when a loss is not finite.
        """
        clock = time.perf_counter()
        for adam in self.adams.values():
            adam.zero_grad()
        world_loss, post, metrics = self.world.loss(batch)
        states = post.states.detach()
        clock = self.lap("world_model", clock)

        size, length = batch.reward.shape
        count = self.behavior.starts or size * length
        tail = min(length, max(1, count // size))  # rows at the end of each sequence that start dreams
        ends = post.states.map(lambda leaf: leaf[:, -tail:])
        terminal = batch.is_terminal[:, -tail:]
        rollout = self.world.imagine(
            ends.detach().map(lambda leaf: leaf.flatten(0, 1)),
            self.behavior.policy,
            self.behavior.cfg.horizon,
            1.0 - terminal.flatten().float(),
            grad=self.behavior.through,
        )
        if self.world.surprise is not None:
            expected = self.world.surprise(rollout.states.deter[:, 1:].detach()).detach()
            rollout = rollout._replace(surprise=expected)
        clock = self.lap("imagination", clock)

        policy_loss, value_loss, returns, behavior_metrics = self.behavior.loss(rollout)
        replay_loss = self.behavior.replay_loss(
            ends.feat(), batch.reward[:, -tail:], terminal, batch.is_last[:, -tail:], returns[:, 0].view(size, tail)
        )
        metrics |= behavior_metrics
        metrics["behavior/replay_value_loss"] = replay_loss.detach()
        metrics["loop/dream_depth"] = rollout.loops.depth.float().mean()
        metrics["loop/dream_residual"] = rollout.loops.residual.float().sum(-1).mean()
        total = world_loss + value_loss + replay_loss
        finite(total + policy_loss, metrics)
        clock = self.lap("actor_critic", clock)
        parts = self.policy.parts()
        policy_loss.backward(inputs=parts["actor"])  # alone: the dynamics gradient passes through the world model
        total.backward(inputs=parts["world"] + parts["critic"])
        clock = self.lap("backward", clock)

        for name, adam in self.adams.items():  # all norms before any step: an error leaves every weight as it was
            metrics[f"{name}/grad_norm"] = adam.clip_gradient()
        for adam in self.adams.values():
            adam.step(self.schedule(progress))
        self.updates += 1
        self.follow()
        self.lap("optimizer", clock)
        self.last_depths = rollout.loops.depth
        return states, metrics

    def update_world(self, batch: Batch, progress: float = 0.0) -> tuple[LatentState, Metrics]:
        """One update of the world model alone; otherwise as `update`."""
        adam = self.adams["world"]
        adam.zero_grad()
        loss, post, metrics = self.world.loss(batch)
        finite(loss, metrics)
        loss.backward(inputs=self.policy.parts()["world"])
        metrics["world/grad_norm"] = adam.clip_gradient()
        adam.step(self.schedule(progress))
        self.updates += 1
        self.follow()
        return post.states.detach(), metrics

    def schedule(self, progress: float) -> float:
        """Learning-rate factor: 1 until `hold` of the run, then linearly down to `final`."""
        cfg = self.optimizer
        if progress <= cfg.hold:
            return 1.0
        return 1.0 + (cfg.final - 1.0) * min(1.0, (progress - cfg.hold) / max(1e-8, 1.0 - cfg.hold))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow critic and the averaged weights, which follow closely at first."""
        self.behavior.critic.follow()
        rate = max(1.0 - self.optimizer.average, 1.0 / self.updates)
        for adam, average in zip(self.adams.values(), self.average_flats, strict=True):
            average.lerp_(adam.flat, rate)

    def lap(self, name: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since
        return now

    # ------------------------------------------------------------------ persistence

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "averaged": self.averaged.state_dict(),
            "adams": {name: adam.state_dict() for name, adam in self.adams.items()},
            "updates": self.updates,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.policy.load_state_dict(saved["policy"])
        self.averaged.load_state_dict(saved["averaged"])
        for name, adam in self.adams.items():
            adam.load_state_dict(saved["adams"][name])
        self.updates = saved["updates"]

    @classmethod
    def load(cls, path: Path | str, device: str = "auto") -> Dreamer:
        """The agent of a run folder or checkpoint file; nothing else is needed.

        Raises UsageError when the file is missing, damaged or not a checkpoint, or the device is absent.
        """
        from agent.checkpoint import find_checkpoint, read_checkpoint  # it imports this module

        return cls.from_checkpoint(read_checkpoint(find_checkpoint(path)), device)

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any], device: str = "auto") -> Dreamer:
        """The agent of a checkpoint that `read_checkpoint` returned. Raises UsageError."""
        from agent.checkpoint import UsageError
        from agent.config import Config, resolve_device
        from agent.settings import from_dict

        config = from_dict(Config, saved["config"])
        parts = config.model, config.behavior, config.optimizer
        try:
            agent = cls(*parts, Spaces.of(saved["spaces"]), resolve_device(device))
        except ValueError as error:
            raise UsageError(str(error)) from error
        try:
            agent.load_state_dict(saved["agent"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UsageError(
                "the checkpoint is of another version of the model; use the commit in the run's meta.json"
            ) from error
        return agent
