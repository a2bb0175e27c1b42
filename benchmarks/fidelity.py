"""Does fidelity limit the agent? Return against the error of the world model, over many checkpoints of one task.

    python evaluate.py collect dmc:finger_spin datasets/finger --episodes 100
    python benchmarks/fidelity.py datasets/finger runs/finger-a runs/finger-b --out fidelity.csv

Every run (a run folder, or a folder of runs) gives two points: its latest agent with the return of its last evaluation,
and the agent of its best evaluation with the return of that one. Errors are open loop on the held-out episodes of the
data set, which is the same for all (1 = knowing the mean), 1, 5 and 15 steps ahead, of observations and of rewards. The
last lines are Spearman's rank correlations of return and error with a 95 % interval (bootstrap over runs): near -1 the
better models belong to the better agents, near 0 something else limits them. Each is given over all points and over the
latest agents alone, as the best are chosen by the return that is correlated. A correlation over runs is no cause: with
more steps both returns and errors become better. Rows of one agent favour the models that were trained on states like
its own: collect rows of several, or at random. An interval of fewer than about eight runs means little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from csv_rows import check_place, write_rows
from scipy.stats import spearmanr

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.data.dataset import Dataset, check_dataset, load_dataset, pad_episodes
from agent.errors import UsageError
from agent.evaluation.open_loop import open_loop, usable_horizons
from agent.interop.load import load_dreamer
from agent.runs.run_record import RunRecord, find_runs, load_runs
from agent.runtime import set_threads

HORIZONS = (1, 5, 15)
WINDOWS = 256
RESAMPLES = 2000
COLUMNS = ("run", "checkpoint", "step", "return", *(f"{kind}_{h}" for kind in ("error", "reward") for h in HORIZONS))


def return_at(run: RunRecord, step: int) -> float | None:
    """Mean return of the evaluation at that step, where there was one."""
    episodes = run.evaluations.get(step)
    return float(np.mean(list(episodes.values()))) if episodes else None


def points_of(run: RunRecord, dataset: Dataset) -> list[dict[str, Any]]:
    """One row for each checkpoint that was evaluated at its step; those that cannot be read are left out."""
    episodes = pad_episodes(dataset.held_out)
    horizons = usable_horizons(episodes, HORIZONS)
    rows, seen = [], set[int]()
    for which in ("latest", "best"):
        try:
            saved = read_checkpoint(find_checkpoint(run.path, which))
            world = load_dreamer(saved, str(run.path)).averaged.world
        except UsageError as error:
            print(f"note: left out: {error}")
            continue
        check_dataset(dataset, saved["task"])
        found = return_at(run, saved["step"])
        if found is None or saved["step"] in seen:
            continue
        seen.add(saved["step"])
        if not world.observation_model.decodes:
            print(f"note: left out: {run.path} was trained without a decoder, and shows no errors")
            return []
        errors = open_loop(world, episodes, horizons, WINDOWS).means()
        row = {"run": str(run.path), "checkpoint": which, "step": saved["step"], "return": f"{found:.6g}"}
        rows.append(row | {name: f"{errors[name]:.6g}" for name in COLUMNS[4:] if name in errors})
    return rows


def correlation(rows: Sequence[dict[str, Any]], column: str, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's correlation of return and a column, and its interval: runs are drawn, with all of their points."""
    names = sorted({row["run"] for row in rows})
    groups = [[row for row in rows if row["run"] == name] for name in names]

    def of(chosen: Sequence[dict[str, Any]]) -> float:
        x, y = ([float(row[name]) for row in chosen] for name in ("return", column))
        return float(spearmanr(x, y).statistic) if len(set(x)) > 1 and len(set(y)) > 1 else float("nan")

    rng, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn.append(of([row for place in rng.integers(0, len(groups), len(groups)) for row in groups[place]]))
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return of(rows), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a data set of the task")
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--out", type=Path, default=Path("fidelity.csv"))
    args = parser.parse_args()
    set_threads(1)
    try:
        check_place(args.out)
        dataset = load_dataset(args.data)
        runs, left_out = load_runs(find_runs(args.runs))
        rows = [row for run in runs for row in points_of(run, dataset)]
        if len({row["run"] for row in rows}) < 3:
            raise UsageError("a correlation needs at least three runs with evaluations at their checkpoints: give more")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in left_out:
        print(f"note: {line}")
    write_rows(args.out, rows, COLUMNS)
    print(f"{len(rows)} checkpoints of {len(runs)} runs, in {args.out}")
    for column in COLUMNS[4:]:
        if all(column in row for row in rows):
            texts = []
            for chosen in (rows, [row for row in rows if row["checkpoint"] == "latest"]):
                enough = len({row["run"] for row in chosen}) >= 3
                found, low, high = correlation(chosen, column) if enough else [float("nan")] * 3
                texts.append(f"{found:6.3f} [{low:.3f}, {high:.3f}]")
            print(f"return and {column:10s} rank correlation {texts[0]}   latest alone {texts[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
