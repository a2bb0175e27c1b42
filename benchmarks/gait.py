"""How does a walker move that earns less? The parts of its reward, from the replay of finished runs.

    python benchmarks/gait.py runs/certified/walker_walk-s10 runs/tuned/walker_walk-s11 --csv gait.csv

For every tenth of a run, means over its decisions: reward per simulator step, and its parts by the task's own formulas:
`standing` (is the torso 1.2 m high?), `upright` (does it point upwards?) and `moving` (is it as fast as 1 m/s?), each
from 0 to 1. The reward is (3 standing + upright) / 4 * (5 moving + 1) / 6. The speed is that of the root, where the
task takes that of the centre of mass.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from csv_rows import check_place, write_rows
from dm_control.utils.rewards import tolerance

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import UsageError
from envs import TaskId

TASK, PARTS = "dmc:walker_walk", 10
UPRIGHT, HEIGHT, SPEED = 0, 14, 16
"""Columns of the observation: z component of the torso's axis, its height, forward speed of the root."""
STAND_HEIGHT, WALK_SPEED = 1.2, 1.0


def parts_of(observation: np.ndarray) -> dict[str, np.ndarray]:
    """(N, 24) observations to the parts of the reward, (N,) each."""
    height, speed = observation[:, HEIGHT], observation[:, SPEED]
    return {
        "standing": tolerance(height, (STAND_HEIGHT, np.inf), STAND_HEIGHT / 2),
        "upright": (1 + observation[:, UPRIGHT]) / 2,
        "moving": tolerance(speed, (WALK_SPEED, np.inf), WALK_SPEED / 2, value_at_margin=0.5, sigmoid="linear"),
    }


def rows_of(run: str) -> list[dict[str, Any]]:
    """One row for each tenth of the decisions that the run kept."""
    saved = read_checkpoint(find_checkpoint(run))
    if saved["task"] != TASK or "replay" not in saved:
        raise UsageError(f"{run} has no replay of {TASK}: give the folder of a finished run of that task")
    replay, repeat = saved["replay"], TaskId.parse(TASK).action_repeat
    rows, count = replay["rows"], replay["count"]
    if saved["config"].get("dataset") or np.shape(rows["reward"])[0] > 1 or count > np.shape(rows["reward"])[1]:
        raise UsageError(f"{run} holds rows of others, of several environments, or not all: give another run")
    keep = ~np.asarray(rows["is_first"])[0, :count]
    observation = np.asarray(rows["obs/state"])[0, :count][keep]
    values = {"reward": np.asarray(rows["reward"])[0, :count][keep] / repeat, **parts_of(observation)}
    bounds = np.linspace(0, len(observation), PARTS + 1).astype(int)
    return [
        {"core": saved["config"]["model"]["core"], "seed": saved["config"]["seed"], "steps": int(end) * repeat}
        | {name: round(float(value[start:end].mean()), 4) for name, value in values.items()}
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help=f"finished runs of {TASK}")
    parser.add_argument("--csv", type=Path, help="file for the rows")
    args = parser.parse_args()
    try:
        if args.csv:
            check_place(args.csv)
        rows = [row for run in args.runs for row in rows_of(run)]
        if args.csv:
            write_rows(args.csv, rows)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
