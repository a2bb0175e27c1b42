"""What a run has left in its folder, read back for comparison. Nothing in the folder is changed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.data.checkpoint import find_checkpoint
from agent.errors import UsageError
from agent.runs.cli import read_yaml
from agent.settings import value_of


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it. Steps are simulator steps, times seconds of wall-clock since its start."""

    path: Path
    task: str
    settings: dict[str, Any]
    meta: dict[str, Any]
    evaluations: dict[int, dict[int, float]]
    """{step: {seed of the episode: return}}"""
    training_episodes: list[tuple[int, float]]
    """(step, return) of each."""
    wall_clock: tuple[np.ndarray, np.ndarray]
    """Steps, and the seconds at which they were logged."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last line of metrics.jsonl."""

    updates_per_second: float | None = None
    """Median over the lines of metrics.jsonl between which there were updates: evaluations slow down few of them."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return bool(self.meta.get("finished"))

    @property
    def commit(self) -> str | None:
        """The commit of the source that made it."""
        git = self.meta.get("git")
        commit = git.get("commit") if isinstance(git, dict) else None
        return commit if isinstance(commit, str) else None

    @property
    def commands(self) -> str:
        """What was typed to make it."""
        commands = self.meta.get("commands")
        return "; ".join(map(str, commands)) if isinstance(commands, list) else ""

    @property
    def last_step(self) -> int:
        return max(self.evaluations)

    @property
    def final_returns(self) -> dict[int, float]:
        """{seed: return} of the last evaluation."""
        return self.evaluations[self.last_step]

    @property
    def final_return(self) -> float:
        """Mean return of the last evaluation."""
        return self.return_at(self.last_step)

    @property
    def recent_return(self) -> float | None:
        """Mean of the three evaluations before the last one."""
        before = sorted(self.evaluations)[-4:-1]
        return float(np.mean([self.return_at(step) for step in before])) if before else None

    def return_at(self, step: int) -> float:
        """Mean return of the evaluation at this step."""
        return float(np.mean(list(self.evaluations[step].values())))

    def rescaled(self, scale: Callable[[float], float]) -> RunRecord:
        """The same run with its returns in other units."""
        evaluations = {step: {seed: scale(value) for seed, value in episodes.items()}
                       for step, episodes in self.evaluations.items()}  # fmt: skip
        training_episodes = [(step, scale(value)) for step, value in self.training_episodes]
        return replace(self, evaluations=evaluations, training_episodes=training_episodes)

    def setting(self, name: str) -> Any:
        """The setting's value; None where the run has no such setting."""
        try:
            return value_of(self.settings, name)
        except (KeyError, TypeError):
            return None

    def rollout_errors(self) -> dict[str, float]:
        """The errors that `evaluate.py model` measured, with the run's exit rule; empty where it was not called.

        observation_K, reward_K: errors K = 5 and 15 steps ahead, on the agent's own episodes; value_bias, value_error:
        predicted minus realised return of imagined rollouts of 15 steps. Empty as well where the measured checkpoint
        is not the run's last one.
        """
        if self.rollout_step != self.meta.get("step"):
            return {}
        try:
            measured = self._rollout_file()
            errors = [row for row in measured["errors"] if (row["policy"], row["loops"]) == ("agent", "exit")]
            by_step = {row["step"]: row for row in errors}
            ahead = [by_step[k] for k in (5, 15) if k in by_step]
            numbers = {f"{name}_{row['step']}": float(row[name]) for row in ahead for name in ("observation", "reward")}
            values = [row for row in measured["values"] if row["step"] == 15]
            return numbers | {f"value_{name}": float(row[name]) for row in values for name in ("bias", "error")}
        except (KeyError, TypeError, ValueError, OverflowError):
            return {}

    @property
    def rollout_step(self) -> int | None:
        """The step of the checkpoint that `evaluate.py model` measured; None where it was not called."""
        step = self._rollout_file().get("step")
        return step if isinstance(step, int) else None

    def _rollout_file(self) -> dict[str, Any]:
        try:
            content = json.loads((self.path / "model" / "model.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def seconds_at(self, step: float) -> float:
        """Wall-clock at a step, linear between and beyond the logged steps; NaN where none was logged."""
        steps, seconds = self.wall_clock
        if not len(steps):
            return float("nan")
        if step > steps[-1] and steps[-1] > 0:
            return float(seconds[-1] * step / steps[-1])
        return float(np.interp(step, np.r_[0.0, steps], np.r_[0.0, seconds]))


def checkpoint_of(run: str, which: str = "latest") -> Path:
    """`find_checkpoint`; where `run` is a folder that holds runs, the message names some of them."""
    try:
        return find_checkpoint(run, which)
    except UsageError as error:
        inside = sorted(path.parent for depth in ("*", "*/*") for path in Path(run).glob(f"{depth}/checkpoints"))
        if not inside or (Path(run) / "checkpoints").exists():
            raise
        newest = sorted(inside, key=lambda path: path.stat().st_mtime)[-5:]
        more = f", and {len(inside) - len(newest)} older ones" if len(inside) > len(newest) else ""
        names = " ".join(map(str, newest))
        raise UsageError(f"{run} is not a run folder but holds runs; give one of them: {names}{more}") from error


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The run folders among `paths`; of a folder that is no run, those directly inside it, or else one level below, as
    in runs/TASK/NAME.

    Raises UsageError where a path leads to no run.
    """
    runs: list[Path] = []
    for text in paths:
        path = Path(text)
        if (path / "config.yaml").is_file():
            inside = [path]
        elif path.is_dir():
            found = list(path.glob("*/config.yaml")) or list(path.glob("*/*/config.yaml"))
            inside = sorted(child.parent for child in found)
            inside = [child for child in inside if ".unsaved" not in child.name]
        elif path.is_file():
            continue  # the logs beside the runs of a sweep, where a shell wrote out DIR/*
        else:
            raise UsageError(f"there is no run {text}; give run folders, or a folder that holds some")
        if not inside:
            raise UsageError(f"{text} is not a run folder and holds none (no config.yaml)")
        runs += [child for child in inside if child not in runs]
    if not runs:
        raise UsageError("no run was given; give run folders, or a folder that holds some")
    return runs


def load_runs(paths: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """The runs that can be compared, and a line for each of the others. Raises UsageError where there is none."""
    runs, refused = [], []
    for path in paths:
        try:
            runs.append(load_run(path))
        except UsageError as error:
            refused.append(str(error))
    if not runs:
        others = f" (and {len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise UsageError(f"{refused[0]}{others}")
    return runs, [f"left out: {line}" for line in refused]


def load_run(path: Path) -> RunRecord:
    """Read one run. Raises UsageError when the folder is damaged or holds no evaluation."""
    settings = read_yaml(path / "config.yaml")
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        evaluations: dict[int, dict[int, float]] = {}
        for row in _rows(path / "eval.csv"):
            evaluations.setdefault(_step(row["step"]), {})[int(row["seed"])] = _finite(row["return"])
        training_episodes = [(_step(row["step"]), _finite(row["return"])) for row in _rows(path / "episodes.csv")]
        lines = [json.loads(line) for line in _lines(path / "metrics.jsonl")]
        logged = np.array([[float(line["step"]), float(line["wall"])] for line in lines]).reshape(-1, 2)
        last = lines[-1] if lines else {}
        metrics = {name: float(value) for name, value in last.items() if isinstance(value, float | int)}
        speeds = [speed for line in lines if (speed := float(line.get("speed/updates", 0.0))) > 0.0]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} cannot be read as a run: {' '.join(str(what).split())}") from error
    task = meta.get("task") if isinstance(meta, dict) else None
    if not isinstance(settings, dict) or not isinstance(task, str) or not task.isprintable():
        raise UsageError(f"{path} cannot be read as a run: its config.yaml or meta.json is damaged")
    if settings.get("model_only"):
        raise UsageError(f"{path} trained a world model alone: leave it out, benchmarks/loops.py compares those")
    if not evaluations:
        raise UsageError(f"{path} has no evaluation yet: let it run on (--resume), or leave it out")
    wall_clock = logged[:, 0], logged[:, 1]
    typical = float(np.median(speeds)) if speeds else None
    return RunRecord(path, task, settings, meta, evaluations, training_episodes, wall_clock, metrics, typical)


def _step(text: str) -> int:
    step = int(text)
    if not 0 <= step < 2**53:
        raise ValueError(f"there is no step {text[:30]}")
    return step


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"a return is {text}")
    return value


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; what a run was writing when it died is left out."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_lines(path)))
