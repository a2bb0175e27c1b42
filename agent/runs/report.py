"""A comparison as one HTML file that needs no network, with runs.csv and comparison.json beside it."""

from __future__ import annotations

import base64
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agent.errors import UsageError
from agent.numbers import number
from agent.runs import suite_plots
from agent.runs.compare import ROLLOUT_ERRORS, Comparison
from agent.runs.comparison_text import at_least_lines, suite_cells
from agent.runs.report_plots import curves, final_returns

EN_DASH = "\N{EN DASH}"
MOST_VIDEO = 4_000_000
"""Bytes of video that a report may hold."""


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write report.html, comparison.json and runs.csv into the folder, and return the first one's path.

    Raises UsageError when they cannot be written.
    """
    content = comparison.content()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # Names of folders may hold bytes that are no UTF-8.
        with (folder / "runs.csv").open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, list(content["runs"][0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(content["runs"])
        page = folder / "report.html"
        page.write_text(render(comparison, content), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        what = f"the report cannot be written to {folder} ({error.strerror})"
        raise UsageError(f"{what}: make room, or give another --out") from error
    return page


def render(comparison: Comparison, content: dict[str, Any]) -> str:
    """The page as HTML: report.html.j2 filled in with `Comparison.content`, the pictures and the videos."""
    page, suite = _templates().get_template("report.html.j2"), content.get("suite")
    return page.render(
        **{name: value for name, value in content.items() if name not in ("curves", "suite")},
        suite=suite and {**suite, **suite_parts(suite)},
        title=comparison.title,
        unit=comparison.unit,
        written=time.strftime("%F %R"),
        final_returns=final_returns(comparison, content["groups"]),
        curves={task: curves(comparison, task) for task in comparison.tasks},
        rollout_errors=ROLLOUT_ERRORS,
        has_rollouts=any(row[name] is not None for row in content["groups"] for name in ROLLOUT_ERRORS),
        videos=videos(comparison),
    )


def suite_parts(suite: dict[str, Any]) -> dict[str, Any]:
    """What suite.html.j2 shows of `SuiteComparison.suite_content` besides the content itself: texts and pictures."""
    parts: dict[str, Any] = {"cells": suite_cells(suite, EN_DASH), "at_least_lines": at_least_lines(suite)}
    if suite["compared"]:
        parts |= {"profile_picture": suite_plots.profile(suite), "curve_pictures": suite_plots.curves(suite)}
    return parts


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {"number": number_or_dash, "thousands": "{:,}".format, "verdict": verdict}
    return templates


def number_or_dash(value: float | None, digits: int = 4) -> str:
    """`number`, and a dash for None."""
    return EN_DASH if value is None else number(value, digits)


def verdict(interval: Sequence[float] | None) -> str:
    """What the interval of the probability of improvement says: only where it leaves out one half is there a winner."""
    if interval is None:
        return "too few seeds to say"
    low, high = interval
    return "better" if low > 0.5 else "worse" if high < 0.5 else "no difference"


def videos(comparison: Comparison) -> list[dict[str, Any]]:
    """The last evaluation's video of the best run of each group, while they are small enough.

    Each with its data URI, is_gif and a caption.
    """
    chosen, room = [], MOST_VIDEO
    for group in comparison.groups:
        for run in sorted(group.runs, key=lambda run: -run.final_return):
            files = sorted(path for path in run.path.glob("videos/eval_final.*") if path.is_file())
            if files and files[0].stat().st_size <= room:
                room -= files[0].stat().st_size
                is_gif = files[0].suffix == ".gif"
                data = base64.b64encode(files[0].read_bytes()).decode()
                uri = f"data:{'image/gif' if is_gif else 'video/mp4'};base64,{data}"
                caption = f"{group.label}, seed {run.setting('seed')}"
                chosen.append({"uri": uri, "is_gif": is_gif, "caption": caption})
                break
    return chosen
