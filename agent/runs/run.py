"""A run from its beginning to its end: its files opened and closed in one place, and a line for whatever ends it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from agent.data.checkpoint import CheckpointStore
from agent.data.replay import ReplayBuffer
from agent.environment_failures import environment_traceback
from agent.errors import BadStep, EnvironmentFailure, NonFiniteError, RankLost, UsageError, WorkerFailure
from agent.evaluation.episodes import Agent, Episode
from agent.evaluation.plots import draw_curves
from agent.evaluation.rounds import say
from agent.evaluation.video import save_video
from agent.learning.dreamer import Dreamer
from agent.learning.sampling import rows_needed
from agent.logs.logger import Logger
from agent.runs.cli import save_yaml
from agent.runs.config import Config
from agent.runs.folder import Meta
from agent.runs.header import evaluate_command, last_checkpoint_note, print_results, resume_command
from agent.runs.presets import preset
from agent.settings import differences, to_dict, value_of
from agent.spaces import Spaces
from agent.training.schedule import UNFINISHED


class AnyTrainer(Protocol):
    """A trainer of an agent, of a baseline, or of a world model alone."""

    step: int
    finished: bool


class AgentTrainer(AnyTrainer, Protocol):
    """A trainer of something that acts. signal: what stopped it."""

    signal: signal.Signals

    @property
    def episodes(self) -> list[Episode]: ...

    def run(self) -> bool: ...

    def recent(self) -> dict[str, float]: ...


@dataclass
class Run:
    """An open run. trainer: set by the caller, so that meta.json says how far the run came."""

    folder: Path
    logger: Logger
    store: CheckpointStore
    meta: Meta
    trainer: AnyTrainer | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)

    def report(self, step: int, what: str, error: Exception) -> None:
        """Say that `what` failed at `step` and training goes on, and keep it in meta.json.

        The first failure of an environment comes with its traceback, for its author.
        """
        if isinstance(error, EnvironmentFailure) and not self.failures:
            print(environment_traceback(error), end="", file=sys.stderr)
        cause = " ".join(str(error).split())
        cause = cause if isinstance(error, EnvironmentFailure) else f"{type(error).__name__}: {cause}"
        say(f"note: {what} failed at step {step:,}: {cause}; training goes on")
        self.failures.append({"step": step, "what": what, "error": cause})
        self.meta.update(failures=self.failures[-100:])


@contextmanager
def open_run(
    config: Config,
    task: str,
    spaces: Spaces,
    device: torch.device,
    parameters: dict[str, int],
    folder: Path,
    total: int,
    start: int = 0,
) -> Iterator[Run]:
    """Open logs, config.yaml, meta.json and the checkpoint store in `folder`, and close them whatever happens.

    total: steps or updates of the whole run; start: the step from which a stopped run goes on. Raises UsageError
    where the logs of a stopped run are damaged.
    """
    try:
        logger = Logger(folder, total, start)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        save_yaml(config, folder / "config.yaml")
        meta = Meta(folder, task, device, parameters)
        run = Run(folder, logger, CheckpointStore(folder, task, to_dict(config), spaces), meta)
        try:
            yield run
            run.store.wait()
        finally:
            if run.trainer is not None:
                meta.update(step=run.trainer.step, finished=run.trainer.finished)
    finally:
        try:
            logger.close()
        except OSError as error:  # a full disk, which has ended the run before, or is nothing to end it for now
            print(f"note: the last lines of the logs are missing: {error}", file=sys.stderr)


def make_agent(config: Config, spaces: Spaces, device: torch.device) -> Dreamer:
    """The agent with its first weights. Raises UsageError when its sizes do not fit together."""
    try:
        return Dreamer(config.model, config.behavior, config.optimizer, spaces, device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (TypeError, OverflowError) as error:  # of numbers beyond those that PyTorch counts with
        what = str(error).splitlines()[0]
        sizes = "give smaller --model.* and --behavior.* sizes"
        raise UsageError(f"networks of these sizes cannot be ({what}): {sizes}") from error


def make_replay(config: Config, envs: int, spaces: Spaces, repeat: int, ranks: int = 1) -> ReplayBuffer:
    """An empty replay for the rows of `envs` environments and the latents of the world model.

    repeat: simulator steps per action; ranks: of the run, whose steps they share. No more rows are reserved than the
    run can fill, two for each action where all episodes have one step; with images or a data set as many as are asked
    for, in a file that occupies what is written.
    Raises UsageError where it could never hold one sequence of the longest jumps.
    """
    model, needed = config.model, rows_needed(config.train.length, config.model.jump) * envs
    steps = ranks * repeat * needed
    if model.jump > 1 and (config.train.replay_rows < needed or config.train.steps < steps):
        raise UsageError(
            f"with --model.jump {model.jump} and --train.length {config.train.length} learning needs {needed} rows: "
            f"give at least --train.replay-rows {needed} and --steps {steps}, or less of those two"
        )
    deter, stoch = (model.loop.tokens, model.loop.width), (model.groups, model.classes)
    rows, actions = config.train.replay_rows, spaces.action.size
    if all(isinstance(size, int) for size in spaces.obs.values()) and not config.dataset:
        rows = min(rows, 2 * (config.train.steps // repeat + needed))
    onehot = model.latents == "categorical"
    return ReplayBuffer(rows, envs, spaces.obs, actions, deter, stoch, config.seed, config.train.sampling, onehot)


def train_to_end(run: Run, trainer: AgentTrainer, config: Config, resumes: bool = True) -> int:
    """Run the trainer, with a line for whatever ends it early. Returns the exit status.

    resumes: whether a run of this kind can go on after it was stopped.
    """
    run.trainer = trainer
    ahead = f"to go on:\n  {resume_command(run.folder)}" if resumes else "baselines do not resume: start anew"
    saved = f"everything is saved; {ahead}" if resumes else ahead
    try:
        finished = trainer.run()
        run.store.wait()
        run.logger.hparams(changed_settings(config), {"eval/return": None})
        if finished:
            return 0
    except NonFiniteError as error:
        where = f"at step {trainer.step:,}; {last_checkpoint_note(run.folder)}"
        smaller = ", a smaller --optimizer.lr may help" if resumes else ""
        print(f"error: {error} is not finite {where}{smaller}; {ahead}", file=sys.stderr)
        return 1
    except BadStep as error:
        skip = "; --train.on-bad-step skip leaves such rows out" if resumes else ""
        print(f"error: {error}, after step {trainer.step:,}{skip}; {saved}", file=sys.stderr)
        return 1
    except EnvironmentFailure as error:
        print(environment_traceback(error), end="", file=sys.stderr)
        print(f"error: the environment failed after step {trainer.step:,}: {error}; {saved}", file=sys.stderr)
        return 1
    except RankLost as error:
        where = f"after step {trainer.step:,}; {last_checkpoint_note(run.folder)}"
        print(f"error: {error}, {where}; {ahead}", file=sys.stderr)
        return 1
    except WorkerFailure as error:
        print(f"error: {error}, after step {trainer.step:,}; {saved}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk
        print(f"error: {error} at step {trainer.step:,}; {last_checkpoint_note(run.folder)}, {ahead}", file=sys.stderr)
        return 2
    if not resumes:
        print(f"stopped at step {trainer.step:,}; {ahead}")
        return 128 + trainer.signal
    print(f"stopped and saved at step {trainer.step:,}; {ahead}")
    sliced = config.train.slice and trainer.signal == getattr(signal, "SIGUSR1", None)
    return UNFINISHED if sliced or getattr(trainer, "sliced", False) else 128 + trainer.signal


def show_results(
    run: Run, trainer: AgentTrainer, config: Config, task: str, unit: str, agent: Agent,
    make_env: Callable[[], Any], cannot_draw: str | None,
) -> None:  # fmt: skip
    """After the last step: the numbers, the curve and a video. The run is finished, whatever fails here."""
    if trainer.episodes:
        run.meta.update(results=print_results(trainer, task))
    else:
        command = evaluate_command(run.folder)
        print(f"the run is finished and its final evaluation failed; to evaluate it later:\n  {command}")
    try:
        print(f"curve  {draw_curves(run.folder, f'{task}, {config.agent}, seed {config.seed}', unit)}")
        if config.video:
            print(cannot_draw or save_video(run.folder / "videos" / "eval_final.mp4", agent, make_env, config.eval))
    except Exception as error:
        run.report(trainer.step, "drawing the results", error)


def changed_settings(config: Config) -> dict[str, object]:
    """The settings by which runs are told apart: those that differ from the preset's, for TensorBoard's HParams."""
    mine = to_dict(config)
    changed = differences(to_dict(preset(config.preset)), mine)
    shown = dict.fromkeys(["task", "agent", "preset", "seed", *changed])
    return {name: value_of(mine, name) for name in shown if name not in ("run_dir", "resume", "video", "device")}
