"""Which core, and how large a control must be to cost what the looped core costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from world_model.certified import CertifiedCore, ContractingCore
from world_model.controls.gru import GRUCore
from world_model.controls.stacked import StackedCore
from world_model.core import Core, CoreSizes
from world_model.extensions import build_extension, check_name
from world_model.looped import LoopConfig, LoopedCore

LOOPED: dict[str, type[LoopedCore]] = {
    "looped": LoopedCore,
    "certified": CertifiedCore,
    "contracting": ContractingCore,
}
"""Cores that loop."""


class Cost(NamedTuple):
    """params: trained numbers, without the exit rule; flops: operations of one step of one sample."""

    params: int
    flops: float


def check_core(name: str) -> None:
    """Raise ValueError with a suggestion unless `name` is a core's, or module:Class."""
    check_name("core", name, (*LOOPED, "stacked", "gru"))


def make_core(core: str, loop: LoopConfig, sizes: CoreSizes, match: str = "none") -> Core:
    """The core called `core`: one of LOOPED, stacked, gru, or module:Class, which is built as Class(loop, sizes).

    match "params" or "flops" sizes a control to what the looped core of the same settings has or takes, by the hidden
    width of the stack's layers, or the units of the GRU.
    Raises ValueError when even the smallest control is larger, and when there is no such core.
    """
    check_core(core)
    if loop.exit == "certified" and core not in ("certified", "contracting"):
        raise ValueError(f"the exit rule certified needs a bound that {core} has not: give --model.core certified")
    if match != "none" and (":" in core or core in ("certified", "contracting")):
        raise ValueError(f"the size of {core} is its own: --model.match works with stacked and gru")
    if core in LOOPED:
        return LOOPED[core](loop, sizes)
    if ":" in core:
        return build_extension(core, Core, loop=loop, sizes=sizes)  # type: ignore[type-abstract]

    def build(size: int | None = None) -> Core:
        if core == "stacked":
            return StackedCore(loop, sizes, size)
        return GRUCore(loop, sizes, size)

    if match == "none":
        return build()
    wanted = getattr(cost(_shape(lambda: LoopedCore(replace(loop, exit="fixed"), sizes)), loop.usual_loops), match)
    size = nearest(lambda size: getattr(cost(_shape(lambda: build(size))), match), wanted)
    if size == 0:
        raise ValueError(f"no {core} core is as small as the looped one in {match} ({wanted:,.0f}): widen the latter")
    return build(size)


def cost(core: Core, loops: float = 1.0) -> Cost:
    """What a core has and takes, at a (mean) number of loops. The exit rule counts for neither.

    Controls are matched at the mean number of loops of training, whatever the exits do afterwards.
    """
    rule = {id(p) for p in core.rule.parameters()} if isinstance(core, LoopedCore) else set()
    return Cost(sum(p.numel() for p in core.parameters() if id(p) not in rule), core.flops(loops))


def nearest(of: Callable[[int], float], wanted: float, limit: int = 1 << 20) -> int:
    """The integer from 1 to limit at which the growing function comes nearest to `wanted`; 0 if of(1) is too large."""
    if of(1) > wanted:
        return 0
    low, high = 1, 2
    while high < limit and of(high) <= wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) <= wanted else (low, middle)
    return low if wanted - of(low) <= of(high) - wanted else high


def _shape(build: Callable[[], Core]) -> Core:
    """A core without memory behind its parameters, and without drawing random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build()
