"""The update: world model, dreams, actor and critic from one batch, and the optimisers that follow."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agent.graphs import UpdateGraphs
from agent.optimizer import FlatAdam, NonFiniteError, flatten
from agent.policy import Policy
from world_model import Batch, LatentState, WorldModel, sample_depth
from world_model.ranges import ABOVE_ZERO, NOT_NEGATIVE, SHARE, require

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates, the averaged weights, and how a GPU computes."""

    model_lr: float = 1e-3
    """Adam step of the world model."""
    actor_lr: float = 1e-3
    """Adam step of the actor."""
    critic_lr: float = 1e-3
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
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers that the matrix products of an update compute with (weights and losses stay float32); auto: float32, on a
    GPU in its fast form with 10 bits behind the point (for the whole process). Images have a precision of their own."""
    graphs: bool = True
    """On a GPU, replay the update as a CUDA graph, one for each training depth."""
    compile: bool = False
    """On a GPU, fuse what every loop and step runs into fewer operations, with torch.compile: half a minute."""

    def __post_init__(self) -> None:
        rates = dict.fromkeys(("model_lr", "actor_lr", "critic_lr", "warmup"), NOT_NEGATIVE)
        require(self, "--optimizer.", **rates, clip=ABOVE_ZERO, hold=SHARE, final=SHARE, average=(0.0, 0.999999))


FIRST_LOOKS = 256
"""Images that encoders get used to before the first update."""


class Losses(NamedTuple):
    """total is for world model and critic, policy for the actor alone; states (B, T, ...) are the posteriors, detached;
    depths (B, H) the loops of the dreams; lengths (B,) how far adaptive ones are trusted; metrics 0-d and detached."""

    total: Tensor
    policy: Tensor
    states: LatentState
    depths: Tensor
    lengths: Tensor | None
    metrics: Metrics


def finite(loss: Tensor, metrics: Metrics) -> None:
    """Raise NonFiniteError with the name of the first metric that is not finite, if the loss is not."""
    if not torch.isfinite(loss):
        bad = [name for name, value in metrics.items() if not torch.isfinite(value).all()]
        raise NonFiniteError(bad[0] if bad else "total loss")


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works here, tried out: it needs a C compiler and a GPU that is not too old."""
    try:
        torch.compile(lambda x: x + 1.0)(torch.zeros(1, device=device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"nothing is compiled, and updates take longer: {reason}", stacklevel=2)
        return False
    return True


def fuse(world: WorldModel) -> None:
    """Let torch.compile fuse the parts of a step. They are compiled once for every size of batch that they meet.

    The compiled methods are those of a class, or a copy of the network would compute with the weights of the original.
    """
    torch._dynamo.config.recompile_limit = 64
    parts: dict[torch.nn.Module, tuple[str, ...]] = {
        world: ("reset", "posterior", "prior_probs", "draw"),
        world.core: ("prelude", "refine", "finish", "settle"),
    }
    for part, names in parts.items():
        kind = type(part)
        methods = {name: torch.compile(getattr(kind, name), dynamic=False) for name in names if hasattr(kind, name)}
        part.__class__ = type(kind.__name__, (kind,), methods)


class Learner:
    """A policy, its optimisers and its averaged copy, on one device."""

    def __init__(self, policy: Policy, cfg: OptimizerConfig, device: torch.device | str = "cpu"):
        self.optimizer, self.device = cfg, torch.device(device)
        self.policy = policy.to(device)
        self.world, self.behavior = policy.world, policy.behavior
        rates = {"world": cfg.model_lr, "actor": cfg.actor_lr, "critic": cfg.critic_lr}
        self.adams = {
            name: FlatAdam(name, params, rates[name], cfg.clip, cfg.warmup) for name, params in policy.parts().items()
        }
        self.averaged = copy.deepcopy(policy)
        self.average_flats = [flatten(params, grad=False) for params in self.averaged.parts().values()]
        self.average_rate = torch.zeros((), device=device)
        self.updates = 0
        self.seconds: dict[str, float] = {}  # time spent in each part of the updates
        gpu = self.device.type == "cuda"
        self.half = cfg.precision == "bfloat16"
        if gpu:
            torch.set_float32_matmul_precision("high" if cfg.precision == "auto" else "highest")
        self.compiled = gpu and cfg.compile and compiles(self.device)
        if self.compiled:
            fuse(self.world)
        self.graphs = UpdateGraphs(self) if gpu and cfg.graphs else None

    def update(self, batch: Batch, progress: float = 0.0) -> tuple[LatentState, Metrics]:
        """One update of everything on a (B, T) batch: world model, dreams, actor, critic.

        progress in [0, 1] is the share of the run behind us (learning-rate schedule). Returns the posterior
        states for the replay's write-back, good until the next update, and detached metrics. Raises NonFiniteError
        before any weight is touched when a loss is not finite.
        """
        loops = sample_depth(self.world.cfg.loop, len(batch.reward), self.device)
        if self.graphs is not None:
            clock = time.perf_counter()
            losses = self.graphs(batch, loops, progress)
            self.lap("update", clock)
        else:
            losses = self.losses(batch, loops)
            finite(losses.total + losses.policy, losses.metrics)
            self.differentiate(losses)
            clock = time.perf_counter()
            for name, norm in self.clip(losses.metrics).items():  # all before any step: every weight as it was
                if not torch.isfinite(norm):
                    raise NonFiniteError(name)
            self.advance(progress)
            self.move()
            self.lap("optimizer", clock)
        self.last_depths, self.last_lengths = losses.depths, losses.lengths
        return losses.states, losses.metrics

    def as_written(self) -> AbstractContextManager[Any]:
        """Inside of this nothing compiled runs: for what is too rare to be compiled."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def get_used_to(self, sample: Callable[..., tuple[Batch, Any]]) -> None:
        """Let the encoders see what images usually look like; for the replay's `sample`, before the first update.

        Does nothing where there are no images, or where something was learned already.
        """
        if self.updates == 0 and self.world.senses.images:
            batch, _ = sample(FIRST_LOOKS, 1, self.device)
            for policy in (self.policy, self.averaged):
                policy.world.senses.get_used_to(batch.obs)

    def losses(self, batch: Batch, loops: int | Tensor) -> Losses:
        """Everything that is computed forwards; gradients are zeroed."""
        clock = time.perf_counter()
        for adam in self.adams.values():
            adam.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            world_loss, post, metrics = self.world.loss(batch, loops)
            clock = self.lap("world_model", clock)
            size, length = batch.reward.shape
            count = self.behavior.starts or size * length
            # Rows at the end of each sequence that start dreams; the replayed value needs two.
            tail = min(length, max(2, count // size))
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
            boot = returns[:, 0].view(size, tail)
            replay_loss = self.behavior.replay_loss(
                ends.feat(), batch.reward[:, -tail:], terminal, batch.is_last[:, -tail:], boot
            )
        metrics |= behavior_metrics
        metrics["behavior/replay_value_loss"] = replay_loss.detach()
        metrics["loop/dream_depth"] = rollout.loops.depth.float().mean()
        metrics["loop/dream_residual"] = rollout.loops.residual.float().sum(-1).mean()
        self.lap("actor_critic", clock)
        total = world_loss + value_loss + replay_loss
        depths, lengths = rollout.loops.depth, self.behavior.last_lengths
        return Losses(total, policy_loss, post.states.detach(), depths, lengths, metrics)

    def differentiate(self, losses: Losses) -> None:
        """Gradients of every part; the actor's alone, because the dynamics gradient passes through the world model."""
        clock = time.perf_counter()
        parts = self.policy.parts()
        losses.policy.backward(inputs=parts["actor"])
        losses.total.backward(inputs=parts["world"] + parts["critic"])
        self.lap("backward", clock)

    def clip(self, metrics: Metrics) -> Metrics:
        """Clip the gradients; their norms before that go to the metrics, and are returned."""
        norms = {f"{name}/grad_norm": adam.clip_gradient() for name, adam in self.adams.items()}
        metrics |= norms
        return norms

    def advance(self, progress: float) -> None:
        """Count an update, and set the rates of its steps."""
        self.updates += 1
        for adam in self.adams.values():
            adam.set_rate(self.schedule(progress))
        self.average_rate.fill_(max(1.0 - self.optimizer.average, 1.0 / self.updates))

    @torch.no_grad()
    def move(self) -> None:
        """The optimisers' steps; then the slow critic and the averaged weights follow (these closely at first)."""
        for adam in self.adams.values():
            adam.step()
        self.behavior.critic.follow()
        for adam, average in zip(self.adams.values(), self.average_flats, strict=True):
            average.lerp_(adam.flat, self.average_rate)

    def update_world(self, batch: Batch, progress: float = 0.0) -> tuple[LatentState, Metrics]:
        """One update of the world model alone; otherwise as `update`."""
        for adam in self.adams.values():
            adam.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss, post, metrics = self.world.loss(batch)
        finite(loss, metrics)
        loss.backward(inputs=self.policy.parts()["world"])
        norm = metrics["world/grad_norm"] = self.adams["world"].clip_gradient()
        if not torch.isfinite(norm):
            raise NonFiniteError("world/grad_norm")
        self.advance(progress)
        self.adams["world"].step()
        self.average_flats[0].lerp_(self.adams["world"].flat.detach(), self.average_rate)
        return post.states.detach(), metrics

    def schedule(self, progress: float) -> float:
        """Learning-rate factor: 1 until `hold` of the run, then linearly down to `final`."""
        cfg = self.optimizer
        if progress <= cfg.hold:
            return 1.0
        return 1.0 + (cfg.final - 1.0) * min(1.0, (progress - cfg.hold) / max(1e-8, 1.0 - cfg.hold))

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
