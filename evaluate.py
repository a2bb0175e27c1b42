"""Look at a trained agent. Examples:

    python evaluate.py policy runs/dmc-cartpole_swingup/small-s0-20261123-1456
    python evaluate.py policy RUN --episodes 20 --max-loops 1 --video
    python evaluate.py policy RUN --json -
    python evaluate.py model RUN --horizon 50 --max-loops 1 2 4
    python evaluate.py compare runs/horizons --by behavior.horizon
    python evaluate.py dataset RUN datasets/walker
    python evaluate.py collect dmc:cheetah_run datasets/cheetah --episodes 100
    python evaluate.py export RUN policy.pt2
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from agent.data.checkpoint import check_spaces, find_checkpoint, read_checkpoint
from agent.data.dataset import collected, export_dataset, write_dataset
from agent.errors import NonFiniteError, UsageError
from agent.evaluation.atari_scores import human_normalised
from agent.evaluation.episodes import Actor, Evaluator, loop_shares, save_video, summarise
from agent.evaluation.recording import record
from agent.evaluation.rollout_error import content_of, describe, rollout_errors, save_results
from agent.evaluation.rollout_plots import draw_all, save_all
from agent.evaluation.statistics import format_summary
from agent.interop.export import export_policy
from agent.learning.dreamer import Dreamer
from agent.runs.cli import COUNTS
from agent.runs.commands import Collect, Compare, Dataset, Export, Model, Policy
from agent.runs.compare import Comparison, as_text
from agent.runs.config import Config
from agent.runs.history import find_runs, load_run
from agent.runs.report import write_report
from agent.settings import from_dict
from agent.spaces import Spaces, spaces_of
from envs import TaskError, TaskId, make_env, make_vector_env, position_entries, prepare_rendering

Write = Callable[[dict[str, Any]], None]
"""Writes the numbers where --json says."""


def policy(args: Policy, write: Write) -> None:
    """Evaluate one checkpoint."""
    path = find_checkpoint(args.run, args.checkpoint)
    saved = read_checkpoint(path)
    task, config = TaskId.parse(saved["task"]), from_dict(Config, saved["config"])
    if config.model_only:
        raise UsageError(f"{args.run} trained the world model alone: it has no policy to play")
    if config.agent != "dreamer" and args.exit:
        raise UsageError(f"{args.run} is a run of {config.agent}, which has no loops: leave --exit out")
    agent = agent_of(saved, args.device) if args.sb3 is None else guest(args.sb3, Spaces.of(saved["spaces"]))
    cfg = args.changes(config.eval)
    if args.exit and isinstance(agent, Dreamer):
        cfg = replace(cfg, max_loops=args.cap(config))
        try:
            agent.use_exit(args.exit, args.cap(config), args.exit_threshold, args.exit_histogram)
        except ValueError as error:
            raise UsageError(f"--exit {args.exit}: {error}") from error
    torch.set_num_threads(config.train.threads or 1)  # ten rows at a time: more threads are no help
    cannot_draw = prepare_rendering(task.draws or (args.video and task.suite == "dmc"))

    envs = make_vector_env(task, 1, args.seed)
    envs.close()
    check_spaces(saved, spaces_of(envs))
    make_envs = partial(make_vector_env, task, seed=cfg.first_seed, apart=task.is_parallel)
    episodes = Evaluator(cfg, agent, make_envs, task.action_repeat, task.judged_by)(final=True)
    result, shares = summarise(episodes), loop_shares(episodes)
    print(f"{task}, {args.sb3}" if args.sb3 else f"{task}, {path}, step {saved['step']:,}")
    print(format_summary(result))
    if len(shares) > 1:
        print("shares of 1, 2, .. loops " + " ".join(f"{share:.4f}" for share in shares))
    human = human_normalised(str(task), result["mean"])
    if human is not None:
        print(f"human-normalised {human:.3f}")
    write({
        "task": str(task), "checkpoint": args.sb3 or str(path), "step": None if args.sb3 else saved["step"],
        "max_loops": cfg.max_loops, "exit": None if args.sb3 else args.exit or config.model.loop.exit,
        "summary": result, "loop_shares": shares, "human_normalised": human, "episodes": episodes,
    })  # fmt: skip
    if args.video:
        name = Path(args.sb3 or path).stem
        target = run_folder(path) / "videos" / f"policy_{name}_{args.seed}.mp4"
        drawn = partial(make_env, task, render=True)
        print(cannot_draw or save_video(target, agent, drawn, cfg))


def agent_of(saved: dict[str, Any], device: str) -> Actor:
    """The agent of a checkpoint, ours or a baseline."""
    if saved["config"].get("agent", "dreamer") == "dreamer":
        return Dreamer.from_checkpoint(saved, device)
    from agent.interop.baselines import Baseline  # a second to import

    return Baseline.from_checkpoint(saved, device)


def guest(file: str, spaces: Spaces) -> Actor:
    """An agent that stable-baselines3 has saved."""
    from agent.interop.baselines import Baseline

    return Baseline.from_library(file, spaces)


def dreamer_of(saved: dict[str, Any], run: str) -> Dreamer:
    """The Dreamer of a checkpoint, on the CPU. Raises UsageError for a baseline, which has no world model."""
    kind = saved["config"].get("agent", "dreamer")
    if kind != "dreamer":
        raise UsageError(f"{run} is a run of {kind}, which has no world model")
    return Dreamer.from_checkpoint(saved, "cpu")


@contextmanager
def json_to(target: str | None) -> Iterator[Write]:
    """Where the numbers go: a function that writes them to `target`, which is checked before anything is played.

    Where they go to standard output, whatever else is printed, by environments too, goes to standard error.
    """
    out = sys.stdout
    if target not in (None, "-"):
        folder = Path(str(target)).absolute().parent
        if not folder.is_dir() or Path(str(target)).is_dir():
            raise UsageError(f"--json {target} cannot be written: {folder} must be a folder, and the name a file's")

    def write(content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        if target == "-":
            out.write(text)
        elif target is not None:
            try:
                Path(target).write_text(text, encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--json {target} cannot be written: {error.strerror}") from error

    with redirect_stdout(sys.stderr) if target == "-" else nullcontext():
        yield write


def model(args: Model, write: Write) -> None:
    """Record episodes, predict, and write tables and pictures."""
    path = find_checkpoint(args.run, args.checkpoint)
    saved = read_checkpoint(path)
    task, config = TaskId.parse(saved["task"]), from_dict(Config, saved["config"])
    agent = dreamer_of(saved, args.run)
    world = agent.averaged.world
    if not world.observation_model.decodes:
        raise UsageError(f"{args.run} was trained without a decoder: its dreams show nothing to compare")
    if args.max_loops and not world.core.looping:
        raise UsageError(f"the core of {args.run} is {config.model.core}, it has no loops: leave --max-loops out")
    torch.set_num_threads(config.train.threads or 1)
    make_envs = partial(make_vector_env, task, seed=args.seed, apart=task.is_parallel)
    check_spaces(saved, spaces_of(make_envs(1)))
    players = (None,) if config.model_only else (agent, None)
    recordings = [record(player, agent.spaces, make_envs, args.episodes, args.seed) for player in players]
    loops = args.max_loops or (tuple(range(1, world.run_cap + 1)) if world.core.looping else ())
    behavior = agent.averaged.behavior
    found = rollout_errors(world, behavior, recordings, args.horizon, loops, args.windows, args.seed)
    print(f"{task}, {path}, step {saved['step']:,}\n{describe(found)}")
    folder = Path(args.out) if args.out else run_folder(path) / "model"
    save_results(found, folder, {"task": str(task), "checkpoint": str(path), "step": saved["step"]})
    save_all(draw_all(world, recordings, found, args.horizon, folder), folder)
    print(f"results {folder}")
    write(content_of(found))


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint file belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def compare(args: Compare, write: Write) -> None:
    """Read the runs, print the table, write the report."""
    comparison = Comparison([load_run(path) for path in find_runs(args.runs)], args.by)
    for line in comparison.warnings:
        print(f"note: {line}")
    print(as_text(comparison.table()))
    print(f"report {write_report(comparison, Path(args.out))}")
    write(comparison.content())


def dataset(args: Dataset, write: Write) -> None:
    """Export the replay of one run."""
    path = find_checkpoint(args.run)
    saved = read_checkpoint(path)
    kept = (position_entries(saved["task"]), "@nov") if args.nov else ()
    facts = export_dataset(saved, args.folder, path, *kept)
    print(
        f"{facts['task']}: {facts['episodes']} whole episodes, {facts['rows']:,} rows, mean return "
        f"{facts['mean_return']:.4g}, best {facts['best_return']:.4g}, in {args.folder}"
    )


def collect(args: Collect, write: Write) -> None:
    """Record ten episodes at a time."""
    task = TaskId.parse(args.task)
    make_envs = partial(make_vector_env, task, seed=args.seed, apart=task.is_parallel)
    spaces, player = spaces_of(make_envs(1)), None
    if args.run:
        saved = read_checkpoint(find_checkpoint(args.run))
        check_spaces(saved, spaces)
        player = agent_of(saved, "cpu")
    parts = []
    for done in range(0, args.episodes, 10):
        actor = player if done // 10 % 2 == 0 else None
        count = min(10, args.episodes - done)
        parts.append(record(actor, spaces, make_envs, count, args.seed + done, explore=True))
    pieces = [collected(part.episodes, part.terminal) for part in parts]
    rows = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    source = f"random actions, and {args.run}" if args.run else "random actions"
    facts = write_dataset(rows, args.folder, {"task": str(task), "spaces": spaces.plain(), "source": source})
    print(f"{facts['task']}: {facts['episodes']} episodes, {facts['rows']:,} rows, mean return "
          f"{facts['mean_return']:.4g}, best {facts['best_return']:.4g}, in {args.folder}")  # fmt: skip


def export(args: Export, write: Write) -> None:
    """Export one checkpoint; the program is checked against the agent."""
    saved = read_checkpoint(find_checkpoint(args.run, args.checkpoint))
    agent, loop = dreamer_of(saved, args.run), from_dict(Config, saved["config"]).model.loop
    loops = args.max_loops or max(1, round(loop.mean_loops))
    export_policy(agent, Path(args.file), loops)
    sizes = ", ".join(f"{name} ({size})" for name, size in agent.spaces.obs.items())
    print(f"{args.file}: observation {sizes} -> action ({agent.spaces.action.size}), {loops} loops per step")


COMMANDS: dict[str, tuple[type, Callable[[Any, Write], None]]] = {
    "policy": (Policy, policy),
    "model": (Model, model),
    "compare": (Compare, compare),
    "dataset": (Dataset, dataset),
    "collect": (Collect, collect),
    "export": (Export, export),
}


def main(argv: list[str]) -> int:
    """Run the sub-command, with one line in place of a traceback where it cannot work."""
    with COUNTS:
        kinds: dict[str, Callable[..., Any]] = {name: kind for name, (kind, _) in COMMANDS.items()}
        args = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, prog="evaluate.py")
    try:
        with json_to(getattr(args, "json", None)) as write:
            next(action for kind, action in COMMANDS.values() if isinstance(args, kind))(args, write)
    except (TaskError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"error: {error} is not finite", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
