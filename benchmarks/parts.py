"""What is each part of the agent worth? The same tasks and seeds without it, up to the middle of a run.

    python benchmarks/parts.py runs/parts --csv results/suite/parts --jobs 2
    python benchmarks/parts.py runs/parts --csv results/suite/parts --without loops --tasks dmc:walker_walk --seeds 10
    python benchmarks/parts.py runs/parts --csv results/suite/parts --without fusing --seeds 10 11 12
    python benchmarks/parts.py runs/parts --csv results/suite/exploration --without nothing noise --seeds 0 1 2
    python benchmarks/parts.py --table results/suite/parts results/suite/dmc18

A run is that of 100,000 steps, ended after the evaluation at 50,000, where the decay of learning rates would begin: so
it is comparable with the first half of a whole run. A run that is there is skipped, one that was interrupted goes on.
FOLDER of --csv gets PART/TASK-sSEED.csv, the eval.csv of each. --table prints the mean of the evaluations at 40,000 and
50,000 steps beside that of the whole agent, whose TASK-sSEED.csv lie in the second folder, by seeds that all have. Its
last lines are over all pairs of task and seed: in how many the whole agent is better, and its mean lead with Student's
95 % interval, also over the means of tasks (pairs of one task are not independent), at 50,000 steps alone, and over all
evaluations up to there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from csv_rows import at_least_one, seed_number, stopped, whole_lines
from scipy import stats
from suite_curves import Curves, read

from agent.data.checkpoint import has_saved
from agent.errors import UsageError
from agent.runs.folder import in_use
from agent.runs.sweep import set_aside
from agent.runtime import PROJECT

STEPS, EVERY = 50_000, 10_000
LAST_TWO = (STEPS - EVERY, STEPS)
ALL = tuple(range(EVERY, STEPS + 1, EVERY))
TUNED = ("cartpole_swingup", "walker_walk", "finger_spin", "pendulum_swingup", "cheetah_run", "finger_turn_easy")
TASKS = tuple(f"dmc:{name}" for name in TUNED)
PARTS: dict[str, tuple[str, str]] = {
    "loops": ("train_agent.py", "--model.loop.mean-loops 1 --model.loop.depth fixed --model.loop.exit fixed"),
    "core": ("train_agent.py", "--model.core gru --model.match params"),
    "exploration": ("benchmarks/without_exploration.py", ""),
    "planning": ("train_agent.py", "--behavior.decisions both"),
    "fusing": ("train_agent.py", ""),
    **{part: (f"benchmarks/without_exploration.py --take-back {part}", "") for part in ("noise", "entropy", "floor")},
    "nothing": ("train_agent.py", ""),
}
"""{part: (program, options)}. One loop; a GRU of equal size; without exploration; planning, which the default lacks;
the whole agent with plain layers, as where there is no compiler; the parts of exploration; and the whole agent, for
seeds of which there is no longer run."""
ENVIRONMENTS = {"fusing": {"CXX": "/nowhere"}}


def evaluated(folder: Path) -> int:
    """The last step whose evaluation is written."""
    path = folder / "eval.csv"
    steps = [line.split(",")[0] for line in whole_lines(path)[1:]]
    return int(steps[-1]) if steps and steps[-1].isdecimal() else 0


class Run:
    """One training. name: TASK-sSEED."""

    def __init__(self, part: str, task: str, seed: int, runs: Path, out: Path):
        name = f"{task.rpartition(':')[2]}-s{seed}"
        self.folder, self.copy = runs / f"{part}-{name}", out / part / f"{name}.csv"
        (program, *flags), options = PARTS[part][0].split(), PARTS[part][1]
        self.command = [sys.executable, str(PROJECT / program), *flags]
        self.words = [task, "--seed", str(seed), "--run-dir", str(self.folder), "--no-video", "--train.threads", "1"]
        self.words += options.split()
        self.environment = {**os.environ, **ENVIRONMENTS.get(part, {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.failed = False

    def start(self) -> None:
        """Start the training, or go on with it."""
        if self.folder.exists() and in_use(self.folder):
            raise UsageError(f"another process trains in {self.folder}: wait until it has ended")
        if has_saved(self.folder):
            self.words = ["--resume", str(self.folder)]
        elif self.folder.exists():
            set_aside(self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.folder.with_suffix(".log").open("ab") as log:
            command = [*self.command, *self.words]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0, env=self.environment)

    def over(self) -> bool:
        """Has it the evaluation at STEPS, or ended without? Then it is stopped, and its evaluations are kept."""
        assert self.process is not None
        if evaluated(self.folder) < STEPS:
            if self.process.poll() is None:
                return False
            print(f"failed: {self.folder}, see {self.folder.with_suffix('.log')}", flush=True)
            self.failed = True
            return True
        self.stop()
        self.copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "eval.csv", self.copy)
        print(f"done: {self.copy}", flush=True)
        return True

    def stop(self) -> None:
        """As Ctrl-C does: the run saves and ends."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()


def train(waiting: list[Run], jobs: int) -> None:
    """All runs, `jobs` at a time; Ctrl-C and SIGTERM save those that are at work, also where a shell ignores Ctrl-C."""
    signals = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    working: list[Run] = []
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                working.append(waiting.pop(0))
                working[-1].start()
            time.sleep(1.0)
            working = [run for run in working if not run.over()]
    finally:
        for run in working:
            run.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def score(curve: dict[int, float], steps: Sequence[int] = LAST_TWO) -> float:
    """Mean of the evaluations at some steps; NaN where one is missing."""
    return float(np.mean([curve.get(step, np.nan) for step in steps]))


def leads(part: Curves, whole: Curves, steps: Sequence[int] = LAST_TWO) -> dict[str, np.ndarray]:
    """By how much the whole agent is better: of each task, for every seed that both have."""
    found: dict[str, np.ndarray] = {}
    for task in part.keys() & whole.keys():
        both = sorted(part[task].keys() & whole[task].keys())
        lead = np.array([score(whole[task][seed], steps) - score(part[task][seed], steps) for seed in both])
        if np.isfinite(lead).any():
            found[task] = lead[np.isfinite(lead)]
    return found


def of_pairs(found: dict[str, np.ndarray]) -> np.ndarray:
    """(P,) of all pairs of task and seed."""
    return np.concatenate([np.zeros(0), *found.values()])


def in_words(lead: np.ndarray) -> str:
    """mean +- half of the interval."""
    if len(lead) < 2:
        return ""
    half = float(stats.t.ppf(0.975, len(lead) - 1) * lead.std(ddof=1) / len(lead) ** 0.5)
    return f"{lead.mean():.0f} +- {half:.0f}"


def table(parts: dict[str, Curves], whole: Curves) -> list[str]:
    """Lines of Markdown: for each task the return of the whole agent and of each part, by seeds that all have."""
    if not parts or not whole:
        raise UsageError("there are no TASK-sSEED.csv: give --table the folder of parts and that of the whole agent")
    lines = ["| | seeds | whole | " + " | ".join(parts) + " |", "|" + "---|" * (3 + len(parts))]
    rows: list[list[float]] = []
    for task in sorted(set().union(*parts.values())):
        present = [curves.get(task, {}) for curves in (whole, *parts.values())]
        seeds = sorted(set.intersection(*(set(curves) for curves in present if curves)))
        rows.append([float(np.mean([score(of[s]) for s in seeds])) if of else np.nan for of in present])
        text = " | ".join("" if np.isnan(value) else f"{value:.0f}" for value in rows[-1])
        lines.append(f"| {task} | {', '.join(map(str, seeds))} | {text} |")
    means = " | ".join("" if np.isnan(value) else f"{value:.0f}" for value in np.mean(rows, 0))
    lead = [leads(curves, whole) for curves in parts.values()]
    pairs = [of_pairs(found) for found in lead]
    better = " | ".join(f"{int((values > 0).sum())} of {len(values)}" for values in pairs)
    over_tasks = [np.array([np.mean(of_task) for of_task in found.values()]) for found in lead]
    last, every = ([of_pairs(leads(curves, whole, steps)) for curves in parts.values()] for steps in ((STEPS,), ALL))
    return [
        *lines,
        f"| mean | | {means} |",
        f"| pairs in which the whole agent is better | | | {better} |",
        f"| mean lead of the whole agent, 95 % interval | | | {' | '.join(map(in_words, pairs))} |",
        f"| the same, over the means of tasks | | | {' | '.join(map(in_words, over_tasks))} |",
        f"| the same over pairs, at {STEPS:,} steps alone | | | {' | '.join(map(in_words, last))} |",
        f"| the same over pairs, all evaluations to {STEPS:,} | | | {' | '.join(map(in_words, every))} |",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--csv", type=Path, help="folder of the evaluations")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=list(PARTS)[:4], metavar="PART")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[10, 11])
    parser.add_argument("--jobs", type=at_least_one, default=2, help="runs at a time")
    parser.add_argument("--table", nargs=2, type=Path, metavar=("PARTS", "WHOLE"), help="print the table instead")
    args = parser.parse_args()
    if args.table:
        try:
            found = {part: read(args.table[0] / part) for part in PARTS if (args.table[0] / part).is_dir()}
            print("\n".join(table(found, read(args.table[1]))))
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    if args.runs is None or args.csv is None:
        parser.error("give the folder of the runs, and --csv FOLDER for what is kept of them")
    cells = ((part, task, seed) for part in args.without for task in args.tasks for seed in args.seeds)
    runs = [Run(*cell, args.runs, args.csv) for cell in cells]
    waiting = [run for run in runs if not run.copy.exists()]
    if there := len(runs) - len(waiting):
        print(f"{there} of {len(runs)} runs are in {args.csv}: give another --csv to train them anew", flush=True)
    try:
        train(waiting, args.jobs)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return stopped()
    return int(any(run.failed for run in runs))


if __name__ == "__main__":
    sys.exit(main())
