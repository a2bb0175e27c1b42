"""Runs side by side: groups by settings, final returns with intervals, curves, and published returns.

The runs of a group differ only by seed. The score of a run is the mean return of its last evaluation. Several tasks can
be compared at once where their returns share a scale (dmc: 0 to 1,000). Source of the statistics: Agarwal et al. 2021.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.errors import UsageError
from agent.evaluation.atari_scores import human_normalised
from agent.evaluation.statistics import (
    FEWEST_SEEDS,
    aggregate_intervals,
    aggregates,
    improvement_interval,
    paired_difference,
    paired_interval,
    probability_of_improvement,
)
from agent.runs.config import Config
from agent.runs.presets import PRESETS, preset
from agent.runs.published import PublishedReturn, published_near
from agent.runs.run_record import RunRecord
from agent.settings import differences, known_name, text_of, to_dict

SCHEDULES = {f"train.{name}" for name in ("threads", "slice", "eval_every", "log_every", "save_every")}
IGNORED = {"seed", "run_dir", "resume", "device", "video", "optimizer.workers"} | SCHEDULES
"""Settings in which runs of one group may differ."""
DMC_SCALE = 1000.0
"""Highest possible return of a Control Suite task."""
ROLLOUT_ERRORS = ("observation_5", "observation_15", "reward_5", "reward_15", "value_bias", "value_error")
"""Keys of `RunRecord.rollout_errors`: how far the imagined rollouts of a run can be trusted."""


@dataclass(frozen=True)
class Group:
    """Runs that differ by seed (and task) alone."""

    label: str
    runs: list[RunRecord]

    def runs_of(self, task: str) -> list[RunRecord]:
        return [run for run in self.runs if run.task == task]


class Comparison:
    """Groups of runs with their statistics.

    Args:
        runs: finished runs, or such that have at least one evaluation.
        by: the settings that make the groups; by default all in which the runs differ, but the seed.
        games: the tasks are games: human-normalised scores are compared in place of returns.

    Raises UsageError for unknown fields, and for tasks whose returns share no scale.
    """

    def __init__(self, runs: Sequence[RunRecord], by: Sequence[str] = (), games: bool = False):
        self.runs, self.games = list(runs), games
        self.tasks = sorted({run.task for run in runs})
        if len(self.tasks) > 1 and not games and not all(task.startswith("dmc:") for task in self.tasks):
            raise UsageError(
                f"runs of {', '.join(self.tasks)} share no scale of returns (only dmc: tasks do): compare the "
                "runs of one task, or the games of a list with --suite atari26"
            )
        self.scale = DMC_SCALE if self.tasks[0].startswith("dmc:") else 1.0
        self.by = [known_name(Config, name) for name in by] or self.differing_settings()
        self.groups = self.make_groups()
        self.warnings = self.find_warnings()

    def differing_settings(self) -> list[str]:
        """The settings in which the runs differ, without the task and those of `IGNORED`."""
        return _differing(self.runs, IGNORED | {"task", "preset"}) or ["preset"]

    def make_groups(self) -> list[Group]:
        """Groups with labels such as "horizon 5", in the order of their values."""
        short = {name: name.rpartition(".")[2] for name in self.by}
        if len(set(short.values())) < len(short):
            short = {name: name for name in self.by}
        groups: dict[tuple[str, ...], list[RunRecord]] = {}
        for run in self.runs:
            groups.setdefault(tuple(text_of(run.setting(name)) for name in self.by), []).append(run)

        def order(values: tuple[str, ...]) -> list[tuple[int, float, str]]:
            return [(0, float(value), "") if _is_number(value) else (1, 0.0, value) for value in values]

        def label(values: tuple[str, ...]) -> str:
            return ", ".join(f"{short[name]} {value}" for name, value in zip(self.by, values, strict=True))

        return [Group(label(values), groups[values]) for values in sorted(groups, key=order)]

    # --- numbers

    @property
    def title(self) -> str:
        """What is compared, in a few words."""
        return f"{', '.join(self.tasks)} by {', '.join(self.by)}"

    @property
    def unit(self) -> str:
        """Of the numbers in `table`."""
        return "human-normalised score" if self.games else "return"

    def score(self, task: str, value: float) -> float:
        """A return in units that tasks share: 1 is the most that a dmc: task gives, or a human where games are
        compared."""
        human = human_normalised(task, value) if self.games else None
        return value / self.scale if human is None else human

    def in_unit(self, run: RunRecord) -> RunRecord:
        """The run with its returns in `unit`."""
        return run.rescaled(lambda value: self.score(run.task, value)) if self.games else run

    def scores(self, group: Group) -> dict[str, np.ndarray]:
        """{task: (seeds,)} `score` of the last evaluations."""
        return {task: np.array([self.score(task, run.final_return) for run in group.runs_of(task)])
                for task in self.tasks if group.runs_of(task)}  # fmt: skip

    def table(self) -> list[dict[str, Any]]:
        """One row per group, its returns in `unit`; intervals only from five seeds on."""
        budgets = self.time_budgets()
        return [self.group_row(group, budgets) for group in self.groups]

    def group_row(self, group: Group, budgets: Mapping[str, float]) -> dict[str, Any]:
        """The numbers of one group; budgets as of `time_budgets`."""
        runs, scores = [self.in_unit(run) for run in group.runs], self.scores(group)
        values, intervals = aggregates(scores), aggregate_intervals(scores)
        row: dict[str, Any] = {"group": group.label, "runs": len(runs)}
        for name in ("iqm", "mean", "median"):
            row[name] = values[name] * self.scale
            row[f"{name}_interval"] = [end * self.scale for end in intervals[name]] if name in intervals else None
        if self.scale != 1.0 or self.games:
            row["optimality_gap"] = values["optimality_gap"]
            row["optimality_gap_interval"] = list(intervals["optimality_gap"]) if intervals else None
        finals = [run.final_return for run in runs]
        row |= {"lowest": min(finals), "highest": max(finals)}
        row["last_3_evaluations"] = _mean([run.recent_return for run in runs])
        last = [[ret for _, ret in run.training_episodes[-10:]] for run in runs if run.training_episodes]
        row["last_10_training_episodes"] = _mean([float(np.mean(returns)) for returns in last])
        row["steps"] = max(run.last_step for run in runs)
        row["minutes"] = _mean([run.seconds_at(run.last_step) / 60 for run in runs])
        row["equal_minutes"] = _mean([seconds / 60 for seconds in budgets.values()])
        in_time = [return_at_seconds(run, budgets[run.task]) for run in runs if run.task in budgets]
        # The mean of those that were fast enough would stand for all.
        row["at_equal_minutes"] = None if None in in_time else _mean(in_time)
        errors = [run.rollout_errors() for run in runs]
        for name in ROLLOUT_ERRORS:
            row[name] = _mean([error.get(name) for error in errors])
        row["updates_per_second"] = _mean([run.updates_per_second for run in runs])
        return row

    def time_budgets(self) -> dict[str, float]:
        """{task: seconds of its quickest finished run}, without the tasks that have none."""
        budgets: dict[str, float] = {}
        for run in self.runs:
            seconds = run.seconds_at(run.last_step)
            if run.finished and np.isfinite(seconds):
                budgets[run.task] = min(seconds, budgets.get(run.task, seconds))
        return budgets

    def improvements(self) -> list[dict[str, Any]]:
        """For each pair of groups: the chance that a run of the first is better, and the paired difference."""
        rows = []
        for one, other in itertools.combinations(self.groups, 2):
            x, y = self.scores(one), self.scores(other)
            common = [task for task in x if task in y]
            if not common:
                continue
            finals = [
                ([self.in_unit(run).final_returns for run in one.runs_of(task)],
                 [self.in_unit(run).final_returns for run in other.runs_of(task)])
                for task in common
            ]  # fmt: skip
            chance, difference = improvement_interval(x, y), paired_interval(finals)
            rows.append({
                "one": one.label, "other": other.label, "probability": probability_of_improvement(x, y),
                "interval": list(chance) if chance else None,
                "paired_difference": _mean([paired_difference(*pair) for pair in finals]),
                "paired_difference_interval": list(difference) if difference else None,
            })  # fmt: skip
        return rows

    def curve(self, group: Group, task: str) -> dict[str, list[float]]:
        """Steps at which all runs of the group were evaluated, mean, lowest and highest return, mean seconds."""
        runs = group.runs_of(task)
        steps = sorted(set.intersection(*(set(run.evaluations) for run in runs))) if runs else []
        values = np.array([[run.return_at(step) for step in steps] for run in runs]).reshape(len(runs), len(steps))
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

    def published(self, task: str) -> list[PublishedReturn]:
        """Published returns of the task at the step nearest to where its runs end."""
        return published_near(task, max((run.last_step for run in self.runs if run.task == task), default=0))

    # --- warnings

    def find_warnings(self) -> list[str]:
        """What a reader must know before trusting the numbers."""
        warnings = [f"{run.path} is not finished: it counts with its evaluation at step {run.last_step:,}"
                    for run in self.runs if not run.finished]  # fmt: skip
        for task in self.tasks:
            runs = [run for run in self.runs if run.task == task]
            steps = sorted({run.last_step for run in runs})
            if len(steps) > 1:
                listed = ", ".join(f"{step:,}" for step in steps)
                warnings.append(f"{task}: the last evaluations are at different steps: {listed}")
            if len({frozenset(run.final_returns) for run in runs}) > 1:
                warnings.append(f"{task}: the last evaluations played different episodes")
        for group in self.groups:
            warnings += self.group_warnings(group)
        if differing := self.differing_between_groups():
            warnings.append(f"the groups differ in {', '.join(differing)} too")
        warnings += [f"{run.path}: the errors of its dreams are left out, they are of step {run.rollout_step:,}"
                     for run in self.runs if run.rollout_step not in (None, run.meta.get("step"))]  # fmt: skip
        commits = {(run.commit or "unknown")[:7] for run in self.runs}
        if len(commits) > 1:
            warnings.append(f"the runs are of different commits: {', '.join(sorted(commits))}")
        return warnings

    def group_warnings(self, group: Group) -> list[str]:
        """Missing tasks, too few or equal seeds, and settings in which the runs differ though they should not."""
        warnings, counts = [], {task: len(group.runs_of(task)) for task in self.tasks}
        few = [task for task, count in counts.items() if 0 < count < FEWEST_SEEDS]
        if missing := [task for task, count in counts.items() if not count]:
            warnings.append(f"{group.label} has no run of {', '.join(missing)}: its means are over fewer tasks")
        if few:
            fewest = min(few, key=lambda task: counts[task])
            more = f" and too few of {len(few) - 1} other tasks" if len(few) > 1 else ""
            what = f"{counts[fewest]} run{'' if counts[fewest] == 1 else 's'} of {fewest}{more}"
            warnings.append(f"{group.label} has {what}: no interval below {FEWEST_SEEDS}")
        for task in self.tasks:
            seeds = [str(run.setting("seed")) for run in group.runs_of(task)]
            if len(set(seeds)) < len(seeds):
                warnings.append(f"{group.label}: two runs of {task} have the same seed")
        if differing := _differing(group.runs, IGNORED | {*self.by, "task"}):
            warnings.append(f"{group.label}: its runs differ in {', '.join(differing)} too")
        return warnings

    def differing_between_groups(self) -> list[str]:
        """Settings in which the groups differ besides those that name them."""
        if "preset" in self.by:  # it stands for all that follows from it
            return []
        return _differing([group.runs[0] for group in self.groups], IGNORED | {*self.by, "task"})

    # --- for JSON and the report

    def content(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "tasks": self.tasks,
            "by": self.by,
            "warnings": self.warnings,
            "groups": self.table(),
            "improvement": self.improvements(),
            "curves": {
                task: {group.label: _finite_or_none(self.curve(group, task)) for group in self.groups}
                for task in self.tasks
            },
            "settings": self.settings(),
            "published": {task: [row._asdict() for row in self.published(task)] for task in self.tasks},
            "runs": [self.run_row(group, run) for group in self.groups for run in group.runs],
        }

    def settings(self) -> list[dict[str, Any]]:
        """Settings of the groups that are not those of the first run's preset: name, value by group, same.

        same: whether all groups have one value; those that differ come first. A group's value is its first run's.
        """
        name = self.runs[0].setting("preset")
        usual = to_dict(preset(name if name in PRESETS else "small"))
        changed = dict[str, None]()  # an ordered set
        for group in self.groups:
            changed |= dict.fromkeys(differences(usual, group.runs[0].settings))
        rows = []
        for name in changed:
            if name not in IGNORED | {"task", "preset"}:
                values = {group.label: group.runs[0].setting(name) for group in self.groups}
                rows.append({"name": name, "values": values, "same": len(set(map(str, values.values()))) == 1})
        return sorted(rows, key=lambda row: row["same"])

    def run_row(self, group: Group, run: RunRecord) -> dict[str, Any]:
        """One run as a line of runs.csv."""
        return {
            "group": group.label, "run": str(run.path), "task": run.task, "seed": run.setting("seed"),
            "step": run.last_step, "return": run.final_return, "last_3_evaluations": run.recent_return,
            "minutes": _mean([run.seconds_at(run.last_step) / 60]), "finished": run.finished,
            "commit": run.commit, "command": run.commands,
        }  # fmt: skip


def return_at_seconds(run: RunRecord, seconds: float) -> float | None:
    """The run's last evaluation that was done within so many seconds; None where there was none yet."""
    steps = [step for step in sorted(run.evaluations) if run.seconds_at(step) <= seconds * (1 + 1e-9)]
    return run.return_at(steps[-1]) if steps else None


def _differing(runs: Sequence[RunRecord], but: set[str]) -> list[str]:
    """The settings in which any of the runs differs from the first, without those of `but`."""
    names = dict[str, None]()  # an ordered set
    for run in runs[1:]:
        names |= dict.fromkeys(differences(runs[0].settings, run.settings))
    return [name for name in names if name not in but]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _finite_or_none(curve: Mapping[str, list[float]]) -> dict[str, list[float | None]]:
    """JSON knows no NaN: None for the seconds of a run without logged times."""
    return {name: [value if np.isfinite(value) else None for value in values] for name, values in curve.items()}
