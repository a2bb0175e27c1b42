"""The agent: world model and actor-critic behind the verbs act, update, save and load."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agent.actor_critic import ActionSpec, ActorCritic, BehaviorConfig, to_env
from agent.optimizer import FlatAdam, NonFiniteError, flatten
from world_model import Batch, LatentState, ModelConfig, WorldModel

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


class Spaces(NamedTuple):
    """Sizes of the environment, all that the agent knows of it: obs {name: O} and the action."""

    obs: dict[str, int]
    action: ActionSpec


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

    def shadow(self, dtype: torch.dtype) -> tuple[Policy, list[nn.Parameter]]:
        """A copy without gradients, and its flat parameters in the order of `parts`."""
        twin = copy.deepcopy(self)
        return twin, [flatten(params, grad=False, dtype=dtype) for params in twin.parts().values()]

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


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively; emulated they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


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
        # Two copies of the weights: a running average for evaluation, and the newest in the dreams' precision.
        self.half = torch.bfloat16 if fast_bfloat16(self.device) else torch.float32
        self.averaged, self.average_flats = self.policy.shadow(torch.float32)
        self.dreamer, self.dreamer_flats = self.policy.shadow(self.half)
        # On CPU the world model's backward pass runs beside the dreams: both only read the weights.
        self.beside = ThreadPoolExecutor(1) if self.device.type == "cpu" else None
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
        """obs {name: (E, O)} -> environment actions (E, A) or (E,), memory, loops used (E,).

        Exploring acts with the newest weights and samples; otherwise the averaged weights give the mean
        action from the most probable latents.
        """
        policy = self.policy if explore or self.optimizer.average == 0.0 else self.averaged
        tensors = {name: torch.as_tensor(obs[name], device=self.device) for name in self.spaces.obs}
        first = torch.as_tensor(is_first, device=self.device)
        action, memory, depth = policy.act(tensors, memory, first, explore, max_loops)
        return to_env(action, self.spaces.action).numpy(force=True), memory, depth.numpy(force=True)

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
        finite(world_loss, metrics)
        states = post.states.detach()
        clock = self.lap("world_model", clock)

        backward = self.beside.submit(world_loss.backward) if self.beside else world_loss.backward()
        size, length = batch.reward.shape
        count = self.behavior.cfg.starts or size * length
        tail = min(length, max(1, count // size))  # rows at the end of each sequence that start dreams
        ends = states.map(lambda leaf: leaf[:, -tail:])
        terminal = batch.is_terminal[:, -tail:]
        through = self.behavior.cfg.actor_gradient == "dynamics"
        autocast = torch.autocast(self.device.type, self.half, enabled=self.half != torch.float32)
        with autocast if through else nullcontext():
            rollout = self.dreamer.world.imagine(
                ends.map(lambda leaf: leaf.flatten(0, 1).to(self.half)),
                (self.behavior if through else self.dreamer.behavior).policy,
                self.behavior.cfg.horizon,
                1.0 - terminal.flatten().float(),
                grad=through,
            )
        clock = self.lap("imagination", clock)

        with autocast:
            behavior_loss, returns, behavior_metrics = self.behavior.loss(rollout, self.dreamer.behavior.critic)
            replay_loss = self.behavior.replay_loss(
                ends.feat(), batch.reward[:, -tail:], terminal, batch.is_last[:, -tail:], returns[:, 0].view(size, tail)
            )
        metrics |= behavior_metrics
        metrics["behavior/replay_value_loss"] = replay_loss.detach()
        metrics["loop/dream_depth"] = rollout.loops.depth.float().mean()
        metrics["loop/dream_residual"] = rollout.loops.residual.float().sum(-1).mean()
        finite(behavior_loss + replay_loss, metrics)
        (behavior_loss + replay_loss).backward()
        clock = self.lap("actor_critic", clock)
        if backward is not None:
            backward.result()
        clock = self.lap("world_backward", clock)

        factor = self.schedule(progress)
        for name, adam in self.adams.items():
            metrics[f"{name}/grad_norm"] = adam.step(factor)
        self.updates += 1
        self.follow()
        self.lap("optimizer", clock)
        self.last_depths = rollout.loops.depth
        return states, metrics

    def schedule(self, progress: float) -> float:
        """Learning-rate factor: 1 until `hold` of the run, then linearly down to `final`."""
        cfg = self.optimizer
        if progress <= cfg.hold:
            return 1.0
        return 1.0 + (cfg.final - 1.0) * min(1.0, (progress - cfg.hold) / max(1e-8, 1.0 - cfg.hold))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow critic and the two copies of the weights; at first the average follows closely."""
        self.behavior.critic.follow()
        rate = max(1.0 - self.optimizer.average, 1.0 / self.updates)
        for adam, average, half in zip(self.adams.values(), self.average_flats, self.dreamer_flats, strict=True):
            average.lerp_(adam.flat, rate)
            half.copy_(adam.flat)

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
        self.dreamer.load_state_dict(saved["policy"])
