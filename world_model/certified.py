"""Two cores whose stability follows from their weights: the loop contracts for every state, input and weight.

    y      = sqrt(c) * x_{r-1}
    T(y)   = W2 ( sigmoid(G e) * maxmin( W1 mix(y) + U e ) )            ||W1||, ||W2|| <= 1
    mix(y) = (1 - m) y + m P(e) y V O                                   ||V||, ||O||, ||P(e)|| <= 1
    x_r    = a * x_{r-1} + sqrt(c) * T(y) + B e                         a = L Abar, c = L - a, per channel

Gates and mixing weights read the input e, never x. So T is 1-Lipschitz in y, and by Cauchy-Schwarz

    |v' (dx_r / dx_{r-1}) w| <= sum a |v| |w| + |sqrt(c) v| |sqrt(c) w| <= max(a + c) |v| |w| = L |v| |w|,   L < 1.

    certified     prelude, coda and outer gate are the looped core's. The loop has one fixed point x*, with
                  |x_r - x*| <= L / (1 - L) |x_r - x_{r-1}|; the outer gate keeps the carried state in a box.
    contracting   so is the environment step: prelude and gate read latents and action alone, and
                  deter' = (1 - u) deter + sqrt(u) x_R,   x_0 = sqrt(u) deter,   u >= SMALLEST_UPDATE,
                  so that two dreams with equal actions and latents forget how they differed.

Every ||.|| is kept by division by an upper bound of the spectral norm; power iteration bounds it from below, which
certifies nothing. Symbols as in `types.py`; h hidden units, M samples that are still looping.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.core import CoreSizes
from world_model.exits import ExitRule, HaltingState, RuleMemory
from world_model.looped import GatedCore, LoopConfig, LoopedCore
from world_model.nets import Norm, balanced_linear, linear
from world_model.retention import Retention

RATE = 0.9
"""L: every loop brings two states nearer to each other by at least this factor."""
SMALLEST_UPDATE = 0.02
"""Least u of the contracting core: what the gate alone keeps fades over at most 50 environment steps."""
HARMLESS = ("__init__", "flops")
"""Methods that a subclass of a core may have without losing its certificate."""
SQUARINGS = 6
"""Of the Gram matrix in a spectral bound: at most D^(1/256) times the norm, 2 % for a width of 128."""


def spectral_bound(matrix: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """0-d, at least the largest singular value of `matrix`, with gradient.

    Gram iteration (Delattre et al. 2023, arXiv 2305.16173): ||W||^(2k) = ||G^k|| <= ||G^k||_F for G = W'W. The norm
    is divided out before every squaring, and its logarithm kept, so that powers do not overflow. In float64 on a GPU,
    whose products of float32 may be rounded to ten bits.
    """
    kind, matrix = matrix.dtype, matrix.double() if matrix.is_cuda else matrix
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    log_norm, power = gram.new_zeros(()), 2.0
    for _ in range(squarings):
        size = gram.norm().clamp(min=1e-30)
        gram = gram / size
        gram, log_norm, power = gram @ gram, 2.0 * (log_norm + size.log()), 2.0 * power
    return torch.exp((log_norm + gram.norm().clamp(min=1e-30).log()) / power).to(kind)


def at_most_one(matrix: Tensor) -> Tensor:
    """The matrix, divided by its spectral bound where that exceeds 1."""
    return matrix / spectral_bound(matrix).clamp(min=1.0)


def maxmin(x: Tensor) -> Tensor:
    """(..., h) -> (..., h): each unit of one half paired with one of the other, sorted (Anil et al. 2019).

    It permutes its input, so it keeps distances, and gradients do not shrink, unlike with ReLU.
    """
    one, other = x.chunk(2, -1)
    return torch.cat([torch.maximum(one, other), torch.minimum(one, other)], -1)


class Mixing(NamedTuple):
    """V and O (D, D), normalised, and m (0-d)."""

    value: Tensor
    merge: Tensor
    share: Tensor


class CertifiedDynamics(NamedTuple):
    """What the weights alone say: a and sqrt(c) (D,), W1 (h, D) and W2 (D, h), normalised; reads [B; U; G] (D + 2h, D);
    mixing, where there are several tokens."""

    decay: Tensor
    coupling: Tensor
    up: Tensor
    down: Tensor
    reads: Tensor
    mixing: Mixing | None


class CertifiedLoop(nn.Module):
    """The weights of x_r = a x_{r-1} + sqrt(c) T(sqrt(c) x_{r-1}; e) + B e, for N tokens of width D."""

    def __init__(self, tokens: int, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads, self.attends = heads, tokens > 1
        hidden += hidden % 2  # maxmin works on pairs
        self.up, self.down = (nn.Parameter(torch.empty(shape)) for shape in ((hidden, width), (width, hidden)))
        self.bias, self.gate = linear(width, hidden), linear(width, hidden)
        if self.attends:
            self.scores = linear(width, 2 * width)
            self.value, self.merge = (nn.Parameter(torch.empty(width, width)) for _ in range(2))
            self.share = nn.Parameter(torch.zeros(()))
        for weight in (self.up, self.down, *((self.value, self.merge) if self.attends else ())):
            nn.init.orthogonal_(weight)  # the largest that the certificate lets pass

    def prepare(self, retention: Retention) -> CertifiedDynamics:
        """The normalised weights; `retention` gives Abar and B."""
        kept, injection = retention()
        decay = RATE * kept  # (D,)
        coupling = (RATE - decay).clamp(min=0.0).sqrt()
        reads = torch.cat([injection, self.bias.weight, self.gate.weight])  # (D + 2h, D)
        mixing = None
        if self.attends:
            mixing = Mixing(at_most_one(self.value), at_most_one(self.merge), self.share.sigmoid())
        return CertifiedDynamics(decay, coupling, at_most_one(self.up), at_most_one(self.down), reads, mixing)

    def inject(self, e: Tensor, prepared: CertifiedDynamics) -> Tensor:
        """e (B, N, D) -> (B, N, D + 2h + heads * N): B e, U e, sigmoid(G e), and rows of P(e)."""
        hidden = self.up.shape[0]
        read = e @ prepared.reads.t()  # (B, N, D + 2h)
        parts = [read[..., :-hidden], read[..., -hidden:].sigmoid()]
        if self.attends:
            parts.append(self.token_weights(e).permute(0, 2, 1, 3).flatten(2))  # (B, N, heads * N)
        return torch.cat(parts, -1)

    def token_weights(self, e: Tensor) -> Tensor:
        """P(e), (B, N, D) -> (B, heads, N, N): attention of the input on itself, with a spectral norm of at most 1.

        Rows sum to 1, and ||P|| <= sqrt(largest row sum * largest column sum).
        """
        shape = (*e.shape[:2], 2, self.heads, e.shape[2] // self.heads)
        query, key = self.scores(e).view(shape).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        weights = (query @ key.transpose(2, 3) * shape[-1] ** -0.5).softmax(-1)  # (B, heads, N, N)
        return weights / weights.sum(2, keepdim=True).amax(3, keepdim=True).clamp(min=1.0).sqrt()

    def forward(self, x: Tensor, injected: Tensor, prepared: CertifiedDynamics) -> Tensor:
        """One loop, (M, N, D) -> (M, N, D)."""
        hidden, width = self.up.shape
        start, bias, gate, token_weights = injected.tensor_split([width, width + hidden, width + 2 * hidden], -1)
        y = x * prepared.coupling
        if prepared.mixing is not None:
            y = self.mix(y, token_weights, prepared.mixing)
        units = maxmin(F.linear(y, prepared.up) + bias) * gate  # (M, N, h)
        return torch.addcmul(start, x, prepared.decay) + prepared.coupling * F.linear(units, prepared.down)

    def mix(self, y: Tensor, token_weights: Tensor, mixing: Mixing) -> Tensor:
        """(1 - m) y + m P y V O, (M, N, D) -> (M, N, D); a head mixes the tokens of its own channels."""
        batch, tokens, width = y.shape
        weights = token_weights.view(batch, tokens, self.heads, tokens).transpose(1, 2)  # (M, heads, N, N)
        values = F.linear(y, mixing.value).view(batch, tokens, self.heads, -1).transpose(1, 2)  # (M, heads, N, d)
        other = F.linear((weights @ values).transpose(1, 2).reshape(batch, tokens, width), mixing.merge)
        return torch.lerp(y, other, mixing.share)

    def flops(self) -> float:
        """Operations of one loop for one token, without those on e, which run once, and without P V."""
        return 2.0 * sum(weight.numel() for name, weight in self.named_parameters(recurse=False) if weight.dim() > 1)


class CertifiedCore(LoopedCore):
    """The looped core with a loop that contracts by construction; it needs no norm after each loop."""

    def build_loop(self, cfg: LoopConfig) -> None:
        if cfg.retention == "free":
            raise ValueError("a certified core constrains its retention: leave --model.loop.retention out")
        self.retention = Retention(cfg.width, cfg.gain)
        self.loop = CertifiedLoop(cfg.tokens, cfg.width, cfg.heads, cfg.hidden)

    def prepare(self) -> CertifiedDynamics:  # type: ignore[override]
        """The normalised weights, once for all steps of a sequence."""
        return self.loop.prepare(self.retention)

    def inject(self, e: Tensor, prepared: CertifiedDynamics) -> Tensor:  # type: ignore[override]
        return self.loop.inject(e, prepared)

    def refine(self, x: Tensor, injected: Tensor, prepared: CertifiedDynamics) -> Tensor:  # type: ignore[override]
        return self.loop(x, injected, prepared)

    def flops(self, loops: float = 1.0) -> float:
        """What reads e runs once, the rest `loops` times."""
        cfg, once = self.cfg, [self.loop.bias, self.loop.gate, *([self.loop.scores] if self.loop.attends else [])]
        reads = self.retention.matrix.numel() + sum(layer.weight.numel() for layer in once)
        per_loop = self.loop.flops() + (2.0 * cfg.tokens * cfg.width if self.loop.attends else 0.0)
        return self.shell_flops() + cfg.tokens * (2.0 * reads + loops * per_loop)


class ContractingCore(CertifiedCore):
    """The certified core whose environment step contracts too, by 1 - (1 - L) SMALLEST_UPDATE or faster.

    Prelude and outer gate do not read the state: it reaches the next one through the loop and by what the gate keeps.
    """

    def __init__(self, cfg: LoopConfig, sizes: CoreSizes):
        super().__init__(cfg, sizes)
        with torch.random.fork_rng(devices=[]):
            squares = sizes.squared_norm or sizes.groups, sizes.actions
            self.prelude_in = balanced_linear((sizes.groups * sizes.classes, sizes.actions), squares, cfg.units)
        del self.coda, self.coda_norm

    def read(self, deter: Tensor, inputs: Tensor) -> Tensor:
        return inputs

    def prelude(self, deter: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        e, gate = super().prelude(deter, inputs)
        return e, SMALLEST_UPDATE + (1.0 - SMALLEST_UPDATE) * gate

    def enter(self, deter: Tensor, gate: Tensor) -> Tensor:
        return gate.sqrt() * deter

    def readout(self, deter: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        gate = gate.to(deter.dtype)
        return torch.addcmul((1.0 - gate) * deter, gate.sqrt(), x.to(deter.dtype))

    def shell_flops(self) -> float:
        return 2.0 * sum(layer.weight.numel() for layer in (self.prelude_in, self.prelude_out, self.update_gate))


class CertifiedExit(ExitRule):
    """Stop when the loops that are left up to the cap cannot move the state by more than `threshold` times its norm.

    |x_R - x_r| <= (L + L^2 + .. + L^(R-r)) |x_r - x_{r-1}|, for the cores of this file alone.
    """

    stops_early = True

    def __init__(self, flat: int, cap: int, threshold: float | None = None):
        super().__init__()
        self.threshold = 0.1 if threshold is None else threshold

    def begin(self, e: Tensor, cap: int) -> RuleMemory:
        return (torch.full((len(e),), float(cap), device=e.device),)

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        left = RATE * (1.0 - RATE ** (memory[0] - now.loop)) / (1.0 - RATE)  # (M,)
        ahead = left * now.change.flatten(1).norm(dim=1)
        return ahead <= self.threshold * now.x.flatten(1).norm(dim=1), memory


# ---------------------------------------------------------------------- what is certified


class Certificate(NamedTuple):
    """Bounds that hold for every state and input; inf where a core has none.

    loop  Lipschitz constant of one loop; step: of one environment step, in deter; box: largest |deter| of a channel
    that can be reached from the learned start, when all bounds are taken at their worst.
    """

    loop: float
    step: float
    box: float


@torch.no_grad()
def certificate(core: nn.Module) -> Certificate:
    """The bounds of a core, from its weights alone: exact norms of what the loop multiplies with, in float64.

    Infinite where none is known: for other cores, and for subclasses with steps of their own.
    """
    if not isinstance(core, GatedCore) or not is_known(core):
        return Certificate(math.inf, math.inf, math.inf)
    start = float(core.start.double().abs().max())
    if not isinstance(core, CertifiedCore):
        return Certificate(math.inf, math.inf, max(start, largest_normed(core.coda_norm)))
    *parts, mixing = core.prepare()
    decay, coupling, up, down, reads = (part.double() for part in parts)
    lipschitz = norm(up) * norm(down)  # of T; with several tokens times that of the mixing
    if mixing is not None:
        lipschitz *= 1.0 + float(mixing.share) * (norm(mixing.value) * norm(mixing.merge) - 1.0)
    loop = float((decay + coupling.square() * lipschitz).max())
    if not isinstance(core, ContractingCore):
        return Certificate(loop, math.inf, max(start, largest_normed(core.coda_norm)))
    step = 1.0 - (1.0 - loop) * SMALLEST_UPDATE
    # |deter'| <= step |deter| + |x_R(0)|, as sqrt(u) <= 1: so |deter| <= |x_R(0)| / (1 - step)
    width, hidden = core.cfg.width, len(up)
    e = float(core.input_norm.gain.double().abs().max()) * math.sqrt(width)  # |e| of one token
    moved = norm(reads[:width]) + float(coupling.max()) * norm(down) * norm(reads[width : width + hidden])
    at_rest = math.sqrt(core.cfg.tokens) * moved * e / (1.0 - loop)
    return Certificate(loop, step, max(float(core.start.double().norm()), at_rest / (1.0 - step)))


def is_known(core: nn.Module) -> bool:
    """Whether a core and its parts take the steps of this project, which the bounds are of; any exit rule will do."""
    rules = {id(module) for rule in core.modules() if isinstance(rule, ExitRule) for module in rule.modules()}
    kinds = {kind for module in core.modules() if id(module) not in rules for kind in type(module).__mro__}
    ours = "world_model", "agent", "torch", "builtins"
    others = [kind for kind in kinds if kind.__module__.split(".")[0] not in ours]
    return not any(callable(value) for kind in others for name, value in vars(kind).items() if name not in HARMLESS)


def norm(matrix: Tensor) -> float:
    """Largest singular value."""
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


def largest_normed(layer: Norm) -> float:
    """The largest |entry| that a layer normalisation of width D can give: gain * sqrt(D - 1)."""
    return float(layer.gain.double().abs().max()) * math.sqrt(max(1, len(layer.gain) - 1))
