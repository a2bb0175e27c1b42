"""Train a Looped Dreamer on one task. Examples:

    python train_agent.py dmc:cartpole_swingup
    python train_agent.py gym:CartPole-v1 --steps 50k --seed 1
    python train_agent.py toy:cue5 --preset debug
    python train_agent.py --resume runs/dmc-cartpole_swingup/small-s0-20261123-1456
    python train_agent.py dmc:cartpole_swingup --agent sac
    python train_agent.py dmc:walker_walk --dataset DIR --model-only --model.core gru --model.match params
    python train_agent.py dmc:walker_walk --sweep behavior.horizon=5,15 --sweep seed=0,1,2 --jobs 2 --run-dir DIR
    python train_agent.py --sweep task=@dmc18 --sweep seed=0,1 --jobs 2 --run-dir DIR
"""

import atexit
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch

from agent.data.checkpoint import check_spaces
from agent.environment_failures import first_reset
from agent.errors import NonFiniteError, RankLost, UsageError
from agent.evaluation.episodes import Evaluator
from agent.execution import Ranks, make_execution
from agent.execution.ranks import join_ranks, started_as_rank
from agent.logs.streams import lasting_streams
from agent.runs.baseline_run import train_baseline
from agent.runs.capacity import check_capacity, out_of_memory
from agent.runs.cli import parse_cli
from agent.runs.config import Config
from agent.runs.folder import claimed
from agent.runs.header import print_header, resume_command
from agent.runs.model_run import train_model
from agent.runs.notes import check_steps, headline, notes
from agent.runs.rank_run import (
    config_of_rank,
    device_of,
    folder_of,
    refuse_ranks,
    run_of,
    shared_config,
    train_ranks_to_end,
)
from agent.runs.run import make_agent, make_replay, open_run, show_results
from agent.runs.sweep import run_sweep
from agent.runs.sweep_grid import parse_sweep
from agent.runtime import keep_memory, resolve_device, seed_everything, set_threads
from agent.spaces import spaces_of
from agent.training.evaluations import Evaluations
from agent.training.rank_trainer import RankTrainer
from agent.training.recorded import add_recorded, load_recorded, recorded_line
from agent.training.resume import forget_replay, open_replay
from agent.training.trainer import Trainer
from envs import EPISODE_LIMIT, TaskError, TaskId, endless, how_shown, make_env, make_vector_env, prepare_rendering


def train(argv: list[str]) -> int:
    """Read the command line and train what it asks for. Returns the exit status."""
    if grid := parse_sweep(argv):
        refuse_ranks("a sweep")
        return run_sweep(grid, checked)
    config, saved = parse_cli(argv, TaskId.shows_images)
    task, device = TaskId.parse(config.task), resolve_device(config.device)
    if config.dataset or config.agent != "dreamer":
        refuse_ranks("--dataset" if config.dataset else f"--agent {config.agent}")
    if config.model_only:
        return train_model(config, str(task), task.slug, device)
    check_steps(config, task)
    cannot_draw = prepare_rendering(task.draws or (config.video and task.suite == "dmc"))
    limit = EPISODE_LIMIT if endless(task) else None
    if config.agent != "dreamer":
        return train_baseline(config, task, device, make_env, make_vector_env, limit, cannot_draw, how_shown)
    device = device_of(device)
    with closing(join_ranks(device)) as ranks:
        return train_dreamer(config, saved, task, device, limit, cannot_draw, ranks)


def train_dreamer(
    config: Config, saved: dict[str, Any] | None, task: TaskId, device: torch.device,
    limit: int | None, cannot_draw: str | None, ranks: Ranks,
) -> int:  # fmt: skip
    """The main program: environments, agent, replay, evaluation and trainer joined.

    saved: the checkpoint of a run that goes on; limit: length at which episodes are cut off where the task names none;
    cannot_draw: why there will be no video; ranks: the processes of this run, which all do this.
    """
    if saved and saved["task"] != str(task):
        raise UsageError(f"{config.resume} is a run of {saved['task']}, not of {task}: leave the task out")
    config = shared_config(config, ranks)
    own = config_of_rank(config, ranks)
    set_threads(config.train.threads or int(max(config.optimizer.workers, ranks.size) > 1))
    keep_memory()
    seed_everything(config.seed)

    with closing(make_vector_env(task, config.train.envs, own.seed, config.train.lives_end, task.is_slow)) as envs:
        spaces = spaces_of(envs)
        first_reset(envs, own.seed)
        if saved:
            check_spaces(saved, spaces)
        check_capacity(config, spaces, task.action_repeat, saved)
        recorded = load_recorded(config.dataset, str(task), spaces) if config.dataset and not saved else None
        agent = make_agent(config, spaces, device)
        if ranks.rank:
            seed_everything(own.seed)  # the same first weights everywhere, and nothing else
        replay = make_replay(own, envs.num_envs, spaces, task.action_repeat, ranks.size)
        make_envs = partial(make_vector_env, task, seed=config.eval.first_seed, asynchronous=task.is_parallel)
        evaluate = Evaluator(config.eval, agent, make_envs, task.action_repeat, task.evaluation_episodes)
        start, counts = saved["step"] if saved else 0, agent.parameter_counts()
        claim_folder = partial(claimed, config.run_dir, task.slug, f"{config.preset}-s{config.seed}", saved)
        with folder_of(ranks, claim_folder) as folder:
            own_saved = open_replay(replay, folder, saved, agent, ranks)  # of this rank
            added = [recorded_line(recorded, add_recorded(replay, recorded, agent))] if recorded else []
            opening = partial(open_run, config, str(task), spaces, device, counts, folder, config.train.steps, start)
            with closing(make_execution(agent, ranks)) as execution, run_of(ranks, folder, opening) as run:
                evaluations = Evaluations(agent, evaluate, run.logger, run.store, run.report)
                make_trainer = Trainer if ranks.size == 1 else partial(RankTrainer, ranks)
                trainer = make_trainer(
                    own.train, agent, execution, envs, replay, run.logger, evaluations, run.store, own.seed,
                    task.action_repeat,
                )  # fmt: skip
                if own_saved:
                    trainer.load_state_dict(own_saved)
                    forget_replay(saved, own_saved)
                lines = [f"resume       {resume_command(folder)}", *how_shown(envs), *added]
                lines += notes(config, spaces, device, limit, cannot_draw, ranks.size)
                print_header(headline(config, task), spaces, counts, f"{device}, {config.preset}", folder, *lines)
                status = train_ranks_to_end(ranks, run, trainer, config)
            if status == 0 and ranks.rank == 0:
                make_rendered_env = partial(make_env, task, render=True)
                show_results(run, trainer, config, str(task), task.unit, agent, make_rendered_env, cannot_draw)
    return status


def checked(argv: Sequence[str]) -> Config:
    """The settings of a command line whose task exists and whose steps suffice: of one run of a sweep."""
    config, _ = parse_cli(argv, TaskId.shows_images)
    task = TaskId.parse(config.task)
    if not config.model_only:
        check_steps(config, task)
    return config


@lasting_streams()
def main(argv: list[str]) -> int:
    """`train`, with one line in place of a traceback where the command cannot work."""
    try:
        return train(argv)
    except (TaskError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankLost as error:  # before or after training
        print(f"rank {started_as_rank()[0]}: {error}", file=sys.stderr)
        return 1
    except NonFiniteError as error:  # of a baseline's evaluation
        print(f"error: {error} is not finite", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error}; look at that place, then give the command again", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        line = out_of_memory(error, "a lower --train.replay-rows, --train.batch or --train.envs needs less")
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # All is saved by then: Ctrl-C would interrupt Python's own exit.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
