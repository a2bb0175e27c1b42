"""Jumps: one prediction covers several decisions.

A jump of k decisions goes from the state at row p to the state at row p + k. The core reads all k actions and their
number at once. Rewards are summed with the discount inside of the jump, and values are those of single decisions:

    v(s_p) = sum_{j=0}^{k-1} gamma^j r_{p+1+j} + gamma^k v(s_{p+k})

J is the longest jump, span the number of decisions that a jump covers. Other symbols as in `types.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from world_model.nets import clipped
from world_model.types import Batch


def action_input_size(action: int, longest: int) -> int:
    """Numbers that the core reads of a jump's actions: A, or J*A + J."""
    return action if longest == 1 else longest * (action + 1)


def pack(actions: Tensor, span: Tensor) -> Tensor:
    """Actions (..., J, A), of which the first `span` (...) count -> (..., J*A + J): these actions, and their number."""
    longest = actions.shape[-2]
    within = torch.arange(longest, device=actions.device) < span[..., None]  # (..., J)
    number = F.one_hot(span.long() - 1, longest).to(actions.dtype)
    return torch.cat([(actions * within[..., None]).flatten(-2), number], -1)


def action_input(action: Tensor, span: Tensor | int | None, longest: int) -> Tensor:
    """What the core reads of actions, clipped: C numbers, see `action_input_size`.

    span, None: single decisions (..., A). A tensor (...): jumps of so many decisions (..., J, A). A number k: one
    action (B, A) that is held for k decisions, or k decisions (B, k, A). Raises ValueError where k is beyond J.
    """
    action = clipped(action)
    if isinstance(span, int):
        check_jump(span if action.dim() == 2 else action.shape[1], longest)
    if longest == 1:
        return action.squeeze(1) if isinstance(span, int) and action.dim() == 3 else action
    if isinstance(span, Tensor):
        return pack(action, span)
    if span is None or action.dim() == 2:
        action, span = action[..., None, :].expand(*action.shape[:-1], longest, action.shape[-1]), span or 1
    else:
        span = action.shape[1]
        action = F.pad(action, (0, 0, 0, longest - span))  # (B, J, A)
    return pack(action, torch.full(action.shape[:-2], span, device=action.device))


def check_jump(jump: int, longest: int) -> None:
    """Raise ValueError for a step of so many decisions that no jump is as long."""
    if not 1 <= jump <= longest:
        raise ValueError(f"a step covers 1 to {longest} decisions with --model.jump {longest}, not {jump}")


def jump_bounds(batch: Batch, jump: int, length: int) -> tuple[Tensor, Tensor]:
    """The first and the last row of each of `length` jumps of at most `jump` decisions, (B, T) each.

    batch holds T*k rows. A jump ends early where its episode does, and the first row of an episode is a jump by itself:
    rows that T jumps then do not reach stay unused.
    """
    rows = batch.reward.shape[1]
    begins = torch.cat([batch.is_first[:, 1:], torch.ones_like(batch.is_first[:, :1])], 1)
    index = torch.arange(rows, device=batch.reward.device)
    ends = torch.where(batch.is_last | begins | batch.is_first, index, rows - 1)
    ends = ends.flip(1).cummin(1).values.flip(1)  # (B, rows) the next end, from each row on
    last, first = [], []
    at = torch.zeros_like(index[:1]).expand(len(batch.reward))  # (B,) where the next jump begins
    for _ in range(length):
        first.append(at)
        last.append(torch.minimum(at + jump - 1, ends.gather(1, at[:, None]).squeeze(1)))
        at = (last[-1] + 1).clamp(max=rows - 1)
    return torch.stack(first, 1), torch.stack(last, 1)


def jump_rows(batch: Batch, jump: int, longest: int, gamma: float) -> tuple[Batch, Tensor]:
    """Rows (B, T*k, ...) of single decisions -> T jumps of at most k = `jump` decisions, and their rows (B, T).

    prev_action becomes (B, T, J, A), rewards are discounted sums, and `span` says how many decisions each row covers.
    A jump in which the episode terminates is told to the core as one of k decisions, like all jumps of imagination: its
    length would reveal the termination. The actions that were never taken are copies of those before the jump, as many
    as the episode has, else of the last one.
    """
    length = batch.reward.shape[1] // jump
    first, last = jump_bounds(batch, jump, length)
    taken = last - first + 1  # (B, T)
    each = torch.arange(len(last), device=last.device)[:, None]

    def at_last(value: Tensor) -> Tensor:  # (B, T*k, ...) -> (B, T, ...)
        return value[each, last]

    index = torch.arange(batch.reward.shape[1], device=last.device)
    begin = at_last(torch.where(batch.is_first, index, -1).cummax(1).values)[..., None]  # (B, T, 1) of its episode
    is_terminal = at_last(batch.is_terminal)
    span = torch.where(is_terminal, jump, taken)
    step = torch.arange(longest, device=last.device)
    before = first[..., None] + step - jump  # (B, T, J)
    before = torch.where((before > begin) & (step < jump), before, last[..., None])
    inside = step < taken[..., None]
    covered = torch.where(inside, first[..., None] + step, before)
    reward = (batch.reward[each[..., None], covered] * inside * gamma**step).sum(-1)
    return Batch(
        obs={name: at_last(value) for name, value in batch.obs.items()},
        prev_action=batch.prev_action[each[..., None], covered] * (step < span[..., None])[..., None],
        reward=reward,
        is_first=at_last(batch.is_first), is_last=at_last(batch.is_last), is_terminal=is_terminal,
        start=batch.start, span=span,
    ), last  # fmt: skip
