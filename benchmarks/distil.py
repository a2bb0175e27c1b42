"""Can an ensemble of models be distilled into one looped core?

    python evaluate.py collect dmc:walker_walk datasets/walker --episodes 200
    python benchmarks/distil.py datasets/walker --steps 4 --out distil.csv

Nets as in the scaling study (`scaling_cells.py`): an observation and k actions in, the change of the observation after
them out. For each k and seed, on the same pairs and with equal updates:

    single      one net
    members     the mean error of the ensemble's members, each a net of its own seed
    ensemble    the mean of what they predict
    distilled   one net of the same size that is trained to predict what the ensemble predicts
    longer      one net with as many updates as ensemble and distillation take together

for looped nets of every number of --loops, all of equal parameters. Errors are those of held-out episodes over the
variance. Episodes are the same for all seeds, which are those of nets. The last lines are means over the seeds, and the
share of the way from single nets to the ensemble that the distilled ones go, with its range over the seeds. What is
distilled are prediction nets alone, not world models of agents. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from csv_rows import append_row, at_least_one, read_rows, seed_number, stopped
from scaling_cells import Cell, Net, Settings, error_of, looped_shape, trained_net
from scaling_data import Problem, same_data
from torch import Tensor

from agent.data.dataset import load_dataset
from agent.errors import UsageError
from agent.runtime import keep_memory, set_threads

COLUMNS = (
    "data", "k", "loops", "width", "seed", "updates", "members_count", "params", "single", "members", "ensemble",
    "distilled", "longer",
)  # fmt: skip


class Ensemble:
    """The mean of what several nets predict."""

    def __init__(self, nets: list[Net]):
        self.nets = nets

    @torch.no_grad()
    def __call__(self, obs: Tensor, actions: Tensor) -> Tensor:
        return torch.stack([net(obs, actions) for net in self.nets]).mean(0)


def measured(problem: Problem, cell: Cell, settings: Settings, members: int) -> dict[str, Any]:
    """One row: errors of all kinds."""
    shape = looped_shape(cell, problem.sizes, settings)
    held = torch.arange(len(problem.held.start))

    def error(net: Callable[[Tensor, Tensor], Tensor]) -> float:
        return error_of(net, problem, problem.held, held)[0]

    nets = [trained_net(problem, shape, settings, 1000 * (1 + cell.seed) + member) for member in range(members)]
    ensemble = Ensemble(nets)

    def to_ensemble(net: Net, rows: Tensor) -> Tensor:
        obs, actions, _ = problem.batch(problem.train, rows)
        return (net(obs, actions) - ensemble(obs, actions)).square().mean()

    single = error(trained_net(problem, shape, settings, cell.seed))
    distilled = error(trained_net(problem, shape, settings, cell.seed, to_ensemble))
    long = replace(settings, updates=(members + 1) * settings.updates)
    found = {
        "single": single, "members": float(np.mean([error(net) for net in nets])), "ensemble": error(ensemble),
        "distilled": distilled, "longer": error(trained_net(problem, shape, long, cell.seed)),
    }  # fmt: skip
    params = sum(weight.numel() for weight in nets[0].parameters())
    return {name: f"{value:.6g}" for name, value in found.items()} | {"params": params}


def report(rows: list[dict[str, str]]) -> list[str]:
    """Means over the seeds, a line for each net."""
    about = ("data", "k", "loops", "width", "updates", "members_count")
    kinds = ("single", "members", "ensemble", "distilled", "longer")
    lines = ["| " + " | ".join([*about, *kinds]) + " | of the way |", "|" + "---|" * (1 + len(about) + len(kinds))]
    for key in dict.fromkeys(tuple(row[name] for name in about) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in about) == key]
        error = {kind: np.array([float(row[kind]) for row in own]) for kind in kinds}
        gained, possible = error["single"] - error["distilled"], error["single"] - error["ensemble"]
        share = ""  # an ensemble that is no better than a single net leaves no way to go
        if possible.min() > 0:
            way = gained / possible
            share = f"{gained.mean() / possible.mean():.2f} ({way.min():.2f} to {way.max():.2f})"
        means = [f"{error[kind].mean():.4f}" for kind in kinds]
        lines.append("| " + " | ".join([*key, *means, share]) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="folders of data sets of vectors")
    parser.add_argument("--steps", type=at_least_one, nargs="+", default=[4], help="k, decisions of a prediction")
    parser.add_argument("--loops", type=at_least_one, nargs="+", default=[1, 4])
    parser.add_argument("--width", type=at_least_one, default=64)
    parser.add_argument("--members", type=at_least_one, default=5)
    parser.add_argument("--updates", type=at_least_one, default=3000)
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[10, 11, 12])
    parser.add_argument("--out", type=Path, default=Path("distil.csv"))
    args = parser.parse_args()
    set_threads(1)
    keep_memory()
    settings = Settings(updates=args.updates)
    try:
        rows = read_rows(args.out, COLUMNS)
        known = {tuple(row[name] for name in COLUMNS[:7]) for row in rows}
        for folder in args.data:
            dataset = load_dataset(folder)
            same_data(args.out, folder.name, dataset)
            for number in args.seeds:
                for k in args.steps:
                    problem = Problem.of(dataset, k, 1.0, number)
                    for loops in args.loops:
                        about = (folder.name, k, loops, args.width, number, args.updates, args.members)
                        if tuple(map(str, about)) in known:
                            continue
                        cell = Cell(folder.name, "looped", "none", args.width, loops, k, 1.0, number)
                        row = dict(zip(COLUMNS, about, strict=False)) | measured(problem, cell, settings, args.members)
                        rows.append(append_row(args.out, COLUMNS, row))
                        print(", ".join(f"{name} {row[name]}" for name in COLUMNS), flush=True)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return stopped()
    print("\n".join(report(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
