"""Every setting of a run: one frozen tree of dataclasses, its presets, the command line and YAML."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from agent.actor_critic import BehaviorConfig
from agent.checkpoint import UsageError, find_checkpoint, read_checkpoint
from agent.evaluation import EVAL_SEEDS, EvalConfig
from agent.learner import OptimizerConfig
from agent.offline import OfflineConfig
from agent.settings import differences, from_dict, option, parse_count, to_dict
from agent.trainer import TrainConfig
from world_model import ModelConfig

PRESETS = ("debug", "small", "pixels", "base")


@dataclass(frozen=True)
class Config:
    """Train a Looped Dreamer.

    Whole numbers may be written 100000, 100_000, 1e5 or 100k. Options are spelt with - or _.

    A grid of runs: --sweep FIELD=V1,V2 (once for each field) --jobs N --run-dir DIR, and --commands to see what
    it would run.
    """

    task: tyro.conf.Positional[str] = "dmc:cartpole_swingup"
    """Task as suite:name, for example dmc:walker_walk, gym:CartPole-v1 or toy:cue."""
    preset: Literal["debug", "small", "pixels", "base"] = "small"
    """Values of all options not given: debug ends in seconds, small suits two CPU cores (pixels where there is much to
    look at: dmc:TASK@pixels and games), base a GPU."""
    agent: Literal["dreamer", "sac", "ppo", "dqn"] = "dreamer"
    """Looped Dreamer, or a baseline of stable-baselines3 with its own settings and the same files and evaluation."""
    dream: str | None = None
    """Let the baseline learn inside the world model of this run alone; evaluations are real. Needs --agent."""
    seed: int = 0
    """Seed of weights, actions and training episodes."""
    device: str = "auto"
    """auto, cpu or cuda; auto takes the GPU if there is one."""
    run_dir: str | None = None
    """Folder of this run; by default runs/TASK/PRESET-sSEED-TIME."""
    resume: str | None = None
    """Go on with the run in this folder; task and settings come from the run, --steps may extend it."""
    video: bool = True
    """Record an evaluation episode at the end."""
    dataset: str | None = None
    """Learn from this folder instead of from an environment; needs --model-only. Made by evaluate.py dataset."""
    model_only: bool = False
    """Train the world model alone, on the data set, and measure its open-loop errors."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Interaction and updates."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """World model."""
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    """Imagination and actor-critic."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimisers."""
    offline: OfflineConfig = field(default_factory=OfflineConfig)
    """Training on a fixed data set."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        if self.seed >= EVAL_SEEDS:
            raise ValueError(f"--seed must be below {EVAL_SEEDS:,}, where the evaluations' seeds begin")
        if self.model_only != bool(self.dataset):
            raise ValueError("--dataset DIR and --model-only belong together: give both or neither")
        if self.behavior.adaptive == "surprise" and not self.model.surprise:
            raise ValueError("--behavior.adaptive surprise needs a world model that expects it: add --model.surprise")
        always_alike = self.model.core in ("stacked", "gru") or self.model.loop.exit == "fixed"
        if self.behavior.adaptive == "loops" and always_alike:
            raise ValueError("--behavior.adaptive loops needs dreams of unequal loops: a looped core and an exit rule")
        if self.dream and self.agent == "dreamer":
            raise ValueError("--dream is for baselines: give --agent sac, ppo or dqn with it")
        if self.agent != "dreamer" and self.model_only:
            raise ValueError(f"--agent {self.agent} has no world model: leave --model-only out")
        if self.train.batch % self.optimizer.workers:
            raise ValueError(
                f"--train.batch {self.train.batch} cannot be shared evenly by {self.optimizer.workers} processes: "
                "give another, or --optimizer.workers 1"
            )
        if self.behavior.starts and self.behavior.starts < 2 * self.train.batch:
            raise ValueError(
                f"--behavior.starts must be 0 (all) or at least {2 * self.train.batch}, two rows of each of the "
                f"{self.train.batch} sequences (--train.batch), got {self.behavior.starts}"
            )


# Random actions before a baseline learns: the library's default of SAC and DQN; PPO's first update comes earlier.
FIRST_ACTIONS = 100


def check_baseline(config: Config) -> None:
    """Raise UsageError where a baseline was given settings that it would not look at."""
    names = ("envs", "prefill", "pretrain", "ratio", "batch", "length", "replay_rows")
    unused = ("model.", "behavior.", "optimizer.", "offline.", *(f"train.{name}" for name in names))
    given = [name for name in differences(to_dict(preset(config.preset)), to_dict(config)) if name.startswith(unused)]
    if given:
        raise UsageError(f"--agent {config.agent} has its own settings and knows nothing of --{', --'.join(given)}")


def cores() -> int:
    """Processors that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def preset(name: str) -> Config:
    """The named preset: small is what the dataclasses say, the others differ from it in what stands here."""
    small = Config()
    loop, model, behavior = small.model.loop, small.model, small.behavior
    # Images are seen first, and rewards and dynamics learned then.
    sees = replace(model, image=replace(model.image, ease=True), reward_scale=2.0)
    if name == "small":
        return small
    if name == "pixels":
        wider = replace(sees, units=256, loop=replace(loop, units=256))  # costs little beside the convolutions
        shared = replace(small.optimizer, workers=min(2, cores()))
        return replace(small, preset="pixels", model=wider, optimizer=shared)
    if name == "base":
        wide = replace(loop, tokens=4, width=64, heads=4, units=256)
        return replace(
            small,
            preset="base",
            model=replace(sees, loop=wide, groups=32, classes=16, units=256, image=replace(sees.image, halve="stride")),
            behavior=replace(behavior, units=256, starts=0, horizon=15),
            # As many rows and updates per step as DreamerV3's 16 x 64 and 0.25 on Atari-100k. Sequences that are apart
            # teach more, and a GPU waits for the length of a sequence, not for their number.
            train=replace(small.train, batch=64, length=16, ratio=0.25, envs=min(16, cores())),
            optimizer=replace(small.optimizer, model_lr=4e-4, actor_lr=4e-4, critic_lr=4e-4, compile=True),
        )
    if name == "debug":
        tiny = replace(loop, tokens=2, width=16, heads=2, units=32)
        return replace(
            small,
            preset="debug",
            model=replace(model, loop=tiny, groups=4, classes=4, units=32),
            behavior=replace(behavior, horizon=5, starts=16, units=32),
            train=TrainConfig(
                steps=600,
                prefill=100,
                pretrain=5,
                ratio=0.2,
                batch=4,
                length=8,
                replay_rows=10_000,
                eval_every=300,
                log_every=100,
                save_every=300,
                threads=1,
            ),  # fmt: skip
            eval=replace(small.eval, interim_episodes=2, video_frames=50),
        )
    raise UsageError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")


def resolve_device(name: str) -> torch.device:
    """The device that auto, cpu, cuda or cuda:1 stands for. Raises UsageError where it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: no CUDA device here; use --device cpu")
    return device


def set_threads(wanted: int) -> int:
    """Give PyTorch `wanted` threads per operation, or with 0 the faster of one and two; returns the number.

    Two threads save a quarter of an update's time on two idle cores, and cost several times as much as they
    save on busy ones, because threads that wait for each other keep their core busy. So it is tried out.
    """
    if wanted == 0:
        small, wide, weight = torch.ones(128, 256), torch.ones(2048, 256), torch.ones(256, 128)
        seconds = {}
        for threads in (1, 2) if cores() > 1 else (1,):
            torch.set_num_threads(threads)
            rounds = []
            for _ in range(15):
                start = time.perf_counter()
                for _ in range(20):
                    (small @ weight).relu_()
                (wide @ weight).relu_()
                rounds.append(time.perf_counter() - start)
            seconds[threads] = sum(sorted(rounds)[2:])  # the first rounds start the threads
        wanted = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(wanted)
    return wanted


def keep_memory() -> None:
    """Let the C library keep freed memory for the next update instead of handing it back to the system.

    Tensors of a few megabytes otherwise cost a page fault per 4 KiB, every time: at 1,024 dreams a fifth of an
    update. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest: smaller blocks come from the heap
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: so much may lie free at its end


# ---------------------------------------------------------------------- command line


COUNTS = ConstructorRegistry()
"""Use `with COUNTS:` around tyro: whole numbers are then read by `parse_count`."""


@COUNTS.primitive_rule
def _counts(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """The rule."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def parse_cli(
    argv: Sequence[str], shows_images: Callable[[str], bool] = lambda task: False
) -> tuple[Config, dict[str, Any] | None]:
    """Read the command line of train_agent.py: the settings, and of a run that goes on its checkpoint.

    shows_images says whether a word is a task of images, which has a preset of its own on a CPU.
    A run goes on with --resume, or, where it is trained in slices, by its first command given again.
    Unknown options and values that cannot be end the program with status 2 and a message, as tyro does it.
    Raises UsageError for the rest.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for word in ("--preset", "--resume", "--device", "--run-dir", "--train.slice"):
        early.add_argument(word, nargs="?")  # a missing value is for tyro to complain about
    first, _ = early.parse_known_args([re.sub("^--run_dir", "--run-dir", word) for word in argv])
    run = first.resume
    if run is None and getattr(first, "train.slice") and first.run_dir and _begun(first.run_dir):
        run = first.run_dir
    if run is not None:
        _run_folder(run)
        saved = read_checkpoint(find_checkpoint(run))
        return _parse_resumed(argv, saved, run), saved
    default = "pixels" if any(shows_images(word) for word in argv) else "small"
    if first.device != "cpu" and torch.cuda.is_available():
        default = "base"
    return _parse(argv, preset(first.preset if first.preset in PRESETS else default)), None


def _begun(run_dir: str) -> bool:
    """Whether a run in this folder has saved something to go on with."""
    return (Path(run_dir) / "checkpoints" / "latest.pt").is_file()


def _run_folder(resume: str) -> Path:
    """The run's folder; what --resume names may be its latest.pt too. Raises UsageError for anything else."""
    path = Path(resume)
    if resume and path.is_file():
        path = path.resolve()
        if path.parent.name != "checkpoints" or not (path.parent.parent / "config.yaml").exists():
            raise UsageError(
                f"--resume {resume}: a copied checkpoint has no run around it to go on with; give the run's folder"
            )
        return path.parent.parent
    if not resume:
        raise UsageError("--resume needs the folder of a run (runs/TASK/NAME)")
    return path


def _parse(argv: Sequence[str], base: Config) -> Config:
    with COUNTS:
        return tyro.cli(Config, args=list(argv), default=base, prog="train_agent.py")


def _parse_resumed(argv: Sequence[str], saved: Mapping[str, Any], run: str) -> Config:
    """The settings of a stopped run; only what leaves the run the same run may be given anew."""
    if "trainer" not in saved:
        raise UsageError(f"{run} holds the agent alone; --resume needs the run's folder or its latest.pt")
    before = replace(from_dict(Config, saved["config"]), resume=run, run_dir=str(_run_folder(run)))
    config = _parse(argv, before)
    may_change = ("steps", "minutes", "slice", "eval_every", "log_every", "save_every", "threads")
    kept = {name: getattr(before.train, name) for name in may_change}
    fast = {name: getattr(before.optimizer, name) for name in ("compile", "graphs", "workers")}
    same = replace(
        config, task=before.task, device=before.device, video=before.video, eval=before.eval,
        train=replace(config.train, **kept), optimizer=replace(config.optimizer, **fast),
    )  # fmt: skip
    if changed := differences(to_dict(before), to_dict(same)):
        raise UsageError(
            f"--resume goes on with the run's own settings; {', '.join(map(option, changed))} cannot change: "
            "leave that out, or start a new run"
        )
    if config.train.steps < min(saved["step"], before.train.steps):
        raise UsageError(f"--steps {config.train.steps}: the run {run} has done {saved['step']} already")
    if saved["trainer"]["finished"]:
        out_of_time = 0.0 < 60.0 * config.train.minutes <= saved["trainer"].get("seconds", 0.0)
        more = "--train.minutes 0" if out_of_time else f"--steps {2 * saved['step']}"
        if out_of_time or config.train.steps <= saved["step"]:
            raise UsageError(
                f"the run {run} is complete with {saved['step']} steps; to extend it give more, for example "
                f"{more}, or see what it is worth: python evaluate.py policy {run}"
            )
    return config


# ---------------------------------------------------------------------- YAML


def save_yaml(config: Config, path: Path) -> None:
    """Write all settings, readable with `load_yaml`."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_yaml(path: Path | str) -> Config:
    """Read settings; those that are not in the file keep their defaults. Raises UsageError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return from_dict(Config, values or {})
