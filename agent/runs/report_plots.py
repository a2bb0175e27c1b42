"""The pictures of a report, as data URIs: drawn for light and for dark screens."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.runs.compare import Comparison
from agent.runs.published import PublishedReturn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B0A000", "#7F7F7F")
"""Okabe and Ito's, which colour-blind people can tell apart."""

Draw = Callable[["Axes", str], None]
"""Draws into axes; the second argument is the colour of what is neither group nor background."""


class Picture(NamedTuple):
    """A picture as two data URIs, for light and for dark screens, and what it shows in words."""

    light: str
    dark: str
    alt: str


def curves(comparison: Comparison, task: str) -> list[Picture]:
    """Learning curves over steps and over minutes: every seed, and the mean of each group."""

    def over(axis: str, words: str) -> Picture:
        return picture(lambda axes, ink: _curves(axes, ink, comparison, task, axis, words), f"Return over {words}")

    return [over("steps", "steps"), over("seconds", "minutes")]


def final_returns(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> Picture:
    """The last evaluation of every seed, and the IQM of each group with its interval where there is one."""

    def draw(axes: Axes, ink: str) -> None:
        for number, (group, row) in enumerate(zip(comparison.groups, rows, strict=True)):
            scores = [comparison.in_unit(run).final_return for run in group.runs]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(scores, [number] * len(scores), "o", color=colour, alpha=0.5, markersize=6, markeredgewidth=0)
            axes.plot([row["iqm"]], [number], "|", color=ink, markersize=16, markeredgewidth=2)
            if row["iqm_interval"]:
                axes.plot(row["iqm_interval"], [number, number], color=ink, linewidth=1)
        axes.set(xlabel=comparison.unit, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [row["group"] for row in rows])
        axes.grid(axis="x", alpha=0.15)

    return picture(draw, "Final return of every seed by group", height=0.9 + 0.35 * len(rows))


def picture(draw: Draw, alt: str, height: float = 4.0) -> Picture:
    """Draw once with dark ink and once with light ink; height in inches."""
    return Picture(_svg(draw, "#1b1f24", height), _svg(draw, "#e6e8eb", height), alt)


def in_thousands(value: float, _: float) -> str:
    """Steps or minutes beside an axis: 50k, or 500. matplotlib calls it, and gives the position of the mark too."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _svg(draw: Draw, ink: str, height: float) -> str:
    """As a data URI."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: Any = {**dict.fromkeys(inked, ink), "svg.fonttype": "none", "font.family": "sans-serif"}
    style["text.parse_math"] = False  # labels hold values of settings: a $ in one is no formula
    with rc_context(style):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes, ink)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue().encode()).decode()


def _curves(axes: Axes, ink: str, comparison: Comparison, task: str, axis: str, words: str) -> None:
    for number, group in enumerate(comparison.groups):
        curve, colour = comparison.curve(group, task), COLOURS[number % len(COLOURS)]
        for run in group.runs_of(task):
            steps = sorted(run.evaluations)
            x = steps if axis == "steps" else [run.seconds_at(step) / 60 for step in steps]
            axes.plot(x, [run.return_at(step) for step in steps], color=colour, alpha=0.3, linewidth=0.8)
        x = curve["steps"] if axis == "steps" else [second / 60 for second in curve["seconds"]]
        axes.plot(x, curve["mean"], color=colour, marker="o", markersize=3, label=group.label)
    last = max(run.last_step for run in comparison.runs if run.task == task)
    _published(axes, comparison.published(task), last, ink)
    axes.set(xlabel=words, ylabel="return")
    axes.xaxis.set_major_formatter(in_thousands)
    axes.grid(alpha=0.15)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _published(axes: Axes, rows: Sequence[PublishedReturn], last: int, ink: str) -> None:
    """A dotted line for each published return, its step said where it is not near `last`; names whose lines lie close
    share a label."""
    low, high = axes.get_ylim()
    high = max([high, *(row.value for row in rows)])
    labels: list[tuple[float, list[str]]] = []
    for row in rows:  # from the highest
        axes.axhline(row.value, color=ink, alpha=0.3, linestyle=":", linewidth=1)
        name = row.method if abs(row.step - last) <= last / 4 else f"{row.method} at {row.step // 1000}k"
        if labels and labels[-1][0] - row.value < 0.06 * (high - min(low, 0.0)):
            labels[-1][1].append(name)
        else:
            labels.append((row.value, [name]))
    for value, names in labels:
        axes.annotate(
            ", ".join(names), (0, value), xycoords=("axes fraction", "data"), xytext=(2, 2),
            textcoords="offset points", fontsize=7, alpha=0.75,
        )  # fmt: skip
