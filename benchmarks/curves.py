"""Every seed's curve of one task in one picture, and the table of a results page.

    python benchmarks/curves.py results/first-agent/dmc-cartpole_swingup-s* --out results/first-agent/cartpole.png

Reads eval.csv and episodes.csv of each folder (a run folder, or a copy of its CSV files) and prints, per folder,
the final evaluation, the mean of the last three evaluations before it, and the training return of the last ten
episodes; then mean and median over the folders.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def columns(path: Path) -> dict[str, np.ndarray]:
    """The named columns of a CSV file of numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with eval.csv and episodes.csv")
    parser.add_argument("--out", type=Path, help="PNG to write")
    args = parser.parse_args()
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    finals = []
    print("| run | final evaluation | std | lowest | last 3 evaluations | last 10 training episodes |")
    print("|---|---|---|---|---|---|")
    for number, run in enumerate(args.runs):
        evaluation, episodes = columns(run / "eval.csv"), columns(run / "episodes.csv")
        steps = np.unique(evaluation["step"])
        groups = [evaluation["return"][evaluation["step"] == step] for step in steps]
        means = [group.mean() for group in groups]
        finals.append(means[-1])
        before, train = np.mean(means[-4:-1]), episodes["return"][-10:].mean()
        print(
            f"| {run.name} | {means[-1]:.1f} | {groups[-1].std():.1f} | {groups[-1].min():.1f} "
            f"| {before:.1f} | {train:.1f} |"
        )
        colour = f"C{number}"
        axis.plot(episodes["step"], episodes["return"], ".", color=colour, markersize=2, alpha=0.4)
        axis.plot(steps, means, "o-", color=colour, label=run.name)
    print(f"\nmean {np.mean(finals):.1f}, median {np.median(finals):.1f}, lowest {np.min(finals):.1f}")
    axis.set(xlabel="simulator steps", ylabel="return (dots: training episodes)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    if args.out:
        figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
