"""The scan over the rows of a batch as one differentiable function: posterior states of `WorldModel.observe_sequence`.

Forward and backward go through the rows with the kernels of single layers, without autograd between them, and gradients
of weights are added up where they are. For one token and latents of classes; the core is looped or certified.

Symbols as in `world_model/types.py`; I inputs of the core beside deter, h hidden units of the gated MLP.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from agent.execution.fused.scan_loops import At, LoopPlace, Rows, Sizes
from agent.execution.fused.scope import SCOPE
from world_model.latent import UNIMIX

BEFORE = "w_in", "gain_in", "w_out", "gain_out", "w_gate", "b_gate"
"""Weights of prelude and outer gate; those of the loops follow."""
BEHIND = "coda", "gain_coda", "w_deter", "gain_post", "w_post", "b_post"
"""Of read-out and posterior."""
TURNED = "w_in", "w_out", "w_gate", "coda", "w_deter", "w_post"

class Given(NamedTuple):
    """What has no gradient: how loops run, actions (T, B, A), keeps (T, B), which rows hold a first one, levels
    (T, B, S, 1), loops R, classes K, and whether latents are drawn, or are their probabilities."""

    kind: Rows
    actions: Tensor
    keeps: Tensor
    resets: list[bool]
    levels: Tensor
    loops: int
    classes: int
    drawn: bool


class Kept:
    """All that the rows leave for the gradient, (T, B, ...) each, or (R, T, B, ...) of the loops. z, hidden, y and
    stats are the prelude's; what ends in _z is the input of a norm, in _stats its mean and 1 / deviation."""

    def __init__(self, given: Given, sizes: Sizes):
        rows, loops = len(given.keeps), given.loops
        size, width, inputs, units, _, latents, post = sizes

        def room(*shape: int) -> Tensor:
            return given.levels.new_empty(shape)

        self.states = room(loops + 1, rows, size, width)
        self.before, self.inputs = self.states[0], room(rows, size, inputs)
        self.z, self.hidden, self.y = room(rows, size, units), room(rows, size, units), room(rows, size, width)
        self.stats = room(rows, 2 * size, 2)
        self.e, self.gate = room(rows, size, width), room(rows, size, width)
        self.injected = room(rows, size, given.kind.injected(sizes))
        for name, shape in given.kind.kept(sizes).items():
            setattr(self, name, room(loops, rows, *shape))
        self.coda_z, self.coda_out, self.deter = (room(rows, size, width) for _ in range(3))
        self.post_z, self.post_y = room(rows, size, post), room(rows, size, post)
        self.coda_stats, self.post_stats = room(rows, size, 2), room(rows, size, 2)
        self.logits, self.probs, self.stoch = (room(rows, size, latents) for _ in range(3))


def names_of(kind: Rows) -> tuple[str, ...]:
    """Of all weights, in the order in which `Scan` takes them."""
    return (*BEFORE, *kind.weights, *BEHIND)


class Scan(Function):
    """deter (B, D), stoch (B, S*K) before the first row, start (D,), embeds (T, B, U) -> deter (T, B, D), stoch and
    probabilities (T, B, S*K); and without gradient states (R+1, T, B, D), e and gate (T, B, D)."""

    @staticmethod
    def forward(
        ctx: Any, given: Given, deter: Tensor, stoch: Tensor, start: Tensor, embeds: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        kind = given.kind
        w = dict(zip(names_of(kind), tensors, strict=True))
        turned = {name: SCOPE.transposed(w[name]).data_ptr() for name in (*TURNED, *kind.turned)}
        p = {name: weight.data_ptr() for name, weight in w.items()}
        embeds = embeds.contiguous()
        rows, size, width, latents = len(given.keeps), len(deter), deter.shape[1], stoch.shape[1]
        units, hidden, post = len(w["gain_in"]), w["w_down"].shape[1], len(w["gain_post"])
        inputs, groups = w["w_in"].shape[1] - width, latents // given.classes
        sizes = Sizes(size, width, inputs, units, hidden, latents, post)
        k = Kept(given, sizes)
        run, at, embed = SCOPE.kernels, {name: At(x) for name, x in vars(k).items()}, At(embeds)
        level = At(given.levels)
        k.inputs[:, :, latents:] = given.actions
        each = k.before, k.inputs[:, :, :latents], k.deter, k.stoch, k.probs
        before, read, deters, stochs, probs = (x.unbind(0) for x in each)
        for t in range(rows):
            if given.resets[t]:
                keep = given.keeps[t][:, None]
                torch.lerp(start, deter, keep, out=before[t])
                torch.mul(stoch, keep, out=read[t])
                k.inputs[t, :, latents:] *= keep
            else:
                before[t].copy_(deter)
                read[t].copy_(stoch)
            run.prelude_forward(
                size, 1, width, inputs, units, at["before"](t), at["inputs"](t), turned["w_in"], p["gain_in"],
                turned["w_out"], p["gain_out"], turned["w_gate"], p["b_gate"], at["z"](t), at["hidden"](t), at["y"](t),
                at["stats"](t), at["e"](t), at["gate"](t),
            )  # fmt: skip
            run.layer_forward(
                size, width, kind.injected(sizes), at["e"](t), turned[kind.reads], None, False, None, at["injected"](t),
                None, at["injected"](t),
            )  # fmt: skip
            x = at["before"](t)
            for r in range(given.loops):
                y = at["states"].of(r + 1, t)
                kind.forward(run, sizes, at, LoopPlace(r, t, size, x, at["injected"](t), y), p, turned)
                x = y
            run.readout_forward(
                size, width, at["before"](t), x, at["gate"](t), turned["coda"], p["gain_coda"], at["coda_z"](t),
                at["coda_out"](t), at["coda_stats"](t), at["deter"](t),
            )  # fmt: skip
            run.layer_forward(
                size, width, post, at["deter"](t), turned["w_deter"], embed(t), True, p["gain_post"], at["post_z"](t),
                at["post_stats"](t), at["post_y"](t),
            )  # fmt: skip
            run.layer_forward(
                size, post, latents, at["post_y"](t), turned["w_post"], p["b_post"], False, None, at["logits"](t), None,
                at["logits"](t),
            )  # fmt: skip
            run.categorical_forward(size * groups, given.classes, UNIMIX, at["logits"](t), at["probs"](t))
            if given.drawn:
                run.sample(size * groups, given.classes, at["probs"](t), level(t), at["stoch"](t))
            else:
                stochs[t].copy_(probs[t])
            deter, stoch = deters[t], stochs[t]
        ctx.given, ctx.kept, ctx.sizes = given, k, sizes
        ctx.save_for_backward(start, *tensors)
        beside = k.states, k.e, k.gate
        ctx.mark_non_differentiable(*beside)
        results = k.deter, k.stoch, k.probs, *beside
        # An output that its own function holds would hold the function, and never be freed.
        for name, x in vars(k).items():
            setattr(k, name, x.detach())
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddeters: Tensor, dstochs: Tensor, dprobs: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        given, k, sizes = ctx.given, ctx.kept, ctx.sizes
        start, *tensors = ctx.saved_tensors
        kind, (size, width, inputs, units, _, latents, post) = given.kind, sizes
        gradients = [torch.zeros_like(weight) for weight in tensors]
        w, g = ({name: x.data_ptr() for name, x in zip(names_of(kind), xs, strict=True)} for xs in (tensors, gradients))
        run, at = SCOPE.kernels, {name: At(x) for name, x in vars(k).items()}
        groups, rows = latents // given.classes, len(given.keeps)
        ddeters = ddeters.contiguous()
        each_deter = ddeters.unbind(0)
        each_prob = (dprobs + dstochs).contiguous().unbind(0)  # samples pass their gradient straight on
        dembeds, dstart = torch.empty_like(k.post_z), torch.zeros_like(start)
        out = Buffers(ddeters, sizes, kind.injected(sizes))
        b = {name: x.data_ptr() for name, x in vars(out).items()}
        embed, dread = At(dembeds), out.dinputs[:, :latents]
        for t in range(rows - 1, -1, -1):
            ddeter, dprob = each_deter[t], each_prob[t]
            if t < rows - 1:
                ddeter, dprob = ddeter + out.carry, dprob + dread
            run.categorical_backward(
                size * groups, given.classes, UNIMIX, at["probs"](t), dprob.data_ptr(), b["dlogits"]
            )
            run.layer_backward(
                size, post, latents, at["post_y"](t), w["w_post"], None, None, None, b["dlogits"], None, b["dy"],
                g["w_post"], g["b_post"], None,
            )  # fmt: skip
            run.layer_backward(
                size, width, post, at["deter"](t), w["w_deter"], w["gain_post"], at["post_z"](t), at["post_stats"](t),
                b["dy"], embed(t), b["dx"], g["w_deter"], None, g["gain_post"],
            )  # fmt: skip
            ddeter = ddeter + out.dx
            run.readout_backward(
                size, width, at["before"](t), at["states"].of(given.loops, t), at["gate"](t), w["coda"], w["gain_coda"],
                at["coda_z"](t), at["coda_out"](t), at["coda_stats"](t), ddeter.data_ptr(), b["scratch"], b["dbefore"],
                b["dx"], b["dgate"], g["coda"], g["gain_coda"],
            )  # fmt: skip
            dx, other = out.dx, out.other
            out.dinjected.zero_()
            for r in range(given.loops - 1, -1, -1):
                loop = LoopPlace(r, t, size, at["states"].of(r, t), at["injected"](t), dx.data_ptr())
                kind.backward(run, sizes, at, loop, other.data_ptr(), b, w, g)
                out.dinjected += out.dloop
                dx, other = other, dx
            run.layer_backward(
                size, width, kind.injected(sizes), at["e"](t), w[kind.reads], None, None, None, b["dinjected"], None,
                b["de"], g[kind.reads], None, None,
            )  # fmt: skip
            out.dbefore += dx
            run.prelude_backward(
                size, 1, width, inputs, units, at["before"](t), at["inputs"](t), w["w_in"], w["gain_in"], w["w_out"],
                w["gain_out"], w["w_gate"], at["z"](t), at["hidden"](t), at["y"](t), at["stats"](t), at["gate"](t),
                b["de"], b["dgate"], b["scratch"], b["carry"], b["dinputs"], g["w_in"], g["gain_in"], g["w_out"],
                g["gain_out"], g["w_gate"], g["b_gate"],
            )  # fmt: skip
            out.carry += out.dbefore
            if given.resets[t]:
                keep = given.keeps[t][:, None]
                dstart += ((1.0 - keep) * out.carry).sum(0)
                out.carry *= keep
                out.dinputs *= keep
        return None, out.carry, dread, dstart, dembeds, *gradients


class Buffers:
    """Gradients of one row, written anew for each."""

    def __init__(self, like: Tensor, sizes: Sizes, injected: int):
        size, width, inputs, units, hidden, latents, post = sizes
        columns = {
            "carry": width, "dbefore": width, "dx": width, "other": width, "dloop": injected, "dinjected": injected,
            "de": width, "dgate": width, "dinputs": inputs, "dlogits": latents, "dy": post,
            "scratch": 2 * width + max(3 * hidden, 2 * units),
        }  # fmt: skip
        for name, count in columns.items():
            setattr(self, name, like.new_empty(size, count))

    carry: Tensor
    dbefore: Tensor
    dx: Tensor
    other: Tensor
    dloop: Tensor
    dinjected: Tensor
    de: Tensor
    dgate: Tensor
    dinputs: Tensor
    dlogits: Tensor
    dy: Tensor
    scratch: Tensor
