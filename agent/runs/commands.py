"""The options of the commands of evaluate.py. What the commands do is in evaluate.py itself."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from agent.errors import UsageError
from agent.evaluation.episodes import EvalConfig
from agent.runs.config import Config
from agent.runs.model_commands import check_loops
from agent.seeds import COLLECTION
from agent.settings import expand_home


@dataclass(frozen=True)
class PolicyArgs:
    """Play episodes with fixed seeds and report the returns."""

    run: tyro.conf.Positional[str]
    """Run folder, or a checkpoint file."""
    episodes: int | None = None
    """Number of episodes; by default as at the end of training."""
    seed: int = 0
    """Which episodes; 0 begins with those of the evaluation at the end of training."""
    max_loops: int | None = None
    """Most loops per step; it may exceed that of training. By default as the run was configured."""
    exit: Literal["fixed", "residual", "acceleration", "kl", "random", "certified"] | None = None
    """Another exit rule than the run's own, one that needs no training; fixed runs --max-loops loops, or the mean."""
    exit_threshold: float | None = None
    """Threshold of that rule."""
    exit_histogram: tuple[float, ...] = ()
    """Weights of 1, 2, .. loops for the random exit."""
    plan: int | None = None
    """Candidates of planning at every decision, also for agents trained without; 0 = the policy decides. By default as
    the run was configured."""
    plan_horizon: int | None = None
    """Steps ahead that are planned."""
    sb3: str | None = None
    """Score this agent instead, saved by stable-baselines3 (agent.zip), in the run's task: one that learned in its
    dream. Such a file can run code while it is read: only open your own."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint of a run folder."""
    device: str = "auto"
    """auto, cpu or cuda."""
    video: bool = False
    """Record the first episode into the run's videos/."""
    json: str | None = None
    """Write the numbers to this file; - is standard output, which then holds nothing else."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "sb3", "json")
        check_loops(self.max_loops)
        try:
            self.eval_config(EvalConfig())
        except ValueError as error:
            raise ValueError(str(error).replace("--eval.", "--")) from error
        if self.sb3 and (self.exit or self.max_loops):
            raise ValueError("an agent of stable-baselines3 has no loops: leave --exit and --max-loops out")
        if self.sb3 and self.plan:
            raise ValueError("an agent of stable-baselines3 has no world model to plan in: leave --plan out")
        if self.plan is not None and self.plan < 0:
            raise ValueError(f"--plan must be at least 0, got {self.plan}")
        if self.plan_horizon is not None and not self.plan:
            raise ValueError("--plan-horizon belongs to planning: give the number of candidates too, such as --plan 64")
        if self.exit is None and (self.exit_threshold is not None or self.exit_histogram):
            raise ValueError("--exit-threshold and --exit-histogram belong to another rule: name it with --exit")

    def loop_cap(self, config: Config) -> int | None:
        """Most loops per step; None: as the run is configured."""
        loop = config.model.loop
        if self.exit is None:
            return self.max_loops
        return self.max_loops or (round(loop.mean_loops) if self.exit == "fixed" else loop.run_cap)

    def played_otherwise(self) -> str:
        """What changes how the agent plays, for the name of a file: _exit-kl-0.02_max-loops-8, or nothing."""
        shares = "-".join(f"{share:g}" for share in self.exit_histogram)
        threshold = "" if self.exit_threshold is None else f"-{self.exit_threshold:g}"
        exit_words = f"_exit-{self.exit}{threshold}{f'-{shares}' if shares else ''}" if self.exit else ""
        loops = f"_max-loops-{self.max_loops}" if self.max_loops else ""
        steps = f"x{self.plan_horizon}" if self.plan_horizon else ""
        return exit_words + loops + (f"_plan-{self.plan}{steps}" if self.plan is not None else "")

    def eval_config(self, cfg: EvalConfig) -> EvalConfig:
        """The run's evaluation settings `cfg`, replaced by those of the command line."""
        episodes = cfg.episodes if self.episodes is None else self.episodes
        return replace(cfg, episodes=episodes, seed=cfg.seed + self.seed)


@dataclass(frozen=True)
class CompareArgs:
    """Put finished runs side by side: returns with intervals, curves, cost, and one HTML report."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, or folders that hold some."""
    by: tuple[str, ...] = ()
    """Settings that make the groups, such as behavior.horizon; by default all in which the runs differ."""
    suite: str | None = None
    """Compare over this list of tasks, dmc18, easy6, easy12 or atari26: a table of them all beside published returns,
    and numbers over tasks. Runs of other tasks are left out."""
    out: str = "comparison"
    """Folder for report.html, comparison.json and runs.csv."""
    json: str | None = None
    """Write the numbers to this file too; - is standard output, which then holds nothing else."""

    def __post_init__(self) -> None:
        expand_home(self, "runs", "out", "json")


@dataclass(frozen=True)
class DatasetArgs:
    """Keep the experience of a run as a fixed data set, for train_agent.py --dataset FOLDER."""

    run: tyro.conf.Positional[str]
    """Run folder, or its latest.pt; or minari:ID, a data set of Minari on this machine (minari download ID)."""
    folder: tyro.conf.Positional[str]
    """The new folder of the data set."""
    nov: bool = False
    """Leave the velocities out, as dmc:TASK@nov does."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "folder")
        if self.nov and self.run.startswith("minari:"):
            raise ValueError("--nov knows the entries of dm_control's tasks alone: leave it out")


@dataclass(frozen=True)
class CollectArgs:
    """Play episodes of a task for a fixed data set: at random, and by the agent of a run if one is given."""

    task: tyro.conf.Positional[str]
    """Task as suite:name."""
    folder: tyro.conf.Positional[str]
    """The new folder of the data set."""
    run: str | None = None
    """Let the agent of this run play every second batch of episodes, with sampled actions."""
    episodes: int = 100
    """How many episodes; every tenth is held out."""
    seed: int = 0
    """Which episodes."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "folder")
        if self.episodes < 1:
            raise ValueError(f"--episodes must be at least 1, got {self.episodes}")
        COLLECTION.episodes(self.seed, self.episodes)


@dataclass(frozen=True)
class ExportArgs:
    """Write the acting path alone as a program that torch.export.load reads, without this project."""

    run: tyro.conf.Positional[str]
    """Run folder, or a checkpoint file."""
    file: tyro.conf.Positional[str]
    """The new file, by custom ending in .pt2."""
    max_loops: int | None = None
    """Loops of every step; by default the mean of training."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint of a run folder."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "file")
        check_loops(self.max_loops)


def check_command(argv: Sequence[str], known: Collection[str]) -> None:
    """Raise UsageError where the first word is no command, with the nearest one."""
    if not argv or argv[0].startswith("-") or argv[0] in known:
        return
    near = difflib.get_close_matches(argv[0], known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"there is no command {argv[0]!r}; {meant}the commands are {', '.join(known)}")
