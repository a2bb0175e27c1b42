"""The pictures of a suite's report: the performance profile, and returns over tasks by steps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent.runs.report_plots import COLOURS, Picture, in_thousands, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS: Any = "steps-post"
"""A share is that of its threshold up to the next one."""


def profile(suite: Mapping[str, Any]) -> Picture:
    """Share of runs that score above each threshold; suite: of `SuiteComparison.suite_content`."""

    def draw(axes: Axes, _: str) -> None:
        found = suite["profile"]
        for number, (label, shares) in enumerate(found["groups"].items()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(found["thresholds"], shares, color=colour, label=_wrapped(label), drawstyle=STEPS)
        for method, shares in found["published"].items():
            axes.plot(found["thresholds"], shares, label=method, drawstyle=STEPS, **_published(suite, method))
        axes.set(xlabel=_units(suite), ylabel="share above it", xlim=(0.0, 1.0), ylim=(-0.02, 1.02))
        _finish(axes)

    return picture(draw, "Share of runs above each score, by group and published method")


def curves(suite: Mapping[str, Any]) -> list[Picture]:
    """Mean and IQM over the tasks by steps."""

    def over(name: str, words: str) -> Picture:
        return picture(lambda axes, _: _curve(axes, suite, name, words), f"{words} over the tasks by steps")

    return [over("mean", "mean"), over("iqm", "IQM")]


def _curve(axes: Axes, suite: Mapping[str, Any], name: str, words: str) -> None:
    last = max(row["step"] for row in suite["rows"])
    for number, (label, curve) in enumerate(suite["curves"]["groups"].items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(curve["steps"], curve[name], color=colour, marker="o", markersize=3, label=_wrapped(label))
    for method in (method for method in suite["methods"] if method in suite["curves"]["published"]):
        curve = suite["curves"]["published"][method]
        # Later steps would squeeze the runs' curves; what is published of no step before has its first one.
        shown = [i for i, step in enumerate(curve["steps"]) if step <= 1.25 * last] or [0]
        x, y = ([curve[key][i] for i in shown] for key in ("steps", name))
        axes.plot(x, y, marker="x", markersize=5, label=method, **_published(suite, method))
    axes.set(xlabel="steps", ylabel=f"{words} over tasks of {_units(suite)}")
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.xaxis.set_major_formatter(in_thousands)
    _finish(axes)


def _published(suite: Mapping[str, Any], method: str) -> dict[str, Any]:
    """How the line of a published method looks: dotted, in the colours that the groups leave."""
    number = len(suite["groups"]) + suite["methods"].index(method)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ":", "linewidth": 1.3}


def _wrapped(label: str) -> str:
    """The label on lines that leave room for the axes beside it."""
    return textwrap.fill(textwrap.shorten(label, 120), 24)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.15)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # lines are everywhere inside


def _units(suite: Mapping[str, Any]) -> str:
    return "return / 1,000" if suite["unit"] == "return" else suite["unit"]
