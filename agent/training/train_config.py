"""The settings of a training run: real interaction, updates, and how often things happen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from world_model.ranges import AT_LEAST_ONE, NOT_NEGATIVE, require


@dataclass(frozen=True)
class TrainConfig:
    """Real interaction, updates, and how often things happen. Steps are simulator steps, repeats included."""

    steps: Annotated[int, tyro.conf.arg(aliases=("--steps",))] = 100_000
    """Simulator steps of the whole run (agent steps times the task's action repeat)."""
    minutes: float = 0.0
    """Wall-clock minutes after which training ends, if its steps are not done before; 0 = no limit."""
    slice: float = 0.0
    """Minutes after which the run saves and ends with status 75; the same command and --run-dir goes on. SIGUSR1 ends
    a slice early. 0 = never."""
    envs: int = 1
    """Environments that step together."""
    lives_end: bool = False
    """Atari: the loss of a life ends an episode in training (never in evaluations)."""
    prefill: int = 1000
    """Agent steps with random actions. After them come at once 0.1 updates per such step."""
    ratio: float = 0.35
    """Updates per agent step from then on."""
    batch: int = 16
    """B, sequences per update."""
    length: int = 16
    """T, rows per sequence."""
    sampling: Literal["uniform", "recent", "model-error", "value-error"] = "uniform"
    """Sequences are drawn evenly; half of them from the newest tenth; or by the last mean error of world model (KL) or
    critic (against imagined returns). Losses are not corrected for being drawn more often."""
    replay_rows: int = 500_000
    """Rows the replay holds, over all environments; the oldest are overwritten."""
    eval_every: int = 10_000
    """Steps between two evaluations during training; 0 = none before the end."""
    log_every: int = 1000
    """Steps between two lines of metrics."""
    save_every: int = 10_000
    """Steps between two checkpoints; 0 = by time alone. A checkpoint is never older than four minutes."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """A reward or observation that is not finite: stop, with everything before it saved, or skip the row, so that the
    episode ends before it, truncated."""
    threads: int = 0
    """Threads inside one operation on CPU; 0 = one or two, whichever is faster at the start, and one where several
    processes share an update."""

    def __post_init__(self) -> None:
        least_one = dict.fromkeys(("steps", "envs", "batch", "length", "log_every"), AT_LEAST_ONE)
        loose = ("minutes", "slice", "ratio", "eval_every", "save_every")
        require(self, "--train.", **least_one, **dict.fromkeys(loose, NOT_NEGATIVE))
        require(self, "--train.", replay_rows=(1, 1_000_000_000), threads=(0, 1024))
        rows = (self.length + 1) * self.envs
        for name in ("prefill", "replay_rows"):
            if getattr(self, name) < rows:
                raise ValueError(
                    f"--train.{name} must be at least {rows}, a sequence of {self.length} rows and the one "
                    f"before it for each environment, got {getattr(self, name)}"
                )
