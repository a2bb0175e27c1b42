"""The nets of a cells.csv, each over its seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scaling_fits import Interval, middle, ratio, ratio_over_episodes


class Net(NamedTuple):
    """One net over its seeds. system: name of the data set, with its share where that is not all of it; errors
    {seed: test error}; episodes {seed: errors of the held-out episodes (E,)}."""

    system: str
    data: str
    core: str
    match: str
    width: int
    loops: int
    k: int
    params: int
    flops: float
    pairs: int
    errors: dict[int, float]
    episodes: dict[int, np.ndarray]

    @property
    def error(self) -> float:
        """Geometric mean over seeds."""
        return middle(self.errors)

    @property
    def one_loop(self) -> bool:
        """One application of the block, whatever its width."""
        return self.core == "wide" or (self.core == "looped" and self.loops == 1)


def nets_of(rows: Sequence[dict[str, str]]) -> tuple[list[Net], int]:
    """The nets, each over its seeds, and how many cells were left out because their training diverged."""
    found: dict[tuple[Any, ...], Net] = {}
    diverged = 0
    for row in rows:
        error = float(row["test_error"])
        if not math.isfinite(error):
            diverged += 1
            continue
        share = float(row["share"])
        system = row["data"] if share == 1 else f"{row['data']} ({share:g})"
        place = int(row["width"]), int(row["loops"]), int(row["k"])
        size = int(row["params"]), float(row["flops"]), int(row["pairs"])
        key = system, row["core"], row["match"], *place
        net = found.setdefault(key, Net(system, row["data"], row["core"], row["match"], *place, *size, {}, {}))
        net.errors[int(row["seed"])] = error
        net.episodes[int(row["seed"])] = np.array(row["episodes"].split(), float)
    return list(found.values()), diverged


def paired(one: Net, other: Net) -> tuple[Interval, tuple[float, float], int]:
    """Error of `one` over that of `other`: over their common seeds, over episodes, and the number of seeds."""
    seeds = sorted(one.errors.keys() & other.errors.keys())
    if not seeds:
        return Interval(float("nan")), (float("nan"), float("nan")), 0
    errors = [np.array([net.errors[seed] for seed in seeds]) for net in (one, other)]
    episodes = [np.stack([net.episodes[seed] for seed in seeds]) for net in (one, other)]
    return ratio(*errors), ratio_over_episodes(*episodes), len(seeds)


def families(nets: Sequence[Net]) -> Iterator[tuple[str, list[Net]]]:
    """Kinds of nets by name, over all their widths and loops."""
    yield "looped", [net for net in nets if net.core == "looped"]
    yield "one loop", [net for net in nets if net.one_loop]
    yield "separate blocks", [net for net in nets if net.core == "stacked"]
    yield "gru", [net for net in nets if net.core == "gru"]
    yield "recurrent", [net for net in nets if net.core == "recurrent"]
