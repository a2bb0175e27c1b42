"""Pictures of the scaling study: gain of loops over k; error over parameters, operations and loops.

One panel per system and width, or per system and k. Axes are logarithmic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scaling_fits import between
from scaling_nets import Net, families

from agent.evaluation.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTROLS = {"separate blocks": ("s", "tab:orange"), "gru": ("^", "tab:green"), "recurrent": ("v", "tab:red")}
"""Marker and colour of the families that are not looped; one loop is black."""


def draw_all(nets: Sequence[Net], gains: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write gain.png, parameters.png, operations.png and loops.png into the folder."""
    if gains:
        draw_gain(gains, out / "gain.png")
    draw_grid(nets, out / "parameters.png", over_parameters, "parameters")
    draw_grid(nets, out / "operations.png", over_operations, "operations per sample")
    draw_grid(nets, out / "loops.png", over_loops, "loops")


def shade(place: int, count: int) -> Any:
    """One of `count` colours from dark to light."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.9 * place / max(1, count - 1))


def draw_gain(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gain over k, one line per T."""
    systems, widths = sorted({row["system"] for row in rows}), sorted({row["width"] for row in rows})
    loops, steps = sorted({row["loops"] for row in rows}), sorted({row["k"] for row in rows})
    size = 3.4 * len(widths) + 1.2, 2.8 * len(systems)
    figure, axes = new_figure(*size, len(systems), len(widths))
    for i, system in enumerate(systems):
        for j, width in enumerate(widths):
            axis = axes[i, j]
            for place, depth in enumerate(loops):
                key = system, width, depth
                some = [row for row in rows if (row["system"], row["width"], row["loops"]) == key]
                some.sort(key=lambda row: row["k"])
                x, gain = [row["k"] for row in some], [row["gain"] for row in some]
                colour, label = shade(place, len(loops)), f"T = {depth}"
                axis.plot(x, gain, "o-", color=colour, markersize=4, label=label)
                low, high = [row["low"] for row in some], [row["high"] for row in some]
                axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            axis.axhline(1.0, color="0.7", linestyle=":")
            axis.set(title=f"{system}, width {width}", xlabel="k", ylabel="error with one loop / with T")
            logarithmic(axis, steps)
    legend(axes[0, -1])
    figure.savefig(path, dpi=120)


def draw_grid(nets: Sequence[Net], path: Path, draw: Any, label: str) -> None:
    """Error over something, a row of panels per system and a column per k."""
    systems, steps = sorted({net.system for net in nets}), sorted({net.k for net in nets})
    size = 3.6 * len(steps) + 1.6, 3.0 * len(systems)
    figure, axes = new_figure(*size, len(systems), len(steps))
    for i, system in enumerate(systems):
        for j, k in enumerate(steps):
            here = [net for net in nets if (net.system, net.k) == (system, k)]
            draw(axes[i, j], here)
            axes[i, j].set(title=f"{system}, k = {k}", xlabel=label, ylabel="error / variance")
            logarithmic(axes[i, j], sorted({net.loops for net in here}) if draw is over_loops else ())
    legend(max(axes.flat, key=lambda axis: (len(axis.get_legend_handles_labels()[0]), axis is axes[0, -1])))
    figure.savefig(path, dpi=120)


def over_parameters(axis: Axes, nets: Sequence[Net]) -> None:
    """Looped nets of equal T are joined, and those with one loop; controls are points."""
    _lines(axis, nets, "loops", "params")
    _controls(axis, nets, "params")


def over_operations(axis: Axes, nets: Sequence[Net]) -> None:
    """Looped nets of equal width, that is of equal parameters, are joined, and those with one loop."""
    _lines(axis, nets, "width", "flops")
    _controls(axis, nets, "flops")


def over_loops(axis: Axes, nets: Sequence[Net]) -> None:
    """Looped nets at equal parameters (one line per width), and at equal operations, interpolated between widths."""
    looped = [net for net in nets if net.core == "looped"]
    widths, depths = sorted({net.width for net in looped}), sorted({net.loops for net in looped})
    _lines(axis, nets, "width", "loops", one_loop=False)
    for place, width in enumerate(widths):
        same = [net for net in looped if net.width == width and net.loops == depths[len(depths) // 2]]
        x, y = iso_operations(looped, same[0].flops) if same else ([], [])
        if len(x) > 1:
            label = f"{same[0].flops / 1e3:,.0f} thousand operations"
            axis.plot(x, y, "x--", color=shade(place, len(widths)), markersize=4, label=label)


def iso_operations(looped: Sequence[Net], flops: float) -> tuple[list[int], list[float]]:
    """Loops, and the error of a looped net with so many operations; depths that have no width on both sides are left
    out."""
    x, y = [], []
    for loops in sorted({net.loops for net in looped}):
        some = [net for net in looped if net.loops == loops]
        error = between([net.flops for net in some], [net.error for net in some], flops)
        if error == error:  # not NaN
            x.append(loops)
            y.append(error)
    return x, y


def _lines(axis: Axes, nets: Sequence[Net], joined: str, x: str, one_loop: bool = True) -> None:
    """Looped nets, those with an equal `joined` on one line."""
    looped = [net for net in nets if net.core == "looped"]
    values = sorted({getattr(net, joined) for net in looped})
    for place, value in enumerate(values):
        some = sorted((net for net in looped if getattr(net, joined) == value), key=lambda net: getattr(net, x))
        label = f"looped, T = {value}" if joined == "loops" else f"looped, width {value}"
        _plot(axis, some, x, "o-", shade(place, len(values)), label)
    some = sorted((net for net in nets if net.one_loop), key=lambda net: getattr(net, x))
    if one_loop and some:
        _plot(axis, some, x, ".-", "black", "one loop, any width")


def _controls(axis: Axes, nets: Sequence[Net], x: str) -> None:
    for name, members in families(nets):
        if name in CONTROLS and members:
            marker, colour = CONTROLS[name]
            for match, filled in (("params", colour), ("flops", "none")):
                some = [net for net in members if net.match == match]
                if some:
                    place = [getattr(net, x) for net in some], [net.error for net in some]
                    label = f"{name}, equal {'parameters' if match == 'params' else 'operations'}"
                    axis.plot(*place, marker, color=colour, markerfacecolor=filled, markersize=5, label=label)


def _plot(axis: Axes, nets: Sequence[Net], x: str, style: str, colour: Any, label: str) -> None:
    """A line with the range of the seeds at every net."""
    place, error = [getattr(net, x) for net in nets], [net.error for net in nets]
    # of one seed the mean may differ from it by rounding
    low = [max(0.0, net.error - min(net.errors.values())) for net in nets]
    high = [max(0.0, max(net.errors.values()) - net.error) for net in nets]
    width = 1.0 if colour == "black" else 1.4
    look: dict[str, Any] = {"fmt": style, "color": colour, "markersize": 4, "lw": width, "elinewidth": 0.8}
    axis.errorbar(place, error, [low, high], label=label, **look)


def logarithmic(axis: Axes, ticks: Sequence[int]) -> None:
    """Both axes; with ticks at those values of x only."""
    axis.set_xscale("log", base=2 if ticks else 10)
    axis.set_yscale("log")
    if ticks:
        axis.set_xticks(list(ticks), [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        left, right = axis.get_xlim()
        between = "3" if right < 50 * left else ""  # more labels would touch each other
        threes = FuncFormatter(lambda value, _: f"{value:,.0f}" if f"{value:e}"[0] == between else "")
        axis.xaxis.set_minor_formatter(threes)
        axis.xaxis.set_major_locator(LogLocator(numticks=4))
        axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(_few))
    low, high = axis.get_ylim()
    if high < 4 * low:  # too narrow for powers of ten
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.grid(alpha=0.15)


def _few(value: float, _: Any) -> str:
    """Labels 2 and 5 of every power of ten, which short axes may otherwise be without."""
    first = f"{value:e}"[0]
    return f"{value:g}" if first in "25" else ""


def legend(axis: Axes) -> None:
    """Beside the axes."""
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

