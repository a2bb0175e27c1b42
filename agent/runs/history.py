"""Finished runs, read back from their folders for comparison. Nothing in them is changed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agent.errors import UsageError
from agent.settings import value_of


@dataclass(frozen=True)
class Run:
    """What a run's folder says. Steps are simulator steps, times seconds of wall-clock since its start."""

    path: Path
    task: str
    settings: dict[str, Any]
    meta: dict[str, Any]
    evaluations: dict[int, dict[int, float]]
    """{step: {seed of the episode: return}}"""
    training: list[tuple[int, float]]
    """(step, return) of every training episode."""
    clock: tuple[np.ndarray, np.ndarray]
    """Steps, and the seconds at which they were logged."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last line of metrics.jsonl."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return bool(self.meta.get("finished"))

    @property
    def last_step(self) -> int:
        return max(self.evaluations)

    @property
    def final(self) -> dict[int, float]:
        """{seed: return} of the last evaluation."""
        return self.evaluations[self.last_step]

    @property
    def score(self) -> float:
        """Mean return of the last evaluation."""
        return float(np.mean(list(self.final.values())))

    @property
    def recent(self) -> float | None:
        """Mean of the three evaluations before the last one."""
        before = sorted(self.evaluations)[-4:-1]
        return float(np.mean([self.mean_at(step) for step in before])) if before else None

    def mean_at(self, step: int) -> float:
        return float(np.mean(list(self.evaluations[step].values())))

    def setting(self, name: str) -> Any:
        """The setting's value; None where the run has no such setting."""
        try:
            return value_of(self.settings, name)
        except (KeyError, TypeError):
            return None

    def rollout(self) -> dict[str, float]:
        """What `evaluate.py model` found of the run's dreams, with its exit rule; empty where it was not asked.

        observation_K, reward_K: errors after 5 and 15 steps on the agent's own episodes; value_bias, value_error: what
        dreams of 15 steps promise, against what came of them. Empty as well where the checkpoint that was measured is
        not of the run's end.
        """
        if self.dreamt != self.meta.get("step"):
            return {}
        try:
            found = self._dreams()
            rows = {row["step"]: row for row in found["errors"] if (row["policy"], row["loops"]) == ("agent", "exit")}
            numbers = {f"{name}_{k}": rows[k][name] for k in (5, 15) if k in rows for name in ("observation", "reward")}
            values = [row for row in found["values"] if row["step"] == 15]
            return numbers | {f"value_{name}": row[name] for row in values for name in ("bias", "error")}
        except (KeyError, TypeError):
            return {}

    @property
    def dreamt(self) -> int | None:
        """The step of the checkpoint that `evaluate.py model` measured; None where it was not asked."""
        return self._dreams().get("step")

    def _dreams(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "model" / "model.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def seconds_at(self, step: float) -> float:
        """Wall-clock at a step, between and beyond the logged ones in a straight line."""
        steps, seconds = self.clock
        if not len(steps):
            return float("nan")
        if step > steps[-1] and steps[-1] > 0:
            return float(seconds[-1] * step / steps[-1])
        return float(np.interp(step, np.r_[0.0, steps], np.r_[0.0, seconds]))


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The run folders that are named, and those directly inside of named folders that are none themselves.

    Raises UsageError where a path leads to no run.
    """
    found: list[Path] = []
    for text in paths:
        path = Path(text)
        if (path / "config.yaml").is_file():
            inside = [path]
        elif path.is_dir():
            inside = sorted(child.parent for child in path.glob("*/config.yaml"))
            inside = [child for child in inside if ".unsaved" not in child.name]
        elif path.is_file():
            continue  # the logs beside the runs of a sweep, where a shell wrote out DIR/*
        else:
            raise UsageError(f"there is no run {text}; give run folders, or a folder that holds some")
        if not inside:
            raise UsageError(f"{text} is not a run folder and holds none (no config.yaml)")
        found += [child for child in inside if child not in found]
    if not found:
        raise UsageError("no run was given; give run folders, or a folder that holds some")
    return found


def load_run(path: Path) -> Run:
    """Read one run. Raises UsageError when the folder is damaged or holds no evaluation."""
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        evaluations: dict[int, dict[int, float]] = {}
        for row in _rows(path / "eval.csv"):
            evaluations.setdefault(int(row["step"]), {})[int(row["seed"])] = float(row["return"])
        training = [(int(row["step"]), float(row["return"])) for row in _rows(path / "episodes.csv")]
        lines = [json.loads(line) for line in _lines(path / "metrics.jsonl")]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a run: {error}") from error
    if not isinstance(settings, dict) or not isinstance(meta, dict) or "task" not in meta:
        raise UsageError(f"{path} cannot be read as a run: its config.yaml or meta.json is damaged")
    if settings.get("model_only"):
        raise UsageError(f"{path} trained a world model alone: compare those with benchmarks/loops.py")
    if not evaluations:
        raise UsageError(f"{path} has no evaluation yet: let it run on (--resume), or leave it out")
    clock = np.array([[line["step"], line["wall"]] for line in lines], float).reshape(-1, 2).T
    numbers = {name: value for name, value in (lines[-1] if lines else {}).items() if isinstance(value, float | int)}
    return Run(path, meta["task"], settings, meta, evaluations, training, (clock[0], clock[1]), numbers)


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; what a run was writing when it died is left out."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_lines(path)))
