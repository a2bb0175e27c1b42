"""A world model whose scan over time is parallel: all rows of a sequence are computed at once.

The default model cannot be: its posterior and its prelude read the deterministic state, so that row t waits for row
t - 1. Here both read what is known beforehand, and the state is a linear recurrence over the rows:

    z_t     ~ q(z_t | o_t)                              posterior from the observation alone
    e_t, u_t = prelude(z_{t-1}, a_{t-1})                gates and inputs for all rows at once
    c_t     = norm(C x_R),  x_0 learned                 loops of all rows at once
    deter_t = (1 - u_t) deter_{t-1} + u_t c_t           elementwise: the only part that goes row by row

It is the form of minGRU (arXiv 2410.01201) with a looped candidate. The price: nothing but the heads joins what was
seen at different times in a nonlinear way. `PicardWorldModel` asks what a nonlinear core would need instead: it guesses
the states of all rows, computes all rows from the guess, and repeats. A sweep solves the recurrence of the outer gate
exactly, as DEER (arXiv 2309.12252) does with a diagonal Jacobian.

Symbols as in `world_model/types.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from world_model import Batch, CoreSizes, LatentState, LoopConfig, LoopedCore, WorldModel
from world_model.core import Traces
from world_model.jumps import action_input
from world_model.nets import linear
from world_model.types import Scanned


class ScanCore(LoopedCore):
    """The looped core whose prelude and loops do not read the state; the outer gate alone carries it on."""

    def __init__(self, loop: LoopConfig, sizes: CoreSizes):
        super().__init__(loop, sizes)
        with torch.random.fork_rng(devices=[]):
            self.prelude_in = linear(sizes.groups * sizes.classes + sizes.actions, loop.units)

    def read(self, deter: Tensor, inputs: Tensor) -> Tensor:
        return inputs

    def enter(self, deter: Tensor, gate: Tensor) -> Tensor:
        return self.start.expand_as(deter)


def linear_recurrence(keep: Tensor, add: Tensor, first: Tensor) -> Tensor:
    """h_t = keep_t * h_{t-1} + add_t, along (T, B, N, D), from h_{-1} = first (B, N, D) -> (T, B, N, D)."""
    states = []
    for kept, added in zip(keep.unbind(0), add.unbind(0), strict=True):
        first = torch.addcmul(added, kept, first)
        states.append(first)
    return torch.stack(states)


class FilterWorldModel(WorldModel):
    """The posterior reads the observation alone; the scan is still row by row, with any core."""

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        return self.latents.distribution(self.post_out(F.silu(self.post_norm(embed))))

    def sampled(
        self, state: LatentState, batch: Batch, embeds: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (B, T, S, K), latents drawn from them; and the inputs of the core of all rows (B, T, S*K + C),
        which are zero at the first row of an episode."""
        probs = self.posterior(embeds.new_zeros(0), embeds)
        stoch = self.draw(probs, levels.transpose(0, 1))
        before = torch.cat([state.stoch[:, None], stoch[:, :-1]], 1).flatten(2)  # (B, T, S*K)
        keep = (1.0 - batch.is_first.to(before.dtype))[..., None]
        actions = action_input(batch.prev_action, batch.span, self.cfg.jump)
        return probs, stoch, torch.cat([before, actions], -1) * keep

    def carried(self, state: LatentState, batch: Batch, gate: Tensor, new: Tensor) -> Tensor:
        """The outer gate's recurrence, gate and new (B, T, N, D) -> deter (B, T, N, D), from the start at resets."""
        keep = (1.0 - batch.is_first.to(gate.dtype))[..., None, None]
        begun = (1.0 - keep) * (1.0 - gate) * self.core.start  # what a first row keeps of the start
        kept, added = ((1.0 - gate) * keep).transpose(0, 1), (gate * new + begun).transpose(0, 1)
        return linear_recurrence(kept, added, state.deter).transpose(0, 1)

    def shifted(self, state: LatentState, batch: Batch, deter: Tensor) -> Tensor:
        """The state before each row, (B, T, N, D): that of the row before, or the start."""
        before = torch.cat([state.deter[:, None], deter[:, :-1]], 1)
        return torch.where(batch.is_first[..., None, None], self.core.start, before)

    def rows(self, batch: Batch, before: Tensor, inputs: Tensor, loops: int) -> tuple[Tensor, Tensor, Traces]:
        """All rows at once from the states before them (B, T, N, D): gate and new state of each, and the trace."""
        assert isinstance(self.core, LoopedCore)
        shape = before.shape
        _, trace = self.core(before.flatten(0, 1), inputs.flatten(0, 1), loops, self.core.prepare())
        x = trace.states[-1]
        new = self.core.coda_norm(x @ self.core.coda.t()).view(shape)
        assert trace.e is not None
        states = torch.stack(trace.states).detach().unflatten(1, shape[:2])  # (R+1, B, T, N, D)
        gate = trace.gate.view(shape)
        traces = Traces(states, before.detach(), gate.detach(), trace.e.detach().view(shape))
        return gate, new, traces


class ScanWorldModel(FilterWorldModel):
    """For a `ScanCore`: every row is computed at once, and the outer gate carries the states on."""

    def scan(self, state: LatentState, batch: Batch, embeds: Tensor, levels: Tensor, loops: int) -> Scanned:
        probs, stoch, inputs = self.sampled(state, batch, embeds, levels)
        before = self.core.start.expand(*batch.reward.shape, *self.core.start.shape)  # not read
        gate, new, traces = self.rows(batch, before, inputs, loops)
        deter = self.carried(state, batch, gate, new)
        traces = traces._replace(prev_deter=self.shifted(state, batch, deter).detach())
        return Scanned(LatentState(deter, stoch), probs, traces, list(deter.unbind(1)))


class PicardWorldModel(FilterWorldModel):
    """Any looped core, by sweeps over all rows: states are guessed, and computed from the guess `sweeps` times."""

    sweeps = 4

    def scan(self, state: LatentState, batch: Batch, embeds: Tensor, levels: Tensor, loops: int) -> Scanned:
        probs, stoch, inputs = self.sampled(state, batch, embeds, levels)
        deter = self.core.start.expand(*batch.reward.shape, *self.core.start.shape)
        for _ in range(self.sweeps):
            before = self.shifted(state, batch, deter)
            gate, new, traces = self.rows(batch, before, inputs, loops)
            deter = self.carried(state, batch, gate, new)
        return Scanned(LatentState(deter, stoch), probs, traces, list(deter.unbind(1)))
