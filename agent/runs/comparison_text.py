"""A comparison as text: the table of its groups, and of a suite the table of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.numbers import number, side_by_side


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `Comparison.table` as lines for the terminal."""
    lines = [["", "runs", "IQM", "mean", "median", "lowest", "highest", "95 % of the IQM", "minutes"]]
    for row in rows:
        returns = [number(row[name]) for name in ("iqm", "mean", "median", "lowest", "highest")]
        interval = f"[{', '.join(side_by_side(row['iqm_interval']))}]" if row["iqm_interval"] else "-"
        minutes = "-" if row["minutes"] is None else f"{row['minutes']:.1f}"
        lines.append([row["group"], str(row["runs"]), *returns, interval, minutes])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column from the left, the others from the right."""
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))

    def padded(cells: Sequence[str]) -> str:
        return "  ".join([f"{cells[0]:{first}s}", *(f"{c:>{w}s}" for c, w in zip(cells[1:], others, strict=True))])

    return "\n".join(map(padded, lines))


def suite_cells(suite: Mapping[str, Any], dash: str = "-") -> list[list[str]]:
    """The table of a suite as text: a heading, one row per task, and the mean, median and IQM over tasks.

    suite: of `SuiteComparison.suite_content`. Behind a group's mean return stands its number of seeds. Where a
    published return is of another step than the runs', the step is said: in the heading where all tasks have the same.
    """
    groups, methods, rows = suite["groups"], suite["methods"], suite["rows"]
    headings, marked = [], []
    for method in methods:
        pairs = [(row["published"][method]["step"], row["step"]) for row in rows if method in row["published"]]
        elsewhere, every = any(theirs != ours for theirs, ours in pairs), {theirs for theirs, _ in pairs}
        headings.append(f"{method} at {thousands(min(every))}" if elsewhere and len(every) == 1 else method)
        marked.append(elsewhere and len(every) > 1)
    lines = [["", *groups, *headings]]
    for row in rows:
        ours, theirs = [row["groups"].get(group) for group in groups], [row["published"].get(name) for name in methods]
        seeds = [f" ({entry['seeds']})" if entry else "" for entry in ours]
        steps = [f" at {thousands(entry['step'])}" if entry and mark and entry["step"] != row["step"] else ""
                 for entry, mark in zip(theirs, marked, strict=True)]  # fmt: skip
        values = _texts([entry["return"] if entry else None for entry in (*ours, *theirs)], dash)
        lines.append([row["task"], *map(str.__add__, values, [*seeds, *steps])])
    over = suite["over_tasks"]
    found = [*(over["groups"].get(group) for group in groups), *(over["published"].get(name) for name in methods)]
    for name, words in (("mean", "mean"), ("median", "median"), ("iqm", "IQM")):
        lines.append([words, *_texts([entry[name] if entry else None for entry in found], dash)])
    return lines


def _texts(values: Sequence[float | None], dash: str) -> list[str]:
    """Numbers of one kind to the same place; a dash for those that are missing."""
    known = [value for value in values if value is not None]
    texts = iter(side_by_side(known) if known else ())
    return [dash if value is None else next(texts) for value in values]


def format_suite(suite: Mapping[str, Any]) -> str:
    """The table of a suite, and on how many tasks each group is at least as good as each method, for the terminal."""
    head, *rows = suite_cells(suite)
    foot = f"over {len(suite['compared'])} tasks, {suite['unit']}s:"
    over = [foot, *[""] * (len(head) - 1)]
    table = aligned([head, *rows[:-3], over, *rows[-3:]])
    lines = [*map(str.rstrip, table.splitlines()), "", *at_least_lines(suite)]
    if suite["sampled"]:
        names = ", ".join(suite["sampled"])
        lines.append(f"{names}: training episodes with sampled actions, a little lower than evaluations")
    return "\n".join([*lines, "", f"over runs, {suite['unit']}s:"])


def at_least_lines(suite: Mapping[str, Any]) -> list[str]:
    """One line per group: at least DreamerV3 on 14 of 18 tasks, BRO on 9 of 18."""
    lines = []
    for group in suite["groups"]:
        found = [row for row in suite["at_least"] if row["group"] == group]
        parts = [f"{row['method']} on {row['at_least']} of {row['tasks']}" for row in found]
        if parts:
            lines.append(f"{group}: at least {', '.join(parts)} tasks")
    return lines


def thousands(step: int) -> str:
    """490k, or 500 where it is less than a thousand."""
    return f"{step / 1000:g}k" if step >= 1000 else str(step)
