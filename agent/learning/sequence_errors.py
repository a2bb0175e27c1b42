"""How wrong an update was about each sequence, by which a replay may draw."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_errors(kl: Tensor, is_first: Tensor, wrong: Tensor | None = None, ended: Tensor | None = None) -> Tensor:
    """(B, 2): the mean error of the world model and of the critic, over the rows that have something to learn.

    kl (B, T): KL(posterior || prior); is_first (B, T): rows whose observation nothing before them predicts.
    wrong (B, L): value against lambda-return, 0 without a critic; ended (B, L): rows after which nothing follows, whose
    value no loss trains.
    """
    model = mean_where(kl, ~is_first.bool())
    critic = torch.zeros_like(model) if wrong is None or ended is None else mean_where(wrong, ~ended.bool())
    return torch.stack([model, critic], 1).detach()


def mean_where(values: Tensor, kept: Tensor) -> Tensor:
    """(B, T), booleans (B, T) -> (B,) the mean over the rows that are kept; 0 where there are none."""
    kept = kept.to(values.dtype)
    return (values * kept).sum(1) / kept.sum(1).clamp(min=1.0)
