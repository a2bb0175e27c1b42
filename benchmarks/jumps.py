"""What a jump costs and how well it predicts: one world model, asked in steps of 1, 2, 4, .. decisions.

    python evaluate.py collect TASK DATASET --run RUN --episodes 40          # rows that RUN has not learned from
    python benchmarks/jumps.py RUN DATASET
    python benchmarks/jumps.py RUN DATASET --jumps 1 2 4 8 --times 8 16 32 --csv jumps.csv

From the same states of the held-out episodes the same actions are predicted, in steps of k decisions. Printed for every
k: the error after each time, squared and over the variance of the observations (1: as good as knowing the mean), with
its standard error, where windows that overlap count as one; the loops of a step; and the milliseconds of a dream as in
an update, fused and of as many states, per decision that it covers. Jumps take turns, and times are medians; nothing
else may run.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.data.dataset import Dataset, check_dataset, load_dataset, pad_episodes
from agent.errors import UsageError
from agent.evaluation.open_loop import choose_windows, open_loop, posterior_states
from agent.evaluation.statistics import standard_error
from agent.execution.fused import fuse, fused_layers
from agent.learning.dreamer import Dreamer
from agent.runtime import set_threads

STATES, ROUNDS = 64, 20


def milliseconds(agent: Dreamer, jumps: list[int], decisions: int) -> list[float]:
    """Of a dream of STATES states under the policy, in steps of each of the jumps, per decision."""
    fuse(agent)
    world, took = agent.world, {jump: list[float]() for jump in jumps}
    start = world.initial(STATES)
    with fused_layers():
        for _ in range(ROUNDS):
            for jump, seconds in took.items():
                began = time.perf_counter()
                world.imagine(start, agent.behavior.policy, decisions // jump, jump=jump)
                seconds.append(time.perf_counter() - began)
    return [1000.0 * statistics.median(took[jump]) / (decisions // jump * jump) for jump in jumps]


def measure(
    agent: Dreamer, dataset: Dataset, jumps: list[int], times: list[int], windows: int
) -> list[dict[str, float]]:
    """One row for each jump."""
    longest = agent.world.cfg.jump
    if too_long := [jump for jump in jumps if jump > longest]:
        raise UsageError(f"the run was trained with --model.jump {longest}: ask for at most that, not {too_long[0]}")
    episodes = pad_episodes(dataset.held_out)
    world = agent.averaged.world
    states, _ = posterior_states(world, episodes)
    try:
        places = choose_windows(episodes, max(times), windows)
    except ValueError as error:
        raise UsageError(f"{error}: give shorter --times") from error
    rows = []
    for jump, ms in zip(jumps, milliseconds(agent, jumps, max(times)), strict=True):
        horizons = [t for t in times if t % jump == 0]
        if not horizons:
            raise UsageError(f"no time of --times {' '.join(map(str, times))} is reached in steps of {jump}")
        result = open_loop(world, episodes, horizons, places, states=states, jump=jump)
        groups = places.groups()
        errors = {f"error_{t}": float(result.error[t].mean()) for t in horizons}
        spread = {f"se_{t}": standard_error(result.error[t].numpy(), groups) for t in horizons}
        loops = float(result.depth.float().mean())
        rows.append({"jump": jump, **errors, **spread, "loops": loops, "ms": ms})
    return rows


def main(argv: list[str]) -> int:
    """Print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--jumps", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--times", type=int, nargs="+", default=[8, 16, 32], metavar="DECISIONS")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    set_threads(1)
    try:
        saved, dataset = read_checkpoint(find_checkpoint(args.run)), load_dataset(args.dataset)
        check_dataset(dataset, saved["task"])
        agent = Dreamer.from_checkpoint(saved, "cpu")
        rows = measure(agent, dataset, args.jumps, sorted(args.times), args.windows)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("jump  " + "".join(f"error {t:<11d}" for t in args.times) + "loops   ms per decision")
    for row in rows:
        known = {t: f"{row[f'error_{t}']:.3f} +- {row[f'se_{t}']:.3f}" for t in args.times if f"error_{t}" in row}
        cells = [f"{known.get(t, ''):17s}" for t in args.times]
        print(f"{row['jump']:<6.0f}{''.join(cells)}{row['loops']:.2f}    {row['ms']:.3f}")
    if args.csv:
        names = dict.fromkeys(name for row in rows for name in row)
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(names), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main(sys.argv[1:]))
