"""Evaluate, compare and export trained agents. Examples:

    python evaluate.py policy runs/dmc-cartpole_swingup/small-s0-20261123-1456
    python evaluate.py policy RUN --episodes 20 --max-loops 1 --video
    python evaluate.py policy RUN --plan 128 --plan-horizon 5
    python evaluate.py policy RUN --json -
    python evaluate.py model RUN --horizon 50 --max-loops 1 2 4
    python evaluate.py stability RUN
    python evaluate.py loops RUN
    python evaluate.py probe RUN
    python evaluate.py compare runs/horizons --by behavior.horizon
    python evaluate.py compare runs/all --suite dmc18
    python evaluate.py dataset RUN datasets/walker
    python evaluate.py collect dmc:cheetah_run datasets/cheetah --episodes 100
    python evaluate.py export RUN policy.pt2
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from agent.data.checkpoint import check_spaces, read_checkpoint, run_folder
from agent.data.dataset import check_target, dataset_line, export_dataset, rows_of, write_dataset
from agent.data.episode_rows import rows_of_episodes
from agent.environment_failures import environment_traceback
from agent.errors import EnvironmentFailure, NonFiniteError, UsageError
from agent.evaluation.anatomy import anatomy, format_anatomy, untrained_like
from agent.evaluation.anatomy_plots import save_anatomy
from agent.evaluation.atari_scores import human_normalised
from agent.evaluation.episodes import Agent, EvalConfig, Evaluator, Timed, loop_shares, summarise
from agent.evaluation.open_loop import use_exit
from agent.evaluation.probe import format_probe, probe_states, save_probe
from agent.evaluation.recording import Recording, record, record_batches
from agent.evaluation.rollout_error import format_results, rollout_errors, save_results
from agent.evaluation.rollout_plots import draw_all, save_all
from agent.evaluation.stability import format_stability, save_stability, stability_report
from agent.evaluation.statistics import format_summary
from agent.evaluation.video import save_video
from agent.interop.export import export_notes, export_policy
from agent.interop.load import load_agent, load_dreamer, load_player, load_sb3_agent, require_loops, require_policy
from agent.learning.dreamer import Dreamer
from agent.learning.planning import use_plan
from agent.logs.json_output import Write, json_output
from agent.logs.streams import lasting_streams
from agent.runs.capacity import out_of_memory
from agent.runs.cli import COUNTS
from agent.runs.commands import CollectArgs, CompareArgs, DatasetArgs, ExportArgs, PolicyArgs, check_command
from agent.runs.compare import Comparison
from agent.runs.comparison_text import format_suite, format_table
from agent.runs.config import saved_config
from agent.runs.model_commands import LoopsArgs, ModelArgs, ModelRunArgs, ProbeArgs, StabilityArgs
from agent.runs.report import write_report
from agent.runs.run_record import checkpoint_of, find_runs, load_runs
from agent.runs.suite_comparison import SuiteComparison
from agent.runs.suites import find_suite
from agent.seeds import COLLECTION, MODEL_RECORDING
from agent.spaces import Spaces, sizes_of, spaces_of
from envs import MinariData, TaskError, TaskId, make_env, make_vector_env, position_entries, prepare_rendering


def task_spaces(task: TaskId) -> Spaces:
    """The sizes of a task's observations and actions."""
    with closing(make_vector_env(task, 1, seed=0)) as envs:
        return spaces_of(envs)


# ---------------------------------------------------------------------- evaluate.py policy


def policy(args: PolicyArgs, write: Write) -> None:
    """Play evaluation episodes with one checkpoint."""
    path = checkpoint_of(args.run, args.checkpoint)
    saved = read_checkpoint(path)
    task, config = TaskId.parse(saved["task"]), saved_config(saved)
    if config.agent != "dreamer" and args.exit:
        raise UsageError(f"{args.run} is a run of {config.agent}, which has no loops: leave --exit out")
    agent = load_agent(saved, args.device) if args.sb3 is None else load_sb3_agent(args.sb3, saved)
    require_loops(agent, args.max_loops, args.run)
    cfg, max_loops = args.eval_config(config.eval), args.loop_cap(config)
    if args.exit and max_loops and isinstance(agent, Dreamer):
        try:
            use_exit(agent, args.exit, max_loops, args.exit_threshold, args.exit_histogram)
        except ValueError as error:
            raise UsageError(f"--exit {args.exit}: {error}") from error
    if args.plan is not None:
        if not isinstance(agent, Dreamer):
            raise UsageError(f"{args.run} is a run of {config.agent}, which has no world model: leave --plan out")
        try:
            use_plan(agent.averaged.behavior, args.plan, args.plan_horizon or agent.behavior.cfg.plan_horizon)
        except ValueError as error:
            raise UsageError(str(error).replace("--behavior.", "--")) from error
    torch.set_num_threads(config.train.threads or 1)  # batches of ten rows: more threads do not help
    cannot_draw = prepare_rendering(task.draws or (args.video and task.suite == "dmc"))

    check_spaces(saved, task_spaces(task))
    make_envs = partial(make_vector_env, task, seed=cfg.first_seed, asynchronous=task.is_parallel)
    timed = Timed(agent)
    evaluate = Evaluator(cfg, timed, make_envs, task.action_repeat, task.evaluation_episodes, max_loops)
    episodes = evaluate(final=True)
    result, shares = summarise(episodes), loop_shares(episodes)
    print(f"{task}, {args.sb3}" if args.sb3 else f"{task}, {path}, step {saved['step']:,}")
    print(format_summary(result))
    if isinstance(agent, Dreamer) and (planned := agent.averaged.behavior.cfg).plans:
        many = f"{planned.plan_candidates} candidates, {planned.plan_horizon} steps ahead"
        print(f"planned with {many}: {timed.milliseconds:.1f} ms per decision of {min(len(episodes), 10)} environments")
    if len(shares) > 1:
        print("shares of 1, 2, .. loops " + " ".join(f"{share:.4f}" for share in shares))
    human = human_normalised(str(task), result["mean"])
    if human is not None:
        print(f"human-normalised {human:.3f}")
    write({
        "task": str(task), "checkpoint": args.sb3 or str(path), "step": None if args.sb3 else saved["step"],
        "max_loops": max_loops, "exit": None if args.sb3 else args.exit or config.model.loop.exit,
        "decision_ms": timed.milliseconds, "summary": result, "loop_shares": shares, "human_normalised": human,
        "episodes": episodes,
    })  # fmt: skip
    if args.video:
        print(cannot_draw or policy_video(args, path, task, agent, cfg, max_loops))


def policy_video(
    args: PolicyArgs, path: Path, task: TaskId, agent: Agent, cfg: EvalConfig, max_loops: int | None
) -> str:
    """Record the first episode into the run's videos/; returns a line for the terminal."""
    name = Path(args.sb3 or path).stem
    target = run_folder(path) / "videos" / f"policy_{name}_{args.seed}{args.played_otherwise()}.mp4"
    return save_video(target, agent, partial(make_env, task, render=True), cfg, max_loops)


# ---------------------------------------------------------------------- evaluate.py model


def model(args: ModelArgs, write: Write) -> None:
    """Record episodes, predict them open loop, and write tables and figures."""
    path, saved, agent = model_of(args)
    world, behavior = agent.averaged.world, agent.averaged.behavior
    require_loops(agent, args.max_loops, args.run)
    recordings = recordings_of(args, saved, agent, agent, None)
    loops = args.max_loops or (tuple(range(1, world.run_cap + 1)) if world.core.looping else ())
    results = rollout_errors(world, behavior, recordings, args.horizon, loops, args.windows, args.seed)
    print(f"{saved['task']}, {path}, step {saved['step']:,}\n{format_results(results)}")
    folder = Path(args.out) if args.out else run_folder(path) / "model"
    save_results(results, folder, about(path, saved))
    try:
        save_all(draw_all(world, recordings, results, args.horizon, folder), folder)
    except ValueError as error:  # numbers that are not finite cannot be drawn
        print(f"note: not all figures can be drawn: {error}")
    print(f"results {folder}")
    write(results.to_dict())


def model_of(args: ModelRunArgs) -> tuple[Path, dict[str, Any], Dreamer]:
    """The checkpoint that is asked for, where it is, and its agent, which must be able to predict observations."""
    path = checkpoint_of(args.run, args.checkpoint)
    saved = read_checkpoint(path)
    agent = load_dreamer(saved, args.run)
    if not (agent.averaged.world.observation_model.decodes or isinstance(args, ProbeArgs)):
        raise UsageError(f"{args.run} was trained without a decoder, and shows nothing to compare: give another run")
    return path, saved, agent


def about(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """What a table is of."""
    return {"task": saved["task"], "checkpoint": str(path), "step": saved["step"]}


def recordings_of(args: ModelRunArgs, saved: dict[str, Any], agent: Dreamer, *players: Agent | None) -> list[Recording]:
    """Episodes of each player; None plays at random, and so does the agent of a run that has no policy."""
    task, config = TaskId.parse(saved["task"]), saved_config(saved)
    torch.set_num_threads(config.train.threads or 1)
    make_envs = partial(make_vector_env, task, seed=args.seed, asynchronous=task.is_parallel)
    check_spaces(saved, task_spaces(task))
    seeds = MODEL_RECORDING.episodes(args.seed, args.episodes)
    able = dict.fromkeys(None if config.model_only and player is agent else player for player in players)
    return [record(player, agent.spaces, make_envs, seeds) for player in able]


# ---------------------------------------------------------------------- evaluate.py stability, probe, loops


def stability(args: StabilityArgs, write: Write) -> None:
    """Certificate, attack and long dreams."""
    path, saved, agent = model_of(args)
    recording, loop = recordings_of(args, saved, agent, agent)[0], saved_config(saved).model.loop
    report = stability_report(
        agent.averaged.world, agent.averaged.behavior, recording, args.max_loops or max(1, round(loop.mean_loops)),
        points=args.points, attack_steps=args.attack_steps, steps=args.steps, seed=args.seed,
    )  # fmt: skip
    print(f"{saved['task']}, {path}, step {saved['step']:,}, {report.loops} loops\n{format_stability(report)}")
    folder = Path(args.out) if args.out else run_folder(path) / "stability"
    save_stability(report, folder, about(path, saved))
    print(f"results {folder}")
    write(report.plain())


def probe(args: ProbeArgs, write: Write) -> None:
    """Read the true state out of the latents."""
    path, saved, agent = model_of(args)
    recording = recordings_of(args, saved, agent, load_player(args.player, saved, agent))[0]
    found = probe_states(agent.averaged.world, recording, args.horizons, args.seed)
    print(f"{saved['task']}, {path}, step {saved['step']:,}\n{format_probe(found)}")
    folder = Path(args.out) if args.out else run_folder(path) / "probe"
    save_probe(found, folder, about(path, saved))
    write(found.plain())


def loops(args: LoopsArgs, write: Write) -> None:
    """Orbits and read-outs, loop by loop."""
    path, saved, agent = model_of(args)
    recording, world = recordings_of(args, saved, agent, agent)[0], agent.averaged.world
    world = untrained_like(world, args.seed) if args.untrained else world
    behavior = None if args.untrained else agent.averaged.behavior
    report = anatomy(world, behavior, recording, args.samples, args.loops, args.seed)
    print(f"{saved['task']}, {path}, step {0 if args.untrained else saved['step']:,}\n{format_anatomy(report)}")
    folder = Path(args.out) if args.out else run_folder(path) / ("loops_untrained" if args.untrained else "loops")
    save_anatomy(report, folder, {**about(path, saved), "untrained": args.untrained})
    print(f"results {folder}")
    write(report.plain())


# ---------------------------------------------------------------------- evaluate.py compare


def compare(args: CompareArgs, write: Write) -> None:
    """Read the runs, print the table, write the report."""
    suite = None if args.suite is None else find_suite(args.suite)
    runs, left_out = load_runs(find_runs(args.runs))
    comparison = Comparison(runs, args.by) if suite is None else SuiteComparison(suite, runs, args.by)
    for line in [*left_out, *comparison.warnings]:
        print(f"note: {line}")
    if isinstance(comparison, SuiteComparison):
        print(format_suite(comparison.suite_content()))
    print(format_table(comparison.table()))
    print(f"report {write_report(comparison, Path(args.out))}")
    write(comparison.content())


# ---------------------------------------------------------------------- evaluate.py dataset, collect


def dataset(args: DatasetArgs, write: Write) -> None:
    """Write the replay of one run, or a data set of Minari, as a data set."""
    if args.run.startswith("minari:"):
        data = MinariData(args.run.removeprefix("minari:"))
        spaces = sizes_of(data.adapter.observation_space, data.adapter.action_space)
        metadata = {"task": data.task, "spaces": spaces.plain(), "source": args.run}
        written = write_dataset(rows_of_episodes(data.episodes(), spaces), args.folder, metadata)
        print(f"{dataset_line(written)}, in {args.folder}" + (f"\nnote: {data.note}" if data.note else ""))
        return
    path = checkpoint_of(args.run)
    saved = read_checkpoint(path)
    variant = (position_entries(saved["task"]), "@nov") if args.nov else ()
    print(f"{dataset_line(export_dataset(saved, args.folder, path, *variant))}, in {args.folder}")


def collect(args: CollectArgs, write: Write) -> None:
    """Record a data set."""
    check_target(args.folder, args.episodes)
    task = TaskId.parse(args.task)
    make_envs = partial(make_vector_env, task, seed=args.seed, asynchronous=task.is_parallel)
    spaces, agent = task_spaces(task), None
    if args.run:
        saved = read_checkpoint(checkpoint_of(args.run))
        check_spaces(saved, spaces)
        agent = load_agent(saved, "cpu")
    recordings = record_batches(agent, spaces, make_envs, COLLECTION.episodes(args.seed, args.episodes))
    parts = [rows_of(recording.episodes, recording.terminal) for recording in recordings]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    source = f"random actions, and {args.run}" if args.run else "random actions"
    metadata = write_dataset(rows, args.folder, {"task": str(task), "spaces": spaces.plain(), "source": source})
    print(f"{dataset_line(metadata)}, in {args.folder}")


# ---------------------------------------------------------------------- evaluate.py export


def export(args: ExportArgs, write: Write) -> None:
    """Export the policy of one checkpoint."""
    saved = read_checkpoint(checkpoint_of(args.run, args.checkpoint))
    agent, loop = load_dreamer(saved, args.run), saved_config(saved).model.loop
    require_policy(saved)
    require_loops(agent, args.max_loops, args.run)
    loops = args.max_loops or max(1, round(loop.mean_loops))
    export_policy(agent, Path(args.file), loops)
    sizes = ", ".join(f"{name} ({size})" for name, size in agent.spaces.obs.items())
    depth = f", {loops} loops per step" if agent.world.core.looping else ""
    print(f"{args.file}: observation {sizes} -> action ({agent.spaces.action.size}){depth}")
    for note in export_notes(agent):
        print(f"note: {note}")


# ---------------------------------------------------------------------- command line

COMMANDS: dict[str, tuple[type, Callable[[Any, Write], None]]] = {
    "policy": (PolicyArgs, policy),
    "model": (ModelArgs, model),
    "stability": (StabilityArgs, stability),
    "probe": (ProbeArgs, probe),
    "loops": (LoopsArgs, loops),
    "compare": (CompareArgs, compare),
    "dataset": (DatasetArgs, dataset),
    "collect": (CollectArgs, collect),
    "export": (ExportArgs, export),
}


@lasting_streams()
def main(argv: list[str]) -> int:
    """Run one command; errors that the user can correct are one line. Returns the exit status."""
    try:
        check_command(argv, COMMANDS)
        with COUNTS:
            types: dict[str, Callable[..., Any]] = {name: kind for name, (kind, _) in COMMANDS.items()}
            args = tyro.extras.subcommand_cli_from_dict(types, args=argv, prog="evaluate.py")
        with json_output(getattr(args, "json", None)) as write:
            next(command for kind, command in COMMANDS.values() if isinstance(args, kind))(args, write)
    except (TaskError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EnvironmentFailure as error:
        print(f"{environment_traceback(error)}error: the environment failed: {error}", file=sys.stderr)
        return 1
    except NonFiniteError as error:
        print(f"error: {error} is not finite", file=sys.stderr)
        return 1
    except OSError as error:  # a path that may not be read, or cannot be
        print(f"error: {error}; look at that place, or give another one", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        line = out_of_memory(error, "close other programs, or give fewer --episodes where the command has them")
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
