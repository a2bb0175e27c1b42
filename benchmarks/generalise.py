"""Does recursion help generalisation more than size does? Nets that saw few bodies, and the first rows of episodes.

    python benchmarks/generalise.py dmc:acrobot_swingup --steps 16 --out generalise.csv

Random play of one task with bodies of several masses (all masses and moments of inertia of the model times a factor,
which the nets are told as one more number of the observation). Nets as in the scaling study (`scaling_cells.py`) learn
from the first --rows rows of each episode with the masses of --train-on, and are judged on other episodes:

    same       the masses and rows that were trained on
    later      the same masses, the rows after them
    between    masses between those that were trained on
    beyond     masses lighter and heavier than those

    looped     one block, --loops loops            one        the same block with one loop: equal parameters
    wide       one loop, wider: equal operations   stacked    separate blocks: equal operations

Errors are squared, over the variance of what is judged. The last lines are ratios to the looped net, means over the
seeds of nets and their range: above 1 the looped net is better. If recursion helps generalisation and not only fit, the
ratios of the last three columns are larger than that of the first. Episodes are the same for all seeds. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from csv_rows import append_row, at_least_one, positive, read_rows, seed_number, stopped
from scaling_cells import Cell, Settings, error_of, shape_of, size_of, trained_net
from scaling_data import Pairs, Problem, Standard, pairs_of

from agent.data.dataset import Rows
from agent.errors import UsageError
from agent.runtime import keep_memory, set_threads
from envs import make_env
from envs.errors import TaskError

# core and what its size is matched to, see `scaling_cells.py`
NETS = {
    "looped": ("looped", "none"),
    "one": ("looped", "none"),
    "wide": ("wide", "flops"),
    "stacked": ("stacked", "flops"),
}
JUDGED = ("same", "later", "between", "beyond")
COLUMNS = (
    "task", "k", "width", "loops", "seed", "updates", "episodes", "rows", "masses", "net", "params", "flops", *JUDGED,
)  # fmt: skip


def play(task: str, mass: float, episodes: int, first_seed: int) -> Rows:
    """Rows of random play with a body of so many times its mass; the factor is the last number of an observation."""
    env = make_env(task, seed=first_seed)
    physics = getattr(getattr(env.unwrapped, "_env", None), "physics", None)
    if physics is None or set(env.observation_space.spaces) != {"state"}:  # type: ignore[attr-defined]
        raise UsageError(f"{task} has no masses to change, or images: give a task of dmc: with vectors")
    physics.model.body_mass[:] *= mass
    physics.model.body_inertia[:] *= mass
    mujoco.mj_setConst(physics.model.ptr, physics.data.ptr)  # what MuJoCo derives from masses, as for contacts
    rng, size = np.random.default_rng(first_seed), int(np.prod(env.action_space.shape or (1,)))
    columns: dict[str, list[np.ndarray]] = {"obs/state": [], "prev_action": [], "is_first": []}
    for _ in range(episodes):
        obs, _ = env.reset()
        action, over, first = np.zeros(size), False, True
        while True:
            columns["obs/state"].append(np.append(obs["state"], mass).astype(np.float32))
            columns["prev_action"].append(action.astype(np.float32))
            columns["is_first"].append(np.array(first))
            if over:
                break
            action, first = rng.uniform(-1.0, 1.0, size), False
            obs, _, terminated, truncated, _ = env.step(action)
            over = bool(terminated or truncated)
    env.close()
    return {name: np.stack(values) for name, values in columns.items()}


def joined(parts: list[Rows]) -> Rows:
    """Rows of several bodies behind each other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def within(rows: Rows, k: int, low: int, high: int) -> Pairs:
    """The pairs that lie in the rows `low` to `high` of their episodes. Raises UsageError where there are none."""
    pairs = pairs_of(rows, k)
    first = torch.from_numpy(np.flatnonzero(rows["is_first"]))
    place = pairs.start - first[pairs.episode]
    kept = (place >= low) & (place + k < high)
    if not kept.any():
        raise UsageError(f"no episode has {k} decisions in its rows {low} to {high}: give other --rows or --steps")
    return pairs._replace(start=pairs.start[kept], episode=pairs.episode[kept])


def played(args: argparse.Namespace) -> dict[str, Rows]:
    """All episodes: those that are learned from, others with the same masses, and with other masses."""

    def of(masses: list[float], seed: int) -> Rows:
        return joined([play(args.task, mass, args.episodes, seed + number) for number, mass in enumerate(masses)])

    learned, same = of(args.train_on, 1000), of(args.train_on, 2000)
    return {"learned": learned, "same": same, "between": of(args.between, 3000), "beyond": of(args.beyond, 4000)}


def problem_of(episodes: dict[str, Rows], k: int, rows: int) -> tuple[Problem, dict[str, Pairs]]:
    """What is learned from, and what is judged: pairs within the first `rows` rows of episodes, or behind them."""
    train = within(episodes["learned"], k, 0, rows)
    judged = {name: within(episodes[name], k, 0, rows) for name in ("same", "between", "beyond")}
    judged["later"] = within(episodes["same"], k, rows, 1 << 30)
    change = train.change(torch.arange(len(train.start)))
    return Problem(train, judged["same"], Standard.fit(train.obs[train.start]), Standard.fit(change)), judged


def measured(
    problem: Problem, judged: dict[str, Pairs], args: argparse.Namespace, net: str, about: dict[str, Any]
) -> dict[str, Any] | None:
    """The row of one net, or None where no control is as large as it should be."""
    core, match = NETS[net]
    loops = 1 if net == "one" else args.loops
    cell, settings = Cell("", core, match, args.width, loops, about["k"], 1.0, about["seed"]), Settings(args.updates)
    shape = shape_of(cell, problem.sizes, settings)
    if shape is None:
        return None
    trained, size = trained_net(problem, shape, settings, about["seed"]), size_of(shape)
    row = about | {"net": net, "params": size.params, "flops": f"{size.flops:.0f}"}
    for name, pairs in judged.items():
        error, _ = error_of(trained, problem, pairs, torch.arange(len(pairs.start)))
        row[name] = f"{error:.6g}"
    return row


def check_masses(train_on: list[float], between: list[float], beyond: list[float]) -> None:
    """Raise UsageError unless the names of the columns are true."""
    low, high = min(train_on), max(train_on)
    if any(not low < mass < high or mass in train_on for mass in between):
        raise UsageError(f"--between must lie between masses of --train-on ({low:g} to {high:g}): give others")
    if any(low <= mass <= high for mass in beyond):
        raise UsageError(f"--beyond must be lighter or heavier than --train-on ({low:g} to {high:g}): give others")


def report(rows: list[dict[str, str]]) -> list[str]:
    """Errors, and their ratios to the looped net's, a line for each k and net. rows: of one command."""
    lines = ["| k | net | parameters | " + " | ".join(JUDGED) + " |", "|" + "---|" * (3 + len(JUDGED))]
    for k in dict.fromkeys(row["k"] for row in rows):
        own = [row for row in rows if row["k"] == k]
        looped = {row["seed"]: row for row in own if row["net"] == "looped"}
        for net in dict.fromkeys(row["net"] for row in own):
            found, cells = [row for row in own if row["net"] == net and row["seed"] in looped], []
            for name in JUDGED:
                text = f"{np.mean([float(row[name]) for row in found]):.4f}"
                if net != "looped":
                    ratios = [float(row[name]) / float(looped[row["seed"]][name]) for row in found]
                    text += f", {np.mean(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
                cells.append(text)
            lines.append(f"| {k} | {net} | {found[0]['params']} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a task of dmc: with vectors")
    parser.add_argument("--steps", type=at_least_one, nargs="+", default=[16], help="k, decisions of a prediction")
    parser.add_argument("--rows", type=at_least_one, default=150, help="rows of each episode that are learned from")
    parser.add_argument("--train-on", type=positive, nargs="+", default=[0.7, 1.0, 1.5], help="times the body's mass")
    parser.add_argument("--between", type=positive, nargs="+", default=[0.85, 1.25])
    parser.add_argument("--beyond", type=positive, nargs="+", default=[0.5, 2.0])
    parser.add_argument("--episodes", type=at_least_one, default=40, help="of each mass")
    parser.add_argument("--loops", type=at_least_one, default=8)
    parser.add_argument("--width", type=at_least_one, default=32)
    parser.add_argument("--updates", type=at_least_one, default=3000)
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[10, 11, 12])
    parser.add_argument("--out", type=Path, default=Path("generalise.csv"))
    args = parser.parse_args()
    set_threads(1)
    keep_memory()
    rows = list[dict[str, str]]()
    masses = " / ".join(" ".join(f"{m:g}" for m in some) for some in (args.train_on, args.between, args.beyond))
    try:
        check_masses(args.train_on, args.between, args.beyond)
        known, episodes = read_rows(args.out, COLUMNS), played(args)
        for k in args.steps:
            problem, judged = problem_of(episodes, k, args.rows)
            for number in args.seeds:
                for net in NETS:
                    about = {"task": args.task, "k": k, "width": args.width, "loops": args.loops, "seed": number}
                    about |= {"updates": args.updates, "episodes": args.episodes, "rows": args.rows, "masses": masses}
                    wanted = {name: str(value) for name, value in (about | {"net": net}).items()}
                    if there := [row for row in known if wanted.items() <= row.items()]:
                        rows.append(there[0])
                        continue
                    row = measured(problem, judged, args, net, about)
                    if row is None:
                        print(f"note: no {net} net has the operations of the looped one", file=sys.stderr)
                        continue
                    rows.append(append_row(args.out, COLUMNS, row))
                    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    except (UsageError, TaskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return stopped()
    print("\n".join(report(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
