"""Dreams of an update as one differentiable function: `WorldModel.imagine` under the actor of continuous actions.

Forward and backward go through the steps with the kernels of single layers, without autograd between them. The
gradient reaches the actor's weights alone, through the dynamics; the world model's are not learned from dreams. For one
token and latents of classes, of the looped core or the certified one, with the gate as exit rule or none.

Symbols as in `world_model/types.py`; t counts the H steps, L = S*K, and of every loop the first rows are those of the
samples that are still looping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from agent.execution.fused.scan_loops import At, Loop, Rows, Sizes
from agent.execution.fused.scope import SCOPE
from agent.learning.actor_critic import MIN_STD
from world_model.latent import UNIMIX

BEFORE = "w_in", "gain_in", "w_out", "gain_out", "w_gate", "b_gate"
"""Weights of prelude and outer gate; those of the loops follow."""
BEHIND = "coda", "gain_coda", "w_prior", "gain_prior", "w_logits", "b_logits"
"""Of read-out and prior."""
TURNED = "w_in", "w_out", "w_gate", "coda", "w_prior", "w_logits"


class Gate(NamedTuple):
    """Weights (D,), bias (1,) and weights of the changes (D,) of the exit gate, and the gain that stops a sample."""

    state: Tensor
    bias: Tensor
    change: Tensor
    threshold: float


class Given(NamedTuple):
    """All but the actor: how loops run and up to which cap R, how many decisions a step covers and at most could, the
    states at the start (B, D) and (B, L), normal noise (H, B, A), levels (H, B, S, 1), classes K, whether latents are
    drawn, or are their probabilities, weights by BEFORE, `kind.weights` and BEHIND, and the gate."""

    kind: Rows
    cap: int
    held: int
    longest: int
    deter: Tensor
    stoch: Tensor
    noise: Tensor
    levels: Tensor
    classes: int
    drawn: bool
    weights: tuple[Any, ...]
    gate: Gate | None

    def named(self) -> dict[str, Tensor]:
        return dict(zip((*BEFORE, *self.kind.weights, *BEHIND), self.weights, strict=True))


class Dreamed(NamedTuple):
    """Features (H+1, B, F), outputs of the actor's network (H, B, 2A), actions (H, B, A), loops (H, B) and their
    residuals (H, B, R)."""

    feat: Tensor
    outputs: Tensor
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
        self.actions = room(steps, size, given.noise.shape[2])
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
        self.steps, _, self.actions = given.noise.shape
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

    def begin(self) -> None:
        """The state that is given."""
        for begun, state in ((self.deters, self.given.deter), (self.stochs, self.given.stoch)):
            begun[0].copy_(state)
        self.describe(0)

    def describe(self, t: int) -> None:
        """Features of state t."""
        self.feat_deters[t].copy_(self.deters[t])
        self.feat_stochs[t].copy_(self.stochs[t])

    def decide(self, t: int) -> None:
        """The actor's action at state t, among the inputs of the core."""
        run, at, size, latents = self.run, self.at, self.sizes.size, self.sizes.latents
        x = at["feat"](t)
        for i, (fan_in, fan_out, weight, bias, gain) in enumerate(self.mlp):
            y = at[f"actor_y{i}"](t)
            z, stats = (y, None) if gain is None else (at[f"actor_z{i}"](t), at[f"actor_stats{i}"](t))
            run.layer_forward(size, fan_in, fan_out, x, weight, bias, False, gain, z, stats, y)
            x = y
        self.read[t].copy_(self.stochs[t])
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
            self.kind.forward(run, self.sizes, at, Loop(r, t, rows, x, injected, new), w, turned)
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


class Backward(Steps):
    """The steps from the last to the first."""

    def __init__(self, given: Given, kept: Kept, sizes: Sizes, outputs: str, dfeat: Tensor):
        super().__init__(given, kept, sizes)
        self.ddeters, self.dstochs = (part.unbind(0) for part in dfeat.split([sizes.width, sizes.latents], -1))
        self.out = buffers(kept.feat, sizes, self.extra)
        self.b, self.frozen = {name: x.data_ptr() for name, x in self.out.items()}, dict.fromkeys(self.w)
        self.outputs = self.at[outputs]
        self.dout = kept.feat.new_empty(self.steps, sizes.size, 2 * self.actions)  # of the actor's outputs

    def prior(self, t: int) -> None:
        """From features of state t + 1, and what comes back from the step behind it, to its deter."""
        run, at, w, b, out, (size, width, *_, latents, post) = (
            self.run, self.at, self.w, self.b, self.out, self.sizes
        )  # fmt: skip
        out["ddeter"].copy_(self.ddeters[t + 1])
        out["dstoch"].copy_(self.dstochs[t + 1])
        if t < self.steps - 1:
            out["ddeter"] += out["carry"]
            out["dstoch"] += out["dinputs"][:, :latents]
        # a sample passes its gradient straight on
        run.categorical_backward(
            size * self.groups, self.given.classes, UNIMIX, at["probs"](t), b["dstoch"], b["dlogits"]
        )  # fmt: skip
        run.layer_backward(
            size, post, latents, at["prior_y"](t), w["w_logits"], None, None, None, b["dlogits"], None, b["dprior"],
            None, None, None,
        )  # fmt: skip
        run.layer_backward(
            size, width, post, at["deters"](t + 1), w["w_prior"], w["gain_prior"], at["prior_z"](t),
            at["prior_stats"](t), b["dprior"], b["dz"], b["dx"], None, None, None,
        )  # fmt: skip
        out["ddeter"] += out["dx"]

    def core(self, t: int, counts: list[int]) -> None:
        """Read-out, loops and prelude: to the deter of state t, and to the inputs."""
        run, at, w, b, out, (size, width, inputs, units, *_) = (
            self.run, self.at, self.w, self.b, self.out, self.sizes
        )  # fmt: skip
        run.readout_backward(
            size, width, at["deters"](t), at["last"](t), at["gate"](t), w["coda"], w["gain_coda"], at["coda_z"](t),
            at["coda_out"](t), at["coda_stats"](t), b["ddeter"], b["scratch"], b["dbefore"], b["dstate"], b["dgate"],
            None, None,
        )  # fmt: skip
        out["dinjected"].zero_()
        for r in range(len(counts) - 1, -1, -1):
            rows, index = counts[r], at["index"].of(r, t)
            run.gather(rows, width, b["dstate"], index, b["dnew"])
            x = at["x"].of(r, t) if r else at["deters"](t)
            loop = Loop(r, t, rows, x, at["injected"].of(r, t), b["dnew"])
            self.kind.backward(run, self.sizes, at, loop, b["dx"], b, w, self.frozen)
            run.scatter(rows, width, b["dx"], index, b["dstate"])
            run.scatter_add(rows, self.extra, b["dloop"], index, b["dinjected"])
        run.layer_backward(
            size, width, self.extra, at["e"](t), w[self.kind.reads], None, None, None, b["dinjected"], None, b["de"],
            None, None, None,
        )  # fmt: skip
        run.prelude_backward(
            size, 1, width, inputs, units, at["deters"](t), at["inputs"](t), w["w_in"], w["gain_in"], w["w_out"],
            w["gain_out"], w["w_gate"], at["z"](t), at["hidden"](t), at["y"](t), at["stats"](t), at["gate"](t), b["de"],
            b["dgate"], b["scratch"], b["carry"], b["dinputs"], *[None] * 6,
        )  # fmt: skip
        out["carry"] += out["dbefore"]
        out["carry"] += out["dstate"]

    def decide(self, t: int) -> None:
        """To the outputs of the actor at state t."""
        dcontrol, stride = self.b["dinputs"] + 4 * self.sizes.latents, self.sizes.inputs
        self.run.act_backward(
            self.sizes.size, self.actions, self.given.held, MIN_STD, self.outputs(t), self.at["noise"](t),
            self.at["actions"](t), dcontrol, stride, self.dout.data_ptr() + t * 4 * self.dout[0].numel(),
        )  # fmt: skip


class Dream(Function):
    """The actor's weights, w, bias and gain (None: it has none) of each layer -> the fields of `Dreamed`."""

    @staticmethod
    def forward(ctx: Any, given: Given, *actor: Any) -> tuple[Tensor, ...]:
        layers, w, (size, width) = list(zip(*[iter(actor)] * 3, strict=True)), given.named(), given.deter.shape
        inputs, post = w["w_in"].shape[1] - width, len(w["gain_prior"])
        sizes = Sizes(size, width, inputs, len(w["gain_in"]), w["w_down"].shape[1], given.stoch.shape[1], post)
        k = Kept(given, sizes, layers)
        run, counts = Forward(given, k, sizes, layers), []
        run.begin()
        for t in range(run.steps):
            run.decide(t)
            counts.append(run.core(t))
            run.prior(t)
        ctx.given, ctx.kept, ctx.sizes, ctx.counts = given, k, sizes, counts
        ctx.save_for_backward(*actor)
        results = Dreamed(k.feat, getattr(k, last_outputs(layers)), k.actions, k.depth, k.residual)
        ctx.mark_non_differentiable(*results[2:])
        # An output that its own function holds would hold the function, and never be freed.
        for name, kept in vars(k).items():
            setattr(k, name, kept.detach())
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfeat: Tensor, doutputs: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        actor = ctx.saved_tensors
        run = Backward(ctx.given, ctx.kept, ctx.sizes, last_outputs(actor[::3]), dfeat)
        for t in range(run.steps - 1, -1, -1):
            run.prior(t)
            run.core(t, ctx.counts[t])
            run.decide(t)
        run.dout += doutputs
        return None, *actor_gradients(actor, ctx.kept, run.dout)


def last_outputs(layers: Sequence[Any]) -> str:
    """What `Kept` calls the outputs of the actor's last layer."""
    return f"actor_y{len(layers) - 1}"


def actor_gradients(actor: tuple[Tensor | None, ...], k: Kept, dout: Tensor) -> list[Tensor | None]:
    """Of the actor's weights from those of its outputs (H, B, 2A): it reads features without gradient, so that all
    steps are one batch."""
    gradients = [None if weight is None else torch.zeros_like(weight) for weight in actor]
    rows, gradient = dout[..., 0].numel(), dout
    for i in range(len(actor) // 3 - 1, -1, -1):
        weight, _, gain = actor[3 * i : 3 * i + 3]
        assert weight is not None
        outputs, inputs = weight.shape
        x = getattr(k, f"actor_y{i - 1}") if i else k.feat
        dz = gradient if gain is None else torch.empty_like(gradient)
        dx = dout.new_empty(rows, inputs) if i else None
        SCOPE.kernels.layer_backward(
            rows, inputs, outputs, x.data_ptr(), weight.data_ptr(), address(gain),
            getattr(k, f"actor_z{i}").data_ptr(), getattr(k, f"actor_stats{i}").data_ptr(), gradient.data_ptr(),
            dz.data_ptr(), address(dx), *map(address, gradients[3 * i : 3 * i + 3]),
        )  # fmt: skip
        gradient = dz if dx is None else dx
    return gradients


def address(x: Tensor | None) -> int | None:
    """Where the numbers lie."""
    return None if x is None else x.data_ptr()


def buffers(like: Tensor, sizes: Sizes, extra: int) -> dict[str, Tensor]:
    """Gradients of one step, written anew for each."""
    size, width, inputs, units, hidden, latents, post = sizes
    states = "ddeter", "carry", "dbefore", "dx", "dstate", "dnew", "de", "dgate"
    columns = dict.fromkeys(states, width) | {
        "dstoch": latents, "dlogits": latents, "dprior": post, "dz": post, "dloop": extra, "dinjected": extra,
        "dinputs": inputs, "scratch": 2 * width + max(3 * hidden, 2 * units),
    }  # fmt: skip
    return {name: like.new_empty(size, count) for name, count in columns.items()}
