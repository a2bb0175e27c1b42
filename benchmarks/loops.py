"""Tables and a picture of cores trained on one data set: open-loop errors over seeds, by horizon and by depth.

    python benchmarks/loops.py GROUP=RUN,RUN,.. GROUP=RUN,.. --out errors.png

A group is what differs only by seed; its runs are those of train_agent.py --dataset DIR --model-only. Printed: the
mean and the spread (standard deviation) over seeds of the error at each horizon with exits after the last update,
then the error at each fixed depth.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import yaml

Table = dict[tuple[int, str, int], list[float]]
"""(update, depth, horizon) -> errors by seed."""


def read(runs: list[Path]) -> Table:
    table: Table = {}
    for run in runs:
        path = run if run.suffix == ".csv" else run / "open_loop.csv"
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                key = int(row["update"]), row["depth"], int(row["horizon"])
                table.setdefault(key, []).append(float(row["error"]))
    return table


def write_rows(groups: dict[str, list[Path]], out: Path) -> None:
    """All rows of all runs in one file, with the group and the run's seed in front."""
    with out.open("w", encoding="utf-8", newline="") as target:
        writer = csv.writer(target)
        for name, runs in groups.items():
            for run in runs:
                seed = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["seed"]
                with (run / "open_loop.csv").open(encoding="utf-8", newline="") as file:
                    rows = list(csv.reader(file))
                if target.tell() == 0:
                    writer.writerow(["core", "seed", *rows[0]])
                writer.writerows([name, seed, *row] for row in rows[1:])


def core_of(run: Path) -> str:
    """Parameters and operations per step of the run's core, from meta.json."""
    path = run / "meta.json"
    if not path.exists():
        return ""
    core = json.loads(path.read_text(encoding="utf-8")).get("core", {})
    return f"{core['params']:,} parameters, {core['flops'] / 1e3:,.0f}k operations" if core else ""


def cell(values: list[float]) -> str:
    return f"{np.mean(values):.4f} +- {np.std(values, ddof=1) if len(values) > 1 else 0:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", help="NAME=RUN,RUN,.. (folders, or their open_loop.csv)")
    parser.add_argument("--out", type=Path, help="draw error over updates there")
    parser.add_argument("--csv", type=Path, help="write all rows of all runs there (needs run folders)")
    args = parser.parse_args()
    groups: dict[str, list[Path]] = {}
    for text in args.groups:
        name, equals, runs = text.partition("=")
        if not equals:
            sys.exit(f"error: {text} names no group; write NAME=RUN,RUN")
        groups[name] = [Path(run) for run in runs.split(",")]
    tables = {name: read(runs) for name, runs in groups.items()}
    horizons = sorted({key[2] for table in tables.values() for key in table})
    print("| core | " + " | ".join(f"{h} step{'s' * (h > 1)}" for h in horizons) + " | core's size |")
    print("|---" * (len(horizons) + 2) + "|")
    for name, table in tables.items():
        last = max(key[0] for key in table)
        cells = [cell(table[last, "exit", h]) if (last, "exit", h) in table else "" for h in horizons]
        seeds = len(table[last, "exit", horizons[0]])
        print(f"| {name} ({seeds} seeds) | {' | '.join(cells)} | {core_of(groups[name][0])} |")
    for name, table in tables.items():
        last = max(key[0] for key in table)
        depths = sorted({int(key[1]) for key in table if key[0] == last and key[1] != "exit"})
        if depths:
            print(f"\n{name}, one checkpoint at fixed depths:\n")
            print("| loops | " + " | ".join(f"{h}" for h in horizons) + " |")
            print("|---" * (len(horizons) + 1) + "|")
            for depth in depths:
                print(f"| {depth} | " + " | ".join(cell(table[last, str(depth), h]) for h in horizons) + " |")
    if args.csv:
        write_rows(groups, args.csv)
    if args.out:
        draw(tables, horizons, args.out)


def draw(tables: dict[str, Table], horizons: list[int], out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(horizons), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, horizon in zip(figure.subplots(1, len(horizons), squeeze=False)[0], horizons, strict=True):
        for name, table in tables.items():
            updates = sorted({key[0] for key in table if key[1:] == ("exit", horizon)})
            means = np.array([np.mean(table[update, "exit", horizon]) for update in updates])
            spread = np.array([np.std(table[update, "exit", horizon]) for update in updates])
            line = axes.plot(updates, means, label=name)[0]
            axes.fill_between(updates, means - spread, means + spread, color=line.get_color(), alpha=0.15)
        axes.set(title=f"{horizon} steps ahead", xlabel="updates", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("squared error / variance, held-out")
    figure.axes[0].legend()
    figure.savefig(out, dpi=110)
    print(f"\n{out}")


if __name__ == "__main__":
    main()
