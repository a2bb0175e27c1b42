"""What has an agent learned after so many minutes? The last evaluation by then, and when a return is reached.

    python train_agent.py --sweep task=dmc:cartpole_swingup --sweep agent=dreamer,sac --train.minutes 30 \\
        --steps 2m --train.eval-every 5000 --train.threads 1 --no-video --jobs 2 --run-dir runs/clock
    python benchmarks/clock.py runs/clock --minutes 5 10 20 30 --reach 800 --csv clock.csv

Minutes are those of the run: they count acting, updates and evaluations. Returns are means of five evaluation episodes,
of ten at the end. --csv writes every evaluation with its minutes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from agent.errors import UsageError
from agent.runs.compare import return_at_seconds
from agent.runs.run_record import RunRecord, find_runs, load_runs

COLUMNS = ("task", "agent", "seed", "step", "minutes", "return")


def reached(run: RunRecord, target: float) -> float | None:
    """Minutes until the first evaluation with at least this return."""
    for step in sorted(run.evaluations):
        returns = run.evaluations[step].values()
        if sum(returns) >= target * len(returns):
            return run.seconds_at(step) / 60
    return None


def rows_of(runs: list[RunRecord]) -> list[dict[str, object]]:
    """Every evaluation."""
    return [
        {
            "task": run.task, "agent": run.settings["agent"], "seed": run.settings["seed"], "step": step,
            "minutes": f"{run.seconds_at(step) / 60:.3f}", "return": f"{np.mean(list(episodes.values())):.6g}",
        }  # fmt: skip
        for run in runs
        for step, episodes in sorted(run.evaluations.items())
    ]  # fmt: skip


def table(runs: list[RunRecord], minutes: list[float], target: float | None) -> list[str]:
    """Lines of Markdown, a run each."""
    reach = [] if target is None else [f"minutes to {target:g}"]
    head = ["task", "agent", "seed", *(f"{m:g} min" for m in minutes), "steps", *reach]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in sorted(runs, key=lambda run: (run.task, str(run.settings["agent"]), run.settings["seed"])):
        returns = [return_at_seconds(run, 60 * m) for m in minutes]
        cells = [run.task, str(run.settings["agent"]), str(run.settings["seed"])]
        cells += ["" if value is None else f"{value:.0f}" for value in returns]
        cells += [f"{run.last_step:,}"]
        if target is not None:
            first = reached(run, target)
            cells.append("never" if first is None else f"{first:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--minutes", nargs="+", type=float, default=[5, 10, 20, 30])
    parser.add_argument("--reach", type=float, help="a return: print when it is reached")
    parser.add_argument("--csv", type=Path, help="write every evaluation there")
    args = parser.parse_args()
    try:
        runs, left_out = load_runs(find_runs(args.runs))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*left_out, *table(runs, args.minutes, args.reach)]))
    if args.csv:
        rows = rows_of(runs)
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
