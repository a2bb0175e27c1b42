"""The update: world model, dreams, actor and critic from one batch, and the optimisers that follow."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agent.errors import NonFiniteError
from agent.execution.cuda_graphs import UpdateGraphs
from agent.execution.data_parallel import Crew
from agent.learning.gradients import Gradients, Losses, Metrics, finite
from agent.learning.optimizer import FlatAdam, flatten
from agent.learning.policy import Policy
from world_model import Batch, LatentState, WorldModel, sample_depth
from world_model.ranges import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE, SHARE, require


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
    workers: int = 1
    """Processes that share every update of an agent, each with its part of the sequences (which must divide evenly);
    a GPU, and --model-only, do without."""

    def __post_init__(self) -> None:
        rates = dict.fromkeys(("model_lr", "actor_lr", "critic_lr", "warmup"), NOT_NEGATIVE)
        require(self, "--optimizer.", workers=AT_LEAST_ONE)
        require(self, "--optimizer.", **rates, clip=ABOVE_ZERO, hold=SHARE, final=SHARE, average=(0.0, 0.999999))


FIRST_LOOKS = 256
"""Images that encoders get used to before the first update."""


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
        world.core: ("prelude", "refine", "readout", "adaptive_step"),
    }
    for part, names in parts.items():
        kind = type(part)
        methods = {name: torch.compile(getattr(kind, name), dynamic=False) for name in names if hasattr(kind, name)}
        part.__class__ = type(kind.__name__, (kind,), methods)


class Learner(Gradients):
    """A policy, its optimisers and its averaged copy, on one device. On a GPU nobody shares the updates."""

    def __init__(self, policy: Policy, cfg: OptimizerConfig, device: torch.device | str = "cpu"):
        self.optimizer, self.device = cfg, torch.device(device)
        policy = policy.to(device)
        rates = {"world": cfg.model_lr, "actor": cfg.actor_lr, "critic": cfg.critic_lr}
        self.adams = {
            name: FlatAdam(name, params, rates[name], cfg.clip, cfg.warmup) for name, params in policy.parts().items()
        }
        grads = [adam.gradient for adam in self.adams.values()]
        parts = cfg.workers if self.device.type == "cpu" else 1
        super().__init__(policy, grads, cfg.precision == "bfloat16", parts)
        self.averaged = copy.deepcopy(policy)
        self.average_flats = [flatten(params, grad=False) for params in self.averaged.parts().values()]
        self.average_rate = torch.zeros((), device=device)
        self.updates = 0
        gpu = self.device.type == "cuda"
        self.crew: Crew | None = None
        self.crew_random: list[Tensor] = []  # where its random numbers go on, as a checkpoint had them
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
        loops = sample_depth(self.world.cfg.loop)
        if self.graphs is not None:
            clock = time.perf_counter()
            losses = self.graphs(batch, loops, progress)
            self.lap("update", clock)
        else:
            losses = self.shared(batch, loops) if self.parts > 1 else self.alone(batch, loops)
            clock = time.perf_counter()
            for name, norm in self.clip(losses.metrics).items():  # all before any step: every weight as it was
                if not torch.isfinite(norm):
                    raise NonFiniteError(name)
            self.advance(progress)
            self.move()
            self.lap("optimizer", clock)
        self.last_depths, self.last_lengths = losses.depths, losses.lengths
        return losses.states, losses.metrics

    def alone(self, batch: Batch, loops: int) -> Losses:
        """Losses and gradients of a batch. Raises NonFiniteError before anything is differentiated."""
        losses = self.losses(batch, loops)
        finite(losses)
        self.differentiate(losses)
        return losses

    def shared(self, batch: Batch, loops: int) -> Losses:
        """The same, by several processes, which begin with the first batch."""
        if self.crew is None:
            seed = torch.initial_seed() + 1_000_000_007  # far from those of other runs
            self.crew = Crew(self.policy, self.flats, self.half, self.parts - 1, seed)
            self.crew.restore(self.crew_random)
        losses = self.alone(*self.crew.begin(batch, loops))
        clock = time.perf_counter()
        losses = self.crew.end(losses)
        self.lap("others", clock)
        return losses

    def close(self) -> None:
        """End the processes that share the updates, where there are any."""
        if self.crew is not None:
            self.crew.close()
            self.crew = None

    def as_written(self) -> AbstractContextManager[Any]:
        """Inside of this nothing compiled runs: for what is too rare to be compiled."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def get_used_to(self, sample: Callable[..., tuple[Batch, Any]]) -> None:
        """Let the encoders see what images usually look like; for the replay's `sample`, before the first update.

        Does nothing where there are no images, or where something was learned already.
        """
        if self.updates == 0 and self.world.observation_model.images:
            batch, _ = sample(FIRST_LOOKS, 1, self.device)
            for policy in (self.policy, self.averaged):
                policy.world.observation_model.fit_normaliser(batch.obs)

    def clip(self, metrics: Metrics) -> Metrics:
        """Clip the gradients; their norms before that go to the metrics, and are returned."""
        norms = {f"{name}/grad_norm": adam.clip_gradient() for name, adam in self.adams.items()}
        metrics |= norms
        return norms

    def advance(self, progress: float) -> None:
        """Count an update, and set the rates of its steps and what images weigh."""
        self.updates += 1
        self.world.observation_model.anneal(self.updates)
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
            post = self.world.observe_sequence(batch, sample_depth(self.world.cfg.loop))
            loss, metrics = self.world.loss(post, batch)
        if not torch.isfinite(loss):
            raise NonFiniteError(next((name for name, value in metrics.items() if not value.isfinite()), "total loss"))
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

    # ------------------------------------------------------------------ persistence

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "averaged": self.averaged.state_dict(),
            "adams": {name: adam.state_dict() for name, adam in self.adams.items()},
            "updates": self.updates,
            "crew": self.crew_random if self.crew is None else self.crew.random_states(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.policy.load_state_dict(saved["policy"])
        self.averaged.load_state_dict(saved["averaged"])
        for name, adam in self.adams.items():
            adam.load_state_dict(saved["adams"][name])
        self.updates = saved["updates"]
        self.crew_random = saved.get("crew", [])
        if self.crew is not None:
            self.crew.restore(self.crew_random)
