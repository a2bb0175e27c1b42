"""Exit rules that stand for other people's systems, and the random one: controls of the gate.

    residual      |x_r - x_{r-1}| / |x_r| is small                                default threshold 0.1
    acceleration  |change_r - change_{r-1}| / |x_r| is small twice in a row       0.1 (arXiv 2509.23314)
    kl            KL(prior_{r-1} || prior_r) is small: the prior hardly changes   0.01 nats (Huginn, arXiv 2502.05171)
    paper         sigmoid(w x_r + b) is large, trained as printed                 0.5 (arXiv 2606.18208 eq. 9 and 10)
    random        at a depth drawn from a given histogram

Symbols as in `types.py`; M samples still looping. All are built as Class(flat, cap, threshold).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from world_model.exits import ExitRule, HaltingBatch, HaltingState, Metrics, RuleMemory
from world_model.latent import kl_divergence
from world_model.nets import linear


def norm(x: Tensor) -> Tensor:
    """(M, N, D) -> (M,) Euclidean norms."""
    return x.flatten(1).norm(dim=1)


class Residual(ExitRule):
    """Stop when the last loop changed the state by less than `threshold` of its size."""

    stops_early = True
    default_threshold = 0.1

    def __init__(self, flat: int, cap: int, threshold: float | None = None):
        super().__init__()
        self.threshold = self.default_threshold if threshold is None else threshold

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        return norm(now.change) < self.threshold * norm(now.x), memory


class Acceleration(Residual):
    """Stop when two consecutive second differences are below `threshold` of the state: three loops at least."""

    def begin(self, e: Tensor, cap: int) -> RuleMemory:
        return torch.zeros_like(e), torch.zeros(len(e), dtype=torch.bool, device=e.device)

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        before, was_small = memory
        small = norm(now.change - before) < self.threshold * norm(now.x)
        small = small & (now.loop > 1)  # the first loop has no second difference
        return small & was_small, (now.change, small)


class PriorKL(Residual):
    """Stop when the prior changed by less than `threshold` nats in the last loop: two loops at least."""

    default_threshold = 0.01

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        new = now.log_prior()
        if not memory:
            return torch.zeros(len(new), dtype=torch.bool, device=new.device), (new,)
        return kl_divergence(memory[0], new) < self.threshold, (new,)


class PaperGate(ExitRule):
    """Stop when g = sigmoid(w x + b) > threshold; g enters no loss but -alpha * sum of its entropies over the loops.

    That is all the paper prints, and its optimum is g = 1/2 everywhere: the gate then knows nothing.
    """

    stops_early = trained = True

    def __init__(self, flat: int, cap: int, threshold: float | None = None, alpha: float = 0.01):
        super().__init__()
        self.threshold, self.alpha = 0.5 if threshold is None else threshold, alpha
        self.read = linear(flat, 1, bias=True)

    def logit(self, x: Tensor) -> Tensor:  # (..., N, D) -> (...)
        return self.read(x.flatten(-2)).squeeze(-1)

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        return torch.sigmoid(self.logit(now.x)) > self.threshold, memory

    def loss(self, batch: HaltingBatch) -> tuple[Tensor, Metrics]:
        logit = self.logit(batch.x)  # (R, B, T)
        g = torch.sigmoid(logit)
        entropy = F.softplus(logit) - logit * g
        loss = -self.alpha * entropy.mean(-1).sum(0).mean()
        spread = g.detach().flatten().std(unbiased=False)
        return loss, {"loop/exit_loss": loss.detach(), "loop/exit_gate": g.detach().mean(), "loop/exit_spread": spread}


class RandomExit(ExitRule):
    """Stop at a depth drawn from `histogram`, the weights of 1, 2, 3, .. loops; by default equal up to the cap.

    With a `generator` of its own, the latents of a dream are drawn as under any other rule, and the two can be compared
    pair by pair. Raises ValueError for weights that are negative, not finite or all 0.
    """

    stops_early = True
    histogram: Tensor
    generator: torch.Generator | None = None

    def __init__(self, flat: int, cap: int, threshold: float | None = None, histogram: tuple[float, ...] = ()):
        super().__init__()
        weights = torch.tensor(histogram or (1.0,) * cap, dtype=torch.float32)
        if not (weights >= 0).all() or not 0 < float(weights.sum()) < float("inf"):
            raise ValueError(f"a histogram of exits holds weights of 0 or more, and some above 0, not {histogram}")
        self.register_buffer("histogram", weights, persistent=False)

    def begin(self, e: Tensor, cap: int) -> RuleMemory:
        depth = torch.multinomial(self.histogram, len(e), replacement=True, generator=self.generator) + 1
        return (depth,)  # (B,)

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        return now.loop >= memory[0], memory
