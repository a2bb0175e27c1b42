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
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from agent.data.checkpoint import check_spaces, images_folder, make_store
from agent.data.dataset import check_dataset, load_dataset
from agent.data.replay import ReplayBuffer
from agent.errors import EnvironmentFailure, NonFiniteError, UsageError
from agent.evaluation.episodes import Actor, Evaluator, save_video
from agent.evaluation.plots import draw_curves
from agent.learning.dreamer import Dreamer
from agent.logs.logger import Logger
from agent.runs.cli import parse_cli, save_yaml
from agent.runs.config import Config
from agent.runs.folder import Meta, check_task, new_run_dir
from agent.runs.grid import take_grid
from agent.runs.header import Finished, announce, last_checkpoint, report, resume_command
from agent.runs.presets import FIRST_ACTIONS, check_baseline, preset
from agent.runs.sweep import run_sweep
from agent.runtime import keep_memory, resolve_device, seed_everything, set_threads
from agent.settings import differences, to_dict, value_of
from agent.spaces import Spaces, spaces_of
from agent.training.offline import OfflineTrainer, check_lengths
from agent.training.resume import check_fits
from agent.training.schedule import UNFINISHED
from agent.training.trainer import Trainer
from envs import EPISODE_LIMIT, TaskError, TaskId, endless, make_env, make_vector_env, prepare_rendering
from world_model import cost


def checked(argv: Sequence[str]) -> Config:
    """The settings of a command line whose task exists and whose steps suffice."""
    config, _ = parse_cli(argv, TaskId.shows_images)
    task = TaskId.parse(config.task)
    if not config.model_only:
        check_steps(config, task)
    return config


def train(argv: list[str]) -> int:
    """Build the parts, train, and show what came of it. Returns the exit status."""
    if grid := take_grid(argv):
        return run_sweep(grid, checked)
    config, saved = parse_cli(argv, TaskId.shows_images)
    task, device = TaskId.parse(config.task), resolve_device(config.device)
    if config.model_only:
        return train_model(config, task, device)
    if config.agent != "dreamer":
        return train_baseline(config, task, device)
    if saved and saved["task"] != str(task):
        raise UsageError(f"{config.resume} is a run of {saved['task']}, not of {task}: leave the task out")
    check_steps(config, task)
    cannot_draw = prepare_rendering(task.draws or (config.video and task.suite == "dmc"))
    set_threads(config.train.threads or int(config.optimizer.workers > 1))
    keep_memory()
    seed_everything(config.seed)

    envs = make_vector_env(task, config.train.envs, config.seed, config.train.lives_end, task.is_slow)
    spaces, model = spaces_of(envs), config.model
    if saved:
        check_spaces(saved, spaces)
    agent = make_agent(config, spaces, device)
    latent = (model.loop.tokens, model.loop.width), (model.groups, model.classes)
    replay = ReplayBuffer(
        config.train.replay_rows, envs.num_envs, spaces.obs, spaces.action.size, *latent, config.seed
    )
    make_envs = partial(make_vector_env, task, seed=config.eval.first_seed, apart=task.is_parallel)
    evaluate = Evaluator(config.eval, agent, make_envs, task.action_repeat, task.judged_by)

    name = f"{config.preset}-s{config.seed}"
    if saved:
        run_dir = Path(config.run_dir or "")
        check_task(saved, run_dir)
        check_fits(saved, run_dir, agent, replay)
    else:
        run_dir = new_run_dir(config.run_dir, task.slug, name)
        replay.keep_images(images_folder(run_dir))
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
    meta = Meta(run_dir, str(task), device, agent.parameter_counts())
    notes = [f"resume       {resume_command(run_dir)}", *remarks(task, cannot_draw), *advice(config, spaces, device)]
    announce(header(config, task), spaces, agent.parameter_counts(), f"{device}, {config.preset}", run_dir, *notes)
    try:
        status = carry_out(trainer, run_dir)
        logger.hparams(chosen(config), {"eval/return": None})
    finally:
        logger.close()
        meta.update(step=trainer.step, finished=trainer.finished)
        agent.close()
        envs.close()
    if status == 0:
        show(config, task, agent, trainer, meta, run_dir, cannot_draw)
    return status


def train_baseline(config: Config, task: TaskId, device: torch.device) -> int:
    """Train a baseline of stable-baselines3, which leaves the files of any run."""
    from agent.interop.baselines import Baseline, BaselineTrainer, DreamVecEnv, VecEnv, one_env  # a second to import

    if config.resume:
        raise UsageError(f"a run of {config.agent} cannot go on: start it anew in another --run-dir")
    check_baseline(config)
    check_steps(config, task)
    cannot_draw = prepare_rendering(config.video and task.suite == "dmc")
    set_threads(config.train.threads)
    seed_everything(config.seed)
    one = make_vector_env(task, 1, config.seed)
    one.close()
    spaces, repeat = spaces_of(one), task.action_repeat
    if config.dream:
        worlds: VecEnv = DreamVecEnv(config.dream, str(task), seed=config.seed)
    else:
        worlds = one_env(partial(make_env, task, config.seed))
    agent = Baseline(config.agent, spaces, worlds, config.train, config.seed, device, repeat)
    evaluate = Evaluator(config.eval, agent, partial(make_vector_env, task, seed=config.eval.first_seed), repeat)
    run_dir = new_run_dir(config.run_dir, task.slug, f"{config.agent}-s{config.seed}")
    logger = Logger(run_dir, config.train.steps)
    trainer = BaselineTrainer(
        config.train, agent, logger, evaluate, make_store(run_dir, str(task), to_dict(config), spaces), repeat
    )
    save_yaml(config, run_dir / "config.yaml")
    meta = Meta(run_dir, str(task), device, agent.parameter_counts())
    machine = f"{device}, {config.agent} of stable-baselines3"
    machine += f", learning in the dream of {config.dream} alone" if config.dream else ""
    announce(header(config, task), spaces, agent.parameter_counts(), machine, run_dir, *remarks(task, cannot_draw))
    try:
        finished = trainer.run()
        logger.hparams(chosen(config), {"eval/return": None})
    finally:
        logger.close()
        meta.update(step=trainer.step, finished=trainer.finished)
    if not finished:
        print(f"stopped at step {trainer.step}; baselines do not resume: start anew")
        return 130
    show(config, task, agent, trainer, meta, run_dir, cannot_draw)
    return 0


def show(
    config: Config, task: TaskId, agent: Actor, trainer: Finished, meta: Meta, run_dir: Path, cannot_draw: str | None
) -> None:
    """After the last step: the numbers, the curve and a video."""
    meta.update(results=report(trainer, str(task)))
    print(f"curve  {draw_curves(run_dir, f'{task}, {config.agent}, seed {config.seed}', task.unit)}")
    if config.video:
        path, make = run_dir / "videos" / "eval_final.mp4", partial(make_env, task, render=True)
        print(cannot_draw or save_video(path, agent, make, config.eval))


def carry_out(trainer: Trainer, run_dir: Path) -> int:
    """Run the trainer, with a line for whatever ends it early. Returns the exit status."""
    go_on = f"to go on:\n  {resume_command(run_dir)}"
    try:
        if trainer.run():
            return 0
    except NonFiniteError as error:
        where = f"at step {trainer.step:,}; {last_checkpoint(run_dir)}"
        print(f"error: {error} is not finite {where}", file=sys.stderr)
        return 1
    except EnvironmentFailure as error:
        traceback.print_exception(error.__cause__)
        print(f"error: the environment failed at step {trainer.step:,}: {error}; saved, {go_on}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk
        print(f"error: {error} at step {trainer.step:,}; {last_checkpoint(run_dir)}, {go_on}", file=sys.stderr)
        return 2
    print(f"stopped and saved at step {trainer.step}; {go_on}")
    return UNFINISHED if trainer.sliced else 130


def chosen(config: Config) -> dict[str, object]:
    """The settings by which runs are told apart: those that differ from the preset's, for TensorBoard's HParams."""
    mine = to_dict(config)
    changed = differences(to_dict(preset(config.preset)), mine)
    shown = dict.fromkeys(["task", "agent", "preset", "seed", *changed])
    return {name: value_of(mine, name) for name in shown if name not in ("run_dir", "resume", "video", "device")}


def header(config: Config, task: TaskId) -> str:
    limit = f", at most {config.train.minutes:g} minutes" if config.train.minutes else ""
    each = "4 frames each" if task.unit == "agent steps" else f"{task.action_repeat} per action"
    return f"{task}, {config.train.steps:,} {task.unit}{limit}, {each}"


def remarks(task: TaskId, cannot_draw: str | None) -> list[str]:
    """Lines about what the person might not expect."""
    found = []
    if endless(task):
        found.append(f"episodes     end after {EPISODE_LIMIT:,} steps at the latest: the task names no limit")
    if cannot_draw:
        found.append(f"video        left out: {cannot_draw}")
    return found


def advice(config: Config, spaces: Spaces, device: torch.device) -> list[str]:
    """A line for tasks whose name does not say that they show images, and which got the preset for numbers."""
    sees = any(not isinstance(size, int) for size in spaces.obs.values())
    if sees and config.preset == "small" and device.type == "cpu":
        return ["images       this task shows some: --preset pixels learns more from them in the same time"]
    return []


def check_steps(config: Config, task: TaskId) -> None:
    """Raise UsageError where all steps of the run would be random ones."""
    ours = config.agent == "dreamer"
    actions = config.train.prefill if ours else FIRST_ACTIONS
    first, remedy = actions * task.action_repeat, ", a lower --train.prefill, or --preset debug" if ours else ""
    if config.train.steps <= first:
        raise UsageError(
            f"--steps {config.train.steps} end within the {actions} random actions ({first} steps of {task}), "
            f"and nothing would be learned: give more steps{remedy}"
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
    config = replace(config, optimizer=replace(config.optimizer, workers=1))
    set_threads(config.train.threads)
    keep_memory()
    seed_everything(config.seed)
    agent = make_agent(config, dataset.spaces, device)
    if not agent.world.observation_model.decodes:
        raise UsageError("without a decoder no error can be measured: leave --model.image.objective redundancy out")
    run_dir = new_run_dir(config.run_dir, task.slug, f"model-{config.model.core.rpartition(':')[2]}-s{config.seed}")
    save_yaml(config, run_dir / "config.yaml")
    logger = Logger(run_dir, config.offline.updates)
    store = make_store(run_dir, str(task), to_dict(config), dataset.spaces)
    batch = config.train.batch, config.train.length
    trainer = OfflineTrainer(config.offline, agent, dataset, logger, store, batch, config.seed)
    meta = Meta(run_dir, str(task), device, agent.parameter_counts())
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
