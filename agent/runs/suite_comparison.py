"""Runs over a suite: every task beside its published returns, and what can be said over all tasks.

A task counts as much as another, however many seeds it has. Numbers over tasks are over those of which every group has
runs, for the published methods too. Source of the performance profile: Agarwal et al. 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from agent.errors import UsageError
from agent.evaluation.statistics import aggregates, count_at_least, performance_profile
from agent.runs.compare import Comparison, Group
from agent.runs.published import PublishedReturn, published_near, published_returns
from agent.runs.run_record import RunRecord
from agent.runs.suites import Suite

THRESHOLDS = np.linspace(0.0, 1.0, 101)
"""Of the performance profile."""
OVER_TASKS = ("mean", "median", "iqm")


class SuiteComparison(Comparison):
    """The runs of a suite's tasks in groups, with their statistics; of other tasks they are left out.

    Args:
        suite: the list of tasks.
        runs, by: as of `Comparison`.

    Raises UsageError where no run is of the suite, and for unknown fields.
    """

    def __init__(self, suite: Suite, runs: Sequence[RunRecord], by: Sequence[str] = ()):
        self.suite = suite
        self.others = [run for run in runs if run.task not in suite.tasks]
        inside = [run for run in runs if run.task in suite.tasks]
        if not inside:
            raise UsageError(
                f"no run is of a task of {suite.marked}; their tasks are {_listed(self.others)}: leave --suite out, "
                "or give runs of its tasks"
            )
        super().__init__(inside, by, games=suite.tasks[0].startswith("atari"))

    @property
    def title(self) -> str:
        return f"{self.suite.marked} by {', '.join(self.by)}"

    @cached_property
    def compared(self) -> list[str]:
        """The tasks of which every group has runs."""
        return [task for task in self.suite.tasks if all(group.runs_of(task) for group in self.groups)]

    # --- task by task

    def step_of(self, task: str) -> int:
        """Where the runs of the task end; of a task without runs, where the others do."""
        return max(run.last_step for run in ([run for run in self.runs if run.task == task] or self.runs))

    def published(self, task: str) -> list[PublishedReturn]:
        return published_near(task, self.step_of(task))

    @cached_property
    def published_rows(self) -> dict[str, dict[str, PublishedReturn]]:
        """{method: {task: its return at the step nearest to the runs'}}, the methods by their mean, best first.

        Those without a return of one of the compared tasks come last.
        """
        found: dict[str, dict[str, PublishedReturn]] = {}
        for task in self.suite.tasks:
            for row in self.published(task):
                found.setdefault(row.method, {})[task] = row

        def order(method: str) -> tuple[bool, float, str]:
            means = self.over_tasks({task: row.value for task, row in found[method].items()})
            return means is None, -means["mean"] if means else 0.0, method

        return {method: found[method] for method in sorted(found, key=order)}

    def means(self, group: Group) -> dict[str, float]:
        """{task: mean over seeds of the last evaluations}, as returns."""
        return {task: float(np.mean([run.final_return for run in group.runs_of(task)]))
                for task in self.suite.tasks if group.runs_of(task)}  # fmt: skip

    def task_rows(self) -> list[dict[str, Any]]:
        """One row per task of the suite: the step at which its runs end, and the returns of groups and methods."""
        rows = []
        for task in self.suite.tasks:
            row: dict[str, Any] = {"task": task, "step": self.step_of(task), "groups": {}, "published": {}}
            for group in self.groups:
                if runs := group.runs_of(task):
                    value = self.means(group)[task]
                    row["groups"][group.label] = {"return": value, "score": self.score(task, value), "seeds": len(runs)}
            for method, published in self.published_rows.items():
                if task in published:
                    found = published[task]
                    row["published"][method] = {
                        "return": found.value, "score": self.score(task, found.value), "step": found.step,
                        "seeds": found.seeds, "episodes": found.episodes,
                    }  # fmt: skip
            rows.append(row)
        return rows

    def sampled(self) -> list[str]:
        """The methods whose returns are of training episodes: played with sampled actions, a little lower."""
        return [method for method, rows in self.published_rows.items()
                if any(row.episodes == "training" for row in rows.values())]  # fmt: skip

    # --- over tasks

    def over_tasks(self, returns: dict[str, float]) -> dict[str, float] | None:
        """Mean, median and IQM over the compared tasks, in `unit`; None where one of them has no return."""
        if not self.compared or any(task not in returns for task in self.compared):
            return None
        found = aggregates({task: [self.score(task, returns[task])] for task in self.compared})
        return {name: found[name] * self.scale for name in OVER_TASKS}

    def at_least(self) -> list[dict[str, Any]]:
        """Per group and method: on how many of the tasks that both have, the group is at or above the method."""
        rows = []
        for group in self.groups:
            for method, published in self.published_rows.items():
                theirs = {task: row.value for task, row in published.items()}
                better, tasks = count_at_least(self.means(group), theirs)
                if tasks:
                    rows.append({"group": group.label, "method": method, "at_least": better, "tasks": tasks})
        return rows

    def profiles(self) -> dict[str, Any]:
        """Share with a score above each threshold: of the runs of each group, of the task means of each method."""
        groups, methods = {}, {}
        for group in self.groups if self.compared else ():
            scores = self.scores(group)
            groups[group.label] = performance_profile({task: scores[task] for task in self.compared}, THRESHOLDS)
        for method, rows in self.published_rows.items():
            if self.compared and all(task in rows for task in self.compared):
                means = {task: [self.score(task, rows[task].value)] for task in self.compared}
                methods[method] = performance_profile(means, THRESHOLDS)
        return {
            "thresholds": THRESHOLDS.tolist(),
            "groups": {label: shares.tolist() for label, shares in groups.items()},
            "published": {method: shares.tolist() for method, shares in methods.items()},
        }

    def suite_curve(self, group: Group) -> dict[str, list[float]]:
        """Mean and IQM over the compared tasks, as scores, at the steps at which all their runs were evaluated."""
        runs = [run for task in self.compared for run in group.runs_of(task)]
        steps = sorted(set.intersection(*(set(run.evaluations) for run in runs))) if runs else []
        return self._curve({
            step: {task: float(np.mean([run.return_at(step) for run in group.runs_of(task)])) for task in self.compared}
            for step in steps
        })  # fmt: skip

    def published_curves(self) -> dict[str, dict[str, list[float]]]:
        """{method: the same at the steps of which it has a return of every compared task}."""
        returns: dict[str, dict[int, dict[str, float]]] = {}
        for row in published_returns():
            if row.task in self.compared:
                returns.setdefault(row.method, {}).setdefault(row.step, {})[row.task] = row.value
        curves = {method: self._curve(returns[method]) for method in sorted(returns)}
        return {method: curve for method, curve in curves.items() if curve["steps"]}

    def _curve(self, returns: dict[int, dict[str, float]]) -> dict[str, list[float]]:
        """{step: {task: return}} -> steps, mean and IQM, without the steps that lack a compared task."""
        means = {step: self.over_tasks(returns[step]) for step in sorted(returns)}
        known = {step: values for step, values in means.items() if values is not None}
        curve = {"steps": [float(step) for step in known]}
        return curve | {name: [values[name] / self.scale for values in known.values()] for name in ("mean", "iqm")}

    # --- warnings and content

    def find_warnings(self) -> list[str]:
        notes, tasks = [], self.suite.tasks
        if self.others:
            notes.append(f"left out, not in {self.suite.marked}: {len(self.others)} runs of {_listed(self.others)}")
        if missing := [task for task in tasks if task not in self.tasks]:
            notes.append(f"no runs of {len(missing)} of the {len(tasks)} tasks of {self.suite.marked}: "
                         f"{', '.join(missing)}")  # fmt: skip
        if not self.compared:
            notes.append("there is no task of which every group has runs: nothing is said over tasks")
        elif len(self.compared) < len(tasks):
            notes.append(f"what is said over tasks is over {len(self.compared)} of {len(tasks)}, those of which every "
                         "group has runs; of the published methods too")  # fmt: skip
        ends = sorted({self.step_of(task) for task in self.tasks})
        if len(ends) > 1:
            notes.append(f"the runs of some tasks end at step {ends[0]:,}, those of others at {ends[-1]:,}: numbers "
                         "over tasks mix them")  # fmt: skip
        for method, rows in self.published_rows.items():
            if lacking := [task for task in self.compared if task not in rows]:
                notes.append(f"{method} has no published return near these steps of {', '.join(lacking)}: it has no "
                             "numbers over tasks")  # fmt: skip
        return notes + super().find_warnings()

    def suite_content(self) -> dict[str, Any]:
        """What `Comparison.content` lacks, as plain values. Returns are in the tasks' own units, scores as `score`."""
        groups = {group.label: self.over_tasks(self.means(group)) for group in self.groups}
        methods = {method: self.over_tasks({task: row.value for task, row in rows.items()})
                   for method, rows in self.published_rows.items()}  # fmt: skip
        return {
            "name": self.suite.name,
            "source": self.suite.source,
            "unit": self.unit,
            "groups": list(groups),
            "methods": list(methods),
            "sampled": self.sampled(),
            "compared": self.compared,
            "rows": self.task_rows(),
            "over_tasks": {"groups": groups, "published": methods},
            "at_least": self.at_least(),
            "profile": self.profiles(),
            "curves": {
                "groups": {group.label: self.suite_curve(group) for group in self.groups},
                "published": self.published_curves(),
            },
        }

    def content(self) -> dict[str, Any]:
        return super().content() | {"suite": self.suite_content()}


def _listed(runs: Sequence[RunRecord], most: int = 6) -> str:
    """The tasks of the runs, the first few by name."""
    tasks = sorted({run.task for run in runs})
    more = f" and {len(tasks) - most} others" if len(tasks) > most else ""
    return ", ".join(tasks[:most]) + more
