"""Every evaluation of a suite in one picture, a panel for each task, beside published returns.

    python benchmarks/suite_curves.py results/suite/dmc18 --out results/suite/dmc18.png

Reads TASK-sSEED.csv of a folder, each the eval.csv of a run, and prints the tables of the page: the mean of the
episodes of every evaluation, of several seeds the median; and what they come to over the tasks at 100,000 steps.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from csv_rows import whole_lines
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agent.errors import UsageError
from agent.evaluation.statistics import count_at_least, iqm
from agent.runs.published import published_near

SHOWN = ("DreamerV3", "TD-MPC2", "BRO")

STEP = 100_000
"""Steps at which published returns are shown."""

Curves = dict[str, dict[int, dict[int, float]]]
"""{task: {seed: {step: mean return}}}"""


def read(folder: Path) -> Curves:
    """All runs of the folder. Raises UsageError where a file is damaged."""
    curves: Curves = defaultdict(dict)
    for path in sorted(folder.glob("*-s*.csv")):
        found = re.fullmatch(r"(\w+)-s(\d+)", path.stem)
        if found is None:
            continue
        returns: dict[int, list[float]] = defaultdict(list)
        for row in csv.DictReader(whole_lines(path)):
            try:
                returns[int(row["step"])].append(float(row["return"]))
            except (KeyError, ValueError, TypeError) as error:
                raise UsageError(f"{path} is damaged ({error}): copy eval.csv of the run again") from error
        curves[found[1]][int(found[2])] = {step: float(np.mean(group)) for step, group in sorted(returns.items())}
    return curves


def published(task: str) -> dict[str, float]:
    """{method: return} of those that are shown."""
    return {row.method: row.value for row in published_near(f"dmc:{task}", STEP) if row.method in SHOWN}


def table(curves: Curves) -> list[str]:
    """Lines of Markdown."""
    steps = sorted({step for seeds in curves.values() for curve in seeds.values() for step in curve})
    lines = [
        "| | seeds | " + " | ".join(f"{step / 1000:g}k" for step in steps) + " | " + " | ".join(SHOWN) + " |",
        "|" + "---|" * (2 + len(steps) + len(SHOWN)),
    ]
    for task, seeds in curves.items():
        groups = ([curve[step] for curve in seeds.values() if step in curve] for step in steps)
        values = " | ".join(f"{np.median(group):.0f}" if group else "" for group in groups)
        others = published(task)
        known = " | ".join(f"{others[name]:.0f}" if name in others else "" for name in SHOWN)
        lines.append(f"| {task} | {len(seeds)} | {values} | {known} |")
    return lines


def over_tasks(curves: Curves) -> list[str]:
    """Lines of Markdown: mean, median and interquartile mean over the tasks of the medians at STEP, and on how many
    tasks they are at least what is published. A method that is not published for all tasks has no column."""
    own = {
        task: float(np.median([curve[STEP] for curve in seeds.values() if STEP in curve]))
        for task, seeds in curves.items()
        if any(STEP in curve for curve in seeds.values())
    }
    others = {name: {task: published(task)[name] for task in own if name in published(task)} for name in SHOWN}
    columns = {"this agent": own} | {name: found for name, found in others.items() if len(found) == len(own) > 0}
    lines = ["| over tasks | " + " | ".join(columns) + " |", "|" + "---|" * (1 + len(columns))]
    for name, of in {"mean": np.mean, "median": np.median, "interquartile mean": iqm}.items():
        values = " | ".join(f"{of(list(column.values())):.0f}" if column else "" for column in columns.values())
        lines.append(f"| {name} of {len(own)} | {values} |")
    counts = [count_at_least(own, column)[0] for column in list(columns.values())[1:]]
    return [*lines, f"| tasks on which this agent is at least as good | | {' | '.join(map(str, counts))} |"]


def draw(curves: Curves, columns: int = 6) -> Figure:
    """A panel for each task."""
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (task, seeds) in zip(axes.flat, curves.items(), strict=False):
        for seed, curve in seeds.items():
            axis.plot([step / 1000 for step in curve], list(curve.values()), label=f"seed {seed}")
        for number, name in enumerate(SHOWN):
            value = published(task).get(name)
            if value is not None:
                axis.axhline(value, color="0.5", linestyle=("-", "--", ":")[number], linewidth=0.8, label=name)
        axis.set_title(task, fontsize=9)
        axis.set_ylim(0, 1040)
        axis.spines[["top", "right"]].set_visible(False)
    max(axes.flat[: len(curves)], key=lambda axis: len(axis.lines)).legend(frameon=False, fontsize=7)
    axes[-1, 0].set_xlabel("1,000 steps")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of TASK-sSEED.csv")
    parser.add_argument("--out", type=Path, help="PNG to write")
    args = parser.parse_args()
    curves = read(args.folder)
    if not curves:
        parser.error(f"{args.folder} holds no TASK-sSEED.csv")
    print("\n".join([*table(curves), "", *over_tasks(curves)]))
    if args.out:
        draw(curves).savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
