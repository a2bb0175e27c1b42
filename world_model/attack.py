"""Adversarial search: where do two states move apart most in one loop, or in one environment step?

What it finds is a lower bound of the Lipschitz constant, as a certificate is an upper one. Everything runs in float64.
Symbols as in `types.py`; M points that are searched from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from world_model.jumps import action_input
from world_model.looped import LoopedCore
from world_model.model import WorldModel
from world_model.types import Batch

StateMap = Callable[[Tensor, Tensor], Tensor]
"""State (M, N, D) and input (M, ...) -> state (M, N, D); no row depends on the others."""


class Points(NamedTuple):
    """Where a search starts: states (M, N, D) and inputs (M, ...)."""

    state: Tensor
    given: Tensor


class Expansion(NamedTuple):
    """visited (M,): largest singular value at each point; attacked (M,): largest |f(x) - f(y)| / |x - y| of a search
    from there."""

    visited: Tensor
    attacked: Tensor


def loop_map(core: LoopedCore) -> StateMap:
    """One loop as a function of x and of what `input_norm` makes e from."""
    core = copy.deepcopy(core).double()
    with torch.no_grad():
        prepared = core.prepare()
    return lambda x, given: core.refine(x, core.inject(core.input_norm(given), prepared), prepared)


def step_map(core: LoopedCore, loops: int) -> StateMap:
    """One environment step of `loops` loops as a function of deter and the inputs, which need not be latents."""
    core = copy.deepcopy(core).double()
    with torch.no_grad():
        prepared = core.prepare()
    return lambda deter, inputs: core(deter, inputs, loops, prepared)[0]


@torch.no_grad()
def visited_points(world: WorldModel, batch: Batch, loops: int, count: int) -> tuple[Points, Points]:
    """Up to `count` points of a loop and of a step, drawn from the posterior states of a batch."""
    core = world.core
    assert isinstance(core, LoopedCore)
    post = world.observe_sequence(batch, loops)
    assert post.trace.e is not None
    e = (post.trace.e / core.input_norm.gain).expand_as(post.trace.states[1:])
    loop = Points(post.trace.states[:-1].flatten(0, 2), e.flatten(0, 2))
    before = post.states.map(lambda leaf: leaf[:, :-1].flatten(0, 1))
    span = None if batch.span is None else batch.span[:, 1:]
    actions = action_input(batch.prev_action[:, 1:], span, world.cfg.jump).flatten(0, 1)
    step = Points(before.deter, world.inputs(before, actions))

    def some(points: Points) -> Points:
        chosen = torch.randperm(len(points.state), device=points.state.device)[:count]
        return Points(*(part[chosen].double() for part in points))

    return some(loop), some(step)


def expansion(f: StateMap, points: Points, steps: int = 100, rate: float = 0.05) -> Expansion:
    """The largest singular values of df/dx at the points, and what `steps` of gradient ascent make of them.

    Ascent moves the state, the input, and the direction and length of the distance to a second state. Half of the
    searches start from two states close together, along the leading singular direction, and half from pairs of points.
    """
    x, given = (part.detach().clone() for part in points)
    value, direction = leading_direction(f, x, given)
    distance = torch.full_like(value, 1e-3 * float(x.flatten(1).norm(dim=1).mean()))
    far = torch.arange(len(x), device=x.device) % 2 == 1
    other = x.roll(1, 0) - x
    apart = far & (other.flatten(1).norm(dim=1) > 1e-6)
    direction = torch.where(apart[:, None, None], other, direction)
    distance = torch.where(apart, other.flatten(1).norm(dim=1), distance)
    # rates in units of the size of what is moved
    parts = [x, given, direction / direction.flatten(1).norm(dim=1)[:, None, None], distance.log()]
    parts = [part.detach().requires_grad_() for part in parts]
    sizes = [float(x.detach().std()), float(given.detach().std()), float(parts[2].detach().std()), 1.0]
    groups = [{"params": [part], "lr": rate * max(size, 1e-6)} for part, size in zip(parts, sizes, strict=True)]
    optimizer, best = torch.optim.Adam(groups), value
    for _ in range(steps):
        ratio = moved_apart(f, *parts)
        best = torch.maximum(best, ratio.detach())
        optimizer.zero_grad()
        (-ratio.log().sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return Expansion(value, torch.maximum(best, moved_apart(f, *parts)))


def moved_apart(f: StateMap, x: Tensor, given: Tensor, direction: Tensor, log_distance: Tensor) -> Tensor:
    """(M,) |f(y) - f(x)| / |y - x| for y at a distance along a direction."""
    size = direction.flatten(1).norm(dim=1).clamp(min=1e-12)
    y = x + (log_distance.clamp(-9.0, 9.0).exp() / size)[:, None, None] * direction
    moved = (f(y, given) - f(x, given)).flatten(1).norm(dim=1)
    return moved.clamp(min=1e-12) / (y - x).flatten(1).norm(dim=1)


def leading_direction(f: StateMap, x: Tensor, given: Tensor, iterations: int = 30) -> tuple[Tensor, Tensor]:
    """Largest singular value of df/dx at each point (M,), and its direction (M, N, D), by power iteration."""
    direction = torch.randn_like(x)
    value = x.new_zeros(len(x))
    pull_back = torch.func.vjp(lambda state: f(state, given), x)[1]
    for _ in range(iterations):
        direction = direction / direction.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
        pushed = torch.func.jvp(lambda state: f(state, given), (x,), (direction,))[1]
        value = pushed.flatten(1).norm(dim=1)
        direction = pull_back(pushed)[0]
    return value.detach(), direction.detach()
