"""Is a scan over time that computes all rows at once faster, at equal quality?

    python benchmarks/parallel_time.py --time                                       # milliseconds of an update
    python benchmarks/parallel_time.py datasets/walker datasets/cue --out rows.csv  # errors after training

Variants (`experiments/parallel_scan.py`):

    default     posterior and prelude read the deterministic state: row by row
    filter      the posterior reads the observation alone; still row by row
    scan        so does the prelude; loops of all rows at once, and a linear recurrence over the rows
    picard2, 4  the core of filter, its states guessed and computed for all rows at once, 2 or 4 times

An update is one of the world model alone: posterior states, losses, gradient, Adam. --time lets the variants take
turns, at 16 and at 64 rows of 16 sequences, with plain layers and with the fused ones of training. Errors are open
loop on held-out episodes (1 = knowing the mean), after equal updates from equal batches. The same command goes on where
it was stopped: rows that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from agent.data.dataset import Dataset, Rows, load_dataset, pad_episodes
from agent.errors import UsageError
from agent.evaluation.open_loop import open_loop, usable_horizons
from agent.execution.fused import fuse_modules, fused_layers
from agent.execution.fused.networks import FusedLoopedCore
from agent.runs.config import Config
from agent.runs.presets import preset
from agent.runtime import keep_memory, seed_everything, set_threads
from agent.spaces import ActionSpec, Spaces
from experiments.parallel_scan import FilterWorldModel, PicardWorldModel, ScanCore, ScanWorldModel
from world_model import Batch, LoopedCore, WorldModel

WALKER = Spaces({"state": 24}, ActionSpec(6, False))  # those of dmc:walker_walk
HORIZONS = (1, 5, 15)
COLUMNS = ("data", "variant", "seed", "updates", "length", "horizon", "error", "reward_error", "ms")
SCAN_CORE = "experiments.parallel_scan:ScanCore"


class Variant(NamedTuple):
    """How the states of a sequence are computed; sweeps: of `picard`."""

    kind: type[WorldModel]
    core: str = "looped"
    sweeps: int = 0


VARIANTS = {
    "default": Variant(WorldModel),
    "filter": Variant(FilterWorldModel),
    "scan": Variant(ScanWorldModel, SCAN_CORE),
    "picard2": Variant(PicardWorldModel, sweeps=2),
    "picard4": Variant(PicardWorldModel, sweeps=4),
}


class FusedScanCore(ScanCore, FusedLoopedCore):
    """Loops and read-out in the kernels; the prelude there reads the state too, and stays plain here."""

    prelude = LoopedCore.prelude


def make_world(variant: Variant, config: Config, spaces: Spaces, seed: int, fused: bool = False) -> WorldModel:
    """A world model of the preset's sizes; fused: with the layers of training, where the variant can use them."""
    seed_everything(seed)
    world = variant.kind(replace(config.model, core=variant.core), spaces.obs, spaces.action.size)
    if fused:
        fuse_modules(world)
        if type(world.core) is ScanCore:
            world.core.__class__ = FusedScanCore
    if isinstance(world, PicardWorldModel):
        world.sweeps = variant.sweeps
    return world


def window(rows: Rows, size: int, length: int, rng: np.random.Generator) -> Batch:
    """(B, T) rows from random places; what came before their first row is not known to the model."""
    begins = rng.integers(0, len(rows["reward"]) - length + 1, size)
    index = begins[:, None] + np.arange(length)
    taken = {name: torch.from_numpy(value[index]) for name, value in rows.items()}
    taken["is_first"][:, 0] = True
    obs = {name.removeprefix("obs/"): value for name, value in taken.items() if name.startswith("obs/")}
    flags = taken["is_first"], taken["is_last"], taken["is_terminal"]
    return Batch(obs, taken["prev_action"], taken["reward"], *flags)


def update(world: WorldModel, batch: Batch, adam: torch.optim.Optimizer) -> None:
    """One update of the world model alone."""
    world.observation_model.track(batch.obs)
    post = world.observe_sequence(batch, world.sample_depth())
    loss, _ = world.loss(post, batch)
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(world.parameters(), 100.0)
    adam.step()


# ---------------------------------------------------------------------- errors


def train(name: str, data: Path, dataset: Dataset, seed: int, updates: int, length: int) -> list[dict[str, object]]:
    """Train one variant, and measure its open-loop errors on the held-out episodes."""
    config = preset("small")
    world = make_world(VARIANTS[name], config, dataset.spaces, seed, fused=True)
    rng = np.random.default_rng(seed)  # equal batches for every variant
    adam = torch.optim.Adam(world.parameters(), config.optimizer.lr, fused=True)
    times = []
    for number in range(updates):
        batch = window(dataset.train, config.train.batch, length, rng)
        for group in adam.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, number / 100, 2.0 * (1.0 - number / updates) + 0.1)
        began = time.perf_counter()
        fused_layers()(update)(world, batch, adam)
        times.append(time.perf_counter() - began)
    episodes = pad_episodes(dataset.held_out)
    found = open_loop(world, episodes, usable_horizons(episodes, HORIZONS), 256).means()
    horizons = [h for h in HORIZONS if f"error_{h}" in found]
    return [
        dict(zip(COLUMNS, (
            data.name, name, seed, updates, length, h, f"{found[f'error_{h}']:.6g}", f"{found[f'reward_{h}']:.6g}",
            f"{1e3 * float(np.median(times)):.2f}",
        ), strict=True))
        for h in horizons
    ]  # fmt: skip


def done(out: Path) -> set[tuple[str, ...]]:
    """What the file holds already: data, variant, seed, updates, length."""
    if not out.exists():
        return set()
    with out.open(newline="", encoding="utf-8") as file:
        return {tuple(row[name] for name in COLUMNS[:5]) for row in csv.DictReader(file)}


def errors(folders: Sequence[Path], names: Sequence[str], seeds: Sequence[int], args: argparse.Namespace) -> None:
    """Train what is missing, and append its rows."""
    known = done(args.out)
    for data in folders:
        dataset = load_dataset(data)
        for seed in seeds:
            for name in names:
                if (data.name, name, str(seed), str(args.updates), str(args.length)) in known:
                    continue
                rows, fresh = train(name, data, dataset, seed, args.updates, args.length), not args.out.exists()
                with args.out.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    if fresh:
                        writer.writeheader()
                    writer.writerows(rows)
                print(f"{data.name} {name} seed {seed}: " + ", ".join(f"{r['error']} at {r['horizon']}" for r in rows))


# ---------------------------------------------------------------------- times


def times(names: Sequence[str], updates: int, lengths: Sequence[int]) -> None:
    """Print medians of updates that take turns."""
    config = preset("small")
    config = replace(config, model=replace(config.model, loop=replace(config.model.loop, depth="fixed")))
    worlds = {
        f"{name}{', fused' * fused}": (make_world(VARIANTS[name], config, WALKER, 0, fused), fused)
        for fused in (False, True)
        for name in names
    }
    adams = {label: torch.optim.Adam(world.parameters(), 1e-4, fused=True) for label, (world, _) in worlds.items()}
    print(f"{'median ms of an update':24s}" + "".join(f"{f'T = {length}':>12s}" for length in lengths))
    taken: dict[str, list[list[float]]] = {label: [[] for _ in lengths] for label in worlds}
    rng = np.random.default_rng(0)
    for _ in range(updates + 3):
        for place, length in enumerate(lengths):
            rows: Rows = {
                "obs/state": rng.standard_normal((4 * length, 24), np.float32),
                "prev_action": rng.uniform(-1, 1, (4 * length, 6)).astype(np.float32),
                "reward": rng.random(4 * length, np.float32),
                **{flag: np.zeros(4 * length, bool) for flag in ("is_first", "is_last", "is_terminal")},
            }
            batch = window(rows, 16, length, rng)
            for label, (world, fused) in worlds.items():
                began = time.perf_counter()
                (fused_layers()(update) if fused else update)(world, batch, adams[label])
                taken[label][place].append(time.perf_counter() - began)
    for label, series in taken.items():
        first_row = taken[f"{names[0]}{', fused' * worlds[label][1]}"]
        base, medians = ([float(np.median(each[3:])) for each in group] for group in (first_row, series))
        shown = (f"{1e3 * ms:7.1f} {first / ms:4.2f}" for ms, first in zip(medians, base, strict=True))
        print(f"{label:24s}" + "".join(f"{text:>12s}" for text in shown))
    print(f"second number: how many times as fast as {names[0]} with the same layers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", help="folders of data sets, as evaluate.py collect writes them")
    parser.add_argument("--time", action="store_true", help="time updates instead; needs no data")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--updates", type=int, default=None, help="by default 3,000 of training, or 20 timed ones")
    parser.add_argument("--length", type=int, default=64, help="T, rows of a sequence")
    parser.add_argument("--out", type=Path, default=Path("parallel-time.csv"))
    args = parser.parse_args()
    set_threads(1)
    keep_memory()
    if args.time:
        times(args.variants, args.updates or 20, (16, 64))
        return 0
    if not args.data:
        print("error: give folders of data sets, or --time", file=sys.stderr)
        return 2
    args.updates = args.updates or 3000
    try:
        errors(args.data, args.variants, args.seeds, args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
