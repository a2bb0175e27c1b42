"""What a loop does: where its orbit goes, and what the state after each loop says.

Symbols: M samples, R loops of an orbit, N tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from agent.errors import UsageError
from agent.evaluation.recording import Recording
from agent.evaluation.stability import batch_of
from agent.evaluation.tables import Row
from agent.learning.actor_critic import ActorCritic
from world_model import LatentState, LoopedCore, WorldModel
from world_model.attack import Points, loop_map
from world_model.jumps import action_input
from world_model.orbits import LOOPS, Orbits, orbits, spectral_radius


@dataclass(frozen=True)
class Anatomy:
    """loops: one row for each loop; orbits: share of each kind, `periods` of cycles; radius (M,): spectral radius where
    the orbit ends; moving (R, N*D): mean |change| of each channel by loop; reference: the depth that others are
    compared with, the deepest of training."""

    loops: list[Row]
    orbits: dict[str, float]
    periods: dict[int, int]
    radius: Tensor
    moving: Tensor
    reference: int

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self) | {"radius": self.radius.tolist(), "moving": self.moving.tolist()}


class Samples:
    """M transitions of recorded episodes, and the loop states of each far beyond the training depth.

    x (R+1, M, N, D); deter, gate (M, N, D): previous state and outer gate; embed (M, U): of the observation on arrival;
    reward (M,): on arrival; targets (M, P): the observation in the form that the decoder predicts, None without one.
    """

    def __init__(self, world: WorldModel, recording: Recording, count: int, loops: int):
        core, batch = world.core, batch_of(recording.episodes)
        assert isinstance(core, LoopedCore)
        self.reference = world.cfg.loop.train_cap
        states = world.observe_sequence(batch, self.reference).states.map(lambda leaf: leaf[:, :-1].flatten(0, 1))
        actions = action_input(batch.prev_action[:, 1:], None, world.cfg.jump).flatten(0, 1)
        obs = {name: value[:, 1:].flatten(0, 1) for name, value in batch.obs.items()}
        chosen = torch.randperm(len(actions))[:count]
        self.deter = states.deter[chosen]
        inputs = world.inputs(states.map(lambda leaf: leaf[chosen]), actions[chosen])
        obs = {name: value[chosen] for name, value in obs.items()}
        self.embed = world.post_embed(world.observation_model(obs))
        self.targets = world.observation_model.targets(obs) if world.observation_model.decodes else None
        self.reward = batch.reward[:, 1:].flatten(0, 1)[chosen]
        e, self.gate = core.prelude(self.deter, inputs)
        self.f = loop_map(core)
        self.given = (e / core.input_norm.gain).double()
        start = Points(core.enter(self.deter, self.gate).double(), self.given)
        self.orbits: Orbits = orbits(self.f, start, loops)
        self.x = self.orbits.states.unflatten(2, self.deter.shape[1:])  # (R+1, M, N, D), float64

    def at_the_end(self) -> Points:
        """Where the orbits end."""
        return Points(self.x[-1], self.given)


@torch.no_grad()
def anatomy(
    world: WorldModel, behavior: ActorCritic | None, recording: Recording, samples: int = 512, loops: int = LOOPS,
    seed: int = 0,
) -> Anatomy:  # fmt: skip
    """Follow the loops of `samples` recorded transitions; without `behavior` no value is read out.

    Raises UsageError where the core has no loops.
    """
    if not isinstance(world.core, LoopedCore):
        raise UsageError(f"the core {world.cfg.core} has no loops: give a run of a core that has")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = Samples(world, recording, samples, max(loops, world.cfg.loop.train_cap))
        radius = spectral_radius(found.f, found.at_the_end())
    change = found.orbits.states.diff(dim=0)  # (R, M, N*D)
    norm = found.orbits.states[1:].norm(dim=2)  # (R, M)
    away = (found.orbits.states[1:] - found.orbits.states[-1]).norm(dim=2) / norm[-1]  # (R, M)
    tokens = change.unflatten(2, found.deter.shape[1:]).square().sum(3)  # (R, M, N)
    said = readouts(world, behavior, found)
    rows = []
    for loop in range(1, len(change) + 1):
        now = change[loop - 1]
        cosine = torch.cosine_similarity(now, change[loop - 2], dim=1).mean() if loop > 1 else None
        rows.append({
            "loop": loop, "distance": float(away[loop - 1].median()),
            "distance_upper": float(away[loop - 1].quantile(0.75)),
            "residual": float((now.norm(dim=1) / norm[loop - 1]).mean()),
            "cosine": None if cosine is None else float(cosine), "descent": descent(world, found, loop),
            "channels": participation(now.square()), "tokens": participation(tokens[loop - 1]),
            **{name: float(value[loop - 1]) for name, value in said.items()},
        })  # fmt: skip
    periods, counts = found.orbits.period[found.orbits.period > 0].unique(return_counts=True)
    return Anatomy(
        rows, found.orbits.shares(), dict(zip(periods.tolist(), counts.tolist(), strict=True)), radius,
        change.abs().mean(1), found.reference,
    )  # fmt: skip


def participation(energy: Tensor) -> float:
    """(M, N*D) squared changes -> how many take part, as a share: 1 where all are equal, 1/(N*D) where one moves."""
    total = energy.sum(1).square() / energy.square().sum(1).clamp(min=1e-300)
    return float((total / energy.shape[1]).mean())


def readouts(world: WorldModel, behavior: ActorCritic | None, found: Samples) -> dict[str, Tensor]:
    """What is read out of each loop 1..R, means over the samples, (R,) each.

    kl            nats of KL(posterior || prior), both of this loop: what training lowers
    prior_kl      nats of KL(prior of the reference depth || prior of this loop)
    reward, value            mean absolute difference from the reference depth, over its spread
    reward_rank, value_rank  Spearman's correlation with the reference depth
    observation   squared error of the reconstruction over the variance of the samples, where the model decodes
    reward_error  mean absolute error of the reward
    """
    core, latents = world.core, world.latents
    assert isinstance(core, LoopedCore)
    at_reference = core.readout(found.deter, found.x[found.reference].float(), found.gate)
    stoch = world.draw(world.posterior(at_reference, found.embed), None)  # the same for every loop
    reference_prior = world.log_prior(at_reference)
    heads: dict[str, Any] = {"reward": lambda feat: world.twohot.mean(world.reward(feat))}
    if behavior is not None:
        heads["value"] = behavior.critic.value
    reference = {name: head(LatentState(at_reference, stoch).feat()) for name, head in heads.items()}
    found_rows: list[dict[str, Tensor]] = []
    for x in found.x[1:].float():
        deter = core.readout(found.deter, x, found.gate)
        prior, feat = world.log_prior(deter), LatentState(deter, stoch).feat()
        row = {
            "kl": latents.kl(latents.kl_form(world.posterior(deter, found.embed)), prior).mean(),
            "prior_kl": latents.kl(reference_prior, prior).mean(),
        }
        said = {name: head(feat) for name, head in heads.items()}
        for name, value in said.items():
            spread = reference[name].std().clamp(min=1e-8)
            row[name] = (value - reference[name]).abs().mean() / spread
            row[f"{name}_rank"] = rank_correlation(value, reference[name])
        row["reward_error"] = (said["reward"] - found.reward).abs().mean()
        if found.targets is not None:
            variance = found.targets.var(0)
            varies = variance > 1e-3 * variance.max()
            error = (world.observation_model.predictions(feat) - found.targets).square()
            row["observation"] = (error[:, varies] / variance[varies]).mean()
        found_rows.append(row)
    return {name: torch.stack([row[name] for row in found_rows]) for name in found_rows[0]}


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation of two vectors; 0 where one of them does not vary."""
    ranks = torch.stack([part.argsort().argsort().float() for part in (one, other)])
    varies = one.std() > 0 and other.std() > 0
    return torch.corrcoef(ranks)[0, 1] if varies else one.new_zeros(())


def descent(world: WorldModel, found: Samples, loop: int) -> float:
    """Cosine between the change of a loop and the steepest descent of KL(posterior || prior) at the state before it.

    1: the loop is a step of gradient descent on what it is trained for; 0: it is not related.
    """
    core = world.core
    assert isinstance(core, LoopedCore)
    with torch.enable_grad():
        x = found.x[loop - 1].float().requires_grad_()
        deter = core.readout(found.deter, x, found.gate)
        post = world.latents.kl_form(world.posterior(deter, found.embed)).detach()
        (gradient,) = torch.autograd.grad(world.latents.kl(post, world.log_prior(deter)).sum(), x)
    change = (found.x[loop] - found.x[loop - 1]).flatten(1).float()
    return float(torch.cosine_similarity(change, -gradient.flatten(1), dim=1).mean())


def untrained_like(world: WorldModel, seed: int = 0) -> WorldModel:
    """The same model with the first weights of a seed, which sees observations on the same scale."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = WorldModel(world.cfg, world.obs_sizes, world.action_size)
    trained = dict(world.observation_model.named_buffers())
    for name, buffer in fresh.observation_model.named_buffers():
        buffer.copy_(trained[name])
    return fresh


# ---------------------------------------------------------------------- results


def format_anatomy(report: Anatomy) -> str:
    """The table for the terminal."""
    shares = ", ".join(f"{name} {share:.3f}" for name, share in report.orbits.items())
    periods = "".join(f", {count} of period {period}" for period, count in report.periods.items())
    lines = [
        f"orbits of {len(report.radius)} samples after {len(report.loops)} loops: {shares}{periods}",
        f"spectral radius of the loop there: median {float(report.radius.median()):.3g}, "
        f"largest {float(report.radius.max()):.3g}",
        "loop  to the end  cosine  descent  channels     KL  prior KL  reward rank  value rank",
    ]
    last, reference = len(report.loops), report.reference
    for row in report.loops:
        if row["loop"] <= 2 * reference or row["loop"] in (16, 32, last):
            cosine = "      " if row["cosine"] is None else f"{row['cosine']:6.2f}"
            mark = "*" if row["loop"] == reference else " "
            lines.append(
                f"{row['loop']:4d}{mark} {row['distance']:10.3g}  {cosine}  {row['descent']:7.2f}  "
                f"{row['channels']:8.2f} {row['kl']:6.3f}  {row['prior_kl']:8.3g}  {row['reward_rank']:11.3f}  "
                f"{row.get('value_rank', math.nan):10.3f}"
            )
    lines.append("* the deepest of training, with which prior, reward and value are compared")
    return "\n".join(lines)
