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
small product per loop.

Shapes: B batch, N tokens, D token width, R loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.latent import probabilities
from world_model.nets import Norm, linear


@dataclass(frozen=True)
class LoopConfig:
    """The looped core and its depth."""

    tokens: int = 1
    """N, tokens of the deterministic state; attention mixes them (with 1 token it is left out)."""
    width: int = 128
    """D, width of one token."""
    heads: int = 4
    """Attention heads; must divide the width."""
    expand: int = 2
    """Hidden width of the gated MLP in units of the token width."""
    units: int = 128
    """Width of the prelude's hidden layer."""
    mean_loops: float = 2.0
    """Mean number of loops while the world model trains; the cap is twice that."""
    depth: Literal["update", "sequence", "fixed"] = "update"
    """Training depth: Poisson-sampled once per update, once per sequence, or always the mean."""
    gain: Literal["euler", "leaky"] = "euler"
    """Injection per loop: Delta (the paper), or 1 - Abar: a channel then takes in its input as slowly as it forgets."""
    exit: Literal["gate", "fixed"] = "gate"
    """In imagination, acting and evaluation: stop where the gate says so, or run `mean_loops` loops."""
    max_loops: int | None = None
    """Cap of the loops with exits, or the fixed number; may exceed the training depth."""
    exit_threshold: float = 0.05
    """A state goes on while another loop is predicted to lower the prior's KL by more than this (nats)."""
    longest_memory: float = 20.0
    """Time constant at the start of the slowest channels of the outer gate (environment steps)."""
    carry: Literal["gate", "replace", "cut"] = "gate"
    """Memory over steps: outer gate, plain output, or nothing at all (a control that cannot remember)."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a positive multiple of heads {self.heads}")
        if self.mean_loops < 1:
            raise ValueError(f"mean_loops must be at least 1, got {self.mean_loops}")
        if self.longest_memory <= 1:
            raise ValueError(f"longest_memory must be more than 1, got {self.longest_memory}")
        if self.max_loops is not None and self.max_loops < 1:
            raise ValueError(f"max_loops must be at least 1, got {self.max_loops}")

    @property
    def train_cap(self) -> int:
        """Most loops that training ever runs."""
        return round(self.mean_loops) if self.depth == "fixed" else round(2 * self.mean_loops)

    @property
    def run_cap(self) -> int:
        """Most loops outside of world-model training."""
        return self.max_loops or (self.train_cap if self.exit == "gate" else round(self.mean_loops))


class LoopStats(NamedTuple):
    """depth (B,) loops used by each sample; residual (B, R) |x_r - x_{r-1}| / |x_r|, zero after the exit."""

    depth: Tensor
    residual: Tensor


class Dynamics(NamedTuple):
    """The linear part of the loop, computed once per sequence: decay (D,), injection (D, D)."""

    decay: Tensor
    injection: Tensor


class Retention(nn.Module):
    """Abar = exp(-Delta * exp(a)) and Bbar = Delta * B, with Delta = softplus(delta) (arXiv 2606.18208 eq. 4).

    Delta * exp(a) is clamped to [1e-4, 20]: without it float32 rounds Abar to exactly 1 or 0. The decays start
    log-uniformly spread over [0.5, 0.995], so that some channels hold and others follow.

    With the gain Delta the loop has nearly settled after three loops, whatever it is asked. `leaky` puts 1 - Abar
    in its place: x moves towards B e instead of adding it up, and later loops have work left.
    """

    def __init__(self, width: int, gain: str = "euler"):
        super().__init__()
        self.leaky = gain == "leaky"
        delta = 0.8047  # softplus(delta) of Parcae: exp(-0.8047) = sqrt(1/5)
        decay = torch.exp(torch.linspace(math.log(0.5), math.log(0.995), width))
        self.log_rate = nn.Parameter(torch.log(-torch.log(decay) / delta))
        self.delta = nn.Parameter(torch.full((width,), math.log(math.expm1(delta))))
        self.matrix = nn.Parameter(torch.eye(width))

    def forward(self) -> Dynamics:
        delta = F.softplus(self.delta.float())
        rate = delta * self.log_rate.float().clamp(max=60.0).exp()  # beyond 60, exp would overflow
        decay = torch.exp(-rate.clamp(1e-4, 20.0)).to(self.matrix.dtype)
        gain = 1.0 - decay if self.leaky else delta.to(decay.dtype)
        return Dynamics(decay, gain[:, None] * self.matrix)


class Block(nn.Module):
    """The shared block: attention over the N tokens, then a gated MLP, both pre-norm and residual.

    Attention is written out: for a handful of tokens that is faster on CPU than the fused kernel.
    """

    def __init__(self, cfg: LoopConfig):
        super().__init__()
        self.heads, hidden = cfg.heads, cfg.expand * cfg.width
        self.attends = cfg.tokens > 1  # one token would attend to itself alone: a linear map
        if self.attends:
            self.norm_attention = Norm(cfg.width)
            self.qkv = linear(cfg.width, 3 * cfg.width)
            self.merge = linear(cfg.width, cfg.width, scale=0.1)
        self.norm_mlp = Norm(cfg.width)
        self.up = linear(cfg.width, 2 * hidden)
        self.down = linear(hidden, cfg.width, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        if self.attends:
            x = x + self.merge(self.attention(self.qkv(self.norm_attention(x))))
        gate, value = self.up(self.norm_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)

    def attention(self, qkv: Tensor) -> Tensor:  # (B, N, 3D) -> (B, N, D)
        batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.view(shape).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        if qkv.is_cuda:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:  # products of 4 x 16 matrices: three times faster elementwise than as a batched product
            scores = (query.unsqueeze(3) * key.unsqueeze(2)).sum(-1) * shape[-1] ** -0.5  # (B, heads, N, N)
            mixed = (probabilities(scores).to(value.dtype).unsqueeze(-1) * value.unsqueeze(2)).sum(3)
        return mixed.transpose(1, 2).reshape(batch, tokens, width)


class LoopedCore(nn.Module):
    """deter (B, N, D) and inputs (B, I) -> the next deter (B, N, D).

    `forward` runs a given number of loops with gradient (training). `settle` lets each sample stop by itself
    (imagination, acting, evaluation).
    """

    def __init__(self, cfg: LoopConfig, groups: int, classes: int, actions: int):
        super().__init__()
        self.cfg = cfg
        flat = cfg.tokens * cfg.width
        self.prelude_in = linear(flat + groups * classes + actions, cfg.units)
        with torch.no_grad():  # state, latents (of which `groups` are 1) and action start with an equal say
            for columns, size in zip(
                self.prelude_in.weight.split([flat, groups * classes, actions], 1), (flat, groups, actions), strict=True
            ):
                columns.mul_((self.prelude_in.in_features / size / 3) ** 0.5)
        self.prelude_norm = Norm(cfg.units)
        self.prelude_out = linear(cfg.units, flat)
        self.input_norm = Norm(cfg.width)
        self.retention = Retention(cfg.width, cfg.gain)
        self.block = Block(cfg)
        self.loop_norm = Norm(cfg.width)
        self.coda = nn.Parameter(torch.eye(cfg.width))
        self.coda_norm = Norm(cfg.width)
        self.update_gate = linear(cfg.units, flat, bias=True, scale=0.5)
        with torch.no_grad():  # spread over time constants from about 1.4 steps to the longest
            slowest = -math.log(cfg.longest_memory - 1.0)
            self.update_gate.bias.copy_(torch.linspace(slowest, 1.0, flat)[torch.randperm(flat)])
        # The state before the first observation. Learned, and not zero: see `Norm`.
        self.start = nn.Parameter(torch.randn(cfg.tokens, cfg.width))
        # The exit gate reads the loop state and its last change. At first it says "another loop" while the
        # last one moved the state by more than about 5 % of its size.
        self.exit_state = linear(flat, 1, bias=True, scale=0.0)
        self.exit_change = linear(flat, 1, scale=0.0)
        with torch.no_grad():
            self.exit_state.bias.fill_(20.0 * cfg.exit_threshold + 0.2)

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay must leave alone: the retention, B and C."""
        return [*self.retention.parameters(), self.coda]

    def prelude(self, deter: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """-> injected input e (B, N, D), and the outer gate u (B, N, D).

        The previous state enters here with gradient, so that learning reaches back through time whatever the
        loops forget of their start.
        """
        hidden = F.silu(self.prelude_norm(self.prelude_in(torch.cat([deter.flatten(1), inputs], -1))))
        e = self.input_norm(self.prelude_out(hidden).view_as(deter))
        return e, torch.sigmoid(self.update_gate(hidden)).view_as(deter)

    def refine(self, x: Tensor, injected: Tensor, decay: Tensor) -> Tensor:
        """One loop: retention and injection, the shared block, and the norm that lets the state settle."""
        return self.loop_norm(self.block(torch.addcmul(injected, x, decay)))

    def finish(self, deter: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Coda, output norm and outer gate: the state that goes on to the next environment step."""
        out = self.coda_norm(x @ self.coda.t())
        return torch.lerp(deter, out, gate) if self.cfg.carry == "gate" else out

    def forward(
        self, deter: Tensor, inputs: Tensor, loops: int | Tensor, dynamics: Dynamics
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run `loops` loops, an int or (B,) integers, all differentiated.

        Returns the next deter, the loop states [x_0, x_1, ..., x_R], and the outer gate. A sample whose own
        number of loops is reached stays frozen, so that its result does not depend on its batch mates.
        """
        e, gate = self.prelude(deter, inputs)
        injected = e @ dynamics.injection.t()
        states = [deter]
        for loop in range(loops if isinstance(loops, int) else int(loops.max())):
            x = self.refine(states[-1], injected, dynamics.decay)
            if isinstance(loops, Tensor):
                x = torch.where((loops > loop)[:, None, None], x, states[-1])
            states.append(x)
        return self.finish(deter, states[-1], gate), states, gate

    def improvement(self, x: Tensor, change: Tensor) -> Tensor:
        """(B,) nats by which another loop is predicted to lower the KL of the prior.

        What the state says counts in proportion to the size of the last change: a state that has settled
        cannot be improved, whatever it looks like.
        """
        change = change.flatten(1)
        size = change.norm(dim=1, keepdim=True) * change.shape[1] ** -0.5
        return (self.exit_state(x.flatten(1)) * size + self.exit_change(change.abs())).squeeze(-1)

    def settle(
        self,
        deter: Tensor,
        inputs: Tensor,
        dynamics: Dynamics,
        max_loops: int | None = None,
        compact: bool | None = None,
    ) -> tuple[Tensor, LoopStats]:
        """Loop until the exit rule says that another loop would not help, at most `max_loops` times.

        compact takes finished rows out of the computation (default on CPU); otherwise they are frozen in
        place, which keeps shapes fixed. Both give the same result.
        """
        cap = max_loops or self.cfg.run_cap
        compact = not deter.is_cuda if compact is None else compact
        e, gate = self.prelude(deter, inputs)
        injected = e @ dynamics.injection.t()
        batch = len(deter)
        x = deter
        settled: Tensor | None = None  # states by row, once the first rows have exited
        rows = torch.arange(batch, device=deter.device)  # live rows
        live = torch.ones(batch, dtype=torch.bool, device=deter.device)
        depth = torch.full((batch,), cap, device=deter.device)
        residual = deter.new_zeros(batch, cap)
        for loop in range(1, cap + 1):
            new = self.refine(x, injected, dynamics.decay)
            change = new - x
            size = change.detach().flatten(1).norm(dim=1) / new.detach().flatten(1).norm(dim=1)
            x = new if compact else torch.where(live[:, None, None], new, x)
            residual[rows, loop - 1] = size if compact else size * live
            if loop == cap or self.cfg.exit == "fixed":
                continue
            go_on = self.improvement(new.detach(), change.detach()) > self.cfg.exit_threshold
            if not compact:
                depth = torch.where(live & ~go_on, loop, depth)
                live = live & go_on
                continue
            staying = int(go_on.sum())
            if staying == len(rows):
                continue
            depth[rows[~go_on]] = loop
            settled = x if settled is None else settled.index_copy(0, rows, x)
            if staying == 0:
                rows = rows[:0]
                break
            keep = go_on.nonzero().squeeze(1)
            rows, x, injected = rows[keep], x[keep], injected[keep]
        if settled is not None:
            x = settled.index_copy(0, rows, x) if len(rows) else settled
        return self.finish(deter, x, gate), LoopStats(depth, residual)


def sample_depth(cfg: LoopConfig, batch: int, device: torch.device | None = None) -> int | Tensor:
    """Training depth: Poisson around `mean_loops`, at least 1, at most twice the mean.

    The paper samples per sequence; one draw per update costs less, because a batch runs as long as its
    deepest sequence.
    """
    if cfg.depth == "fixed":
        return cfg.train_cap
    size = batch if cfg.depth == "sequence" else 1
    loops = torch.poisson(torch.full((size,), float(cfg.mean_loops))).clamp(1, cfg.train_cap).long()
    return loops.to(device) if cfg.depth == "sequence" else int(loops)
