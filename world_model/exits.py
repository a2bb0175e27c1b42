"""When to stop looping: the interface of an exit rule, and the default gate.

    fixed         never before the cap
    gate          linear read-outs of the loop state predict what another loop brings (the default)
    residual, acceleration, kl, paper, random                           controls, see `controls/exit_rules.py`
    certified     no further loop can move the state by more than a tolerance   see `certified.py`
    module:Class  one of your own, built as Class(flat, cap, threshold)

A rule decides for each sample alone. What it remembers of a sample from loop to loop travels in a tuple of tensors
with one row per sample, so that the loop can take finished samples out.

Symbols as in `types.py`; M samples still looping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from world_model.extensions import build_extension, check_name, load_class
from world_model.nets import linear

RuleMemory = tuple[Tensor, ...]
Metrics = dict[str, Tensor]

CONTROLS = {
    "residual": "world_model.controls.exit_rules:Residual",
    "acceleration": "world_model.controls.exit_rules:Acceleration",
    "kl": "world_model.controls.exit_rules:PriorKL",
    "paper": "world_model.controls.exit_rules:PaperGate",
    "random": "world_model.controls.exit_rules:RandomExit",
    "certified": "world_model.certified:CertifiedExit",
}
RULES = ("fixed", "gate", *CONTROLS)

GAIN_LIMIT = 2.0
"""Gains are clamped to +- this (nats) in the training of a rule."""


class HaltingState(NamedTuple):
    """What a rule may look at after loop number `loop`: state and last change (M, N, D), detached.

    log_prior() computes the prior's log-probabilities (M, S, K), at the price of about one loop; of gaussian latents
    their means and logarithms of deviations (M, S, 2K).
    """

    loop: int
    x: Tensor
    change: Tensor
    log_prior: Callable[[], Tensor]


class HaltingBatch(NamedTuple):
    """What a rule is trained on, all detached: what happened in R loops along (B, T) steps.

    x, change (R, B, T, N, D): states after each loop, and its changes; e (B, T, N, D): the input of the loops;
    gain (R-1, B, T): the nats by which each further loop lowered KL(posterior || prior), empty if not `needs_gain`.
    """

    x: Tensor
    change: Tensor
    e: Tensor | None
    gain: Tensor


class ExitRule(nn.Module):
    """The interface, and the rule `fixed`, which never stops."""

    stops_early = False
    trained = False
    needs_gain = False
    """Whether `loss` wants to know what each further loop brought."""

    def begin(self, e: Tensor, cap: int) -> RuleMemory:
        """What is remembered of each sample before the first of at most `cap` loops; e (B, N, D) is their input."""
        return ()

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        """(M,) booleans: which samples stop after this loop; and the memory, with the same M rows."""
        return torch.zeros(len(now.x), dtype=torch.bool, device=now.x.device), memory

    def loss(self, batch: HaltingBatch) -> tuple[Tensor, Metrics]:
        """Training of the rule alone, where it has something to learn: a scalar and its metrics."""
        return batch.x.new_zeros(()), {}


class Gate(ExitRule):
    """Go on while another loop is predicted to lower KL(posterior || prior) by more than `threshold` nats.

    Linear in the loop state times the RMS of its last change, and in the sizes of that change: two small products per
    loop. It is regressed on the improvement that the next loop brought, as Ouro trains its gate in the second stage
    (arXiv 2510.25741). Its inputs are detached: it cannot bend the trajectory that it judges.
    """

    stops_early = trained = needs_gain = True

    def __init__(self, flat: int, cap: int, threshold: float | None = None):
        super().__init__()
        self.threshold = 0.05 if threshold is None else threshold
        # At first it says "another loop" while the last one moved the state by more than this share of its size:
        # threshold / (20 threshold + 0.2), 4.2 % at 0.05.
        self.state = linear(flat, 1, bias=True, scale=0.0)
        self.change = linear(flat, 1, scale=0.0)
        with torch.no_grad():
            self.state.bias.fill_(20.0 * self.threshold + 0.2)

    def improvement(self, x: Tensor, change: Tensor) -> Tensor:
        """State and last change (M, N, D) -> (M,) nats that another loop is predicted to bring.

        What the state says counts in proportion to the size of the last change: a state that has converged cannot be
        improved, whatever it looks like.
        """
        change = change.flatten(1)  # (M, N*D)
        moved = change.norm(dim=1, keepdim=True) * change.shape[1] ** -0.5  # (M, 1)
        return (self.state(x.flatten(1)) * moved + self.change(change.abs())).squeeze(-1)

    def stops(self, now: HaltingState, memory: RuleMemory) -> tuple[Tensor, RuleMemory]:
        return self.improvement(now.x, now.change) <= self.threshold, memory

    def target(self, gain: Tensor, predicted: Tensor) -> Tensor:
        """What to predict after loops 1..R-1, given what is predicted there, (R-1, B, T) each: the next loop's gain.

        A method of its own for rules that count further loops too.
        """
        return gain

    def loss(self, batch: HaltingBatch) -> tuple[Tensor, Metrics]:
        x, change = (part[:-1].flatten(0, 2) for part in (batch.x, batch.change))  # ((R-1)*B*T, N, D)
        gain = batch.gain.clamp(-GAIN_LIMIT, GAIN_LIMIT)
        predicted = self.improvement(x, change).view_as(gain)  # (R-1, B, T)
        return gain_regression(predicted, self.target(gain, predicted.detach()), batch)


def gain_regression(predicted: Tensor, target: Tensor, batch: HaltingBatch) -> tuple[Tensor, Metrics]:
    """Mean squared error of predicted gains (R-1, B, T), and metrics; nothing where R = 1 and there was no gain."""
    if len(target) == 0:
        return target.sum(), {}
    loss = (predicted - target).square().mean(-1).mean()
    second = batch.gain[0].clamp(-GAIN_LIMIT, GAIN_LIMIT).mean(-1).mean()
    return loss, {"loop/exit_loss": loss.detach(), "loop/gain_second": second}


def make_rule(
    name: str, flat: int, cap: int, threshold: float | None = None, histogram: tuple[float, ...] = ()
) -> ExitRule:
    """The rule called `name`; flat = N*D, cap the most loops, threshold None for the rule's own default.

    histogram: weights of 1, 2, .. loops, for the rule `random` alone. Raises ValueError when there is no such rule.
    """
    check_name("exit rule", name, RULES)
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"the exit threshold must be a finite number, got {threshold}")
    if name == "fixed":
        return ExitRule()
    if name == "gate":
        return Gate(flat, cap, threshold)
    if name == "random":
        return load_class(CONTROLS[name], ExitRule)(flat, cap, threshold, histogram)
    return build_extension(CONTROLS.get(name, name), ExitRule, flat=flat, cap=cap, threshold=threshold)
