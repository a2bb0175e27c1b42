"""The looped core: one shared block refines the latent state again and again, until an exit gate stops it.

    e      = norm(prelude(deter, inputs))              previous state, latent sample and action   (eq. 2)
    x_0    = deter
    x_r    = norm(block(Abar * x_{r-1} + Bbar e))      r = 1..R, the same weights in every loop   (eq. 3-5)
    deter' = (1 - u) * deter + u * norm(C x_R)         coda, and the outer gate u                 (eq. 6)

Source: Looped World Models (arXiv 2606.18208, eq. 2-6); Abar, a diagonal retention in (0, 1) by construction, takes
its concrete form from Parcae (arXiv 2604.12946), see `retention.py`. The injection Bbar e is repeated in every loop, so
what a loop forgets of its start it learns again from the input. Three things are ours:

- The state is normalised after each loop. Unnormalised, a pre-norm residual stream grows with every loop and relative
  changes of the state mean nothing to an exit test.
- The outer gate u keeps a memory over environment steps.
- The exit gate is linear in the loop state times the RMS of its last change, and in |change| (`exits.py`). It is
  regressed on what another loop would bring, where the paper trains a gate by its entropy alone (eq. 9 and 10).

Symbols as in `types.py`; M samples that are still looping.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.block import Block
from world_model.core import Core, CoreSizes, LogPrior, LoopStats, Trace
from world_model.exits import RULES, HaltingState, make_rule
from world_model.extensions import check_name
from world_model.nets import Norm, balanced_linear, linear
from world_model.ranges import ABOVE_ZERO, AT_LEAST_ONE, require
from world_model.retention import Dynamics, Retention

LONGEST_MEMORY = 20.0
"""Time constant of the slowest channels of the outer gate at initialisation, in actions."""


@dataclass(frozen=True)
class LoopConfig:
    """The looped core and its depth."""

    tokens: int = 1
    """N, tokens of the deterministic state; attention mixes them (with 1 token it is left out)."""
    width: int = 128
    """D, width of one token."""
    expand: float = 2.0
    """Hidden width of the gated MLP in units of the token width; below 1 a loop can do little, and many are needed."""
    units: int = 128
    """Width of the prelude's hidden layer; in the control gru, of its three input layers."""
    mean_loops: float = 2.0
    """Mean of the Poisson distribution of training depths, which are clamped to 1 and twice the mean."""
    depth: Literal["update", "fixed"] = "update"
    """Training depth: Poisson-sampled once per update, or always the mean."""
    retention: Literal["constrained", "free"] = "constrained"
    """Abar: in (0, 1) by construction, or any vector (a control)."""
    gain: Literal["euler", "leaky"] = "euler"
    """Injection per loop: Delta (the paper), or 1 - Abar (as slow as the channel forgets)."""
    exit: str = "gate"
    """When a state stops looping in imagination, acting and evaluation: gate, residual, acceleration, kl, paper,
    random, certified, module:Class of your own, or fixed: always `max_loops` loops, by default the mean."""
    max_loops: int | None = None
    """Cap of the loops with exits, or the fixed number; may exceed the training depth."""
    exit_threshold: float | None = None
    """Of the exit rule. By default 0.05 nats for the gate: go on while more is predicted."""
    exit_histogram: tuple[float, ...] = ()
    """Weights of 1, 2, .. loops for the random exit; by default equal up to the cap."""

    def __post_init__(self) -> None:
        check_name("exit rule", self.exit, RULES)
        whole = ("tokens", "width", "units", "max_loops")
        require(self, "", **dict.fromkeys(whole, AT_LEAST_ONE), mean_loops=(1.0, 1000.0), expand=ABOVE_ZERO)
        if self.hidden < 1:
            raise ValueError(f"expand {self.expand} leaves the gated MLP of a width of {self.width} nothing")

    @property
    def heads(self) -> int:
        """Attention heads: 4, or 2 or 1 where they would not divide the width or have less than 8 channels each."""
        return next(heads for heads in (4, 2, 1) if heads == 1 or (self.width % heads == 0 and self.width >= 8 * heads))

    @property
    def hidden(self) -> int:
        """Hidden width of the gated MLP."""
        return round(self.expand * self.width)

    @property
    def usual_loops(self) -> float:
        """Mean number of loops in training, before depths are clamped (2 becomes 2.06, 1 becomes 1.26)."""
        return round(self.mean_loops) if self.depth == "fixed" else self.mean_loops

    @property
    def train_cap(self) -> int:
        """Most loops of the world-model loss. Imagination runs up to `run_cap`."""
        return round(self.mean_loops) if self.depth == "fixed" else round(2 * self.mean_loops)

    @property
    def run_cap(self) -> int:
        """Most loops outside of world-model training."""
        return self.max_loops or (round(self.mean_loops) if self.exit == "fixed" else self.train_cap)


def sample_depth(cfg: LoopConfig) -> int:
    """Loops of one training update: Poisson around `mean_loops`, at least 1, at most twice the mean.

    The paper samples per sequence; one draw per update costs less, as a batch runs as long as its deepest sequence.
    """
    if cfg.depth == "fixed":
        return cfg.train_cap
    return int(torch.poisson(torch.full((1,), float(cfg.mean_loops))).clamp(1, cfg.train_cap).long())


class GatedCore(Core):
    """What the looped core and its stacked control share: prelude, coda, output norm and outer gate."""

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes):
        super().__init__()
        self.cfg, flat, latents = cfg, cfg.tokens * cfg.width, sizes.groups * sizes.classes
        squares = flat, sizes.squared_norm or sizes.groups, sizes.actions
        self.prelude_in = balanced_linear((flat, latents, sizes.actions), squares, cfg.units)
        self.prelude_norm = Norm(cfg.units)
        self.prelude_out = linear(cfg.units, flat)
        self.input_norm = Norm(cfg.width)
        self.coda = nn.Parameter(torch.eye(cfg.width))
        self.coda_norm = Norm(cfg.width)
        self.update_gate = linear(cfg.units, flat, bias=True, scale=0.5)
        with torch.no_grad():  # spread over time constants from about 1.4 steps to the longest
            slowest = -math.log(LONGEST_MEMORY - 1.0)
            self.update_gate.bias.copy_(torch.linspace(slowest, 1.0, flat)[torch.randperm(flat)])
        self.start = nn.Parameter(torch.randn(cfg.tokens, cfg.width))

    def prelude(self, deter: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """deter (B, N, D), inputs (B, S*K + C) -> injected input e (B, N, D), and the outer gate u (B, N, D).

        The previous state enters with gradient: learning reaches back through time whatever the loops forget.
        """
        hidden = F.silu(self.prelude_norm(self.prelude_in(self.read(deter, inputs))))  # (B, U)
        e = self.input_norm(self.prelude_out(hidden).view_as(deter))  # (B, N, D)
        return e, torch.sigmoid(self.update_gate(hidden)).view_as(deter)

    def read(self, deter: Tensor, inputs: Tensor) -> Tensor:
        """What the prelude reads: (B, N*D + S*K + C)."""
        return torch.cat([deter.flatten(1), inputs], -1)

    def readout(self, deter: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Coda, output norm and outer gate (..., N, D): the state that goes on to the next environment step."""
        out = self.coda_norm(x @ self.coda.t()).to(deter.dtype)
        return torch.lerp(deter, out, gate.to(deter.dtype))

    def shell_flops(self) -> float:
        """Operations outside of the loop: prelude, outer gate and coda."""
        layers = self.prelude_in, self.prelude_out, self.update_gate
        return 2.0 * (sum(layer.weight.numel() for layer in layers) + self.cfg.tokens * self.coda.numel())


class LoopedCore(GatedCore):
    """`forward` runs a given number of loops (training); in `adaptive_step` each sample stops by itself (the rest)."""

    looping = True

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes):
        super().__init__(cfg, sizes)
        self.build_loop(cfg)
        flat = cfg.tokens * cfg.width
        with torch.random.fork_rng(devices=[]):  # the other weights of a seed do not depend on the rule
            self.rule = make_rule(cfg.exit, flat, cfg.run_cap, cfg.exit_threshold, cfg.exit_histogram)

    def build_loop(self, cfg: LoopConfig) -> None:
        """The weights of the loop."""
        self.retention = Retention(cfg.width, cfg.gain, cfg.retention)
        self.block = Block(cfg.tokens, cfg.width, cfg.heads, cfg.hidden)
        self.loop_norm = Norm(cfg.width)

    def prepare(self) -> Dynamics:
        """Abar and Bbar."""
        return self.retention()

    def inject(self, e: Tensor, prepared: Dynamics) -> Tensor:  # (B, N, D) -> (B, N, D)
        return e @ prepared.injection.t()

    def enter(self, deter: Tensor, gate: Tensor) -> Tensor:
        """x_0, all (B, N, D)."""
        return deter

    def refine(self, x: Tensor, injected: Tensor, prepared: Dynamics) -> Tensor:
        """One loop, (M, N, D) -> (M, N, D): retention and injection, the shared block, the norm."""
        return self.loop_norm(self.block(torch.addcmul(injected, x, prepared.decay)))

    def forward(self, deter: Tensor, inputs: Tensor, loops: int, prepared: Dynamics) -> tuple[Tensor, Trace]:
        e, gate = self.prelude(deter, inputs)  # (B, N, D) each
        injected = self.inject(e, prepared)
        states = [self.enter(deter, gate)]  # x_0 .. x_R
        for _ in range(loops):
            states.append(self.refine(states[-1], injected, prepared))
        return self.readout(deter, states[-1], gate), Trace(states, deter, gate, e)

    def adaptive_step(
        self, deter: Tensor, inputs: Tensor, prepared: Dynamics, max_loops: int | None = None, *,
        log_prior: LogPrior | None = None,
    ) -> tuple[Tensor, LoopStats]:  # fmt: skip
        """deter (B, N, D), inputs (B, S*K + C) -> next deter. Each sample loops until the exit rule stops it, at most
        `max_loops` times (None: `run_cap`). On a CPU finished samples are taken out of the computation; elsewhere, or
        with `static_shapes`, they are frozen in place. Both give the same result."""
        cap = max_loops or self.cfg.run_cap
        compact = not (deter.is_cuda or self.static_shapes)
        e, gate = self.prelude(deter, inputs)  # (B, N, D) each
        injected, memory = self.inject(e, prepared), self.rule.begin(e.detach(), cap)

        def prior_at(x: Tensor, rows: Tensor) -> Tensor:  # (M, N, D) -> (M, S, P)
            if log_prior is None:
                raise ValueError("this exit rule asks the prior: pass log_prior")
            return log_prior(self.readout(deter[rows], x, gate[rows]))

        batch = deter.shape[0]  # not len(deter), which torch.export would fix
        x, rows = self.enter(deter, gate), torch.arange(batch, device=deter.device)  # (M, N, D), (M,): M = B at first
        ended: Tensor | None = None  # (B, N, D) last states of the samples that were taken out
        live = torch.ones_like(rows, dtype=torch.bool)  # (B,) which of the frozen ones still loop
        depth, residual = torch.full_like(rows, cap), deter.new_zeros(batch, cap)  # (B,), (B, R)
        for loop in range(1, cap + 1):
            new = self.refine(x, injected, prepared)
            change = new - x
            size = relative_change(change, new)  # (M,)
            x = new if compact else torch.where(live[:, None, None], new, x)
            residual[rows, loop - 1] = size if compact else size * live
            if loop == cap or not self.rule.stops_early:
                continue
            now = HaltingState(loop, new.detach(), change.detach(), functools.partial(prior_at, new, rows))
            with torch.no_grad():
                stop, memory = self.rule.stops(now, memory)  # (M,)
            if not compact:
                depth, live = torch.where(live & stop, loop, depth), live & ~stop
            elif stop.any():
                ended = x if ended is None else ended.index_copy(0, rows, x)
                depth[rows[stop]] = loop
                keep = (~stop).nonzero().squeeze(1)  # M shrinks
                rows, x, injected, memory = rows[keep], x[keep], injected[keep], tuple(part[keep] for part in memory)
                if len(rows) == 0:
                    break
        if ended is not None:
            x = ended.index_copy(0, rows, x)  # (B, N, D)
        return self.readout(deter, x, gate), LoopStats(depth, residual)

    def flops(self, loops: float = 1.0) -> float:
        """Prelude, injection and coda once, the block `loops` times."""
        injection = 2.0 * self.cfg.tokens * self.cfg.width**2
        return self.shell_flops() + injection + loops * self.block.flops()


def relative_change(change: Tensor, x: Tensor) -> Tensor:
    """(M, N, D) twice -> (M,) |change| / |x|, without gradient."""
    return change.detach().flatten(1).norm(dim=1) / x.detach().flatten(1).norm(dim=1)
