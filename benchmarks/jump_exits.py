"""Do exits pay where predictions cover different times? The gate against random and fixed depth.

    python train_agent.py dmc:acrobot_swingup --model-only --dataset datasets/acrobot --model.jump 16 \\
        --model.loop.mean-loops 4 --train.threads 1 --run-dir runs/acrobot
    python benchmarks/jump_exits.py runs/acrobot datasets/acrobot --jumps 1 2 4 8 16 --csv acrobot.csv

From the same held-out states the run predicts steps of k decisions, after every number of loops up to the cap and with
the same random numbers: the error of the mean of eight samples, squared and over the variance of the observations. A
rule's error is that at the depths that it chooses. Printed for every k and for all together, for which every k counts
the same:

    own      the depths of the run's exit rule
    random   depths drawn at random, with the histogram of all own ones (in expectation: nothing is drawn)
    within   the same, with the histogram of the own ones at this k: who knows k alone can do as well
    fixed    always the same depth, of the same mean (between two depths in proportion)

and by how much random, within and fixed err more than own, in per cent of its error, with the 95 % interval, for which
windows that overlap count as one. The last lines are the rank correlation of loops and k, the same of a rule that knows
all loops beforehand (it stops where the prior stays within some nats of the one after the last loop), the smallest
fixed depth that errs no more than the own rule over all k, and how much longer dreams take at this depth: fused, of
--states states (64 as in `small`, 1024 as in `base`), with actions of the data that are held for k decisions, rules and
k in turns. Nothing else may run then.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.data.dataset import Episodes, check_dataset, load_dataset, pad_episodes
from agent.errors import UsageError
from agent.evaluation.normalised_error import NormalisedError, targets_at
from agent.evaluation.open_loop import (
    SAMPLES,
    Windows,
    choose_windows,
    exit_rule,
    posterior_states,
    usable_horizons,
)
from agent.evaluation.statistics import standard_error
from agent.execution.fused import fuse, fused_layers
from agent.learning.dreamer import Dreamer
from agent.runtime import set_threads
from world_model import ExitRule, LatentState, LoopedCore, WorldModel
from world_model.jumps import action_input

HORIZON, ROUNDS = 15, 15
CONTROLS = ("random", "within", "fixed")
TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Nats of the rule that knows all loops."""


class Steps(NamedTuple):
    """W predictions for each k of K: errors (K, R, W) after 1..R loops, depths (K, W) of the own rule, groups (W,) of
    windows that overlap, rest (K, R, W) = KL(prior after R loops || prior after 1..R)."""

    error: Tensor
    depth: Tensor
    groups: np.ndarray
    rest: Tensor

    @property
    def own(self) -> Tensor:
        """(K, W) errors of the own rule."""
        return self.error.gather(1, self.depth[:, None] - 1).squeeze(1)

    def at(self, histogram: Tensor) -> Tensor:
        """(K, W) expected errors of depths drawn with weights (R,), or (K, R)."""
        weights = histogram / histogram.sum(-1, keepdim=True)
        return (self.error * weights.expand(len(self.error), -1)[..., None]).sum(1)

    def settled(self, nats: float) -> Tensor:
        """(K, W) the first loop from which on the prior stays within so many nats of that after the last one."""
        far = self.rest > nats
        return far.shape[1] - far.flip(1).cumsum(1).eq(0).sum(1) + 1

    def controls(self) -> dict[str, Tensor]:
        """(K, W) errors of each."""
        loops = self.error.shape[1]
        counts = torch.stack([torch.bincount(depth - 1, minlength=loops) for depth in self.depth]).float()  # (K, R)
        mean = self.depth.float().mean()
        low = int(mean.clamp(max=loops - 1))
        mixed = torch.zeros(loops)
        mixed[low - 1], mixed[low] = 1.0 - (mean - low), mean - low
        return {"random": self.at(counts.sum(0)), "within": self.at(counts), "fixed": self.at(mixed)}


@torch.no_grad()
def predict(world: WorldModel, episodes: Episodes, places: Windows, jumps: Sequence[int], loops: int) -> Steps:
    """All depths of all steps, from the posterior states at the windows."""
    core = world.core
    assert isinstance(core, LoopedCore)
    states, _ = posterior_states(world, episodes)
    state = states.map(lambda leaf: leaf[places.episode, places.row])
    metric, prepared = NormalisedError.fit(world.observation_model, [episodes]), core.prepare()
    errors, depths, rests = [], [], []
    for k in jumps:
        actions = episodes.prev_action[places.episode[:, None], places.ahead[:, :k]]  # (W, k, A)
        inputs = world.inputs(state, action_input(actions[:, 0] if k == 1 else actions, k, world.cfg.jump))
        _, trace = core(state.deter, inputs, loops, prepared)
        _, stats = core.adaptive_step(state.deter, inputs, prepared, loops, log_prior=world.log_prior)
        targets = targets_at(world.observation_model, episodes, places.episode, places.ahead[:, k - 1])
        levels = world.latents.level((SAMPLES, len(places.row)), inputs)  # the same for every depth
        by_depth, priors = [], []
        for x in trace.states[1:]:
            deter = core.readout(state.deter, x, trace.gate)
            probs = world.prior_probs(deter)
            priors.append(world.latents.kl_form(probs))
            feats = [LatentState(deter, world.draw(probs, level)).feat() for level in levels]
            guess = torch.stack([world.observation_model.predictions(feat) for feat in feats]).mean(0)
            by_depth.append(metric.error(guess, targets))
        errors.append(torch.stack(by_depth))
        depths.append(stats.depth)
        rests.append(torch.stack([world.latents.kl(priors[-1], prior) for prior in priors]))
    return Steps(torch.stack(errors), torch.stack(depths), places.groups(), torch.stack(rests))


def rows_of(steps: Steps, jumps: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every k, and one for all."""
    own, controls, rows = steps.own, steps.controls(), []
    for label, part in [*((str(k), slice(i, i + 1)) for i, k in enumerate(jumps)), ("all", slice(None))]:
        mean = float(own[part].mean())
        row: dict[str, Any] = {"k": label, "loops": float(steps.depth[part].float().mean()), "own": mean}
        for name, error in controls.items():
            more = (error[part] - own[part]).flatten().numpy()
            se = standard_error(more, np.tile(steps.groups, len(more) // len(steps.groups)))
            row |= {name: float(error[part].mean()), f"{name}_more": 100.0 * float(more.mean()) / mean}
            row[f"{name}_half"] = 100.0 * 1.96 * se / mean
        rows.append(row | {f"error_{r}": float(e) for r, e in enumerate(steps.error[part].mean((0, 2)), 1)})
    return rows


def equal_depth(steps: Steps) -> int | None:
    """The smallest fixed depth that errs no more than the own rule; None where none does."""
    good = (steps.error.mean((0, 2)) <= steps.own.mean()).nonzero()
    return int(good[0]) + 1 if len(good) else None


@contextmanager
def always(world: WorldModel, depth: int) -> Any:
    """Inside of this every step has `depth` loops."""
    core, cfg = world.core, world.core.cfg
    core.cfg = replace(cfg, max_loops=depth)
    try:
        with exit_rule(world, ExitRule()):
            yield
    finally:
        core.cfg = cfg


def longer(agent: Dreamer, episodes: Episodes, jumps: Sequence[int], depth: int, size: int) -> float:
    """Time of dreams of `size` states at `depth` over that with the own rule: the sums over k of medians."""
    fuse(agent)
    horizon = usable_horizons(episodes, range(1, HORIZON + 1))[-1]
    world, places = agent.world, choose_windows(episodes, horizon, size, seed=1)
    world.load_state_dict(agent.averaged.world.state_dict())
    states, _ = posterior_states(world, episodes)
    start = states.map(lambda leaf: leaf[places.episode, places.row])
    actions = episodes.prev_action[places.episode[:, None], places.ahead]  # (B, H, A)
    took: dict[tuple[bool, int], list[float]] = {(own, k): [] for own in (True, False) for k in jumps}
    with torch.no_grad(), fused_layers():
        for _ in range(ROUNDS):
            for (own, k), seconds in took.items():
                began = time.perf_counter()
                if own:
                    world.imagine(start, actions, horizon, jump=k)
                else:
                    with always(world, depth):
                        world.imagine(start, actions, horizon, jump=k)
                seconds.append(time.perf_counter() - began)
    totals = [sum(statistics.median(took[own, k][1:]) for k in jumps) for own in (True, False)]
    return totals[1] / totals[0]


def rank_correlation(depth: Tensor, jumps: Sequence[int]) -> float:
    """Spearman's of loops (K, W) and k over all predictions; nan where the loops do not vary."""
    k = torch.tensor(jumps)[:, None].expand_as(depth)
    varies = int(depth.min()) < int(depth.max())
    return float(spearmanr(depth.flatten(), k.flatten()).statistic) if varies else float("nan")


def report(steps: Steps, rows: Sequence[dict[str, Any]], jumps: Sequence[int]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| k | loops | error | random | within | fixed |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[f'{name}_more']:+.1f} +- {row[f'{name}_half']:.1f} %" for name in CONTROLS]
        lines.append(f"| {row['k']} | {row['loops']:.2f} | {row['own']:.4f} | {' | '.join(cells)} |")
    known = [f"{rank_correlation(steps.settled(nats), jumps):.3f} ({nats} nats)" for nats in TOLERANCES]
    lines += ["", f"rank correlation of loops and k: {rank_correlation(steps.depth, jumps):.3f}"]
    lines += [f"rank correlation with all loops known: {', '.join(known)}"]
    return [*lines, "error over all k after 1, 2, .. loops: " + ", ".join(f"{e:.4f}" for e in steps.error.mean((0, 2)))]


def main(argv: list[str]) -> int:
    """Print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or checkpoint of a looped core with jumps")
    parser.add_argument("dataset", help="data set of the same task; its held-out episodes are predicted")
    parser.add_argument("--jumps", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="K")
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--max-loops", type=int, help="most loops; by default as in training")
    parser.add_argument("--threshold", type=float, help="of the run's exit rule; by default as in training")
    parser.add_argument("--states", type=int, nargs="+", default=[64], metavar="B", help="of the dreams that are timed")
    parser.add_argument("--no-times", action="store_true", help="leave the times of dreams out")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    args = parser.parse_args(argv)
    set_threads(1)
    torch.manual_seed(0)
    try:
        saved, dataset = read_checkpoint(find_checkpoint(args.run)), load_dataset(args.dataset)
        check_dataset(dataset, saved["task"])
        agent = Dreamer.from_checkpoint(saved, "cpu")
        world, jumps = agent.averaged.world, sorted(set(args.jumps))
        if not isinstance(world.core, LoopedCore):
            raise UsageError(f"the core of {args.run} is {world.cfg.core}, it has no loops")
        for each in (agent.world, world):
            if args.max_loops:
                loop = replace(each.cfg.loop, max_loops=args.max_loops)
                each.cfg, each.core.cfg = replace(each.cfg, loop=loop), loop
            if args.threshold is not None:
                each.core.rule.threshold = args.threshold
        if world.run_cap < 2:
            raise UsageError(f"{args.run} has one loop, and nothing to choose: give a run with more, or --max-loops")
        if not 1 <= jumps[0] <= jumps[-1] <= world.cfg.jump:
            raise UsageError(f"the run was trained with --model.jump {world.cfg.jump}: give --jumps from 1 to that")
        episodes = pad_episodes(dataset.held_out)
        try:
            places = choose_windows(episodes, jumps[-1], args.windows)
        except ValueError as error:
            raise UsageError(f"{error}: give smaller --jumps, or longer episodes") from error
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = predict(world, episodes, places, jumps, world.run_cap)
    rows = rows_of(steps, jumps)
    print("\n".join(report(steps, rows, jumps)))
    depth = equal_depth(steps)
    print("no fixed depth errs as little" if depth is None else f"fixed depth of equal error: {depth}")
    rows[-1] |= {"rank": rank_correlation(steps.depth, jumps), "equal_depth": depth}
    rows[-1] |= {f"rank_known_{nats}": rank_correlation(steps.settled(nats), jumps) for nats in TOLERANCES}
    for size in args.states if depth and not args.no_times else ():
        rows[-1][f"longer_{size}"] = ratio = longer(agent, episodes, jumps, depth, size)
        print(f"dreams of {size} states take {ratio:.2f} times as long")
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[-1].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
