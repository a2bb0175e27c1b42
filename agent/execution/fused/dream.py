"""Dreams of an update as one operation: `WorldModel.imagine` under the actor, step by step with the kernels of layers.

For one token and latents of classes, of the looped core or the certified one, with the gate as exit rule or none. The
gradient through continuous actions is that of `dream_gradient.py`.

Symbols as in `world_model/types.py`; t counts the H steps, L = S*K, and of every loop the first rows are those of the
samples that are still looping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agent.execution.fused.functions import at as address
from agent.execution.fused.scan_loops import At, LoopPlace, Rows, Sizes
from agent.execution.fused.scope import SCOPE
from agent.learning.actor_critic import MIN_STD
from agent.learning.actor_critic import UNIMIX as UNIMIX_OF_CHOICES
from world_model.latent import UNIMIX

BEFORE = "w_in", "gain_in", "w_out", "gain_out", "w_gate", "b_gate"
"""Weights of prelude and outer gate; those of the loops follow."""
BEHIND = "coda", "gain_coda", "w_prior", "gain_prior", "w_logits", "b_logits"
"""Of read-out and prior."""
TURNED = "w_in", "w_out", "w_gate", "coda", "w_prior", "w_logits"


class GateWeights(NamedTuple):
    """Weights (D,), bias (1,) and weights of the changes (D,) of the exit gate, and the gain that stops a sample."""

    state: Tensor
    bias: Tensor
    change: Tensor
    threshold: float


class Given(NamedTuple):
    """All but the actor: how loops run and up to which cap R, how many decisions a step covers and at most could, the
    states at the start (B, D) and (B, L), how many actions A there are, where they come from, normal noise (H, B, A) of
    continuous ones, levels (H, B, 1) of choices, or what the core reads of given ones (H, B, C), levels (H, B, S, 1) of
    latents, classes K, whether latents are drawn, or are their probabilities, weights by BEFORE, `kind.weights` and
    BEHIND, and the gate."""

    kind: Rows
    cap: int
    held: int
    longest: int
    deter: Tensor
    stoch: Tensor
    actions: int
    source: Literal["noise", "choice", "given"]
    noise: Tensor
    levels: Tensor
    classes: int
    drawn: bool
    weights: tuple[Any, ...]
    gate: GateWeights | None

    def named(self) -> dict[str, Tensor]:
        return dict(zip((*BEFORE, *self.kind.weights, *BEHIND), self.weights, strict=True))


class Dreamed(NamedTuple):
    """Features (H+1, B, F), outputs of the actor's network (H, B, ...), actions (H, B, A), loops (H, B) and their
    residuals (H, B, R)."""

    feat: Tensor
    outputs: Tensor | None
    actions: Tensor
    depth: Tensor
    residual: Tensor


class Kept:
    """All that the steps leave for the gradient, (H, B, ...) each, or (R, H, B, ...) of the loops."""

    def __init__(self, given: Given, sizes: Sizes, layers: Sequence[tuple[Any, ...]]):
        steps, cap = len(given.noise), given.cap
        size, width, inputs, units, _, latents, post = sizes
        extra = given.kind.injected(sizes)

        def room(*shape: int) -> Tensor:
            return given.deter.new_empty(shape)

        self.feat = room(steps + 1, size, width + latents)
        self.actions = room(steps, size, given.actions)
        self.deters, self.stochs = room(steps + 1, size, width), room(steps + 1, size, latents)
        self.inputs = room(steps, size, inputs)
        if given.longest > 1:  # as `world_model.jumps.pack`: actions that are not done are 0, then the number that are
            self.inputs.zero_()
            self.inputs[..., inputs - given.longest + given.held - 1] = 1.0
        self.z, self.hidden, self.y = room(steps, size, units), room(steps, size, units), room(steps, size, width)
        self.stats = room(steps, 2 * size, 2)
        self.e, self.gate, self.last = (room(steps, size, width) for _ in range(3))
        self.x, self.new = room(cap, steps, size, width), room(cap, steps, size, width)
        self.injected = room(cap, steps, size, extra)
        for name, shape in given.kind.kept(sizes).items():
            setattr(self, name, room(cap, steps, *shape))
        self.coda_z, self.coda_out = room(steps, size, width), room(steps, size, width)
        self.prior_z, self.prior_y = room(steps, size, post), room(steps, size, post)
        self.coda_stats, self.prior_stats = room(steps, size, 2), room(steps, size, 2)
        self.logits, self.probs = room(steps, size, latents), room(steps, size, latents)
        for i, (w, *_) in enumerate(layers):
            setattr(self, f"actor_z{i}", room(steps, size, len(w)))
            setattr(self, f"actor_y{i}", room(steps, size, len(w)))
            setattr(self, f"actor_stats{i}", room(steps, size, 2))
        self.index = torch.arange(size, dtype=torch.int32).repeat(cap, steps, 1)
        self.depth, self.residual = room(steps, size), given.deter.new_zeros(steps, size, cap)


class Steps:
    """What forward and backward share: sizes, and where everything lies."""

    def __init__(self, given: Given, kept: Kept, sizes: Sizes):
        self.given, self.kept, self.sizes, self.kind = given, kept, sizes, given.kind
        self.steps, self.actions = len(given.noise), given.actions
        self.extra, self.groups = given.kind.injected(sizes), sizes.latents // given.classes
        self.run, self.at = SCOPE.kernels, {name: At(x) for name, x in vars(kept).items()}
        self.at |= {"noise": At(given.noise), "levels": At(given.levels)}
        self.w = {name: weight.data_ptr() for name, weight in given.named().items()}


class Forward(Steps):
    """The steps in their order."""

    def __init__(self, given: Given, kept: Kept, sizes: Sizes, layers: Sequence[tuple[Any, ...]]):
        super().__init__(given, kept, sizes)
        w = given.named()
        self.turned = {name: SCOPE.transposed(w[name]).data_ptr() for name in (*TURNED, *given.kind.turned)}
        self.mlp = [
            (weight.shape[1], len(weight), SCOPE.transposed(weight).data_ptr(), address(bias), address(gain))
            for weight, bias, gain in layers
        ]
        gate = given.gate
        self.gate = (None, None, None) if gate is None else tuple(x.data_ptr() for x in gate[:3])
        self.threshold = 0.0 if gate is None else gate.threshold
        width, latents = sizes.width, sizes.latents
        self.read, self.probs = kept.inputs[..., :latents].unbind(0), kept.probs.unbind(0)
        self.deters, self.stochs = kept.deters.unbind(0), kept.stochs.unbind(0)
        self.feat_deters, self.feat_stochs = (part.unbind(0) for part in kept.feat.split([width, latents], -1))
        self.chosen, many = kept.actions.unbind(0), given.held * given.actions
        self.controls = kept.inputs[..., latents : latents + many].unflatten(-1, (given.held, -1)).unbind(0)
        self.chances = kept.feat.new_empty(sizes.size, given.actions)

    def begin(self) -> None:
        """The state that is given."""
        for begun, state in ((self.deters, self.given.deter), (self.stochs, self.given.stoch)):
            begun[0].copy_(state)
        self.describe(0)
        if self.given.source == "given":
            self.kept.inputs[..., self.sizes.latents :].copy_(self.given.noise)

    def describe(self, t: int) -> None:
        """Features of state t."""
        self.feat_deters[t].copy_(self.deters[t])
        self.feat_stochs[t].copy_(self.stochs[t])

    def decide(self, t: int) -> None:
        """The actor's action at state t, or the one that is given, among the inputs of the core."""
        run, at, size, latents = self.run, self.at, self.sizes.size, self.sizes.latents
        self.read[t].copy_(self.stochs[t])
        if self.given.source == "given":
            return
        x = at["feat"](t)
        for i, (fan_in, fan_out, weight, bias, gain) in enumerate(self.mlp):
            y = at[f"actor_y{i}"](t)
            z, stats = (y, None) if gain is None else (at[f"actor_z{i}"](t), at[f"actor_stats{i}"](t))
            run.layer_forward(size, fan_in, fan_out, x, weight, bias, False, gain, z, stats, y)
            x = y
        if self.given.source == "choice":
            run.categorical_forward(size, self.actions, UNIMIX_OF_CHOICES, x, self.chances.data_ptr())
            run.sample(size, self.actions, self.chances.data_ptr(), at["noise"](t), at["actions"](t))
            self.controls[t].copy_(self.chosen[t][:, None])
            return
        control, stride = at["inputs"](t) + 4 * latents, self.sizes.inputs
        run.act_forward(
            size, self.actions, self.given.held, MIN_STD, x, at["noise"](t), at["actions"](t), control, stride
        )  # fmt: skip

    def core(self, t: int) -> list[int]:
        """Prelude, loops with exits, read-out. Returns how many samples went into each loop."""
        run, at, w, turned, (size, width, inputs, units, *_) = self.run, self.at, self.w, self.turned, self.sizes
        run.prelude_forward(
            size, 1, width, inputs, units, at["deters"](t), at["inputs"](t), turned["w_in"], w["gain_in"],
            turned["w_out"], w["gain_out"], turned["w_gate"], w["b_gate"], at["z"](t), at["hidden"](t), at["y"](t),
            at["stats"](t), at["e"](t), at["gate"](t),
        )  # fmt: skip
        injected = at["injected"].of(0, t)
        run.layer_forward(
            size, width, self.extra, at["e"](t), turned[self.kind.reads], None, False, None, injected, None, injected
        )  # fmt: skip
        rows, r, x, cap, counts = size, 0, at["deters"](t), self.given.cap, []
        while rows:
            injected, new = at["injected"].of(r, t), at["new"].of(r, t)
            after = min(r + 1, cap - 1)  # nothing goes on from the last one
            counts.append(rows)
            self.kind.forward(run, self.sizes, at, LoopPlace(r, t, rows, x, injected, new), w, turned)
            rows = run.exits(
                rows, width, self.extra, r + 1, cap, self.threshold, x, new, injected, *self.gate, at["index"].of(r, t),
                at["depth"](t), at["residual"](t), at["last"](t), at["x"].of(after, t), at["injected"].of(after, t),
                at["index"].of(after, t),
            )  # fmt: skip
            r, x = after, at["x"].of(after, t)
        run.readout_forward(
            size, width, at["deters"](t), at["last"](t), at["gate"](t), turned["coda"], w["gain_coda"], at["coda_z"](t),
            at["coda_out"](t), at["coda_stats"](t), at["deters"](t + 1),
        )  # fmt: skip
        return counts

    def prior(self, t: int) -> None:
        """Prior, sample and features of state t + 1."""
        run, at, w, (size, width, *_, latents, post) = self.run, self.at, self.w, self.sizes
        run.layer_forward(
            size, width, post, at["deters"](t + 1), self.turned["w_prior"], None, False, w["gain_prior"],
            at["prior_z"](t), at["prior_stats"](t), at["prior_y"](t),
        )  # fmt: skip
        run.layer_forward(
            size, post, latents, at["prior_y"](t), self.turned["w_logits"], w["b_logits"], False, None, at["logits"](t),
            None, at["logits"](t),
        )  # fmt: skip
        groups, classes = size * self.groups, self.given.classes
        run.categorical_forward(groups, classes, UNIMIX, at["logits"](t), at["probs"](t))
        if self.given.drawn:
            run.sample(groups, classes, at["probs"](t), at["levels"](t), at["stochs"](t + 1))
        else:
            self.stochs[t + 1].copy_(self.probs[t])
        self.describe(t + 1)


def run_forward(given: Given, actor: Sequence[Any]) -> tuple[Kept, Sizes, list[list[int]], Dreamed]:
    """All steps: what they leave, sizes, how many samples went into each loop, and the dream. actor: w, bias and gain
    (None: it has none) of each layer; nothing, where actions are given."""
    layers, w, (size, width) = list(zip(*[iter(actor)] * 3, strict=True)), given.named(), given.deter.shape
    inputs, post = w["w_in"].shape[1] - width, len(w["gain_prior"])
    sizes = Sizes(size, width, inputs, len(w["gain_in"]), w["w_down"].shape[1], given.stoch.shape[1], post)
    kept = Kept(given, sizes, layers)
    run, counts = Forward(given, kept, sizes, layers), []
    run.begin()
    for t in range(run.steps):
        run.decide(t)
        counts.append(run.core(t))
        run.prior(t)
    outputs = getattr(kept, last_outputs(layers)) if layers else None
    return kept, sizes, counts, Dreamed(kept.feat, outputs, kept.actions, kept.depth, kept.residual)


def last_outputs(layers: Sequence[Any]) -> str:
    """What `Kept` calls the outputs of the actor's last layer."""
    return f"actor_y{len(layers) - 1}"
