"""A run of a baseline of stable-baselines3, from its environments to its results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import gymnasium as gym
import torch

from agent.environment_failures import first_reset
from agent.evaluation.episodes import Evaluator
from agent.runs.config import Config
from agent.runs.folder import claimed
from agent.runs.header import print_header
from agent.runs.notes import Task, headline, notes
from agent.runs.presets import check_baseline
from agent.runs.run import open_run, show_results, train_to_end
from agent.runtime import seed_everything, set_threads
from agent.spaces import spaces_of
from agent.training.evaluations import Evaluations

MakeEnv = Callable[..., gym.Env[Any, Any]]
MakeVectorEnv = Callable[..., gym.vector.VectorEnv[Any, Any, Any]]


def train_baseline(
    config: Config, task: Task, device: torch.device, make_env: MakeEnv, make_vector_env: MakeVectorEnv,
    limit: int | None, cannot_draw: str | None, how_shown: Callable[[Any], list[str]],
) -> int:  # fmt: skip
    """Train a baseline of stable-baselines3, which leaves the files of any run. Returns the exit status.

    make_env(task, seed) and make_vector_env(task, count, seed) make environments of the task; limit: length at which
    episodes are cut off where the task names none; cannot_draw: why there will be no video; how_shown: lines on how
    observations are read. Raises UsageError.
    """
    from agent.interop.baseline_trainer import BaselineTrainer  # a second to import
    from agent.interop.baselines import Baseline, DreamVecEnv, VecEnv, make_sb3_env

    check_baseline(config)
    set_threads(config.train.threads)
    seed_everything(config.seed)
    with closing(make_vector_env(task, 1, config.seed)) as one:
        spaces, repeat, shown = spaces_of(one), task.action_repeat, how_shown(one)
        first_reset(one, config.seed)
    if config.dream:
        worlds: VecEnv = DreamVecEnv(config.dream, str(task), seed=config.seed)
    else:
        worlds = make_sb3_env(partial(make_env, task, config.seed))
    with closing(worlds):
        agent = Baseline(config.agent, spaces, worlds, config.train, config.seed, device, repeat)
        evaluate = Evaluator(config.eval, agent, partial(make_vector_env, task, seed=config.eval.first_seed), repeat)
        counts, steps = agent.parameter_counts(), config.train.steps
        with (
            claimed(config.run_dir, task.slug, f"{config.agent}-s{config.seed}") as folder,
            open_run(config, str(task), spaces, device, counts, folder, steps) as run,
        ):
            evaluations = Evaluations(agent, evaluate, run.logger, run.store, run.report)
            trainer = BaselineTrainer(config.train, agent, run.logger, evaluations, run.store, repeat)
            machine = f"{device}, {config.agent} of stable-baselines3"
            machine += f", learning in the dream of {config.dream} alone" if config.dream else ""
            lines = [*shown, *notes(config, spaces, device, limit, cannot_draw)]
            print_header(headline(config, task), spaces, counts, machine, folder, *lines)
            status = train_to_end(run, trainer, config, resumes=False)
    if status == 0:
        film = partial(make_env, task, render=True)
        show_results(run, trainer, config, str(task), task.unit, agent, film, cannot_draw)
    return status
