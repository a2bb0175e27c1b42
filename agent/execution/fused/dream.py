"""Dreams of an update as one differentiable function: `WorldModel.imagine` under the actor of continuous actions.

Forward and backward go through the steps with the kernels of single layers, without autograd between them. The
gradient reaches the actor's weights alone, through the dynamics; the world model's are not learned from dreams. For one
token and categorical latents, of the looped core or the certified one, with the gate as exit rule or none.

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
    """All but the actor: how loops run and up to which cap R, the states at the start (B, D) and (B, L), normal noise
    (H, B, A), levels (H, B, S, 1), classes K, weights by BEFORE, `kind.weights` and BEHIND, and the gate."""

    kind: Rows
    cap: int
    deter: Tensor
    stoch: Tensor
    noise: Tensor
    levels: Tensor
    classes: int
    weights: tuple[Any, ...]
    gate: Gate | None

    def named(self) -> dict[str, Tensor]:
        return dict(zip((*BEFORE, *self.kind.weights, *BEHIND), self.weights, strict=True))


class Dreamed(NamedTuple):
    """Features (H+1, B, F), actions (H, B, A), loops (H, B) and their residuals (H, B, R)."""

    feat: Tensor
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


class Dream(Function):
    """The actor's weights, w, bias and gain (None: it has none) of each layer -> the fields of `Dreamed`."""

    @staticmethod
    def forward(ctx: Any, given: Given, *actor: Any) -> tuple[Tensor, ...]:
        kind, w = given.kind, given.named()
        layers = list(zip(actor[::3], actor[1::3], actor[2::3], strict=True))
        (size, width), latents = given.deter.shape, given.stoch.shape[1]
        steps, _, actions = given.noise.shape
        inputs = w["w_in"].shape[1] - width
        sizes = Sizes(
            size, width, inputs, len(w["gain_in"]), w["w_down"].shape[1], latents, len(w["gain_prior"])
        )  # fmt: skip
        k, groups, extra = Kept(given, sizes, layers), latents // given.classes, kind.injected(sizes)
        run, at = SCOPE.kernels, {name: At(x) for name, x in vars(k).items()}
        p = {name: weight.data_ptr() for name, weight in w.items()}
        turned = {name: SCOPE.transposed(w[name]).data_ptr() for name in (*TURNED, *kind.turned)}
        mlp = [
            (weight.shape[1], len(weight), SCOPE.transposed(weight).data_ptr(), *map(address, (bias, gain)))
            for weight, bias, gain in layers
        ]
        gate = (None, None, None) if given.gate is None else tuple(x.data_ptr() for x in given.gate[:3])
        threshold = 0.0 if given.gate is None else given.gate.threshold
        noise, level = At(given.noise), At(given.levels)
        counts: list[list[int]] = []
        k.deters[0], k.stochs[0] = given.deter, given.stoch
        k.feat[0, :, :width], k.feat[0, :, width:] = given.deter, given.stoch
        for t in range(steps):
            x = at["feat"](t)
            for i, (fan_in, fan_out, weight, bias, gain) in enumerate(mlp):
                y = at[f"actor_y{i}"](t)
                z, stats = (y, None) if gain is None else (at[f"actor_z{i}"](t), at[f"actor_stats{i}"](t))
                run.layer_forward(size, fan_in, fan_out, x, weight, bias, False, gain, z, stats, y)
                x = y
            k.inputs[t, :, :latents] = k.stochs[t]
            run.act_forward(
                size, actions, MIN_STD, x, noise(t), at["actions"](t), at["inputs"](t) + 4 * latents, inputs
            )  # fmt: skip
            run.prelude_forward(
                size, 1, width, inputs, sizes.units, at["deters"](t), at["inputs"](t), turned["w_in"], p["gain_in"],
                turned["w_out"], p["gain_out"], turned["w_gate"], p["b_gate"], at["z"](t), at["hidden"](t), at["y"](t),
                at["stats"](t), at["e"](t), at["gate"](t),
            )  # fmt: skip
            injected = at["injected"].of(0, t)
            run.layer_forward(
                size, width, extra, at["e"](t), turned[kind.reads], None, False, None, injected, None, injected
            )  # fmt: skip
            rows, r, x = size, 0, at["deters"](t)
            counts.append([])
            while rows:
                injected, new = at["injected"].of(r, t), at["new"].of(r, t)
                after = min(r + 1, given.cap - 1)  # nothing goes on from the last one
                counts[-1].append(rows)
                kind.forward(run, sizes, at, Loop(r, t, rows, x, injected, new), p, turned)
                rows = run.exits(
                    rows, width, extra, r + 1, given.cap, threshold, x, new, injected, *gate, at["index"].of(r, t),
                    at["depth"](t), at["residual"](t), at["last"](t), at["x"].of(after, t), at["injected"].of(after, t),
                    at["index"].of(after, t),
                )  # fmt: skip
                r, x = after, at["x"].of(after, t)
            run.readout_forward(
                size, width, at["deters"](t), at["last"](t), at["gate"](t), turned["coda"], p["gain_coda"],
                at["coda_z"](t), at["coda_out"](t), at["coda_stats"](t), at["deters"](t + 1),
            )  # fmt: skip
            run.layer_forward(
                size, width, sizes.post, at["deters"](t + 1), turned["w_prior"], None, False, p["gain_prior"],
                at["prior_z"](t), at["prior_stats"](t), at["prior_y"](t),
            )  # fmt: skip
            run.layer_forward(
                size, sizes.post, latents, at["prior_y"](t), turned["w_logits"], p["b_logits"], False, None,
                at["logits"](t), None, at["logits"](t),
            )  # fmt: skip
            run.categorical_forward(size * groups, given.classes, UNIMIX, at["logits"](t), at["probs"](t))
            run.sample(size * groups, given.classes, at["probs"](t), level(t), at["stochs"](t + 1))
            k.feat[t + 1, :, :width], k.feat[t + 1, :, width:] = k.deters[t + 1], k.stochs[t + 1]
        ctx.given, ctx.kept, ctx.sizes, ctx.counts = given, k, sizes, counts
        ctx.save_for_backward(*actor)
        results = k.feat, k.actions, k.depth, k.residual
        ctx.mark_non_differentiable(*results[1:])
        # An output that its own function holds would hold the function, and never be freed.
        for name, kept in vars(k).items():
            setattr(k, name, kept.detach())
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfeat: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        given, k, sizes, counts = ctx.given, ctx.kept, ctx.sizes, ctx.counts
        kind, (size, width, inputs, units, _, latents, post) = given.kind, sizes
        steps, _, actions = given.noise.shape
        extra, groups = kind.injected(sizes), latents // given.classes
        run, at, noise = SCOPE.kernels, {name: At(x) for name, x in vars(k).items()}, At(given.noise)
        w = {name: weight.data_ptr() for name, weight in given.named().items()}
        frozen = dict.fromkeys(w)
        out = buffers(dfeat, sizes, extra)
        b = {name: x.data_ptr() for name, x in out.items()}
        dout = dfeat.new_empty(steps, size, 2 * actions)
        of_step = At(dout)
        for t in range(steps - 1, -1, -1):
            out["ddeter"].copy_(dfeat[t + 1, :, :width])
            out["dstoch"].copy_(dfeat[t + 1, :, width:])
            if t < steps - 1:
                out["ddeter"] += out["carry"]
                out["dstoch"] += out["dinputs"][:, :latents]
            # a sample passes its gradient straight on
            run.categorical_backward(
                size * groups, given.classes, UNIMIX, at["probs"](t), b["dstoch"], b["dlogits"]
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
            run.readout_backward(
                size, width, at["deters"](t), at["last"](t), at["gate"](t), w["coda"], w["gain_coda"], at["coda_z"](t),
                at["coda_out"](t), at["coda_stats"](t), b["ddeter"], b["scratch"], b["dbefore"], b["dstate"],
                b["dgate"], None, None,
            )  # fmt: skip
            out["dinjected"].zero_()
            for r in range(len(counts[t]) - 1, -1, -1):
                rows, index = counts[t][r], at["index"].of(r, t)
                run.gather(rows, width, b["dstate"], index, b["dnew"])
                x = at["x"].of(r, t) if r else at["deters"](t)
                loop = Loop(r, t, rows, x, at["injected"].of(r, t), b["dnew"])
                kind.backward(run, sizes, at, loop, b["dx"], b, w, frozen)
                run.scatter(rows, width, b["dx"], index, b["dstate"])
                run.scatter_add(rows, extra, b["dloop"], index, b["dinjected"])
            run.layer_backward(
                size, width, extra, at["e"](t), w[kind.reads], None, None, None, b["dinjected"], None, b["de"], None,
                None, None,
            )  # fmt: skip
            run.prelude_backward(
                size, 1, width, inputs, units, at["deters"](t), at["inputs"](t), w["w_in"], w["gain_in"], w["w_out"],
                w["gain_out"], w["w_gate"], at["z"](t), at["hidden"](t), at["y"](t), at["stats"](t), at["gate"](t),
                b["de"], b["dgate"], b["scratch"], b["carry"], b["dinputs"], *[None] * 6,
            )  # fmt: skip
            out["carry"] += out["dbefore"]
            out["carry"] += out["dstate"]
            last = len(ctx.saved_tensors) // 3 - 1
            run.act_backward(
                size, actions, MIN_STD, at[f"actor_y{last}"](t), noise(t), at["actions"](t),
                b["dinputs"] + 4 * latents, inputs, of_step(t),
            )  # fmt: skip
        return None, *actor_gradients(ctx.saved_tensors, k, dout)


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
