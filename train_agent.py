"""Train a Looped Dreamer on one task. Examples:

    python train_agent.py dmc:cartpole_swingup
    python train_agent.py gym:CartPole-v1 --steps 50k --seed 1
    python train_agent.py toy:cue5 --preset debug
    python train_agent.py --resume runs/dmc-cartpole_swingup/small-s0-20261123-1456
    python train_agent.py dmc:walker_walk --dataset DIR --model-only --model.core gru --model.match params
    python train_agent.py dmc:walker_walk --sweep behavior.horizon=5,15 --sweep seed=0,1,2 --jobs 2 --run-dir DIR
"""

import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agent.checkpoint import (
    Meta,
    UsageError,
    check_fits,
    check_spaces,
    make_store,
    new_run_dir,
    parameter_counts,
    seed_everything,
    spaces_of,
)
from agent.config import Config, keep_memory, parse_cli, resolve_device, save_yaml, set_threads
from agent.dataset import check_dataset, load_dataset
from agent.dreamer import Dreamer, Spaces
from agent.evaluation import Evaluator, save_video, summarise
from agent.grid import take_grid
from agent.logger import Logger
from agent.offline import OfflineTrainer, check_lengths
from agent.optimizer import NonFiniteError
from agent.pictures import draw_curves
from agent.replay import ReplayBuffer
from agent.settings import to_dict
from agent.statistics import format_summary
from agent.sweep import run_sweep
from agent.trainer import EnvironmentFailure, Trainer
from envs import EPISODE_LIMIT, TaskError, TaskId, endless, make_env, make_vector_env, prepare_rendering
from world_model import cost


def checked(argv: Sequence[str]) -> Config:
    """The settings of a command line whose task exists."""
    config, _ = parse_cli(argv)
    TaskId.parse(config.task)
    return config


def train(argv: list[str]) -> int:
    """Build the parts, train, and show what came of it. Returns the exit status."""
    if grid := take_grid(argv):
        return run_sweep(grid, checked)
    config, saved = parse_cli(argv)
    task, device = TaskId.parse(config.task), resolve_device(config.device)
    if config.model_only:
        return train_model(config, task, device)
    if saved and saved["task"] != str(task):
        raise UsageError(f"{config.resume} is a run of {saved['task']}, not of {task}: leave the task out")
    check_steps(config, task)
    cannot_draw = prepare_rendering(config.video and task.suite == "dmc")
    set_threads(config.train.threads)
    keep_memory()
    seed_everything(config.seed)

    envs = make_vector_env(task, config.train.envs, config.seed)
    spaces, model = spaces_of(envs), config.model
    if saved:
        check_spaces(saved, spaces)
    agent = make_agent(config, spaces, device)
    latent = (model.loop.tokens, model.loop.width), (model.groups, model.classes)
    replay = ReplayBuffer(
        config.train.replay_rows, envs.num_envs, spaces.obs, spaces.action.size, *latent, config.seed
    )
    make_envs = partial(make_vector_env, task, seed=config.eval.first_seed)
    evaluate = Evaluator(config.eval, agent, make_envs, task.action_repeat)

    name = f"{config.preset}-s{config.seed}"
    if saved:
        run_dir = Path(config.run_dir or "")
        check_fits(saved, run_dir, agent, replay)
    else:
        run_dir = new_run_dir(config.run_dir, task.slug, name)
    try:
        logger = Logger(run_dir, config.train.steps, saved["step"] if saved else 0)
    except ValueError as error:
        raise UsageError(str(error)) from error
    store = make_store(run_dir, str(task), to_dict(config), spaces)
    repeat = task.action_repeat
    trainer = Trainer(config.train, agent, envs, replay, logger, evaluate, store, config.seed, repeat)
    if saved:
        trainer.load_state_dict(saved)
    save_yaml(config, run_dir / "config.yaml")
    meta = Meta(run_dir, str(task), device, parameter_counts(agent))
    announce(config, task, agent, run_dir, cannot_draw)

    try:
        finished = trainer.run()
    except NonFiniteError as error:
        where = f"at step {trainer.step:,}; {last_checkpoint(run_dir)}"
        print(f"error: {error} is not finite {where}", file=sys.stderr)
        return 1
    except EnvironmentFailure as error:
        traceback.print_exception(error.__cause__)
        print(f"error: the environment failed at step {trainer.step:,}: {error}; saved, to go on:\n"
              f"  {resume_command(run_dir)}", file=sys.stderr)  # fmt: skip
        return 1
    finally:
        logger.close()
        envs.close()
        meta.update(step=trainer.step, finished=trainer.finished)
    if not finished:
        print(f"stopped and saved at step {trainer.step}; to go on:\n  {resume_command(run_dir)}")
        return 130
    meta.update(results=report(trainer))
    print(f"curve  {draw_curves(run_dir, f'{task}, {name}')}")
    if config.video:
        path, make = run_dir / "videos" / "eval_final.mp4", partial(make_env, task, render=True)
        print(cannot_draw or save_video(path, agent, make, config.eval))
    return 0


def check_steps(config: Config, task: TaskId) -> None:
    """Raise UsageError where all steps of the run would be random ones."""
    prefill = config.train.prefill * task.action_repeat
    if config.train.steps <= prefill:
        raise UsageError(
            f"--steps {config.train.steps} end within the {config.train.prefill} random actions ({prefill} steps of "
            f"{task}), and nothing would be learned: give more steps, a lower --train.prefill, or --preset debug"
        )


def make_agent(config: Config, spaces: Spaces, device: torch.device) -> Dreamer:
    """The agent with its first weights. Raises UsageError when its sizes do not fit together."""
    try:
        return Dreamer(config.model, config.behavior, config.optimizer, spaces, device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def train_model(config: Config, task: TaskId, device: torch.device) -> int:
    """Train the world model alone on a fixed data set, and print its errors on held-out episodes."""
    dataset = load_dataset(config.dataset or "")
    check_dataset(dataset, str(task))
    check_lengths(config.offline, dataset, config.train.length)
    set_threads(config.train.threads)
    keep_memory()
    seed_everything(config.seed)
    agent = make_agent(config, dataset.spaces, device)
    run_dir = new_run_dir(config.run_dir, task.slug, f"model-{config.model.core}-s{config.seed}")
    save_yaml(config, run_dir / "config.yaml")
    logger = Logger(run_dir, config.offline.updates)
    store = make_store(run_dir, str(task), to_dict(config), dataset.spaces)
    batch = config.train.batch, config.train.length
    trainer = OfflineTrainer(config.offline, agent, dataset, logger, store, batch, config.seed)
    meta = Meta(run_dir, str(task), device, parameter_counts(agent))
    params, flops = cost(agent.world.core, config.model.loop.usual_loops)
    print(f"task         {task}, {config.offline.updates:,} updates of the world model on {config.dataset}")
    print(f"core         {config.model.core}, {params:,} parameters, {flops:,.0f} operations per step")
    print(f"run folder   {run_dir}")
    try:
        trainer.run()
    except NonFiniteError as error:
        print(f"error: {error} is not finite at update {trainer.step:,}", file=sys.stderr)
        return 1
    finally:
        logger.close()
        meta.update(step=trainer.step, finished=trainer.finished, core={"params": params, "flops": flops})
    meta.update(results=trainer.results)
    print("open loop    " + "  ".join(f"{name} {value:.4g}" for name, value in trainer.results.items()))
    return 0


def announce(config: Config, task: TaskId, agent: Dreamer, run_dir: Path, cannot_draw: str | None) -> None:
    """Say what is about to run and how to watch it."""
    obs = ", ".join(f"{name} ({size},)" for name, size in agent.spaces.obs.items())
    action = agent.spaces.action
    parts = "  ".join(f"{name} {count:,}" for name, count in parameter_counts(agent).items())
    limit = f", at most {config.train.minutes:g} minutes" if config.train.minutes else ""
    print(f"task         {task}, {config.train.steps:,} simulator steps{limit}, {task.action_repeat} per action")
    print(f"observation  {obs}")
    print(f"action       {f'{action.size} choices' if action.discrete else f'({action.size},) in [-1, 1]'}")
    print(f"parameters   {parts}")
    print(f"device       {agent.device}, preset {config.preset}")
    print(f"run folder   {run_dir}")
    print(f"watch        {python_command()} -m tensorboard.main --logdir {shlex.quote(str(run_dir))}")
    print(f"resume       {resume_command(run_dir)}")
    if endless(task):
        print(f"episodes     end after {EPISODE_LIMIT:,} steps at the latest: the task names no limit")
    if cannot_draw:
        print(f"video        left out: {cannot_draw}")


def report(trainer: Trainer) -> dict[str, Any]:
    """Print what the agent is worth, and return it for meta.json."""
    final, recent = summarise(trainer.episodes), trainer.recent()
    print(f"final evaluation: {format_summary(final)}")
    for label, value in recent.items():
        print(f"mean of the {label.replace('_', ' ')}: {value:.4g}")
    return {"final": final, **recent}


def resume_command(run_dir: Path) -> str:
    return f"{python_command()} train_agent.py --resume {shlex.quote(str(run_dir))}"


def python_command() -> str:
    """How to call this Python from the current folder, as a person would type it."""
    here, executable = Path.cwd(), Path(sys.executable)
    if executable.is_relative_to(here):
        return shlex.quote(str(executable.relative_to(here)))
    on_path = shutil.which("python")
    return "python" if on_path and Path(on_path).absolute() == executable else shlex.quote(str(executable))


def last_checkpoint(run_dir: Path) -> str:
    path = run_dir / "checkpoints" / "latest.pt"
    return f"the last good checkpoint is untouched: {path}" if path.exists() else "nothing was saved yet"


def main(argv: list[str]) -> int:
    """`train`, with one line in place of a traceback where the command cannot work."""
    try:
        return train(argv)
    except (TaskError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
