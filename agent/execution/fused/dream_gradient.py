"""The gradient of dreams of continuous actions, as one function: from features and the actor's outputs to its weights.

It goes through the steps of `dream.py` backward, through the dynamics, with the kernels of single layers and without
autograd between them. The world model's weights are not learned from dreams. Symbols as in `dream.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from agent.execution.fused.dream import Given, Kept, Steps, last_outputs, run_forward
from agent.execution.fused.functions import at as address
from agent.execution.fused.scan_loops import LoopPlace, Sizes
from agent.execution.fused.scope import SCOPE
from agent.learning.actor_critic import MIN_STD
from world_model.latent import UNIMIX


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
            loop = LoopPlace(r, t, rows, x, at["injected"].of(r, t), b["dnew"])
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
    def forward(ctx: Any, given: Given, *actor: Any) -> tuple[Tensor | None, ...]:
        k, sizes, counts, results = run_forward(given, actor)
        ctx.given, ctx.kept, ctx.sizes, ctx.counts = given, k, sizes, counts
        ctx.save_for_backward(*actor)
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


def buffers(like: Tensor, sizes: Sizes, extra: int) -> dict[str, Tensor]:
    """Gradients of one step, written anew for each."""
    size, width, inputs, units, hidden, latents, post = sizes
    states = "ddeter", "carry", "dbefore", "dx", "dstate", "dnew", "de", "dgate"
    columns = dict.fromkeys(states, width) | {
        "dstoch": latents, "dlogits": latents, "dprior": post, "dz": post, "dloop": extra, "dinjected": extra,
        "dinputs": inputs, "scratch": 2 * width + max(3 * hidden, 2 * units),
    }  # fmt: skip
    return {name: like.new_empty(size, count) for name, count in columns.items()}
