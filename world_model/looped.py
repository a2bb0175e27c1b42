"""The looped core: one shared block refines the latent state again and again, and stops when it is settled.

    e   = norm(prelude(deter, inputs))                     what happened: last state, latent sample, action
    x_0 = deter
    x_r = norm(block(Abar * x_{r-1} + Bbar e))             r = 1..R, the same block every time
    deter' = (1 - u) * deter + u * norm(C x_R)             outer gate: memory over environment steps

Abar is a diagonal retention in (0, 1) by construction, and the injection Bbar e is repeated in every loop, so
what the loop forgets of its start it learns again from its input (Looped World Models, arXiv 2606.18208,
eq. 2-6; the concrete form of the retention is Parcae's, arXiv 2604.12946). Three things are ours. The state is
normalised after each loop: a pre-norm residual stream grows with every loop and then no exit test means
anything. The outer gate keeps a memory over environment steps. And the exit test is a linear read-out of the
loop state, times the size of its last change, trained to predict what another loop would bring: it costs one
small product per loop (`exits.py`).

Shapes: B batch, N tokens, D token width, R loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from world_model.block import Block
from world_model.core import CoreSizes, GatedCore, LogPrior, LoopStats, Trace
from world_model.exits import RULES, Moment, make_rule
from world_model.nets import Norm
from world_model.outside import check_name
from world_model.ranges import AT_LEAST_ONE, require
from world_model.retention import Dynamics, Retention


@dataclass(frozen=True)
class LoopConfig:
    """The looped core and its depth."""

    tokens: int = 1
    """N, tokens of the deterministic state; attention mixes them (with 1 token it is left out)."""
    width: int = 128
    """D, width of one token."""
    heads: int = 4
    """Attention heads; must divide the width."""
    expand: float = 2.0
    """Hidden width of the gated MLP in units of the token width; below 1 a loop can do little, and many are needed."""
    units: int = 128
    """Width of the prelude's hidden layer."""
    mean_loops: float = 2.0
    """Mean number of loops while the world model trains; the cap is twice that."""
    min_loops: int = 1
    """Fewest loops while the world model trains; at most the mean. Exits may come earlier where that loses nothing."""
    depth: Literal["update", "sequence", "fixed"] = "update"
    """Training depth: Poisson-sampled once per update, once per sequence, or always the mean."""
    backprop_loops: int | None = None
    """Loops of a step that are differentiated, the last ones; by default all (the paper: half of the mean)."""
    retention: Literal["constrained", "free"] = "constrained"
    """Abar: in (0, 1) by construction, or any vector (a control)."""
    gain: Literal["euler", "zoh", "leaky"] = "euler"
    """Injection per loop: Delta (the paper), exact zero-order hold, or 1 - Abar (as slow as the channel forgets)."""
    norm: Literal["pre", "sandwich", "post"] = "pre"
    """Where the block normalises; the state is normalised after each loop in any case."""
    initial: Literal["carry", "zero", "noise"] = "carry"
    """Loop state x_0: the state of the last step, nothing, or unit noise."""
    exit: str = "gate"
    """When a state stops looping in imagination, acting and evaluation: gate, lookahead, forecast, residual,
    acceleration, kl, paper, random, module:Class of your own, or fixed, which always runs `mean_loops` loops."""
    max_loops: int | None = None
    """Cap of the loops with exits, or the fixed number; may exceed the training depth."""
    exit_threshold: float | None = None
    """Of the exit rule. By default 0.05 nats for gate, lookahead and forecast: go on while more is predicted."""
    exit_histogram: tuple[float, ...] = ()
    """Weights of 1, 2, .. loops for the random exit; by default equal up to the cap."""
    longest_memory: float = 20.0
    """Time constant at the start of the slowest channels of the outer gate (environment steps)."""
    carry: Literal["gate", "replace", "cut"] = "gate"
    """Memory over steps: outer gate, plain output, or nothing at all (a control that cannot remember)."""

    def __post_init__(self) -> None:
        check_name("exit rule", self.exit, RULES)
        whole = ("tokens", "width", "heads", "units", "min_loops", "max_loops", "backprop_loops")
        require(self, "", **dict.fromkeys(whole, AT_LEAST_ONE), mean_loops=(1.0, 1000.0))
        if self.min_loops > self.mean_loops:
            raise ValueError(f"min_loops {self.min_loops} must be at most mean_loops {self.mean_loops}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a positive multiple of heads {self.heads}")
        if self.hidden < 1:
            raise ValueError(f"expand {self.expand} leaves the gated MLP of a width of {self.width} nothing")
        if self.longest_memory <= 1:
            raise ValueError(f"longest_memory must be more than 1, got {self.longest_memory}")

    @property
    def hidden(self) -> int:
        """Hidden width of the gated MLP."""
        return round(self.expand * self.width)

    @property
    def usual_loops(self) -> float:
        """Mean number of loops in training."""
        return round(self.mean_loops) if self.depth == "fixed" else self.mean_loops

    @property
    def train_cap(self) -> int:
        """Most loops that training ever runs."""
        return round(self.mean_loops) if self.depth == "fixed" else round(2 * self.mean_loops)

    @property
    def run_cap(self) -> int:
        """Most loops outside of world-model training."""
        return self.max_loops or (round(self.mean_loops) if self.exit == "fixed" else self.train_cap)


class LoopedCore(GatedCore):
    """deter (B, N, D) and inputs (B, I) -> the next deter (B, N, D).

    `forward` runs a given number of loops with gradient (training). `settle` lets each sample stop by itself
    (imagination, acting, evaluation).
    """

    looping = True

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes):
        super().__init__(cfg, sizes)
        self.retention = Retention(cfg.width, cfg.gain, cfg.retention)
        self.block = Block(cfg.tokens, cfg.width, cfg.heads, cfg.hidden, cfg.norm)
        self.loop_norm = Norm(cfg.width)
        flat = cfg.tokens * cfg.width
        with torch.random.fork_rng(devices=[]):  # the other weights of a seed do not depend on the rule
            self.rule = make_rule(cfg.exit, flat, cfg.run_cap, cfg.exit_threshold, cfg.exit_histogram)

    def undecayed(self) -> list[torch.nn.Parameter]:
        """The retention, B and C."""
        return [*self.retention.parameters(), self.coda]

    def prepare(self) -> Dynamics:
        """The linear part of the loop."""
        return self.retention()

    def refine(self, x: Tensor, injected: Tensor, decay: Tensor) -> Tensor:
        """One loop: retention and injection, the shared block, and the norm that lets the state settle."""
        return self.loop_norm(self.block(torch.addcmul(injected, x, decay)))

    def first(self, deter: Tensor) -> Tensor:
        """x_0; noise is drawn for the whole batch, before any sample stops."""
        if self.cfg.initial == "carry":
            return deter
        return torch.zeros_like(deter) if self.cfg.initial == "zero" else torch.randn_like(deter)

    def forward(self, deter: Tensor, inputs: Tensor, loops: int | Tensor, prepared: Dynamics) -> tuple[Tensor, Trace]:
        """Run `loops` loops, an int or (B,) integers.

        A sample whose own number of loops is reached stays frozen, so that its result does not depend on its
        batch mates.
        """
        e, gate = self.prelude(deter, inputs)
        injected = e @ prepared.injection.t()
        states = [self.first(deter)]
        for loop in range(loops if isinstance(loops, int) else self.deepest(loops)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.ungraded(loop, loops)):
                x = self.refine(self.cut(states[-1], loop, loops), injected, prepared.decay)
            if isinstance(loops, Tensor):
                x = torch.where((loops > loop)[:, None, None], x, states[-1])
            states.append(x)
        return self.finish(deter, states[-1], gate), Trace(states, deter, gate, e)

    def deepest(self, loops: Tensor) -> int:
        """Loops to run so that every sample gets its own number of them."""
        return self.cfg.train_cap if self.static else int(loops.max())

    def ungraded(self, loop: int, loops: int | Tensor) -> bool:
        """Whether no sample wants the gradient of this loop (counted from 0)."""
        last = self.cfg.backprop_loops
        return last is not None and isinstance(loops, int) and loop < loops - last

    def cut(self, x: Tensor, loop: int, loops: int | Tensor) -> Tensor:
        """x without gradient where exactly the loops from this one on are to be differentiated."""
        last = self.cfg.backprop_loops
        if last is None or loop == 0:
            return x
        if isinstance(loops, int):
            return x.detach() if loop == loops - last else x
        return torch.where((loops - last == loop)[:, None, None], x.detach(), x)

    def settle(
        self,
        deter: Tensor,
        inputs: Tensor,
        prepared: Dynamics,
        max_loops: int | None = None,
        *,
        log_prior: LogPrior | None = None,
        compact: bool | None = None,
    ) -> tuple[Tensor, LoopStats]:
        """Loop until the exit rule says that another loop would not help, at most `max_loops` times.

        compact takes finished rows out of the computation (default on CPU); otherwise they are frozen in
        place, which keeps shapes fixed. Both give the same result.
        """
        cap = max_loops or self.cfg.run_cap
        compact = not (deter.is_cuda or self.static) if compact is None else compact
        e, gate = self.prelude(deter, inputs)
        injected = e @ prepared.injection.t()
        x, planned = self.first(deter), self.rule.plan(e.detach(), cap)
        if planned is not None:
            planned = planned.clamp(1, cap)
            x, residual = self.follow(planned, x, injected, prepared.decay, cap, compact)
            return self.finish(deter, x, gate), LoopStats(planned, residual)
        batch, memory = deter.shape[0], self.rule.begin(deter)
        settled: Tensor | None = None  # states by row, once the first rows have exited
        rows = torch.arange(batch, device=deter.device)  # live rows
        live = torch.ones(batch, dtype=torch.bool, device=deter.device)
        depth = torch.full((batch,), cap, device=deter.device)
        residual = deter.new_zeros(batch, cap)
        for loop in range(1, cap + 1):
            new = self.refine(x, injected, prepared.decay)
            change = new - x
            size = relative_size(change, new)
            x = new if compact else torch.where(live[:, None, None], new, x)
            residual[rows, loop - 1] = size if compact else size * live
            if loop == cap or not self.rule.stops_early:
                continue

            def read(new: Tensor = new, rows: Tensor = rows) -> Tensor:
                if log_prior is None:
                    raise ValueError("this exit rule asks the prior: pass log_prior")
                return log_prior(self.finish(deter[rows], new, gate[rows]))

            with torch.no_grad():
                stop, memory = self.rule.stops(Moment(loop, new.detach(), change.detach(), read), memory)
            if not compact:
                depth = torch.where(live & stop, loop, depth)
                live = live & ~stop
                continue
            staying = len(rows) - int(stop.sum())
            if staying == len(rows):
                continue
            depth[rows[stop]] = loop
            settled = x if settled is None else settled.index_copy(0, rows, x)
            if staying == 0:
                rows = rows[:0]
                break
            keep = (~stop).nonzero().squeeze(1)
            rows, x, injected = rows[keep], x[keep], injected[keep]
            memory = tuple(part[keep] for part in memory)
        if settled is not None:
            x = settled.index_copy(0, rows, x) if len(rows) else settled
        return self.finish(deter, x, gate), LoopStats(depth, residual)

    def follow(
        self, depth: Tensor, x: Tensor, injected: Tensor, decay: Tensor, cap: int, compact: bool
    ) -> tuple[Tensor, Tensor]:
        """The loops of samples whose depth (B,) is known before: -> x (B, N, D), residual (B, cap).

        Sorted, deepest first, the samples that go on are always the first ones, and taking the others out of the
        computation copies nothing.
        """
        residual = x.new_zeros(len(x), cap)
        if not compact:
            for loop in range(cap):
                new, runs = self.refine(x, injected, decay), depth > loop
                residual[:, loop] = relative_size(new - x, new) * runs
                x = torch.where(runs[:, None, None], new, x)
            return x, residual
        order = depth.argsort(descending=True, stable=True)
        x, injected, done = x[order], injected[order], []
        for loop, count in enumerate((depth[:, None] > torch.arange(cap, device=depth.device)).sum(0).tolist()):
            if count == 0:
                break
            if count < len(x):
                done.append(x[count:])
                x, injected = x[:count], injected[:count]
            new = self.refine(x, injected, decay)
            residual[:count, loop] = relative_size(new - x, new)
            x = new
        back = order.argsort()
        return torch.cat([x, *reversed(done)])[back], residual[back]

    def flops(self, loops: float = 1.0) -> float:
        """Prelude, injection and coda once, the block `loops` times."""
        injection = 2.0 * self.cfg.tokens * self.cfg.width**2
        return self.shell_flops() + injection + loops * self.block.flops()


def relative_size(change: Tensor, x: Tensor) -> Tensor:
    """(M, N, D) twice -> (M,) |change| / |x|, without gradient."""
    return change.detach().flatten(1).norm(dim=1) / x.detach().flatten(1).norm(dim=1)


def sample_depth(cfg: LoopConfig, batch: int = 1, device: torch.device | None = None) -> int | Tensor:
    """Training depth: Poisson around `mean_loops`, at least `min_loops`, at most twice the mean.

    The paper samples per sequence; one draw per update costs less, because a batch runs as long as its
    deepest sequence.
    """
    if cfg.depth == "fixed":
        return cfg.train_cap
    size = batch if cfg.depth == "sequence" else 1
    loops = torch.poisson(torch.full((size,), float(cfg.mean_loops))).clamp(cfg.min_loops, cfg.train_cap).long()
    return loops.to(device) if cfg.depth == "sequence" else int(loops)
