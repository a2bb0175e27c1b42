"""What the outputs of layers stand for, as differentiable functions: samples of categorical latents, two-hot values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from agent.execution.fused.functions import at
from agent.execution.fused.scope import SCOPE


class Sample(Function):
    """Probabilities (..., K), levels (..., 1) -> one-hot samples (..., K) with straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, level: Tensor) -> Tensor:
        probs, level = probs.contiguous(), level.contiguous()
        onehot = torch.empty_like(probs)
        SCOPE.kernels.sample(level.numel(), probs.shape[-1], at(probs), at(level), at(onehot))
        return onehot

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class TwoHotMean(Function):
    """logits (..., bins), centers (bins,) -> mean (...)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, centers: Tensor) -> Tensor:
        logits = logits.contiguous()
        probs, mean = torch.empty_like(logits), logits.new_empty(logits.shape[:-1])
        SCOPE.kernels.twohot_mean_forward(mean.numel(), len(centers), *map(at, (logits, centers, probs, mean)))
        ctx.save_for_backward(probs, centers, mean)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        probs, centers, mean = ctx.saved_tensors
        grad, dlogits = grad.contiguous(), torch.empty_like(probs)
        tensors = probs, centers, mean, grad, dlogits
        SCOPE.kernels.twohot_mean_backward(mean.numel(), len(centers), *map(at, tensors))
        return dlogits, None


class TwoHotLoss(Function):
    """logits (..., bins), centers (bins,), targets (...), second targets (...) or None, their weight -> loss (...)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, centers: Tensor, target: Tensor, second: Tensor | None, scale: float
    ) -> Tensor:
        logits, target = logits.contiguous(), target.contiguous()
        second = None if second is None else second.contiguous()
        log_sum, loss = torch.empty_like(target), torch.empty_like(target)
        tensors = logits, centers, target, second, log_sum
        SCOPE.kernels.twohot_loss_forward(target.numel(), len(centers), scale, *map(at, (*tensors, loss)))
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grad, dlogits = grad.contiguous(), torch.empty_like(tensors[0])
        places = map(at, (*tensors, grad, dlogits))
        SCOPE.kernels.twohot_loss_backward(grad.numel(), len(tensors[1]), ctx.scale, *places)
        return dlogits, None, None, None, None
