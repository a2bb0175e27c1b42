"""Which core survives larger learning rates? World models of three cores, trained on one data set.

    python train_agent.py dmc:walker_walk --model-only --dataset datasets/walker --offline.updates 2500 \\
        --train.threads 1 --sweep model.core=looped,certified --sweep optimizer.lr=0.001,0.003,0.01 \\
        --sweep seed=10,11,12 --jobs 2 --run-dir runs/rates
    python train_agent.py dmc:walker_walk --model-only --dataset datasets/walker --offline.updates 2500 \\
        --train.threads 1 --model.loop.retention free --sweep optimizer.lr=0.001,0.003,0.01 \\
        --sweep seed=10,11,12 --jobs 2 --run-dir runs/rates-free
    python benchmarks/learning_rates.py runs/rates runs/rates-free --csv rates.csv

One line for each core and rate: runs that diverged (a loss that was not finite, or a last error above 1, which knowing
the mean has); the largest mean norm of loop states and of imagined states that any line of their metrics shows (norms
are means over a batch, all alike where a core normalises after every loop; what is not finite is left out); and the
errors of the last measurement 1, 5 and 15 steps ahead, means over the runs that did not diverge and their spread.

    python benchmarks/learning_rates.py --depths 16 datasets/walker runs/rates --csv depth.csv --picture depth.png

measures the runs of --lr at fixed depths of 1 to 16 loops instead, whatever they were trained with.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.data.dataset import check_dataset, load_dataset, pad_episodes
from agent.errors import UsageError
from agent.evaluation.open_loop import exit_rule, open_loop, usable_horizons
from agent.interop.load import load_dreamer
from agent.runs.cli import read_yaml
from agent.runs.run_record import find_runs
from agent.runtime import set_threads
from world_model import ExitRule

HORIZONS = (1, 5, 15)
WINDOWS = 256


def kind_of(settings: dict[str, Any]) -> str:
    """free, constrained (the default) or the name of another core."""
    model = settings["model"]
    if model["core"] != "looped":
        return str(model["core"])
    return "free" if model["loop"]["retention"] == "free" else "constrained"


def outcome(folder: Path) -> dict[str, Any]:
    """What became of one run."""
    settings = read_yaml(folder / "config.yaml")
    row = {"core": kind_of(settings), "lr": settings["optimizer"]["lr"], "seed": settings["seed"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, start in (("loop_norm", "stability/norm_"), ("dream_norm", "stability/dream_norm_")):
        found = [value for line in lines for key, value in line.items() if key.startswith(start)]
        numbers = [float("nan") if value is None else float(value) for value in found]  # null is not a number
        row[name] = max(filter(math.isfinite, numbers), default=float("nan"))
    errors = last_errors(folder / "open_loop.csv")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if not (meta.get("finished") or meta.get("not_finite")):
        raise UsageError(f"{folder} was interrupted: remove it, and give the command of the sweep again")
    row["diverged"] = int(not (meta.get("finished") and errors.get(1, np.inf) <= 1.0))
    return row | {f"error_{h}": errors.get(h, float("nan")) for h in HORIZONS}


def last_errors(path: Path) -> dict[int, float]:
    """{horizon: error} of the last measurement with the run's exit rule."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {int(row["horizon"]): float(row["error"]) for row in csv.DictReader(file) if row["depth"] == "exit"}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    head = ["core", "learning rate", "diverged", "largest mean norm in a loop", "in a dream"]
    head += [f"error at {h}" for h in HORIZONS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["core"], row["lr"]].append(row)
    for (core, lr), group in sorted(groups.items()):
        kept = [row for row in group if not row["diverged"]]
        cells = [core, f"{lr:g}", f"{len(group) - len(kept)} of {len(group)}"]
        cells += [f"{np.nanmax([row[name] for row in group]):.1f}" for name in ("loop_norm", "dream_norm")]
        for h in HORIZONS:
            errors = [row[f"error_{h}"] for row in kept]
            cells.append(f"{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})" if errors else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def by_depth(folder: Path, data: Path, depths: int) -> list[dict[str, Any]]:
    """Errors at 1, 2, .. loops of every step."""
    settings, dataset = read_yaml(folder / "config.yaml"), load_dataset(data)
    saved = read_checkpoint(find_checkpoint(folder))
    check_dataset(dataset, saved["task"])
    world = load_dreamer(saved, str(folder)).averaged.world
    episodes, rows = pad_episodes(dataset.held_out), []
    horizons = usable_horizons(episodes, HORIZONS)
    for depth in range(1, depths + 1):
        with exit_rule(world, ExitRule()):
            errors = open_loop(world, episodes, horizons, WINDOWS, max_loops=depth).means()
        row = {"core": kind_of(settings), "seed": settings["seed"], "depth": depth}
        rows.append(row | {f"error_{h}": errors[f"error_{h}"] for h in horizons})
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Error by depth, a panel for each horizon, a line for each run."""
    horizons = [h for h in HORIZONS if f"error_{h}" in rows[0]]
    figure = Figure(figsize=(3.6 * len(horizons), 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    cores = sorted({row["core"] for row in rows})
    for axis, h in zip(figure.subplots(1, len(horizons), squeeze=False)[0], horizons, strict=True):
        for number, core in enumerate(cores):
            seeds = sorted({row["seed"] for row in rows if row["core"] == core})
            for seed in seeds:
                line = [(row["depth"], row[f"error_{h}"]) for row in rows if (row["core"], row["seed"]) == (core, seed)]
                axis.plot(*zip(*line, strict=True), color=f"C{number}", label=core if seed == seeds[0] else None)
        axis.set_title(f"{h} step{'s' * (h > 1)} ahead", fontsize=9)
        axis.set_xlabel("loops of every step")
        axis.set_ylim(bottom=0.0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("error over variance")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs; with --depths first the data set")
    parser.add_argument("--csv", type=Path, required=True, help="file of the rows")
    parser.add_argument("--depths", type=int, help="measure at 1 to so many loops")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the runs that are measured by depth")
    parser.add_argument("--picture", type=Path, help="PNG of the errors by depth")
    args = parser.parse_args()
    if args.picture and not args.depths:
        parser.error("--picture draws errors by depth: give --depths too")
    set_threads(1)
    try:
        if args.depths:
            rates = {path: read_yaml(path / "config.yaml")["optimizer"]["lr"] for path in find_runs(args.runs[1:])}
            folders = [path for path, rate in rates.items() if rate == args.lr]
            if not folders:
                have = " or ".join(f"{rate:g}" for rate in sorted(set(rates.values())))
                raise UsageError(f"no run has a learning rate of {args.lr:g}: give --lr {have}")
            rows = [row for path in folders for row in by_depth(path, Path(args.runs[0]), args.depths)]
        else:
            rows = [outcome(path) for path in find_runs(args.runs)]
            print("\n".join(table(rows)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with args.csv.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if args.picture:
        draw(rows).savefig(args.picture, dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
