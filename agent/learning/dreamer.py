"""The agent: world model and actor-critic. `Dreamer.update` is the whole algorithm.

Shapes: B sequences, T rows, L start rows of every sequence, H horizon; see `world_model/types.py` for the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import NonFiniteError, UsageError
from agent.learning.actor_critic import SLOW_RATE, ActorCritic, BehaviorConfig, Metrics, lambda_return
from agent.learning.optimizer import EMA_DECAY, FlatAdam, OptimizerConfig, flatten, rate_factor
from agent.learning.policy import Memory, Policy
from agent.learning.sequence_errors import sequence_errors
from agent.runtime import Stopwatch, resolve_device
from agent.settings import from_dict
from agent.spaces import Spaces, to_env
from world_model import Batch, LatentState, ModelConfig, WorldModel
from world_model.averages import Average, alone

NORMALISER_IMAGES = 256
"""Images from which the image normaliser is fitted before the first update."""


class Update(NamedTuple):
    """Detached: posterior states (B, T, ...); dream_depth (B*L, H), loops of each imagined step (0-d, those of the
    update, where the world model learns alone); errors (B, 2): KL(posterior || prior), |v - lambda return|."""

    states: LatentState
    dream_depth: Tensor
    metrics: Metrics
    errors: Tensor


class Execution(Protocol):
    """How an update runs (`agent/execution/`). processes: how many share a batch, each with a part of equal size."""

    processes: int

    def average(self, x: Tensor) -> Tensor:
        """The mean of a statistic of the batch over the processes, with its gradient."""

    def reduce(self, total: Tensor, metrics: Metrics) -> Metrics:
        """Average the gradients over the processes, and return the averaged metrics; `check` of the averaged total."""

    def check(self, total: Tensor, metrics: Metrics) -> None:
        """Raise NonFiniteError where `total` is not finite, now or, if nothing may be read back, after the update."""


class Dreamer:
    """World model, actor-critic, their optimisers and averaged weights, on one device."""

    def __init__(
        self,
        model: ModelConfig,
        behavior: BehaviorConfig,
        optimizer: OptimizerConfig,
        spaces: Spaces,
        device: torch.device | str = "cpu",
    ):
        if behavior.jump > model.jump:
            raise ValueError(f"--behavior.jump {behavior.jump} needs --model.jump {behavior.jump} or more")
        self.spaces, self.optimizer, self.device = spaces, optimizer, torch.device(device)
        world = WorldModel(model, spaces.obs, spaces.action.size)
        self.policy = Policy(world, ActorCritic(behavior, world.feat_size, spaces.action)).to(device)
        self.world, self.behavior = self.policy.world, self.policy.behavior
        self.optimizers = {name: FlatAdam(params, optimizer.lr) for name, params in self.policy.parts().items()}
        self.averaged = copy.deepcopy(self.policy)
        if behavior.decisions == "both":
            self.averaged.behavior.cfg = behavior.without_plans()
        self.averaged.world.observation_model.share_statistics(world.observation_model)
        self.average_flats = {name: flatten(params, grad=False) for name, params in self.averaged.parts().items()}
        self.average_rate = torch.zeros((), device=device)
        self.slow_flat = flatten(self.behavior.critic.slow.parameters(), grad=False)
        self.nonfinite: Tensor | None = None  # see `skip_step_where`
        self.updates = 0
        self.clock = Stopwatch()

    # ------------------------------------------------------------------ learning

    def update(self, batch: Batch, depth: int, execution: Execution) -> Update:
        """One update of everything on (B, T) rows: DreamerV3's, with the `depth` loops that `begin_update` has drawn.

        Where processes share a batch, B is this one's share, and all take the same optimiser step.
        Raises NonFiniteError, before any weight is moved, when a loss or a gradient is not finite.
        """
        world, behavior, parts, clock = self.world, self.behavior, self.policy.parts(), self.clock.start()
        world.observation_model.track(batch.obs, execution.average)
        for adam in self.optimizers.values():
            adam.gradient.zero_()

        # World model: posterior states along the rows, observation, reward, continue and KL losses, exit rule.
        posterior = world.observe_sequence(batch, depth)
        world_loss, metrics = world.loss(posterior, batch, execution.average)
        clock.lap("world_model")

        # Imagination: rollouts of H steps from the last L rows of every sequence.
        rows = self.start_rows(len(batch.reward), batch.reward.shape[1], execution.processes)
        starts = posterior.states.map(lambda leaf: leaf[:, rows])  # (B, L, ...)
        is_terminal = batch.is_terminal[:, rows]
        rollout = world.imagine(
            starts.detach().map(lambda leaf: leaf.flatten(0, 1)),  # (B*L, ...)
            behavior.policy,
            behavior.cfg.horizon,
            1.0 - is_terminal.flatten().float(),
            grad=behavior.dynamics_backprop,
            jump=behavior.cfg.jump,
        )
        clock.lap("imagination")

        # Lambda-returns, actor and critic losses on the rollouts, critic loss on the replayed rows.
        logits, values = behavior.values(rollout)  # (H+1, B*L, bins), (B*L, H+1)
        returns = lambda_return(rollout.rewards, rollout.continues, values, behavior.cfg.gamma**behavior.cfg.jump)
        actor_loss, critic_loss, behavior_metrics = behavior.losses(rollout, returns, values, logits, execution.average)
        bootstrap = returns[:, 0].detach().view_as(is_terminal)  # (B, L)
        replay_loss = behavior.replay_loss(
            starts.feat(), batch.reward[:, rows], is_terminal, batch.ends()[:, rows], bootstrap,
            None if batch.span is None else batch.span[:, rows],
        )  # fmt: skip
        metrics |= behavior_metrics | {
            "behavior/replay_value_loss": replay_loss.detach(),
            "loop/dream_depth": rollout.loops.depth.float().mean(),
            "loop/dream_residual": rollout.loops.residual.float().sum(-1).mean(),
        }
        clock.lap("actor_critic")

        # Gradients. The actor's are taken alone, because the dynamics gradient passes through the world model.
        total = world_loss + critic_loss + replay_loss
        actor_loss.backward(inputs=parts["actor"])
        total.backward(inputs=parts["world"] + parts["critic"])
        clock.lap("backward")
        metrics = execution.reduce((total + actor_loss).detach(), metrics)
        metrics |= self.optimizer_step(execution)
        clock.lap("optimizer")
        value_error = (values[:, 0] - returns[:, 0]).abs().view_as(is_terminal)  # (B, L)
        errors = sequence_errors(posterior.kl(), batch.is_first, value_error, is_terminal)
        return Update(posterior.states.detach(), rollout.loops.depth, metrics, errors)

    def start_rows(self, size: int, length: int, processes: int) -> slice:
        """The last L rows of each of `size` sequences, at which imagined rollouts start. `starts` 0: all rows. At least
        two, because the replay value loss needs a row and its successor."""
        per_sequence = self.behavior.starts // (processes * size) if self.behavior.starts else length
        return slice(-min(length, max(2, per_sequence)), None)

    def optimizer_step(self, execution: Execution) -> Metrics:
        """Clip the gradients, take the optimisers' steps; the slow critic and the averaged weights follow. Returns the
        norms of the gradients."""
        norms = {f"{name}/grad_norm": adam.clip_gradient() for name, adam in self.optimizers.items()}
        execution.check(torch.stack(list(norms.values())).sum(), norms)
        with torch.no_grad():
            for adam in self.optimizers.values():
                adam.step()
            moves = 1.0 if self.nonfinite is None else 1.0 - self.nonfinite
            self.slow_flat.lerp_(self.optimizers["critic"].flat, SLOW_RATE * moves)
            for name, adam in self.optimizers.items():
                self.average_flats[name].lerp_(adam.flat, self.average_rate * moves)
        return norms

    def skip_step_where(self, bad: Tensor) -> None:
        """Let `optimizer_step` do nothing while `bad` (0-d) is 1: no number is read back for it."""
        self.nonfinite = bad
        for adam in self.optimizers.values():
            adam.skip_step_where(bad)

    def begin_update(self, progress: float) -> int:
        """Before every update: set rates and image weight for a share `progress` of the run; returns the depth."""
        depth = self.world.sample_depth()
        self.world.observation_model.anneal(self.updates)
        self.updates += 1
        for adam in self.optimizers.values():
            adam.set_rate(rate_factor(progress))
        # Close to the newest weights at first.
        self.average_rate.fill_(max(1.0 - EMA_DECAY, 1.0 / self.updates))
        return depth

    def fit_image_normaliser(
        self, sample: Callable[..., tuple[Batch, Any]], processes: int = 1, average: Average = alone
    ) -> None:
        """Fit mean and standard deviation of the images to rows of the replay, before the first update alone."""
        if self.updates == 0 and self.world.observation_model.images:
            batch, _ = sample(NORMALISER_IMAGES // processes, 1, self.device)
            for policy in (self.policy, self.averaged):
                policy.world.observation_model.fit_normaliser(batch.obs, average)

    # ------------------------------------------------------------------ acting

    def act(
        self, obs: dict[str, np.ndarray], memory: Memory | None, is_first: np.ndarray, explore: bool = True,
        max_loops: int | None = None,
    ) -> tuple[np.ndarray, Memory, np.ndarray]:  # fmt: skip
        """obs {name: (E, O) or (E, H, W, C)} -> environment actions (E, A) or (E,), memory, loops used (E,).

        Exploring: newest weights, sampled latents and actions. Otherwise: averaged weights, most probable latents, mean
        (discrete: most probable) action. `decisions` says which of the two plan.
        """
        policy = self.policy if explore else self.averaged
        # A rendered frame may be a view with negative strides, which torch does not take.
        arrays = {name: np.ascontiguousarray(obs[name]) for name in self.spaces.obs}
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in arrays.items()}
        first = torch.as_tensor(is_first, device=self.device)
        action, memory, depth = policy.act(tensors, memory, first, explore, max_loops)
        return to_env(action, self.spaces.action).numpy(force=True), memory.clone(), depth.numpy(force=True)

    def act_randomly(self, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Random environment actions (E, A) or (E,) in place of those that `act` has just returned, and the memory."""
        memory = self.policy.act_randomly(memory)
        return to_env(memory.action, self.spaces.action).numpy(force=True), memory

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: Memory | None = None,
        episode_start: np.ndarray | bool | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Memory]:
        """The protocol of stable-baselines3's models. observation: a vector (O,) or image (H, W, C), a batch of them,
        or a dictionary of such; state: what the last call returned, None at the beginning; episode_start: True, or (E,)
        booleans; deterministic: averaged weights and the mean action, or newest weights and a sample."""
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

    @property
    def run_cap(self) -> int:
        """Most loops of a step of acting."""
        return self.world.run_cap

    # ------------------------------------------------------------------ persistence

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part; the core's are also among the world model's."""
        counts = {name: sum(p.numel() for p in parameters) for name, parameters in self.policy.parts().items()}
        core = sum(p.numel() for p in self.world.core.parameters())
        return {"world": counts.pop("world"), "core": core, **counts}

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": {name: adam.state_dict() for name, adam in self.optimizers.items()},
            "updates": self.updates,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.policy.load_state_dict(saved["policy"])
        self.averaged.load_state_dict(saved["averaged"])
        for name, adam in self.optimizers.items():
            adam.load_state_dict(saved["optimizers"][name])
        self.updates = int(saved["updates"])

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
        configs = {name: from_dict(kind, saved["config"][name], f"{name}.") for name, kind in kinds.items()}
        try:
            agent = cls(**configs, spaces=Spaces.of(saved["spaces"]), device=resolve_device(device))
        except ValueError as error:
            raise UsageError(str(error)) from error
        try:
            agent.load_state_dict(saved["agent"])
        except Exception as error:  # any kind: the values in a file may be of any kind
            hint = "use the commit in the run's meta.json"
            raise UsageError(f"the checkpoint is of another version of the model; {hint}") from error
        return agent


def check_finite(total: Tensor, metrics: Metrics) -> None:
    """Raise NonFiniteError with the name of the first metric that is not finite, if `total` is not."""
    if not torch.isfinite(total):
        bad = [name for name, value in metrics.items() if not torch.isfinite(value).all()]
        raise NonFiniteError(bad[0] if bad else "total loss")
