"""One design choice, all else equal: what each value returns, what its model knows, and what it costs.

    python train_agent.py --sweep task=dmc:walker_walk,dmc:finger_spin --sweep seed=10,11 --steps 50000 \\
        --sweep model.objective=reconstruct,redundancy,sigreg --jobs 2 --train.threads 1 --no-video \\
        --run-dir runs/objective
    python train_agent.py dmc:walker_walk --model-only --dataset datasets/walker --offline.updates 2500 \\
        --sweep model.objective=reconstruct,redundancy,sigreg --sweep seed=10,11 --jobs 2 \\
        --run-dir runs/objective-models
    python benchmarks/choices.py model.objective runs/objective --models runs/objective-models --csv objective.csv

Returns are means of the last evaluation, of each seed. Models are world models trained on one data set: the R^2 of a
linear read-out of the true state from their latents, as they are and after 5 and 15 imagined steps, and the
share of their embedding that is filled (effective rank). Updates per second are those of agents, and compare only where
runs had the machine to themselves in the same way.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from agent.errors import UsageError
from agent.runs.cli import read_yaml
from agent.runs.config import Config
from agent.runs.run_record import RunRecord, find_runs, load_runs
from agent.settings import known_name, value_of

READ = ("probe", "probe_5", "probe_15")
RANK = "stability/embedding_rank"


def finished(folder: Path) -> bool:
    """Whether a world model was trained to its end."""
    return bool(json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("finished"))


def of_models(folder: Path, field: str) -> dict[str, Any]:
    """What one world model knows, by the last line of its files."""
    settings = read_yaml(folder / "config.yaml")
    row = {"value": str(value_of(settings, field)), "task": "model", "seed": settings["seed"]}
    path = folder / "probe.csv"
    if not path.is_file():
        raise UsageError(f"{folder} has no probe.csv: give finished runs of --model-only with vectors")
    with path.open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    row |= {name: float(last[name]) for name in READ if name in last}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ranks = [line[RANK] for line in lines if RANK in line]
    return row | ({"rank": ranks[-1]} if ranks else {})


def of_agents(run: RunRecord, field: str) -> dict[str, Any]:
    """What one agent returns, and what it cost."""
    row = {"value": str(run.setting(field)), "task": run.task, "seed": run.settings["seed"], "step": run.last_step}
    row |= {"return": run.final_return, "minutes": run.seconds_at(run.last_step) / 60}
    speed = run.updates_per_second
    return row | ({"updates_per_second": speed} if speed is not None else {})


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a line for each value, seeds side by side."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    speeds: dict[str, list[float]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["task"] != "model":
            cells[row["value"], row["task"]].append(f"{row['return']:.0f}")
            if "updates_per_second" in row:
                speeds[row["value"]].append(row["updates_per_second"])
            continue
        for name in (*READ, "rank"):
            if name in row:
                cells[row["value"], name].append(f"{row[name]:.2f}")
    columns = {task: task for task in sorted({row["task"] for row in rows} - {"model"})}
    names = {"probe": "R^2 now", "probe_5": "R^2 after 5 steps", "probe_15": "after 15", "rank": "rank"}
    columns |= {name: text for name, text in names.items() if any(name in row for row in rows)}
    lines = ["| | " + " | ".join(columns.values()) + " | updates per second |", "|" + "---|" * (2 + len(columns))]
    for value in dict.fromkeys(row["value"] for row in rows):
        shown = [", ".join(cells[value, name]) for name in columns]
        shown.append(f"{np.mean(speeds[value]):.1f}" if speeds[value] else "")
        lines.append(f"| {value} | " + " | ".join(shown) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field", help="the setting that is chosen, such as model.objective")
    parser.add_argument("agents", nargs="+", help="folders of runs of agents")
    parser.add_argument("--models", nargs="*", default=[], help="folders of runs of the world model alone")
    parser.add_argument("--csv", type=Path, required=True, help="file of the rows")
    args = parser.parse_args()
    try:
        field = known_name(Config, args.field)
        runs, left_out = load_runs(find_runs(args.agents))
        models = find_runs(args.models) if args.models else []
        unfinished = [run.path for run in runs if not run.finished] + [path for path in models if not finished(path)]
        left_out += [f"left out: {path} is not finished, give the command of its sweep again" for path in unfinished]
        rows = [of_agents(run, field) for run in runs if run.finished]
        rows += [of_models(path, field) for path in models if path not in unfinished]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*left_out, *table(rows)]))
    with args.csv.open("w", encoding="utf-8", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
