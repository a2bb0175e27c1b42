"""Every setting of a run: one frozen tree of dataclasses, as the command line and config.yaml spell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from agent.errors import UsageError
from agent.evaluation.episodes import EvalConfig
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.optimizer import OptimizerConfig
from agent.seeds import TRAINING
from agent.settings import expand_home, from_dict
from agent.training.offline import OfflineConfig
from agent.training.train_config import TrainConfig
from world_model import ModelConfig


@dataclass(frozen=True)
class Config:
    """Train a Looped Dreamer.

    Whole numbers may be written 100000, 100_000, 1e5 or 100k. Options are spelt with - or _.

    --config FILE starts from the settings in a file, such as the config.yaml of another run; options given here come
    on top of them. Its run_dir and resume are ignored.

    A grid of runs: --sweep FIELD=V1,V2 (once for each field) --jobs N --run-dir DIR, and --commands to see what
    it would run. Lists of tasks may stand among the tasks, as in --sweep task=@easy6,dmc:cheetah_run; the lists are
    dmc18, easy6, easy12 and atari26, each with an @ in front.
    """

    task: tyro.conf.Positional[str] = ""
    """Task as suite:name, for example dmc:walker_walk, gym:CartPole-v1 or toy:cue. Every new run needs one."""
    preset: Literal["debug", "tiny", "small", "pixels", "base"] = "small"
    """Values of all options not given: debug ends in seconds, tiny has at most 120,000 parameters, small suits two CPU
    cores (pixels where there is much to look at: dmc:TASK@pixels and games), base a GPU."""
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
    """Learn from this folder too, made by evaluate.py dataset or collect: its episodes lie in the replay from the
    beginning. With --model-only learn from nothing else."""
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
        expand_home(self, "run_dir", "resume", "dataset", "dream")
        if self.run_dir == "":
            raise ValueError("--run-dir needs the name of a folder")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        if self.seed >= TRAINING.size:
            raise ValueError(f"--seed must be below {TRAINING.size:,}, where the seeds of evaluations begin")
        if self.model_only and not self.dataset:
            raise ValueError("--model-only learns from a data set: give --dataset DIR with it")
        if self.model_only and self.train.sampling in ("recent", "value-error"):
            lacks = "critic" if self.train.sampling == "value-error" else "newest rows"
            raise ValueError(f"--model-only has no {lacks}: give --train.sampling uniform or model-error")
        if self.dataset and self.agent != "dreamer":
            raise ValueError(f"--agent {self.agent} learns from no data set: leave --dataset out")
        if self.dream and self.agent == "dreamer":
            raise ValueError("--dream is for baselines: give --agent sac, ppo or dqn with it")
        if self.agent != "dreamer" and self.model_only:
            raise ValueError(f"--agent {self.agent} has no world model: leave --model-only out")
        if self.model.jump > 1 and self.train.sampling.endswith("-error"):
            raise ValueError("--train.sampling by errors knows no jumps: leave --model.jump out, or sample otherwise")
        if self.model.objective == "sigreg" and self.train.batch < 4:
            raise ValueError("--model.objective sigreg compares the sequences of a batch: give --train.batch 4 or more")
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


def saved_config(saved: Mapping[str, Any]) -> Config:
    """The settings in a checkpoint. Raises UsageError where they are those of another version."""
    try:
        config: Config = from_dict(Config, saved["config"])
    except UsageError as error:
        raise UsageError(
            f"the checkpoint's settings are of another version ({error}); check out the commit in the run's meta.json"
        ) from error
    return config
