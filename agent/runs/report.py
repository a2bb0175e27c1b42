"""A comparison as one HTML file that needs no network, with runs.csv and comparison.json beside it."""

from __future__ import annotations

import base64
import csv
import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.errors import UsageError
from agent.runs.compare import ROLLOUT, Comparison
from agent.runs.report_plots import curves, final_returns

MOST_VIDEO = 4_000_000
"""Bytes of video that a report may hold."""

STYLE = """
:root { color-scheme: light dark; --line: #d5d8dc; --soft: #5f6670; --back: #ffffff; --text: #1b1f24; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3f46; --soft: #a0a7b0; --back: #15181c; --text: #e6e8eb; --warn: #3d3113; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); }
.warn { background: var(--warn); border-radius: 6px; padding: .6rem 1rem; }
.warn ul { margin: .3rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; vertical-align: bottom; }
td.words, th.words { text-align: left; white-space: normal; min-width: 24rem; overflow-wrap: anywhere; }
code { font: .85rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
img, video { max-width: 100%; height: auto; display: block; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
summary { cursor: pointer; font-weight: 600; margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
"""


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write report.html, comparison.json and runs.csv into the folder, and return the first one's path.

    Raises UsageError when they cannot be written.
    """
    content = comparison.content()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with (folder / "runs.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(content["runs"][0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(content["runs"])
        page = folder / "report.html"
        page.write_text(as_html(comparison, content), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the report cannot be written to {folder}: {error.strerror}") from error
    return page


def as_html(comparison: Comparison, content: dict[str, Any]) -> str:
    """The whole page."""
    title = f"{', '.join(comparison.tasks)} by {', '.join(comparison.by)}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{len(comparison.runs)} runs in {len(comparison.groups)} groups, '
        f"written {time.strftime('%F %R')}. The return of a run is the mean of its last evaluation; a group is what "
        "differs by seed alone.</p>",
        _warnings(content["warnings"]),
        "<h2>Final returns</h2>",
        _final_table(content["groups"]),
        final_returns(comparison, content["groups"]),
        '<p class="soft">IQM: mean of the middle half of the runs. In brackets 95 % intervals by a bootstrap over '
        "seeds within each task, given from five seeds on.</p>",
        "<h2>Steadiness and cost</h2>",
        _cost_table(content["groups"]),
        '<p class="soft">The column with a number of minutes holds the last evaluation that each run had done by '
        "then, the time of the quickest finished run; a group has none while one of its runs had none.</p>",
    ]
    if any(row[name] is not None for row in content["groups"] for name in ROLLOUT):
        parts += ["<h2>Dreams</h2>", _dream_table(content["groups"])]
    for task in comparison.tasks:
        parts += [f"<h2>Learning curves, {_text(task)}</h2>", curves(comparison, task), _anchors(content, task)]
    if content["improvement"]:
        parts += ["<h2>Which is better?</h2>", _improvement_table(content["improvement"])]
    parts += ["<h2>Settings</h2>", _settings_table(content["settings"])]
    parts += [_films(comparison), "<details open><summary>Runs</summary>", _run_table(content["runs"]), "</details>"]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n<main>\n{body}\n</main>\n</html>\n"
    )


# ---------------------------------------------------------------------- tables


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, digits: int = 4) -> str:
    return "&ndash;" if value is None else f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def _with_interval(row: dict[str, Any], name: str) -> str:
    ends = row[f"{name}_interval"]
    return _number(row[name]) + (f" [{_number(ends[0])}, {_number(ends[1])}]" if ends else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; one that starts with <code> holds words, not a number."""
    worded = [bool(rows) and cell.startswith("<code>") for cell in rows[0]]
    top = "".join(f"<th{' class=words' * is_words}>{cell}</th>" for cell, is_words in zip(head, worded, strict=True))
    lines = []
    for row in rows:
        kinds = [' class="words"' if cell.startswith("<code>") else "" for cell in row]
        lines.append("<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<div class="warn"><b>Before you believe the numbers</b><ul>{items}</ul></div>'


def _final_table(rows: Sequence[dict[str, Any]]) -> str:
    gap = "optimality_gap" in rows[0]
    head = ["group", "runs", "IQM", "mean", "median", "lowest", "highest", *(["optimality gap"] if gap else [])]
    cells = []
    for row in rows:
        numbers = [_with_interval(row, name) for name in ("iqm", "mean", "median")]
        numbers += [_number(row["lowest"]), _number(row["highest"])]
        numbers += [_with_interval(row, "optimality_gap")] if gap else []
        cells.append([_text(row["group"]), str(row["runs"]), *numbers])
    return _table(head, cells)


def _cost_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["group", "3 evaluations<br>before the last", "last 10 training<br>episodes", "steps", "minutes",
            f"return at {_number(rows[0]['equal_minutes'], 3)}<br>minutes", "updates/s"]  # fmt: skip
    cells = [
        [_text(row["group"]), _number(row["last_3_evaluations"]), _number(row["last_10_training_episodes"]),
         f"{row['steps']:,}", _number(row["minutes"], 3), _number(row["at_equal_minutes"]),
         _number(row["updates_per_second"], 3)]
        for row in rows
    ]  # fmt: skip
    return _table(head, cells)


def _dream_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["group", "return", "observation error<br>5 steps", "15 steps", "reward error<br>5 steps", "15 steps",
            "value promised<br>- realised", "its mean error", "minutes"]  # fmt: skip
    cells = []
    for row in rows:
        found = [_number(row[name], 3) for name in (*ROLLOUT, "minutes")]
        cells.append([_text(row["group"]), _number(row["iqm"]), *found])
    said = "Of the runs on which evaluate.py model was called, on the agent's own episodes; observation errors over "
    said += "the variance of all recorded rows."
    return _table(head, cells) + f'<p class="soft">{said}</p>'


def _improvement_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        ends = row["interval"]
        chance = f"{row['probability']:.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
        # Without an interval nothing is said; with one, only where it leaves out one half.
        verdict = "too few seeds to say"
        if ends:
            verdict = "no difference" if ends[0] <= 0.5 <= ends[1] else ("better" if ends[0] > 0.5 else "worse")
        paired = _with_interval(row, "paired_difference")
        cells.append([_text(row["one"]), _text(row["other"]), chance, verdict, paired])
    head = ["first", "second", "chance that a run<br>of the first is better", "verdict"]
    head.append("first - second,<br>same episodes")
    return _table(head, cells)


def _run_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [_text(row["group"]), _text(row["task"]), str(row["seed"]), f"{row['step']:,}", _number(row["return"]),
         _number(row["minutes"], 3), _text((row["commit"] or "unknown")[:7]), f"<code>{_text(row['command'])}</code>"]
        for row in rows
    ]  # fmt: skip
    return _table(["group", "task", "seed", "steps", "return", "minutes", "commit", "command"], cells)


def _settings_table(rows: Sequence[dict[str, Any]]) -> str:
    """What the groups were given beyond their presets; what differs between groups stands first."""
    if not rows:
        return "<p>Every group has the settings of its preset.</p>"
    names = list(rows[0]["values"])
    cells = [
        [f"{_text(row['name'])}{'' if row['same'] else ' *'}", *(_text(row["values"][name]) for name in names)]
        for row in rows
    ]
    return _table(["setting", *map(_text, names)], cells) + '<p class="soft">*: the groups differ.</p>'


def _anchors(content: dict[str, Any], task: str) -> str:
    rows = content["published"][task]
    if not rows:
        return ""
    cells = [
        [_text(row["method"]), _number(row["value"]), f"{row['step']:,}", str(row["seeds"]), row["episodes"],
         f"<code>{_text(row['source'])}</code>"]
        for row in rows
    ]  # fmt: skip
    table = _table(["published", "return", "steps", "seeds", "episodes", "source"], cells)
    return f"{table}<p class='soft'>Training episodes are played with sampled actions and are a little lower.</p>"


# ---------------------------------------------------------------------- films


def _films(comparison: Comparison) -> str:
    """The last evaluation's video of the best run of each group, while they are small enough."""
    found, room = [], MOST_VIDEO
    for group in comparison.groups:
        for run in sorted(group.runs, key=lambda run: -run.score):
            films = sorted(run.path.glob("videos/eval_final.*"))
            if films and films[0].stat().st_size <= room:
                room -= films[0].stat().st_size
                found.append(_film(films[0], f"{group.label}, seed {run.setting('seed')}"))
                break
    return f'<h2>Videos</h2><div class="films">{"".join(found)}</div>' if found else ""


def _film(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".gif":
        film = f'<img src="data:image/gif;base64,{data}" alt="An episode of {_text(caption)}">'
    else:
        film = f'<video controls loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
    return f"<figure>{film}<figcaption>{_text(caption)}</figcaption></figure>"
