"""A step of the control, DreamerV3's block GRU, as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from agent.execution.fused.functions import at, parts, unless_frozen, zeros
from agent.execution.fused.scope import SCOPE

WEIGHTS = "w_deter", "b_deter", "gain_deter", "w_stoch", "b_stoch", "gain_stoch", "w_action", "b_action", "gain_action"
BEHIND = "w_hidden", "b_hidden", "gain_hidden", "w_gates", "b_gates"
"""Weights in the order of `GRUStep`, of the three layers that read and of the two of all blocks."""


class GRUStep(Function):
    """deter (B, F), latents and action (B, I) of which the first are `latents` -> the next deter, and the update gate
    without gradient, (B, F) each."""

    @staticmethod
    def forward(
        ctx: Any, deter: Tensor, inputs: Tensor, latents: int, turned: list[Tensor], *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        deter, inputs = deter.contiguous(), inputs.contiguous()
        w = dict(zip((*WEIGHTS, *BEHIND), weights, strict=True))
        (rows, width), units, blocks = deter.shape, len(w["w_deter"]), len(w["w_gates"])
        ctx.sizes = rows, width, blocks, latents, inputs.shape[1] - latents, units
        ctx.kept = 3 * rows * units, 3 * rows * units, 8 * rows, rows * width, rows * width, 3 * rows * width
        kept = deter.new_empty(sum(ctx.kept))
        out, gate = torch.empty_like(deter), torch.empty_like(deter)
        t_deter, t_stoch, t_action, *_ = turned
        reads = t_deter, *weights[1:3], t_stoch, *weights[4:6], t_action, *weights[7:]
        SCOPE.kernels.gru_forward(
            *ctx.sizes, *map(at, (deter, inputs, *reads)), *parts(kept, *ctx.kept), at(out), at(gate)
        )  # fmt: skip
        ctx.save_for_backward(deter, inputs, kept, *turned[3:], *weights)
        ctx.mark_non_differentiable(gate)
        return out, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        deter, inputs, kept, t_hidden, t_gates, *weights = ctx.saved_tensors
        w = dict(zip((*WEIGHTS, *BEHIND), weights, strict=True))
        gradients = [zeros(weight, any(ctx.needs_input_grad[4:])) for weight in weights]
        rows, width, *_, units = ctx.sizes
        scratch = kept.new_empty(rows * (5 * width + 2 * units))
        ddeter, dinputs, grad = torch.empty_like(deter), torch.empty_like(inputs), grad.contiguous()
        layers = [w[f"{kind}_{read}"] for read in ("deter", "stoch", "action") for kind in ("w", "gain")]
        SCOPE.kernels.gru_backward(
            *ctx.sizes, *map(at, (deter, inputs, *layers, t_hidden, w["gain_hidden"], t_gates)),
            *parts(kept, *ctx.kept), *map(at, (grad, scratch, ddeter, dinputs, *gradients)),
        )  # fmt: skip
        return ddeter, dinputs, None, None, *gradients


def gru_step(deter: Tensor, inputs: Tensor, latents: int, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """weights: of WEIGHTS and BEHIND."""
    turned = [SCOPE.transposed(weights[i]) for i in (0, 3, 6, 9, 12)]
    return GRUStep.apply(deter, inputs, latents, turned, *unless_frozen(weights))
