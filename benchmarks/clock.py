"""What has an agent learned after so many minutes? The last evaluation by then, and when a return is reached.

    python train_agent.py --sweep task=dmc:cartpole_swingup --sweep agent=dreamer,sac --train.minutes 30 \\
        --steps 2m --train.eval-every 5000 --train.threads 1 --no-video --jobs 2 --run-dir runs/clock
    python benchmarks/clock.py runs/clock --minutes 5 10 20 30 --reach 800

Minutes are those of the run: they count acting, updates and evaluations. Returns are means of five evaluation episodes.
"""

from __future__ import annotations

import argparse
import sys

from agent.errors import UsageError
from agent.runs.compare import return_at_seconds
from agent.runs.run_record import RunRecord, find_runs, load_runs


def reached(run: RunRecord, target: float) -> float | None:
    """Minutes until the first evaluation with at least this return."""
    for step in sorted(run.evaluations):
        returns = run.evaluations[step].values()
        if sum(returns) >= target * len(returns):
            return run.seconds_at(step) / 60
    return None


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
    args = parser.parse_args()
    try:
        runs, left_out = load_runs(find_runs(args.runs))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*left_out, *table(runs, args.minutes, args.reach)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
