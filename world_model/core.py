"""What every dynamics core is: the previous state, latents and action go in, the next deterministic state comes out.

    looped    one shared block, applied again and again                      `looped.py`
    stacked   the same block with separate weights per application (control) `stacked.py`
    gru       DreamerV3's block GRU (control)                                `gru.py`

Shapes: B batch, N tokens, D token width, S*K latents, A actions, R loops or layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.nets import Norm, linear

if TYPE_CHECKING:
    from world_model.looped import LoopConfig

LogPrior = Callable[[Tensor], Tensor]
"""(B, N, D) next deter -> (B, S, K) log-probabilities of the prior, for the exit rules that ask it."""


class LoopStats(NamedTuple):
    """depth (B,) loops used by each sample; residual (B, R) |x_r - x_{r-1}| / |x_r|, zero after the exit."""

    depth: Tensor
    residual: Tensor


class Trace(NamedTuple):
    """How a step came about: states x_0 .. x_R, each (B, N, D); the previous deter, the outer gate and, where the core
    has one, the input e that every loop is given again, (B, N, D)."""

    states: list[Tensor]
    deter: Tensor
    gate: Tensor
    e: Tensor | None = None


class Traces(NamedTuple):
    """The same along a sequence, detached: states (R+1, B, T, N, D), deter, gate and e (B, T, N, D)."""

    states: Tensor
    deter: Tensor
    gate: Tensor
    e: Tensor | None = None


class CoreSizes(NamedTuple):
    """Sizes from outside of the core: groups S, classes K, actions A."""

    groups: int
    classes: int
    actions: int


class Core(nn.Module, ABC):
    """The interface; `prepared` is what `prepare` returned, computed once for all steps of a sequence."""

    looping = False
    """Whether the number of loops means anything."""
    static = False
    """Whether nothing that is computed may depend on a number that a GPU would have to tell first; more is computed."""
    start: nn.Parameter
    """(N, D) state before the first observation. Learned, and not zero: see `Norm`."""

    @abstractmethod
    def prepare(self) -> Any:
        """What depends on the weights alone."""

    @abstractmethod
    def forward(self, deter: Tensor, inputs: Tensor, loops: int | Tensor, prepared: Any) -> tuple[Tensor, Trace]:
        """One step with gradient: deter (B, N, D), inputs (B, S*K + A) -> the next deter, and its trace."""

    def settle(
        self,
        deter: Tensor,
        inputs: Tensor,
        prepared: Any,
        max_loops: int | None = None,
        *,
        log_prior: LogPrior | None = None,
    ) -> tuple[Tensor, LoopStats]:
        """One step outside of world-model training. A core without loops reports one of depth 1."""
        out, _ = self(deter, inputs, 1, prepared)
        depth = torch.ones(deter.shape[0], dtype=torch.long, device=deter.device)
        return out, LoopStats(depth, deter.new_zeros(deter.shape[0], 1))

    @abstractmethod
    def flops(self, loops: float = 1.0) -> float:
        """Floating-point operations of one step of one sample: two per multiply-add of a matrix product."""

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay must leave alone."""
        return []


class GatedCore(Core):
    """What the looped core and its stacked control share: prelude, coda, output norm and outer gate."""

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes):
        super().__init__()
        self.cfg, (groups, classes, actions) = cfg, sizes
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
        self.coda = nn.Parameter(torch.eye(cfg.width))
        self.coda_norm = Norm(cfg.width)
        self.update_gate = linear(cfg.units, flat, bias=True, scale=0.5)
        with torch.no_grad():  # spread over time constants from about 1.4 steps to the longest
            slowest = -math.log(cfg.longest_memory - 1.0)
            self.update_gate.bias.copy_(torch.linspace(slowest, 1.0, flat)[torch.randperm(flat)])
        self.start = nn.Parameter(torch.randn(cfg.tokens, cfg.width))

    def prelude(self, deter: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """-> injected input e (B, N, D), and the outer gate u (B, N, D).

        The previous state enters here with gradient, so that learning reaches back through time whatever the
        loops forget of their start.
        """
        hidden = F.silu(self.prelude_norm(self.prelude_in(torch.cat([deter.flatten(1), inputs], -1))))
        e = self.input_norm(self.prelude_out(hidden).view_as(deter))
        return e, torch.sigmoid(self.update_gate(hidden)).view_as(deter)

    def finish(self, deter: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Coda, output norm and outer gate: the state that goes on to the next environment step."""
        out = self.coda_norm(x @ self.coda.t()).to(deter.dtype)
        return torch.lerp(deter, out, gate.to(deter.dtype)) if self.cfg.carry == "gate" else out

    def shell_flops(self) -> float:
        """Operations outside of the loop: prelude, outer gate and coda."""
        layers = self.prelude_in, self.prelude_out, self.update_gate
        return 2.0 * (sum(layer.weight.numel() for layer in layers) + self.cfg.tokens * self.coda.numel())
