"""One cell of the scaling study: a net of a given size around a core, its training and its error.

A net is told the observation at time t and the k actions from t on, and predicts the change of the observation up to
t + k. All vectors of an observation stand side by side, standardised by the training rows; the change is standardised
too. The core is one of the project's own:

    deter (B, N, D) = encoder(obs) + start     linear; the previous state that the core is given
    inputs (B, O + k*A)                        the observation in the place of the latents, and the k actions
    change (B, O)   = readout(core(deter, inputs))

    looped      one call of the looped core, T loops          stacked     the same with separate weights for each loop
    wide        the looped core with one loop, wider          gru         k steps of a GRU, one action each
    recurrent   the looped core with one loop, applied k times, one action each

    supervised  the looped net, whose every loop is trained: after loop j it is to say how the observation has changed
                after about j/T of the k decisions

The others are controls of the looped net of some width and T. Supervised is the same net, trained otherwise. The sizes
of the rest are matched: with `params` they have as many trained numbers, with `flops` as many operations per sample,
encoder and read-out included. The width is the largest that fits, the hidden width of a stack's layers takes what is
left, and the width of the layers that read the input what is left then.

Symbols as in `world_model/types.py`; k decisions, P pairs, E held-out episodes.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scaling_data import Pairs, Problem
from torch import Tensor, nn

from agent.errors import UsageError
from agent.execution.fused import fuse_modules, fused_layers
from agent.runtime import seed_everything
from world_model import Core, CoreSizes, LoopConfig, LoopedCore, cost
from world_model.controls.gru import BLOCKS, GRUCore
from world_model.controls.matching import nearest
from world_model.controls.stacked import StackedCore
from world_model.nets import linear

CORES = ("looped", "stacked", "wide", "gru", "recurrent", "supervised")
SIZED = ("stacked", "wide", "gru", "recurrent")  # controls whose size is matched
TOLERANCE = 0.02
"""A control may differ by this share from what it is matched to."""
WARM = 0.05
"""Share of the updates over which the learning rate rises; then it falls along half a cosine."""
TRAIN_SAMPLE = 20_000
"""Most pairs on which the training error is measured."""


@dataclass(frozen=True)
class Settings:
    """What all cells of a folder share."""

    updates: int = 3000
    batch: int = 512
    lr: float = 1e-3
    tokens: int = 1
    expand: float = 2.0
    gain: str = "leaky"


class Cell(NamedTuple):
    """One net to be trained. width and loops are those of the looped net that it is, or is the control of."""

    data: str
    core: str
    match: str
    width: int
    loops: int
    k: int
    share: float
    seed: int


# ---------------------------------------------------------------------- nets


class Shape(NamedTuple):
    """A net: kind of core, O, A, k, N, D, hidden width of the gated MLPs, U, loops or layers of a call."""

    core: str
    obs: int
    actions: int
    k: int
    tokens: int
    width: int
    hidden: int
    units: int
    loops: int
    gain: str

    @property
    def calls(self) -> int:
        """How often the core is applied to cover the k decisions."""
        return self.k if self.core in ("gru", "recurrent") else 1

    def core_of(self) -> Core:
        """The core alone."""
        cfg = LoopConfig(
            tokens=self.tokens,
            width=self.width,
            expand=self.hidden / self.width,
            units=self.units,
            mean_loops=float(self.loops),
            depth="fixed",
            exit="fixed",
            gain="leaky" if self.gain == "leaky" else "euler",
        )
        sizes = CoreSizes(self.obs, 1, self.k // self.calls * self.actions)
        if self.core == "stacked":
            return StackedCore(cfg, sizes)
        return GRUCore(cfg, sizes) if self.core == "gru" else LoopedCore(cfg, sizes)


class Net(nn.Module):
    """Observation (B, O) and actions (B, k, A), standardised -> standardised change (B, O)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, flat = shape, shape.tokens * shape.width
        self.encoder = linear(shape.obs, flat)
        self.core = shape.core_of()
        self.readout = linear(flat, shape.obs, bias=True, scale=0.1)

    def forward(self, obs: Tensor, actions: Tensor, every: bool = False) -> Tensor:
        """With every, what is read after each loop of the looped core, (T, B, O)."""
        deter = self.encoder(obs).view(-1, self.shape.tokens, self.shape.width) + self.core.start  # (B, N, D)
        prepared = self.core.prepare()
        # (B, k, A) -> (B, calls, k / calls * A)
        for action in actions.reshape(len(obs), self.shape.calls, -1).unbind(1):
            before = deter
            deter, trace = self.core(before, torch.cat([obs, action], -1), self.shape.loops, prepared)
        if every:
            assert isinstance(self.core, LoopedCore)
            deter = self.core.readout(before, torch.stack(trace.states[1:]), trace.gate)  # (T, B, N, D)
        return self.readout(deter.flatten(-2))

    def loss(self, problem: Problem, rows: Tensor) -> Tensor:
        """Mean squared error on training pairs (B,) by number; of early read-outs too, where they are supervised."""
        obs, actions, change = problem.batch(problem.train, rows)
        if self.shape.core != "supervised":
            return (self(obs, actions) - change).square().mean()
        *early, last = self(obs, actions, every=True)
        between = problem.between(rows, len(early) + 1)  # (T-1, B, O)
        return (last - change).square().mean() + (torch.stack(early) - between).square().mean()


class Size(NamedTuple):
    """Trained numbers of the core and of the whole net, and operations per sample of the whole net."""

    core_params: int
    params: int
    flops: float


@functools.lru_cache(maxsize=1 << 16)
def size_of(shape: Shape) -> Size:
    """What a net has and takes; its weights are not made."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net = Net(shape)
    core = cost(net.core, shape.loops)
    ends = [*net.encoder.parameters(), *net.readout.parameters()]
    linear_flops = 2.0 * (net.encoder.weight.numel() + net.readout.weight.numel())
    return Size(core.params, core.params + sum(p.numel() for p in ends), linear_flops + shape.calls * core.flops)


def looped_shape(cell: Cell, sizes: tuple[int, int], settings: Settings) -> Shape:
    """Of the looped net that the cell is, or is the control of. sizes: O and A."""
    hidden = max(1, round(settings.expand * cell.width))
    shape = "looped", *sizes, cell.k, settings.tokens, cell.width, hidden, cell.width, cell.loops, settings.gain
    return Shape(*shape)


def shape_of(cell: Cell, sizes: tuple[int, int], settings: Settings) -> Shape | None:
    """The net of a cell; None when no control comes within TOLERANCE of what it is matched to."""
    looped = looped_shape(cell, sizes, settings)
    if cell.core not in SIZED:
        return looped._replace(core=cell.core)
    control = looped._replace(core=cell.core, loops=cell.loops if cell.core == "stacked" else 1)
    same_width = cell.core == "stacked" and cell.match == "flops"
    wanted = getattr(size_of(looped), cell.match)
    expand = None if same_width else settings.expand
    fitted = fit(control, lambda shape: getattr(size_of(shape), cell.match), wanted, expand)
    close = fitted is not None and abs(getattr(size_of(fitted), cell.match) / wanted - 1.0) <= TOLERANCE
    return fitted if close else None


def fit(shape: Shape, of: Callable[[Shape], float], wanted: float, expand: float | None) -> Shape | None:
    """The shape with another width, hidden width and units, whose size is nearest to `wanted`; None if all are larger.

    Width first, hidden width and units in proportion (expand: hidden over width; None: the width stays); then the
    hidden width of the layers; then the units.
    """
    step = BLOCKS // math.gcd(BLOCKS, shape.tokens) if shape.core == "gru" else 1

    def wide(number: int) -> Shape:
        width = step * number
        return shape._replace(width=width, hidden=max(1, round((expand or 1.0) * width)), units=width)

    def below(make: Callable[[int], Shape]) -> Shape:
        """The largest that is not above `wanted`, or the smallest that there is."""
        number = nearest(lambda number: of(make(number)), wanted, 1 << 12)
        return make(number - 1 if number > 1 and of(make(number)) > wanted else max(number, 1))

    base = below(wide) if expand else shape
    if shape.core != "gru":  # it has no such layers
        widest = base
        base = below(lambda hidden: widest._replace(hidden=hidden))
    units = nearest(lambda units: of(base._replace(units=units)), wanted, 1 << 12)
    return base._replace(units=units) if units else None


# ---------------------------------------------------------------------- training


class Outcome(NamedTuple):
    """What a cell found.

    test_error: squared error on the held-out pairs over the variance of the change there; episodes (E,): what each
    held-out episode says, whose mean is the test error; train_error: the same on training pairs. NaN when training
    diverged.
    """

    shape: Shape
    size: Size
    pairs: int
    train_error: float
    test_error: float
    episodes: np.ndarray
    seconds: float


def learning_rate(update: int, settings: Settings) -> float:
    """Of an update: rises linearly, then falls along half a cosine to 0."""
    warm = max(1.0, WARM * settings.updates)
    part = max(0.0, (update + 1 - warm) / max(1.0, settings.updates - warm))
    return settings.lr * min(1.0, (update + 1) / warm) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, part)))


Loss = Callable[[Net, Tensor], Tensor]
"""Of a net on training pairs (B,) by number: a scalar."""


def trained_net(problem: Problem, shape: Shape, settings: Settings, seed: int, loss_of: Loss | None = None) -> Net:
    """Train a net by its own loss on the problem, or by another; one that diverges is left as it is."""
    seed_everything(seed)
    net = Net(shape)
    fuse_modules(net)
    optimizer = torch.optim.Adam(net.parameters(), settings.lr, fused=True)
    draws = torch.Generator().manual_seed(seed)  # the same batches for all nets of a seed
    for update in range(settings.updates):
        rows = torch.randint(len(problem.train.start), (settings.batch,), generator=draws)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, settings)
        with fused_layers():
            loss = net.loss(problem, rows) if loss_of is None else loss_of(net, rows)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if update % 100 == 0 and not math.isfinite(loss.item()):
            break
    return net


def train_cell(problem: Problem, shape: Shape, settings: Settings, seed: int) -> Outcome:
    """Train the net and measure it."""
    began = time.perf_counter()
    net = trained_net(problem, shape, settings, seed)
    sample = torch.linspace(0, len(problem.train.start) - 1, min(TRAIN_SAMPLE, len(problem.train.start))).long()
    train_error, _ = error_of(net, problem, problem.train, sample)
    test_error, episodes = error_of(net, problem, problem.held, torch.arange(len(problem.held.start)))
    taken = time.perf_counter() - began
    return Outcome(shape, size_of(shape), len(problem.train.start), train_error, test_error, episodes, taken)


@torch.no_grad()
@fused_layers()
def error_of(
    net: Callable[[Tensor, Tensor], Tensor], problem: Problem, pairs: Pairs, rows: Tensor
) -> tuple[float, np.ndarray]:
    """Squared error over variance of the pairs (P,) by number, and what each episode says of it (E,).

    Both are sums over the O standardised numbers. An episode counts by its number of pairs, so that the mean of (E,) is
    the error.
    """
    squares, changes = [], []
    for some in rows.split(4096):
        obs, actions, change = problem.batch(pairs, some)
        squares.append((net(obs, actions) - change).double().square().sum(-1))  # (B,)
        changes.append(change.double())
    square, every = torch.cat(squares), torch.cat(changes)
    variance = (every - every.mean(0)).square().sum()
    if variance == 0:
        raise UsageError("observations change alike everywhere in held-out episodes: nothing is to be predicted")
    _, place = pairs.episode[rows].unique(return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, dtype=torch.double).index_add(0, place, square)
    return float(square.sum() / variance), (sums / variance * len(sums)).numpy()


# ---------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Grid:
    """Which cells are asked for."""

    data: tuple[str, ...]
    steps: tuple[int, ...] = (1, 4, 16)
    loops: tuple[int, ...] = (1, 2, 4, 8, 16)
    widths: tuple[int, ...] = (16, 32, 64)
    shares: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    cores: tuple[str, ...] = CORES
    match: tuple[str, ...] = ("params", "flops")

    def cells(self) -> Iterator[Cell]:
        """Seed after seed, so that what is there early covers the whole grid."""
        for seed in self.seeds:
            for share in self.shares:
                for data in self.data:
                    for k in self.steps:
                        for width in self.widths:
                            template = Cell(data, "looped", "none", width, 1, k, share, seed)
                            yield from self._cells_like(template)

    def _cells_like(self, template: Cell) -> Iterator[Cell]:
        """All cores, matches and loops of one looped net. Cells that would be the net of another are left out."""
        for core in self.cores:
            for match in self.match if core in SIZED else ("none",):
                once = core in ("gru", "recurrent") and match == "params"  # does not depend on the loops
                for loops in (1,) if once else self.loops:
                    one_loop = core == "wide" and match == "params"  # the looped net with one loop
                    same = loops == 1 and core in ("stacked", "wide", "supervised")
                    if not (one_loop or same or (core in ("recurrent", "supervised") and template.k == 1)):
                        yield template._replace(core=core, match=match, loops=loops)
