"""One design choice, all else equal: what each value returns, what its model knows, and what it costs.

    python train_agent.py --sweep task=dmc:walker_walk,dmc:finger_spin --sweep seed=10,11 --steps 50000 \\
        --sweep model.objective=reconstruct,redundancy,sigreg --jobs 2 --train.threads 1 --no-video \\
        --run-dir runs/objective
    python train_agent.py dmc:walker_walk --model-only --dataset datasets/walker --offline.updates 2500 \\
        --sweep model.objective=reconstruct,redundancy,sigreg --sweep seed=10,11 --jobs 2 \\
        --run-dir runs/objective-models
    python benchmarks/choices.py model.objective runs/objective --models runs/objective-models --csv objective.csv

Returns are means of the last evaluation, of each seed; a dash stands for a seed that is missing. Models are world
models trained on a data set: the R^2 of a linear read-out of the true state from their latents, as they are and after 5
and 15 imagined steps, and the effective rank of their embedding as a share of its size (for sigreg, of its projection).
Updates per second are those of agents, a mean over the tasks that every value has, and compare only where runs had the
machine to themselves in the same way. Settings in which the runs differ beside the field, the task and the seed are
named.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from csv_rows import check_place, whole_lines, write_rows

from agent.errors import UsageError
from agent.runs.cli import read_yaml
from agent.runs.config import Config
from agent.runs.folder import read_meta
from agent.runs.run_record import RunRecord, find_runs, load_runs
from agent.runs.sweep_grid import MAY_DIFFER
from agent.settings import differences, from_dict, known_name, to_dict, value_of

READ = {"probe": "R^2 now", "probe_5": "R^2 after 5 steps", "probe_15": "after 15"}
RANK = "stability/embedding_rank"
UNFINISHED = "is not finished, give the command of its sweep again"


def lacking(folder: Path) -> str | None:
    """Why a world model is left out; None for one that was trained to its end."""
    meta = read_meta(folder)
    if "not_finite" in meta:
        return f"has diverged: {meta['not_finite']} is not finite"
    return None if meta.get("finished") else UNFINISHED


def settings_of(folder: Path) -> dict[str, Any]:
    """All settings of a run of this agent, also those that its file does not hold. Raises UsageError."""
    saved = read_yaml(folder / "config.yaml")
    if not isinstance(saved, dict) or not {"task", "seed"} <= saved.keys():
        raise UsageError("cannot be read as a run: its config.yaml names no task and seed")
    settings = to_dict(from_dict(Config, saved))
    if settings["agent"] != "dreamer":
        raise UsageError(f"is a run of {settings['agent']}")
    return settings


def unequal(folders: Sequence[Path], field: str) -> list[str]:
    """Names of settings beside the field in which runs of one table differ."""
    found = [settings_of(folder) for folder in folders]
    names = {name for settings in found for name in differences(found[0], settings)}
    return sorted(names - MAY_DIFFER - {field, "task", "seed"})


def of_models(folder: Path, field: str) -> dict[str, Any]:
    """What one world model knows, by the last line of its files."""
    settings = settings_of(folder)
    row = {"value": str(value_of(settings, field)), "model_of": settings["task"], "seed": settings["seed"]}
    path = folder / "probe.csv"
    if not path.is_file():
        raise UsageError("has no probe.csv: give finished runs of --model-only with vectors")
    last = list(csv.DictReader(whole_lines(path)))[-1]
    row |= {name: float(last[name]) for name in READ if name in last}
    lines = [json.loads(line) for line in whole_lines(folder / "metrics.jsonl")]
    ranks = [line[RANK] for line in lines if RANK in line]
    return row | ({"rank": ranks[-1]} if ranks else {})


def of_agents(run: RunRecord, field: str) -> dict[str, Any]:
    """What one agent returns, and what it cost."""
    settings = settings_of(run.path)
    row = {"value": str(value_of(settings, field)), "task": run.task, "seed": settings["seed"], "step": run.last_step}
    row |= {"return": run.final_return, "minutes": run.seconds_at(run.last_step) / 60}
    row |= {"rank": run.metrics[RANK]} if RANK in run.metrics else {}
    speed = run.updates_per_second
    return row | ({"updates_per_second": speed} if speed is not None else {})


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a line for each value, seeds side by side. Raises UsageError for two runs of one cell."""
    seeds, values = sorted({row["seed"] for row in rows}), list(dict.fromkeys(row["value"] for row in rows))
    cells: dict[str, dict[str, dict[int, str]]] = {}  # by column, value and seed
    speeds: dict[str, dict[str, list[float]]] = {}  # by task and value

    def put(column: str, row: dict[str, Any], text: str) -> None:
        cell = cells.setdefault(column, {}).setdefault(row["value"], {})
        if row["seed"] in cell:
            raise UsageError(f"two runs have {column}, {row['value']} and seed {row['seed']}: give one of each")
        cell[row["seed"]] = text

    for row in sorted((row for row in rows if "task" in row), key=lambda row: row["task"]):
        put(row["task"], row, f"{row['return']:.0f}")
        if "rank" in row:
            put(f"{row['task']}: rank", row, f"{row['rank']:.2f}")
        if "updates_per_second" in row:
            speeds.setdefault(row["task"], {}).setdefault(row["value"], []).append(row["updates_per_second"])
    for row in sorted((row for row in rows if "model_of" in row), key=lambda row: row["model_of"]):
        for name, text in (READ | {"rank": "rank"}).items():
            if name in row:
                put(f"{row['model_of']}, model: {text}", row, f"{row[name]:.2f}")
    shared = [task for task, found in speeds.items() if found.keys() == set(values)]
    lines = [f"| seeds {', '.join(map(str, seeds))} | " + " | ".join(cells) + " | updates per second |"]
    lines.append("|" + "---|" * (2 + len(cells)))
    for value in values:
        found = [column.get(value, {}) for column in cells.values()]
        shown = [", ".join(cell.get(seed, "-") for seed in seeds) if cell else "" for cell in found]
        speed = [np.mean(speeds[task][value]) for task in shared]
        lines.append(f"| {value} | " + " | ".join([*shown, f"{np.mean(speed):.1f}" if speed else ""]) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("field", help="the setting that is chosen, such as model.objective")
    parser.add_argument("agents", nargs="*", help="folders of runs of agents")
    parser.add_argument("--models", nargs="*", default=[], help="folders of runs of the world model alone")
    parser.add_argument("--csv", type=Path, required=True, help="file of the rows")
    args = parser.parse_args()
    try:
        field = known_name(Config, args.field)
        if not args.agents and not args.models:
            raise UsageError("give folders of runs, of agents or after --models")
        check_place(args.csv)
        runs, left_out = load_runs(find_runs(args.agents)) if args.agents else ([], [])
        models = find_runs(args.models) if args.models else []
        why = {run.path: UNFINISHED for run in runs if not run.finished}
        why |= {path: reason for path in models if (reason := lacking(path))}
        left_out += [f"left out: {path} {reason}" for path, reason in why.items()]
        rows, used = [], dict[Any, list[Path]]()
        for row_of, each, path in [
            *((of_agents, run, run.path) for run in runs if run.finished),
            *((of_models, path, path) for path in models if path not in why),
        ]:
            try:
                rows.append(row_of(each, field))
                used.setdefault(row_of, []).append(path)
            except UsageError as error:
                left_out.append(f"left out: {path} {error}")
            except (KeyError, ValueError, IndexError, TypeError) as error:
                left_out.append(f"left out: {path} cannot be read as a run with {field} ({error!r})")
        if not rows:
            raise UsageError("\n".join([*left_out, "no run is left to be compared"]))
        others = sorted({name for folders in used.values() for name in unequal(folders, field)})
        left_out += [f"note: not all else is equal, runs differ in {', '.join(others)} too"] if others else []
        lines = table(rows)
        write_rows(args.csv, rows)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*left_out, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
