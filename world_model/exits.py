"""When to stop looping: the exit rules behind one small interface.

    fixed         never before the cap
    gate          a linear read-out of the loop state predicts what another loop brings (default)
    lookahead     the same, and what the loops behind it bring beyond their own price: optimal stopping
    forecast      what each loop will bring is predicted before the first one, and the best depth planned
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
from world_model.outside import build_outside, check_name

Memory = tuple[Tensor, ...]
Metrics = dict[str, Tensor]

NATS = {"gate": 0.05, "lookahead": 0.05, "forecast": 0.05, "kl": 0.01}
THRESHOLDS = {**NATS, "residual": 0.1, "acceleration": 0.1, "paper": 0.5}
"""What `exit_threshold` is where it is not given: nats, relative sizes, and a probability."""

RULES = ("fixed", "random", *THRESHOLDS)

GAINS = (-2.0, 2.0)
"""Nats beyond which a gain counts no more in the training of a rule."""


class Moment(NamedTuple):
    """What a rule may look at after loop number `loop`: state and last change (M, N, D), detached.

    log_prior() computes the prior's log-probabilities (M, S, K), at the price of about one loop.
    """

    loop: int
    x: Tensor
    change: Tensor
    log_prior: Callable[[], Tensor]


class Lesson(NamedTuple):
    """What a rule is trained on, all detached: what happened in R loops along (B, T) steps.

    x, change (R, B, T, N, D): states after each loop, and its changes; e (B, T, N, D): the input of the loops;
    gain (R-1, B, T): the nats by which each further loop lowered the KL of the prior, empty if not `needs_gain`;
    ran (R, B): 1 where a loop ran.
    """

    x: Tensor
    change: Tensor
    e: Tensor | None
    gain: Tensor
    ran: Tensor


def size(x: Tensor) -> Tensor:
    """(M, N, D) -> (M,) Euclidean norms."""
    return x.flatten(1).norm(dim=1)


class ExitRule(nn.Module):
    """The interface, and the rule that never stops."""

    stops_early = False
    trained = False
    needs_gain = False
    """Whether `loss` wants to know what each further loop brought to the prior."""

    def plan(self, e: Tensor, cap: int) -> Tensor | None:
        """(B,) depths from 1 to cap, by a rule that decides before the first loop, from the input e (B, N, D) of the
        loops; None by a rule that watches them and is asked after each whether it `stops`."""
        return None

    def begin(self, deter: Tensor) -> Memory:
        """What is remembered of each of the (B, N, D) samples before the first loop."""
        return ()

    def stops(self, now: Moment, memory: Memory) -> tuple[Tensor, Memory]:
        """(M,) booleans: which samples stop after this loop; and the memory, with the same M rows."""
        return torch.zeros(len(now.x), dtype=torch.bool, device=now.x.device), memory

    def loss(self, lesson: Lesson) -> tuple[Tensor, Metrics]:
        """Training of the rule alone, where it has something to learn: a scalar and its metrics."""
        return lesson.x.new_zeros(()), {}


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
    """Stop at a depth drawn from `histogram`, the weights of 1, 2, 3, .. loops.

    With a `generator` of its own, the latents of a dream are drawn as under any other rule, and the two can be compared
    pair by pair.
    """

    stops_early = True
    histogram: Tensor
    generator: torch.Generator | None = None

    def __init__(self, histogram: tuple[float, ...]):
        super().__init__()
        weights = torch.tensor(histogram, dtype=torch.float32)
        if not (weights >= 0).all() or not 0 < float(weights.sum()) < float("inf"):
            raise ValueError(f"a histogram of exits holds weights of 0 or more, and some above 0, not {histogram}")
        self.register_buffer("histogram", weights, persistent=False)

    def plan(self, e: Tensor, cap: int) -> Tensor:
        drawn = torch.multinomial(self.histogram, len(e), replacement=True, generator=self.generator)
        return (drawn + 1).clamp(max=cap)


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

    def loss(self, lesson: Lesson) -> tuple[Tensor, Metrics]:
        x, change = (part[:-1].flatten(0, 2) for part in (lesson.x, lesson.change))
        gain = lesson.gain.clamp(*GAINS)
        predicted = self.improvement(x, change).view_as(gain)
        return regression(predicted, self.target(gain, predicted.detach()), lesson)


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


class Forecast(ExitRule):
    """Decide the depth before the first loop: what each loop will bring is read from what happened, the input e.

    A linear read-out of e predicts for every loop of training by how many nats it lowers the KL of the prior. The
    depth is the one that brings most, if each loop behind the first costs `threshold` nats: a loop that brings nothing
    is run where the next ones make up for it. Nothing is asked while the loops run, and as the depths are known
    before, samples can be sorted by them.
    """

    stops_early = trained = needs_gain = True

    def __init__(self, flat: int, cap: int, threshold: float):
        super().__init__()
        self.threshold = threshold
        # Zeros: a loop that training never ran is never planned.
        self.read = linear(flat, max(cap - 1, 1), bias=True, scale=0.0)

    def plan(self, e: Tensor, cap: int) -> Tensor:
        with torch.no_grad():
            worth = (self.read(e.flatten(1))[:, : cap - 1] - self.threshold).cumsum(1)
            return torch.cat([worth.new_zeros(len(e), 1), worth], 1).argmax(1) + 1

    def loss(self, lesson: Lesson) -> tuple[Tensor, Metrics]:
        if lesson.e is None:
            raise ValueError("the forecast reads the input of the loops, which this core does not tell")
        gain = lesson.gain.clamp(*GAINS)[: self.read.out_features]
        predicted = self.read(lesson.e.flatten(2)).movedim(-1, 0)[: len(gain)]
        return regression(predicted, gain, lesson)


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

    def loss(self, lesson: Lesson) -> tuple[Tensor, Metrics]:
        logit = self.logit(lesson.x)  # (R, B, T)
        g = torch.sigmoid(logit)
        entropy = F.softplus(logit) - logit * g
        loss = -self.alpha * (entropy.mean(-1) * lesson.ran).sum(0).mean()
        spread = g.detach().flatten().std(unbiased=False)
        return loss, {"loop/exit_loss": loss.detach(), "loop/exit_gate": g.detach().mean(), "loop/exit_spread": spread}


def regression(predicted: Tensor, target: Tensor, lesson: Lesson) -> tuple[Tensor, Metrics]:
    """Mean squared error of predicted gains (R-1, B, T), and metrics. A sequence teaches nothing about loops that it
    did not run."""
    ran = lesson.ran[1 : len(target) + 1]
    loss = ((predicted - target).square().mean(-1) * ran).sum() / ran.sum().clamp(min=1)
    second = (lesson.gain[0].clamp(*GAINS).mean(-1) * ran[0]).sum() / ran[0].sum().clamp(min=1)
    return loss, {"loop/exit_loss": loss.detach(), "loop/gain_second": second}


def make_rule(
    name: str, flat: int, cap: int, threshold: float | None = None, histogram: tuple[float, ...] = ()
) -> ExitRule:
    """The rule called `name`; flat = N*D, cap the most loops. Raises ValueError when there is no such rule.

    module:Class is built as Class(flat, cap, threshold), the threshold None where none is given.
    """
    check_name("exit rule", name, RULES)
    if ":" in name:
        own: ExitRule = build_outside(name, ExitRule, flat=flat, cap=cap, threshold=threshold)
        return own
    if threshold is None:
        threshold = THRESHOLDS.get(name, 0.0)
    if name == "random":
        return RandomExit(histogram or (1.0,) * cap)
    plain = {"residual": Residual, "acceleration": Acceleration, "kl": PriorKL}
    if name in plain:
        return plain[name](threshold)
    if name == "forecast":
        return Forecast(flat, cap, threshold)
    trained = {"gate": Gate, "lookahead": Lookahead, "paper": PaperGate}
    return trained[name](flat, threshold) if name in trained else ExitRule()
