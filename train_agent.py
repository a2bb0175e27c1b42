"""Train a Looped Dreamer on one task. Examples:

    python train_agent.py dmc:cartpole_swingup
    python train_agent.py gym:CartPole-v1 --steps 50k --seed 1
    python train_agent.py toy:cue5 --preset debug
    python train_agent.py --resume runs/dmc-cartpole_swingup/small-s0-20261123-1456
    python train_agent.py dmc:cartpole_swingup --agent sac
    python train_agent.py dmc:walker_walk --dataset DIR --model-only --model.core gru --model.match params
    python train_agent.py dmc:walker_walk --sweep behavior.horizon=5,15 --sweep seed=0,1,2 --jobs 2 --run-dir DIR
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agent.data.checkpoint import check_spaces, images_folder
from agent.data.dataset import check_dataset, load_dataset
from agent.data.replay import ReplayBuffer
from agent.errors import NonFiniteError, UsageError
from agent.evaluation.episodes import Evaluator
from agent.execution import make_execution
from agent.learning.dreamer import Dreamer
from agent.runs.cli import parse_cli
from agent.runs.config import Config
from agent.runs.folder import check_task
from agent.runs.header import print_header, resume_command
from agent.runs.notes import check_steps, headline, notes
from agent.runs.presets import check_baseline
from agent.runs.run import new_folder, open_run, show_results, train_to_end
from agent.runs.sweep import run_sweep
from agent.runs.sweep_grid import parse_sweep
from agent.runtime import keep_memory, resolve_device, seed_everything, set_threads
from agent.spaces import Spaces, spaces_of
from agent.training.offline import OfflineTrainer, check_lengths
from agent.training.resume import check_fits
from agent.training.trainer import Trainer
from envs import EPISODE_LIMIT, TaskError, TaskId, endless, make_env, make_vector_env, prepare_rendering
from world_model import cost


def train(argv: list[str]) -> int:
    """Read the command line and train what it asks for. Returns the exit status."""
    if grid := parse_sweep(argv):
        return run_sweep(grid, checked)
    config, saved = parse_cli(argv, TaskId.shows_images)
    task, device = TaskId.parse(config.task), resolve_device(config.device)
    if config.model_only:
        return train_model(config, task, device)
    if config.agent != "dreamer":
        return train_baseline(config, task, device)
    return train_dreamer(config, saved, task, device)


def train_dreamer(config: Config, saved: dict[str, Any] | None, task: TaskId, device: torch.device) -> int:
    """The main program: environments, agent, replay, evaluation and trainer joined. saved: of a run that goes on."""
    if saved and saved["task"] != str(task):
        raise UsageError(f"{config.resume} is a run of {saved['task']}, not of {task}: leave the task out")
    check_steps(config, task)
    cannot_draw = prepare_rendering(task.draws or (config.video and task.suite == "dmc"))
    set_threads(config.train.threads or int(config.optimizer.workers > 1))
    keep_memory()
    seed_everything(config.seed)

    with closing(
        make_vector_env(task, config.train.envs, config.seed, config.train.lives_end, task.is_slow)
    ) as envs:
        spaces = spaces_of(envs)
        if saved:
            check_spaces(saved, spaces)
        agent = make_agent(config, spaces, device)
        replay = make_replay(config, envs.num_envs, spaces)
        make_envs = partial(make_vector_env, task, seed=config.eval.first_seed, asynchronous=task.is_parallel)
        evaluate = Evaluator(config.eval, agent, make_envs, task.action_repeat, task.evaluation_episodes)
        if saved:
            folder = Path(config.run_dir or "")
            check_task(saved, folder)
            check_fits(saved, folder, agent, replay)
        else:
            folder = new_folder(config, task.slug, config.preset)
            replay.open_image_store(images_folder(folder))

        start, counts = saved["step"] if saved else 0, agent.parameter_counts()
        with (
            closing(make_execution(agent)) as execution,
            open_run(config, str(task), spaces, device, counts, folder, config.train.steps, start) as run,
        ):
            repeat = task.action_repeat
            trainer = Trainer(
                config.train, agent, execution, envs, replay, run.logger, evaluate, run.store, config.seed, repeat
            )
            if saved:
                trainer.load_state_dict(saved)
            limit = EPISODE_LIMIT if endless(task) else None
            lines = [f"resume       {resume_command(folder)}", *notes(config, spaces, device, limit, cannot_draw)]
            print_header(headline(config, task), spaces, counts, f"{device}, {config.preset}", folder, *lines)
            status = train_to_end(run, trainer, config)
    if status == 0:
        film = partial(make_env, task, render=True)
        show_results(run, trainer, config, str(task), task.unit, agent, film, cannot_draw)
    return status


def train_baseline(config: Config, task: TaskId, device: torch.device) -> int:
    """Train a baseline of stable-baselines3, which leaves the files of any run."""
    from agent.interop.baseline_trainer import BaselineTrainer  # a second to import
    from agent.interop.baselines import Baseline, DreamVecEnv, VecEnv, make_sb3_env

    if config.resume:
        raise UsageError(f"a run of {config.agent} cannot go on: start it anew in another --run-dir")
    check_baseline(config)
    check_steps(config, task)
    cannot_draw = prepare_rendering(config.video and task.suite == "dmc")
    set_threads(config.train.threads)
    seed_everything(config.seed)
    with closing(make_vector_env(task, 1, config.seed)) as one:
        spaces, repeat = spaces_of(one), task.action_repeat
    if config.dream:
        worlds: VecEnv = DreamVecEnv(config.dream, str(task), seed=config.seed)
    else:
        worlds = make_sb3_env(partial(make_env, task, config.seed))
    with closing(worlds):
        agent = Baseline(config.agent, spaces, worlds, config.train, config.seed, device, repeat)
        evaluate = Evaluator(config.eval, agent, partial(make_vector_env, task, seed=config.eval.first_seed), repeat)
        folder, counts = new_folder(config, task.slug, config.agent), agent.parameter_counts()
        with open_run(config, str(task), spaces, device, counts, folder, config.train.steps) as run:
            trainer = BaselineTrainer(config.train, agent, run.logger, evaluate, run.store, repeat)
            machine = f"{device}, {config.agent} of stable-baselines3"
            machine += f", learning in the dream of {config.dream} alone" if config.dream else ""
            lines = notes(config, spaces, device, EPISODE_LIMIT if endless(task) else None, cannot_draw)
            print_header(headline(config, task), spaces, counts, machine, folder, *lines)
            status = train_to_end(run, trainer, config, resumes=False)
    if status == 0:
        film = partial(make_env, task, render=True)
        show_results(run, trainer, config, str(task), task.unit, agent, film, cannot_draw)
    return status


def train_model(config: Config, task: TaskId, device: torch.device) -> int:
    """Train the world model alone on a fixed data set, and print its errors on held-out episodes."""
    dataset = load_dataset(config.dataset or "")
    check_dataset(dataset, str(task))
    check_lengths(dataset, config.train.length)
    config = replace(config, optimizer=replace(config.optimizer, workers=1))
    set_threads(config.train.threads)
    keep_memory()
    seed_everything(config.seed)
    agent = make_agent(config, dataset.spaces, device)
    if not agent.world.observation_model.decodes:
        raise UsageError("without a decoder no error can be measured: leave --model.image.objective redundancy out")
    folder = new_folder(config, task.slug, f"model-{config.model.core.rpartition(':')[2]}")
    counts, updates = agent.parameter_counts(), config.offline.updates
    params, flops = cost(agent.world.core, config.model.loop.usual_loops)
    with open_run(config, str(task), dataset.spaces, device, counts, folder, updates) as run:
        batch, execution = (config.train.batch, config.train.length), make_execution(agent)
        trainer = OfflineTrainer(
            config.offline, agent, execution, dataset, run.logger, run.store, batch, config.seed
        )
        run.trainer = trainer
        run.meta.update(core={"params": params, "flops": flops})
        print(f"task         {task}, {updates:,} updates of the world model on {config.dataset}")
        print(f"core         {config.model.core}, {params:,} parameters, {flops:,.0f} operations per step")
        print(f"run folder   {folder}")
        try:
            trainer.run()
        except NonFiniteError as error:
            print(f"error: {error} is not finite at update {trainer.step:,}", file=sys.stderr)
            return 1
    run.meta.update(results=trainer.results)
    print("open loop    " + "  ".join(f"{name} {value:.4g}" for name, value in trainer.results.items()))
    return 0


# ---------------------------------------------------------------------- parts


def checked(argv: Sequence[str]) -> Config:
    """The settings of a command line whose task exists and whose steps suffice: of one run of a sweep."""
    config, _ = parse_cli(argv, TaskId.shows_images)
    task = TaskId.parse(config.task)
    if not config.model_only:
        check_steps(config, task)
    return config


def make_agent(config: Config, spaces: Spaces, device: torch.device) -> Dreamer:
    """The agent with its first weights. Raises UsageError when its sizes do not fit together."""
    try:
        return Dreamer(config.model, config.behavior, config.optimizer, spaces, device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_replay(config: Config, envs: int, spaces: Spaces) -> ReplayBuffer:
    """An empty replay for the rows of `envs` environments and the latents of the world model."""
    model = config.model
    deter, stoch = (model.loop.tokens, model.loop.width), (model.groups, model.classes)
    rows, actions = config.train.replay_rows, spaces.action.size
    return ReplayBuffer(rows, envs, spaces.obs, actions, deter, stoch, config.seed)


def main(argv: list[str]) -> int:
    """`train`, with one line in place of a traceback where the command cannot work."""
    try:
        return train(argv)
    except (TaskError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:  # of a baseline's evaluation
        print(f"error: {error} is not finite", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
