"""Runs side by side: groups by settings, final returns with intervals, curves, and what was published.

A group is what differs only by seed. Its score is the mean return of each run's last evaluation. Where tasks share a
scale (dmc: 0 to 1,000) several can be compared at once. Source of the statistics: Agarwal et al. 2021.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agent.errors import UsageError
from agent.evaluation.statistics import (
    FEWEST_SEEDS,
    aggregates,
    improvement_interval,
    paired_difference,
    paired_interval,
    probability_of_improvement,
    stratified_intervals,
)
from agent.runs.config import Config
from agent.runs.history import Run
from agent.runs.presets import preset
from agent.settings import differences, known_name, to_dict

PUBLISHED = Path(__file__).with_name("published.csv")
RHYTHMS = {f"train.{name}" for name in ("threads", "slice", "eval_every", "log_every", "save_every")}
UNSEEN = {"seed", "run_dir", "resume", "device", "video"} | RHYTHMS
"""Settings in which runs of one group may differ."""
DMC_SCALE = 1000.0
ROLLOUT = ("observation_5", "observation_15", "reward_5", "reward_15", "value_bias", "value_error")
"""What `Run.rollout` may know: how far the dreams of a run can be trusted."""


class Anchor(NamedTuple):
    """A published return; episodes says of which: training (sampled actions) or evaluation."""

    method: str
    task: str
    step: int
    value: float
    seeds: int
    episodes: str
    source: str


@dataclass(frozen=True)
class Group:
    """Runs that differ by seed (and task) alone."""

    label: str
    runs: list[Run]

    def of(self, task: str) -> list[Run]:
        return [run for run in self.runs if run.task == task]


class Comparison:
    """runs, and the settings they are grouped by: by default all in which they differ, but the seed.

    Raises UsageError for unknown fields, and for tasks whose returns share no scale.
    """

    def __init__(self, runs: Sequence[Run], by: Sequence[str] = ()):
        self.runs = list(runs)
        self.tasks = sorted({run.task for run in runs})
        if len(self.tasks) > 1 and not all(task.startswith("dmc:") for task in self.tasks):
            raise UsageError(
                f"runs of {', '.join(self.tasks)} share no scale of returns (only dmc: tasks do): compare the "
                "runs of one task"
            )
        self.scale = DMC_SCALE if self.tasks[0].startswith("dmc:") else 1.0
        self.by = [known_name(Config, name) for name in by] or self.differing()
        self.groups = self.make_groups()
        self.warnings = self.find_warnings()

    def differing(self) -> list[str]:
        """Settings in which the runs differ, but those of `UNSEEN` and the task."""
        first = self.runs[0].settings
        found: list[str] = []
        for run in self.runs[1:]:
            found += [name for name in differences(first, run.settings) if name not in found]
        return [name for name in found if name not in UNSEEN | {"task", "preset"}] or ["preset"]

    def make_groups(self) -> list[Group]:
        short = {name: name.rpartition(".")[2] for name in self.by}
        if len(set(short.values())) < len(short):
            short = {name: name for name in self.by}
        found: dict[tuple[str, ...], list[Run]] = {}
        for run in self.runs:
            found.setdefault(tuple(str(run.setting(name)) for name in self.by), []).append(run)

        def order(key: tuple[str, ...]) -> list[tuple[int, float, str]]:
            return [(0, float(part), "") if _is_number(part) else (1, 0.0, part) for part in key]

        labels = {key: ", ".join(f"{short[n]} {v}" for n, v in zip(self.by, key, strict=True)) for key in found}
        return [Group(labels[key], found[key]) for key in sorted(found, key=order)]

    # ------------------------------------------------------------------ numbers

    def scores(self, group: Group) -> dict[str, np.ndarray]:
        """{task: (seeds,)} last evaluations, divided by the scale of the task."""
        return {task: np.array([run.score for run in group.of(task)]) / self.scale
                for task in self.tasks if group.of(task)}  # fmt: skip

    def table(self) -> list[dict[str, Any]]:
        """One row per group. Returns are in the task's own units; intervals only from five seeds on."""
        budget = self.budgets()
        rows = []
        for group in self.groups:
            scores = self.scores(group)
            values, intervals = aggregates(scores), stratified_intervals(scores)
            row: dict[str, Any] = {"group": group.label, "runs": len(group.runs)}
            for name in ("iqm", "mean", "median"):
                row[name] = values[name] * self.scale
                row[f"{name}_interval"] = [end * self.scale for end in intervals[name]] if intervals else None
            if self.scale != 1.0:
                row["optimality_gap"] = values["optimality_gap"]
                row["optimality_gap_interval"] = list(intervals["optimality_gap"]) if intervals else None
            every = [run.score for run in group.runs]
            row |= {"lowest": min(every), "highest": max(every)}
            row["last_3_evaluations"] = _mean([run.recent for run in group.runs])
            row["last_10_training_episodes"] = _mean(
                [float(np.mean([ret for _, ret in run.training[-10:]])) for run in group.runs if run.training]
            )
            row["steps"] = max(run.last_step for run in group.runs)
            row["minutes"] = _mean([run.seconds_at(run.last_step) / 60 for run in group.runs])
            row["equal_minutes"] = _mean([seconds / 60 for seconds in budget.values()])
            there = [at_seconds(run, budget[run.task]) for run in group.runs if run.task in budget]
            row["at_equal_minutes"] = None if None in there else _mean(there)  # the fastest seeds would stand for all
            dreams = [run.rollout() for run in group.runs]
            for name in ROLLOUT:
                row[name] = _mean([found.get(name) for found in dreams])
            row["updates_per_second"] = _mean([run.metrics.get("speed/updates") for run in group.runs])
            rows.append(row)
        return rows

    def budgets(self) -> dict[str, float]:
        """{task: seconds} of its quickest finished run, where there is one."""
        found: dict[str, float] = {}
        for run in self.runs:
            seconds = run.seconds_at(run.last_step)
            if run.finished and np.isfinite(seconds):
                found[run.task] = min(seconds, found.get(run.task, seconds))
        return found

    def improvements(self) -> list[dict[str, Any]]:
        """For each pair of groups: the chance that a run of the first is better, and the paired difference."""
        rows = []
        for i, one in enumerate(self.groups):
            for other in self.groups[i + 1 :]:
                x, y = self.scores(one), self.scores(other)
                common = [task for task in x if task in y]
                if not common:
                    continue
                interval = improvement_interval(x, y)
                finals = [([run.final for run in one.of(t)], [run.final for run in other.of(t)]) for t in common]
                ends = paired_interval(finals)
                rows.append({
                    "one": one.label, "other": other.label, "probability": probability_of_improvement(x, y),
                    "interval": list(interval) if interval else None,
                    "paired_difference": _mean([paired_difference(*pair) for pair in finals]),
                    "paired_difference_interval": list(ends) if ends else None,
                })  # fmt: skip
        return rows

    def curve(self, group: Group, task: str) -> dict[str, list[float]]:
        """Steps at which all runs of the group were evaluated, mean, lowest and highest return, mean seconds."""
        runs = group.of(task)
        steps = sorted(set.intersection(*(set(run.evaluations) for run in runs))) if runs else []
        values = np.array([[run.mean_at(step) for step in steps] for run in runs]).reshape(len(runs), len(steps))
        seconds = np.array([[run.seconds_at(step) for step in steps] for run in runs]).reshape(values.shape)
        if not steps:
            return {name: [] for name in ("steps", "mean", "low", "high", "seconds")}
        return {
            "steps": [float(step) for step in steps],
            "mean": values.mean(0).tolist(),
            "low": values.min(0).tolist(),
            "high": values.max(0).tolist(),
            "seconds": seconds.mean(0).tolist(),
        }

    def anchors(self, task: str) -> list[Anchor]:
        """Published returns of the task at the step nearest to where the runs end; the nearest of all where none is
        less than a quarter away."""
        last = max((run.last_step for run in self.runs if run.task == task), default=0)
        rows = sorted((row for row in published() if row.task == task), key=lambda row: abs(row.step - last))
        near = [row for row in rows if abs(row.step - last) <= last / 4] or [
            row for row in rows if row.step == rows[0].step
        ]
        best = {row.method: row for row in reversed(near)}
        return sorted(best.values(), key=lambda row: -row.value)

    # ------------------------------------------------------------------ doubts

    def find_warnings(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        found = [f"{run.path} is not finished: it counts with its evaluation at step {run.last_step:,}"
                 for run in self.runs if not run.finished]  # fmt: skip
        for task in self.tasks:
            runs = [run for run in self.runs if run.task == task]
            steps = sorted({run.last_step for run in runs})
            if len(steps) > 1:
                found.append(f"{task}: the last evaluations are at different steps: {_listed(steps)}")
            if len({frozenset(run.final) for run in runs}) > 1:
                found.append(f"{task}: the last evaluations played different episodes")
        for group in self.groups:
            for task in self.tasks:
                runs = group.of(task)
                if not runs:
                    found.append(f"{group.label} has no run of {task}: its means are over fewer tasks")
                elif len(runs) < FEWEST_SEEDS:
                    found.append(f"{group.label} has {len(runs)} runs of {task}: no interval below {FEWEST_SEEDS}")
                seeds = [run.setting("seed") for run in runs]
                if len(set(seeds)) < len(seeds):
                    found.append(f"{group.label}: two runs of {task} have the same seed")
            hidden = Comparison.hidden(group, self.by)
            if hidden:
                found.append(f"{group.label}: its runs differ in {', '.join(hidden)} too")
        if self.between():
            found.append(f"the groups differ in {', '.join(self.between())} too")
        found += [f"{run.path}: the errors of its dreams are left out, they are of step {run.dreamt:,}"
                  for run in self.runs if run.dreamt not in (None, run.meta.get("step"))]  # fmt: skip
        commits = {str(run.meta.get("git", {}).get("commit", "unknown"))[:7] for run in self.runs}
        if len(commits) > 1:
            found.append(f"the runs are of different commits: {', '.join(sorted(commits))}")
        return found

    @staticmethod
    def hidden(group: Group, by: Sequence[str]) -> list[str]:
        """Settings in which the runs of one group differ though they should not."""
        found: list[str] = []
        for run in group.runs[1:]:
            found += [name for name in differences(group.runs[0].settings, run.settings) if name not in found]
        return [name for name in found if name not in {*UNSEEN, *by, "task"}]

    def between(self) -> list[str]:
        """Settings in which a group differs from another, beside those that it is named by."""
        if "preset" in self.by:  # it stands for all that follows from it
            return []
        first, found = self.groups[0].runs[0].settings, dict[str, None]()
        for group in self.groups[1:]:
            found |= dict.fromkeys(differences(first, group.runs[0].settings))
        return [name for name in found if name not in {*UNSEEN, *self.by, "task"}]

    def content(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "tasks": self.tasks,
            "by": self.by,
            "warnings": self.warnings,
            "groups": self.table(),
            "improvement": self.improvements(),
            "curves": {task: {g.label: _known(self.curve(g, task)) for g in self.groups} for task in self.tasks},
            "settings": self.settings(),
            "published": {task: [anchor._asdict() for anchor in self.anchors(task)] for task in self.tasks},
            "runs": [self.row(group, run) for group in self.groups for run in group.runs],
        }

    def settings(self) -> list[dict[str, Any]]:
        """What the groups were given beyond the preset of the first: name, values by group, whether all are the same.

        Of each group its first run's; what differs between groups stands first.
        """
        usual = to_dict(preset(str(self.runs[0].setting("preset") or "small")))
        found = dict[str, None]()
        for group in self.groups:
            found |= dict.fromkeys(differences(usual, group.runs[0].settings))
        rows = []
        for name in found:
            if name not in UNSEEN | {"task", "preset"}:
                values = {group.label: group.runs[0].setting(name) for group in self.groups}
                rows.append({"name": name, "values": values, "same": len(set(map(str, values.values()))) == 1})
        return sorted(rows, key=lambda row: row["same"])

    def row(self, group: Group, run: Run) -> dict[str, Any]:
        """One run as a line of runs.csv."""
        return {
            "group": group.label, "run": str(run.path), "task": run.task, "seed": run.setting("seed"),
            "step": run.last_step, "return": run.score, "last_3_evaluations": run.recent,
            "minutes": _mean([run.seconds_at(run.last_step) / 60]), "finished": run.finished,
            "commit": run.meta.get("git", {}).get("commit"), "command": "; ".join(run.meta.get("commands") or ()),
        }  # fmt: skip


def at_seconds(run: Run, seconds: float) -> float | None:
    """The run's last evaluation that was done within so many seconds; None where there was none yet."""
    steps = [step for step in sorted(run.evaluations) if run.seconds_at(step) <= seconds * (1 + 1e-9)]
    return run.mean_at(steps[-1]) if steps else None


def published() -> list[Anchor]:
    """The published returns that the project ships, with their sources."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [
            Anchor(row["method"], row["task"], int(row["step"]), float(row["return"]), int(row["seeds"]),
                   row["episodes"], row["source"])
            for row in csv.DictReader(file)
        ]  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _known(curve: Mapping[str, list[float]]) -> dict[str, list[float | None]]:
    """None, which JSON knows, for what is not known: the seconds of a run without logged times."""
    return {name: [value if np.isfinite(value) else None for value in values] for name, values in curve.items()}


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `Comparison.table` as lines for the terminal."""
    width = max(len(row["group"]) for row in rows)
    lines = [f"{'':{width}s}  runs      IQM     mean   median   lowest  highest  95 % of the IQM   minutes"]
    for row in rows:
        ends = row["iqm_interval"]
        interval = f"[{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "-"
        minutes = "-" if row["minutes"] is None else f"{row['minutes']:.1f}"
        numbers = " ".join(f"{row[name]:8.4g}" for name in ("iqm", "mean", "median", "lowest", "highest"))
        lines.append(f"{row['group']:{width}s}  {row['runs']:4d} {numbers}  {interval:>15s}  {minutes:>8s}")
    return "\n".join(lines)
