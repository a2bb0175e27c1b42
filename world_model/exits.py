"""When to stop looping: the exit rules behind one small interface.

    fixed         never before the cap
    gate          a linear read-out of the loop state predicts what another loop brings (default)
    lookahead     the same, and what the loops behind it bring beyond their own price: optimal stopping
    residual      |x_r - x_{r-1}| / |x_r| is small
    acceleration  |change_r - change_{r-1}| / |x_r| is small twice in a row (arXiv 2509.23314)
    kl            the prior has hardly changed: KL(prior_{r-1} || prior_r) is small
    paper         sigmoid(w x_r + b) is large, trained as printed (arXiv 2606.18208 eq. 9 and 10)
    random        at a depth drawn from a given histogram: the control of every other rule

A rule decides for each sample alone. What it remembers of a sample from loop to loop travels in a tuple of tensors
with one row per sample, so that the loop can take finished samples out.

Shapes: M samples still looping, N tokens, D token width, R loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.latent import kl_divergence
from world_model.nets import linear
from world_model.outside import check_name, outside

Memory = tuple[Tensor, ...]
Metrics = dict[str, Tensor]

THRESHOLDS = {"gate": 0.05, "lookahead": 0.05, "residual": 0.1, "acceleration": 0.1, "kl": 0.01, "paper": 0.5}
"""What `exit_threshold` is where it is not given: nats, relative sizes, nats, and a probability."""

RULES = ("fixed", "random", *THRESHOLDS)


class Moment(NamedTuple):
    """What a rule may look at after loop number `loop`: state and last change (M, N, D), detached.

    log_prior() computes the prior's log-probabilities (M, S, K), at the price of about one loop.
    """

    loop: int
    x: Tensor
    change: Tensor
    log_prior: Callable[[], Tensor]


def size(x: Tensor) -> Tensor:
    """(M, N, D) -> (M,) Euclidean norms."""
    return x.flatten(1).norm(dim=1)


class ExitRule(nn.Module):
    """The interface, and the rule that never stops."""

    stops_early = False
    trained = False
    needs_gain = False
    """Whether `loss` wants to know what each further loop brought to the prior."""

    def begin(self, deter: Tensor) -> Memory:
        """What is remembered of each of the (B, N, D) samples before the first loop."""
        return ()

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        """(M,) booleans: which samples stop after this loop; and the memory, with the same M rows."""
        return torch.zeros(len(now.x), dtype=torch.bool, device=now.x.device), memory

    def loss(self, x: Tensor, change: Tensor, gain: Tensor, ran: Tensor) -> tuple[Tensor, Metrics]:
        """Training of the rule alone, where it has something to learn: a scalar and its metrics.

        x, change (R, B, T, N, D): states and changes, detached; ran (R, B): 1 where a loop ran; gain (R-1, B, T):
        the nats by which each further loop lowered the KL of the prior, empty if not `needs_gain`.
        """
        return x.new_zeros(()), {}


class Residual(ExitRule):
    """Stop when the last loop changed the state by less than `threshold` of its size."""

    stops_early = True

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        return size(now.change) < self.threshold * size(now.x), memory


class Acceleration(Residual):
    """Stop when two consecutive second differences are below `threshold` of the state: three loops at least."""

    def begin(self, deter: Tensor) -> Memory:
        return torch.zeros_like(deter), torch.zeros(len(deter), dtype=torch.bool, device=deter.device)

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        before, was_small = memory
        small = size(now.change - before) < self.threshold * size(now.x)
        small = small & (now.loop > 1)  # the first loop has no second difference
        return small & was_small, (now.change, small)


class PriorKL(Residual):
    """Stop when the prior changed by less than `threshold` nats in the last loop: two loops at least."""

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        new = now.log_prior()
        if not memory:
            return torch.zeros(len(new), dtype=torch.bool, device=new.device), (new,)
        return kl_divergence(memory[0], new) < self.threshold, (new,)


class RandomExit(ExitRule):
    """Stop at a depth drawn from `histogram`, the weights of 1, 2, 3, .. loops."""

    stops_early = True
    histogram: Tensor

    def __init__(self, histogram: tuple[float, ...]):
        super().__init__()
        weights = torch.tensor(histogram, dtype=torch.float32)
        if not (weights >= 0).all() or not 0 < float(weights.sum()) < float("inf"):
            raise ValueError(f"a histogram of exits holds weights of 0 or more, and some above 0, not {histogram}")
        self.register_buffer("histogram", weights, persistent=False)

    def begin(self, deter: Tensor) -> Memory:
        return (torch.multinomial(self.histogram, len(deter), replacement=True) + 1,)

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        return memory[0] <= now.loop, memory


class Gate(ExitRule):
    """Go on while another loop is predicted to lower the prior's KL by more than `threshold` nats.

    A linear read-out of the loop state, times the size of its last change: one small product per loop. It is
    regressed on the improvement that the next loop brought, as Ouro trains its gate in the second stage
    (arXiv 2510.25741), and cannot bend the trajectory that it judges: states are detached.
    """

    stops_early = trained = needs_gain = True

    def __init__(self, flat: int, threshold: float):
        super().__init__()
        self.threshold = threshold
        # At first it says "another loop" while the last one moved the state by more than about 5 % of its size.
        self.state = linear(flat, 1, bias=True, scale=0.0)
        self.change = linear(flat, 1, scale=0.0)
        with torch.no_grad():
            self.state.bias.fill_(20.0 * threshold + 0.2)

    def improvement(self, x: Tensor, change: Tensor) -> Tensor:
        """(M,) nats by which another loop is predicted to lower the KL of the prior.

        What the state says counts in proportion to the size of the last change: a state that has settled
        cannot be improved, whatever it looks like.
        """
        change = change.flatten(1)
        moved = change.norm(dim=1, keepdim=True) * change.shape[1] ** -0.5
        return (self.state(x.flatten(1)) * moved + self.change(change.abs())).squeeze(-1)

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        return self.improvement(now.x, now.change) <= self.threshold, memory

    def target(self, gain: Tensor, predicted: Tensor) -> Tensor:
        """What to predict after loops 1..R-1, and what is predicted there, (R-1, B, T) each.

        Here what the next loop brought, whatever follows it.
        """
        return gain

    def loss(self, x: Tensor, change: Tensor, gain: Tensor, ran: Tensor) -> tuple[Tensor, Metrics]:
        gain = gain.clamp(-2.0, 2.0)
        predicted = self.improvement(x[:-1].flatten(0, 2), change[:-1].flatten(0, 2)).view_as(gain)
        error = (predicted - self.target(gain, predicted.detach())).square().mean(-1)  # (R-1, B)
        ran = ran[1:]  # a sequence teaches nothing about loops that it did not run
        loss = (error * ran).sum() / ran.sum().clamp(min=1)
        second = (gain[0].mean(-1) * ran[0]).sum() / ran[0].sum().clamp(min=1)
        return loss, {"loop/exit_loss": loss.detach(), "loop/gain_second": second}


class Lookahead(Gate):
    """Go on while the loops ahead are predicted to bring more than `threshold` nats each, even if the next one alone
    does not: a loop may only prepare what a later one brings.

    The value of going on, learned backwards like any value of optimal stopping: what the next loop brought, and the
    value of going on from there beyond the price of the loop after it, if that is positive.
    """

    def target(self, gain: Tensor, predicted: Tensor) -> Tensor:
        ahead = torch.zeros_like(gain)  # nothing was seen behind the last loop: a guess about it would feed on itself
        ahead[:-1] = (predicted[1:] - self.threshold).clamp(min=0.0)
        return gain + ahead


class PaperGate(ExitRule):
    """Stop when g = sigmoid(w x + b) > threshold; g enters no loss but -alpha * sum of its entropies over the loops.

    That is all the paper prints, and its optimum is g = 1/2 everywhere: the gate then knows nothing.
    """

    stops_early = trained = True

    def __init__(self, flat: int, threshold: float, alpha: float = 0.01):
        super().__init__()
        self.threshold, self.alpha = threshold, alpha
        self.read = linear(flat, 1, bias=True)

    def logit(self, x: Tensor) -> Tensor:
        return self.read(x.flatten(-2)).squeeze(-1)

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        return torch.sigmoid(self.logit(now.x)) > self.threshold, memory

    def loss(self, x: Tensor, change: Tensor, gain: Tensor, ran: Tensor) -> tuple[Tensor, Metrics]:
        logit = self.logit(x)  # (R, B, T)
        g = torch.sigmoid(logit)
        entropy = F.softplus(logit) - logit * g
        loss = -self.alpha * (entropy.mean(-1) * ran).sum(0).mean()
        spread = g.detach().flatten().std(unbiased=False)
        return loss, {"loop/exit_loss": loss.detach(), "loop/exit_gate": g.detach().mean(), "loop/exit_spread": spread}


def make_rule(
    name: str, flat: int, cap: int, threshold: float | None = None, histogram: tuple[float, ...] = ()
) -> ExitRule:
    """The rule called `name`; flat = N*D, cap the most loops. Raises ValueError when there is no such rule.

    module:Class is built as Class(flat, cap, threshold), the threshold None where none is given.
    """
    check_name("exit rule", name, RULES)
    if ":" in name:
        own: ExitRule = outside(name, ExitRule)(flat, cap, threshold)
        return own
    if threshold is None:
        threshold = THRESHOLDS.get(name, 0.0)
    if name == "random":
        return RandomExit(histogram or (1.0,) * cap)
    plain = {"residual": Residual, "acceleration": Acceleration, "kl": PriorKL}
    if name in plain:
        return plain[name](threshold)
    trained = {"gate": Gate, "lookahead": Lookahead, "paper": PaperGate}
    return trained[name](flat, threshold) if name in trained else ExitRule()
