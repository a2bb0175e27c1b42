"""The interface of a dynamics core: previous state, latents and action in, next deterministic state out.

    looped                  one shared block, applied again and again              `looped.py` (the default)
    certified, contracting  the same with bounds that follow from the weights      `certified.py`
    stacked                 the same block with separate weights per application   `controls/stacked.py`
    gru                     DreamerV3's block GRU                                  `controls/gru.py`
    module:Class            one of your own                                        docs/python.md

Symbols as in `types.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LogPrior = Callable[[Tensor], Tensor]
"""(B, N, D) next deter -> (B, S, P): the prior, as `Latents.kl_form` has it, for the exit rules that ask it."""


class LoopStats(NamedTuple):
    """depth (B,) loops used by each sample; residual (B, R) |x_r - x_{r-1}| / |x_r|, zero after the exit."""

    depth: Tensor
    residual: Tensor


class Trace(NamedTuple):
    """How a step came about: states x_0 .. x_R, (B, N, D) each; the previous deter and the outer gate (B, N, D); and
    the input e (B, N, D) that every loop is given again, where the core has one."""

    states: list[Tensor]
    prev_deter: Tensor
    gate: Tensor
    e: Tensor | None = None


class Traces(NamedTuple):
    """The same along a sequence, detached: states (R+1, B, T, N, D), prev_deter, gate and e (B, T, N, D)."""

    states: Tensor
    prev_deter: Tensor
    gate: Tensor
    e: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def stack(cls, steps: Sequence[Trace]) -> Traces:
        """Of the T steps of a sequence."""
        states = torch.stack([torch.stack(x, 1) for x in zip(*(step.states for step in steps), strict=True)])
        parts = zip(*(step[1:] for step in steps), strict=True)
        return cls(states, *(torch.stack(part, 1) for part in parts if part[0] is not None))


class CoreSizes(NamedTuple):
    """Sizes from outside of the core: groups S, classes K, numbers C of the actions (`jumps.action_input_size`), and
    the expected squared norm of the latents, by default that of S one-hot vectors."""

    groups: int
    classes: int
    actions: int
    squared_norm: float | None = None


class Core(nn.Module, ABC):
    """The interface; `prepared` is what `prepare` returned, computed once for all steps of a sequence."""

    looping = False
    """Whether the number of loops means anything."""
    static_shapes = False
    """Whether shapes and control flow must not depend on computed values, as in a CUDA graph; more is then computed."""
    start: nn.Parameter
    """(N, D) state before the first observation. Learned, and not zero: see `Norm`."""

    @abstractmethod
    def prepare(self) -> Any:
        """What depends on the weights alone."""

    @abstractmethod
    def forward(self, deter: Tensor, inputs: Tensor, loops: int, prepared: Any) -> tuple[Tensor, Trace]:
        """One training step, with gradient: deter (B, N, D), inputs (B, S*K + C) -> the next deter, and its trace."""

    def adaptive_step(
        self,
        deter: Tensor,
        inputs: Tensor,
        prepared: Any,
        max_loops: int | None = None,
        *,
        log_prior: LogPrior | None = None,
    ) -> tuple[Tensor, LoopStats]:
        """One step of dreams, acting and evaluation, where each sample may stop by itself. Without loops: depth 1."""
        out, _ = self(deter, inputs, 1, prepared)
        depth = torch.ones(deter.shape[0], dtype=torch.long, device=deter.device)
        return out, LoopStats(depth, deter.new_zeros(deter.shape[0], 1))

    @abstractmethod
    def flops(self, loops: float = 1.0) -> float:
        """Floating-point operations of one step of one sample: two per multiply-add of a matrix product."""
