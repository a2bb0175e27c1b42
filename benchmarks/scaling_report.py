"""Tables of the scaling study, from the rows of its cells.csv: gain of loops, controls, power laws, equal errors.

`write_report` writes report.md with pictures (`scaling_plots.py`), and gain.csv, controls.csv, exponents.csv and
replaced.csv with the same numbers. Intervals are of 95 % over training seeds, where nothing else is said.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scaling_fits import Interval, equal_size, growth, power_law
from scaling_nets import Net, families, nets_of, paired
from scaling_plots import draw_all

from agent.errors import UsageError
from agent.numbers import number

Row = dict[str, Any]


# ---------------------------------------------------------------------- tables


def gain_rows(nets: Sequence[Net]) -> list[Row]:
    """Error with one loop over the error with T, by system, width, T and k."""
    looped = {(net.system, net.width, net.loops, net.k): net for net in nets if net.core == "looped"}
    rows = []
    for (system, width, loops, k), net in sorted(looped.items()):
        base = looped.get((system, width, 1, k))
        if loops == 1 or base is None:
            continue
        gain, over_episodes, seeds = paired(base, net)
        row = {"system": system, "width": width, "loops": loops, "k": k, "one_loop": base.error, "error": net.error}
        row |= {"gain": gain.value, "low": gain.low, "high": gain.high, "seeds": seeds}
        rows.append(row | {"episodes_low": over_episodes[0], "episodes_high": over_episodes[1]})
    return rows


def growth_of(nets: Sequence[Net], system: str, width: int, loops: int) -> Interval | None:
    """b of gain ~ k ** b, over seeds that have every k; None when there are not two of them."""
    of = {(net.loops, net.k): net for net in nets if (net.core, net.system, net.width) == ("looped", system, width)}
    steps = sorted(k for depth, k in of if depth == loops and (1, k) in of)
    if len(steps) < 2:
        return None
    seeds = set.intersection(*(set(of[depth, k].errors) for depth in (1, loops) for k in steps))
    if not seeds:
        return None
    ratios = [[of[1, k].errors[seed] / of[loops, k].errors[seed] for k in steps] for seed in sorted(seeds)]
    return growth(steps, np.array(ratios))


def control_rows(nets: Sequence[Net]) -> list[Row]:
    """Error of every control over that of the looped net that it is matched to: above 1 where loops are better."""
    looped = {(net.system, net.width, net.loops, net.k): net for net in nets if net.core == "looped"}
    rows = []
    for net in nets:
        once = net.core in ("gru", "recurrent") and net.match == "params"  # one control for all loops
        depths = [loops for (system, width, loops, k) in looped if (system, width, k) == (net.system, net.width, net.k)]
        for loops in [] if net.core == "looped" else sorted(depths) if once else [net.loops]:
            base = looped.get((net.system, net.width, loops, net.k))
            if base is None:
                continue
            found, over_episodes, seeds = paired(net, base)
            row = {"system": net.system, "width": net.width, "loops": loops, "k": net.k, "control": net.core}
            row |= {"match": net.match, "params": net.params, "flops": net.flops, "error": net.error}
            row |= {"ratio": found.value, "low": found.low, "high": found.high, "seeds": seeds}
            rows.append(row | {"episodes_low": over_episodes[0], "episodes_high": over_episodes[1]})
    order = {"stacked": 0, "wide": 1, "gru": 2, "recurrent": 3, "supervised": 4}
    key = "system", "width", "k", "loops"
    return sorted(rows, key=lambda row: (*(row[name] for name in key), order[row["control"]], row["match"]))


def exponent_rows(nets: Sequence[Net]) -> list[Row]:
    """error ~ x ** -exponent in parameters (at equal loops), operations, loops (at equal width) and data."""
    rows: list[Row] = []

    def add(system: str, k: int, axis: str, family: str, x: Sequence[float], members: Sequence[Net]) -> None:
        law = power_law(x, [net.errors for net in members])
        if law is not None:
            row = {"system": system, "k": k, "axis": axis, "family": family, "points": law.points}
            rows.append(row | {**law.exponent._asdict(), "spread": law.spread})

    for system, k in sorted({(net.system, net.k) for net in nets}):
        here = [net for net in nets if (net.system, net.k) == (system, k)]
        for name, members in families(here):
            deep = name in ("looped", "separate blocks")  # one line for every T, or one for all
            for loops in sorted({net.loops for net in members}) if deep else [0]:
                some = [net for net in members if loops in (0, net.loops)]
                label = f"{name}, T={loops}" if loops else name
                add(system, k, "parameters", label, [net.params for net in some], some)
            add(system, k, "operations", name, [net.flops for net in members], members)
        for width in sorted({net.width for net in here}):
            some = [net for net in here if net.core == "looped" and net.width == width]
            add(system, k, "loops", f"looped, width {width}", [net.loops for net in some], some)
    shares: dict[tuple[Any, ...], list[Net]] = {}
    for net in nets:
        shares.setdefault((net.data, net.k, net.core, net.match, net.width, net.loops), []).append(net)
    for (data, k, core, match, width, loops), some in shares.items():
        label = f"{core}{'' if match == 'none' else f' ({match})'}, width {width}, T={loops}"
        add(data, k, "data", label, [net.pairs for net in some], some)
    return rows


def replaced_rows(nets: Sequence[Net]) -> list[Row]:
    """How many times the parameters of a net with T loops a net with one loop needs for the same error."""
    rows = []
    for net in sorted(nets, key=lambda net: (net.system, net.k, net.width, net.loops)):
        family = [other for other in nets if other.one_loop and (other.system, other.k) == (net.system, net.k)]
        if net.core != "looped" or net.loops == 1 or len({other.params for other in family}) < 2:
            continue
        size, where = equal_size([other.params for other in family], [other.errors for other in family], net.errors)
        row = {"system": net.system, "k": net.k, "width": net.width, "loops": net.loops, "params": net.params}
        row |= {"error": net.error, "one_loop_params": size.value, "where": where}
        names = "times", "low", "high"
        rows.append(row | {name: part / net.params for name, part in zip(names, size, strict=True)})
    return rows


# ---------------------------------------------------------------------- text


def shown(value: float, low: float, high: float) -> str:
    """1.43 [1.32, 1.55], or the value alone."""
    if math.isnan(low):
        return number(value, 3)
    ends = ["beyond" if math.isinf(end) else "below" if end == 0 else number(end, 3) for end in (low, high)]
    return f"{number(value, 3)} [{ends[0]}, {ends[1]}]"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def by_step(rows: Sequence[Row], names: Sequence[str], value: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table that has the steps side by side."""
    steps = sorted({row["k"] for row in rows})
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in names)
        lines.setdefault(key, {})[row["k"]] = shown(row[value], row["low"], row["high"])
    head = [*names, *(f"k = {k}" for k in steps)]
    return head, [[*key, *(found.get(k, "") for k in steps)] for key, found in lines.items()]


def gain_section(rows: list[Row], nets: Sequence[Net]) -> str:
    """Gain against k."""
    head, lines = by_step(rows, ("system", "width", "loops"), "gain")
    for line in lines:
        found = growth_of(nets, line[0], int(line[1]), int(line[2]))
        line.append("" if found is None else shown(*found))
    return table([*head, "b of gain ~ k^b"], lines)


def replaced_section(rows: list[Row]) -> str:
    """Parameters at equal error."""
    lines = []
    for row in rows:
        bound = {"beyond": "> ", "below": "< "}.get(row["where"], "")
        note = {"beyond": "beyond the range", "below": "below the range"}.get(row["where"], "")
        times = bound + shown(row["times"], row["low"], row["high"])
        place = [row["system"], str(row["k"]), str(row["width"]), str(row["loops"]), f"{row['params']:,}"]
        lines.append([*place, number(row["error"], 3), f"{bound}{row['one_loop_params']:,.0f}", times, note])
    head = "system", "k", "width", "loops", "parameters", "error", "with one loop", "times", ""
    return table(head, lines)


def exponent_section(rows: list[Row]) -> str:
    """Power laws."""
    names = ("axis", "family")
    lines = [
        [row["system"], str(row["k"]), *(row[name] for name in names), shown(row["value"], row["low"], row["high"])]
        + [str(row["points"]), number(row["spread"], 2)]
        for row in sorted(rows, key=lambda row: (row["axis"], row["system"], row["k"]))
    ]
    return table(("system", "k", *names, "exponent", "nets", "spread of log error"), lines)


SECTIONS = {
    "gain": "## Gain of loops\n\nError with one loop over the error with T loops, at the same width, and how it grows "
    "with k.\n\n![Gain of loops over k](gain.png)",
    "controls": "## Controls\n\nError of the control over the error of the looped net that it is matched to: above 1 "
    "where the looped net is better.\n\n![Error over operations](operations.png)",
    "replaced": "## Parameters that loops replace\n\nParameters at which nets with one loop reach the error, "
    "interpolated between their widths, over those of the looped net.\n\n![Error over parameters](parameters.png)",
    "exponents": "## Power laws\n\nerror ~ x^-exponent, fitted to logarithms; Student's intervals over seeds.\n\n"
    "![Error over loops at equal parameters and at equal operations](loops.png)",
}


def write_report(rows: Sequence[dict[str, str]], out: Path) -> str:
    """Write report.md, its tables as CSV and its pictures; returns a line that names it.

    Raises UsageError when there is no finished cell.
    """
    nets, diverged = nets_of(rows)
    if not nets:
        raise UsageError(f"{out} holds no finished cell: train some, with DATASET and --out {out}")
    found = {
        "gain": gain_rows(nets),
        "controls": control_rows(nets),
        "replaced": replaced_rows(nets),
        "exponents": exponent_rows(nets),
    }
    seeds, minutes = {seed for net in nets for seed in net.errors}, sum(float(row["seconds"]) for row in rows) / 60
    text = f"# Scaling\n\n{len(rows)} cells, {len(seeds)} seeds, {minutes:,.0f} minutes of one thread. Errors are "
    text += "squared errors over the variance of the change on held-out episodes, geometric means over seeds; in "
    text += "brackets 95 % intervals over seeds.\n"
    if diverged:
        text += f"\n**{diverged} cells diverged and are left out.**\n"
    bodies = {
        "gain": gain_section(found["gain"], nets),
        "controls": table(*by_step(found["controls"], ("system", "width", "loops", "control", "match"), "ratio")),
        "replaced": replaced_section(found["replaced"]),
        "exponents": exponent_section(found["exponents"]),
    }
    for name, section in found.items():
        if section:
            write_table(out / f"{name}.csv", section)
            text += f"\n{SECTIONS[name]}\n\n{bodies[name]}"
    draw_all(nets, found["gain"], out)
    (out / "report.md").write_text(text, encoding="utf-8")
    return f"report: {out / 'report.md'}"


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """As CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
