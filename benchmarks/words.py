"""State tracking by loops: does a world model of short words of S5 know where long ones lead, and what do exits add?

    python evaluate.py collect toy:words1-16x4 datasets/words --episodes 12000
    python train_agent.py toy:words1-16x4 --model-only --dataset datasets/words --train.length 12 --run-dir RUN
    python benchmarks/words.py RUN [RUN ..] --lengths 4 8 16 32 64 --csv words.csv
    python benchmarks/words.py RUN --exit residual --exit-threshold 0.1

Every RUN reads words of each length, several generators a step, under random actions, and predicts from the query on
the observation that it has not seen: where the five elements are. Printed for every length: the share of words whose
five places are all right (1/120 by chance), the share of single places (1/5), and the loops of a step, with

    own      the run's exit rule, or that of --exit
    random   depths drawn at random with the histogram of the own ones, mean of four draws
    fixed    always the same depth, the mean of the own ones, rounded
    full     always the cap, the most loops of training
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.checkpoint import check_spaces, find_checkpoint, read_checkpoint
from agent.errors import UsageError
from agent.evaluation.open_loop import exit_rule, use_exit
from agent.interop.load import load_dreamer
from agent.runtime import set_threads
from agent.spaces import spaces_of
from envs import TaskError, TaskId, make_vector_env
from envs.words import ELEMENTS
from world_model import ExitRule, LoopedCore, RandomExit, WorldModel

DRAWS = 4
SEED = 2_000_000_000


class Played(NamedTuple):
    """W words of the same length, L' + 2 rows each: observations, actions before them, and the places at the end."""

    obs: Tensor  # (L'+1, W, O), the last is the query
    action: Tensor  # (L'+1, W, A), the last answers the query
    places: Tensor  # (W, 5)


def play(task: str, words: int, seed: int) -> Played:
    """Random actions in `words` environments whose words all have the same length."""
    envs = make_vector_env(task, words, seed)
    envs.action_space.seed(seed)
    obs, _ = envs.reset(seed=seed)
    rows, actions, over = [], [], False
    while not over:
        rows.append(torch.as_tensor(obs["state"]))
        choice = envs.action_space.sample()
        actions.append(torch.nn.functional.one_hot(torch.as_tensor(choice), ELEMENTS).float())
        obs, _, terminated, truncated, _ = envs.step(choice)
        over = bool((terminated | truncated).all())
    envs.close()
    return Played(torch.stack(rows), torch.stack(actions), places_of(torch.as_tensor(obs["state"])))


def places_of(obs: Tensor) -> Tensor:
    """(W, O) observations -> (W, 5) the place of each element."""
    return obs[:, -(ELEMENTS**2) :].unflatten(-1, (ELEMENTS, ELEMENTS)).argmax(-1)


@torch.no_grad()
def predict(world: WorldModel, played: Played, max_loops: int | None = None) -> tuple[Tensor, Tensor]:
    """-> (W, 5) which places are right, (L'+1, W) loops; the first row of an episode has none before it to predict."""
    words, size = len(played.places), played.action.shape[-1]
    state, before, depths = world.initial(words), torch.zeros(words, size), []
    for t, (obs, action) in enumerate(zip(played.obs, played.action, strict=True)):
        first = torch.full((words,), t == 0)
        state, stats = world.observe({"state": obs}, before, first, state, sample=False, max_loops=max_loops)
        before = action
        depths.append(stats.depth)
    state, stats = world.dream_step(state, before, world.core.prepare(), max_loops, sample=False)
    depths.append(stats.depth)
    return places_of(world.decode(state)["state"]) == played.places, torch.stack(depths[1:])


def judge(world: WorldModel, played: Played) -> dict[str, Any]:
    """One row: shares and loops of the own rule, and shares with the other depths."""
    right, depth = predict(world, played)
    row = {"whole": share(right.all(-1)), "place": share(right), "loops": float(depth.float().mean())}
    if not isinstance(world.core, LoopedCore) or world.run_cap < 2:
        return row
    counts = torch.bincount(depth.flatten(), minlength=world.run_cap + 1)[1:]
    flat, drawn = world.cfg.loop.tokens * world.cfg.loop.width, []
    for draw in range(DRAWS):
        rule = RandomExit(flat, world.run_cap, histogram=tuple(counts.tolist()))
        rule.generator = torch.Generator().manual_seed(draw)
        with exit_rule(world, rule):
            drawn.append(share(predict(world, played)[0].all(-1)))
    with exit_rule(world, ExitRule()):
        fixed, full = (
            share(predict(world, played, loops)[0].all(-1)) for loops in (max(1, round(row["loops"])), world.run_cap)
        )
    return row | {"random": float(np.mean(drawn)), "fixed": fixed, "full": full}


def share(right: Tensor) -> float:
    return float(right.float().mean())


def task_of(run: str, saved: dict[str, Any], length: int) -> str:
    """The task of the run with words of one length."""
    task = TaskId.parse(saved["task"])
    if task.suite != "toy" or not task.base.startswith("words"):
        raise UsageError(f"{run} is a run of {task}; give runs of toy:words")
    return f"toy:words{length}x{task.base.partition('x')[2] or 1}"


def main(words: Sequence[str]) -> int:
    """Print a row for every run and length. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or checkpoints of toy:words")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 16, 32, 64], metavar="L")
    parser.add_argument("--words", type=int, default=500, help="of each length")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--exit", choices=("residual", "acceleration", "kl"), help="another rule than the run's own")
    parser.add_argument("--exit-threshold", type=float, help="of that rule")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    args = parser.parse_args(words)
    set_threads(1)
    rows = []
    try:
        for run in args.runs:
            saved = read_checkpoint(find_checkpoint(run))
            agent = load_dreamer(saved, run)
            world = agent.averaged.world
            if args.exit:
                try:
                    use_exit(agent, args.exit, world.run_cap, args.exit_threshold, ())
                except ValueError as error:
                    raise UsageError(str(error)) from error
            if not world.observation_model.decodes:
                raise UsageError(f"{run} predicts no observations: give runs with --model.objective reconstruct")
            for length in args.lengths:
                task = task_of(run, saved, length)
                envs = make_vector_env(task, 1, args.seed)
                check_spaces(saved, spaces_of(envs))
                envs.close()
                row = {"run": Path(run).name, "length": length, **judge(world, play(task, args.words, args.seed))}
                cells = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print("  ".join(cells), flush=True)
                rows.append(row)
    except (TaskError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            names = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(file, list(names), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
