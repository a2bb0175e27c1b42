"""The grid of a sweep: its fields and values, the runs that they make, and what their folders already hold."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import UsageError
from agent.runs.cli import load_yaml
from agent.runs.config import Config
from agent.runs.folder import read_meta
from agent.settings import differences, known_name, option, to_dict

Parse = Callable[[Sequence[str]], Config]
"""Arguments of train_agent.py -> their settings, checked; raises UsageError or ends the program like the real one."""

FREE = {"run_dir", "resume", "video", "device", "train.threads", "optimizer.workers"}
"""Settings in which a run found in a cell's folder may differ from what the sweep would give it."""


@dataclass(frozen=True)
class Grid:
    """What the options of a sweep say. fields {dotted name: its values as typed}."""

    fields: dict[str, list[str]]
    jobs: int
    show: bool
    words: list[str]
    """The other arguments, the same for all runs."""


@dataclass
class Cell:
    """One run of the grid."""

    name: str
    folder: Path
    words: list[str]
    resumes: bool = True
    """Whether an interrupted run of this kind can go on."""
    state: str = "waiting"
    note: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def command(self) -> str:
        """What a person would type in the project's folder."""
        return shlex.join(["python", "train_agent.py", *self.words])


def take_grid(argv: Sequence[str]) -> Grid | None:
    """The sweep that a command line asks for; None where there is no --sweep. Raises UsageError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--sweep", action="append", metavar="FIELD=V1,V2,..")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--commands", action="store_true")
    try:
        mine, words = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; write --sweep FIELD=V1,V2 --jobs N") from error
    if not mine.sweep:
        return None
    if mine.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {mine.jobs}")
    fields: dict[str, list[str]] = {}
    for text in mine.sweep:
        name, equals, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not equals or not all(values):
            raise UsageError(f"--sweep {text} gives no values; write --sweep FIELD=V1,V2, as in --sweep seed=0,1,2")
        field = known_name(Config, name)
        if field in ("run_dir", "resume") or field in fields:
            raise UsageError(f"--sweep {text}: {'twice' if field in fields else 'every run has its own'} {field}")
        if len(set(values)) < len(values):
            raise UsageError(f"--sweep {text} holds a value twice")
        fields[field] = values
    return Grid(fields, mine.jobs, mine.commands, words)


def make_cells(grid: Grid, parse: Parse) -> list[Cell]:
    """All runs of the grid, their settings checked before the first one starts, and what their folders hold.

    Raises UsageError.
    """
    base, words = _split_folder(grid.words)
    short = {field: field.rpartition(".")[2] for field in grid.fields}
    if len(set(short.values())) < len(short):
        short = {field: field for field in grid.fields}
    cells = []
    for values in itertools.product(*grid.fields.values()):
        chosen = dict(zip(grid.fields, values, strict=True))
        name = ",".join(f"{short[field]}={_plain(value)}" for field, value in chosen.items())
        mine = [chosen.pop("task")] if "task" in chosen else []
        mine += words
        for field, value in chosen.items():
            mine += _option(field, value)
        config = parse(mine)
        if config.resume:
            raise UsageError("--sweep begins runs and goes on with its own by itself: leave --resume out")
        if grid.jobs > 1 and config.train.threads == 0:
            mine += ["--train.threads", "1"]  # they would choose two where they find the machine idle
        given = any(word.startswith("--optimizer.workers") for word in mine)
        if grid.jobs > 1 and config.agent == "dreamer" and config.optimizer.workers > 1 and not given:
            mine += ["--optimizer.workers", "1"]  # the other jobs have the other cores
        folder = base / name
        resumes = config.agent == "dreamer" and not config.model_only
        cell = Cell(name, folder, [*mine, "--run-dir", str(folder)], resumes)
        look(cell, config)
        cells.append(cell)
    if len({cell.name for cell in cells}) < len(cells):
        raise UsageError("two runs of the sweep would have the same folder: their values differ in special signs only")
    return cells


def _option(field: str, value: str) -> list[str]:
    """A setting as words of the command line; switches are spelt --name and --no-name."""
    head, _, last = field.rpartition(".")
    if value.lower() in ("true", "false"):
        stem = last if value.lower() == "true" else f"no-{last}"
        return [option(f"{head}.{stem}" if head else stem)]
    return [option(field), value]


def _split_folder(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder of the sweep, and the other words. Raises UsageError where there is none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", "--run_dir", nargs="?")
    found, others = parser.parse_known_args(words)
    if not found.run_dir:
        raise UsageError("a sweep needs a folder for its runs: give --run-dir DIR")
    return Path(found.run_dir), others


def _plain(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", value)


def look(cell: Cell, config: Config) -> None:
    """Read the cell's state off its folder: waiting, done, or waiting to be resumed.

    Raises UsageError where the folder holds a run with other settings: it would be taken for this one.
    """
    if not cell.folder.exists() or not any(cell.folder.iterdir()):
        return
    settings = cell.folder / "config.yaml"
    if settings.exists():
        found = to_dict(load_yaml(settings))
        changed = [name for name in differences(to_dict(config), found) if name not in FREE]
        if changed:
            raise UsageError(
                f"{cell.folder} holds a run with other settings ({', '.join(changed)}): finished runs stay as they "
                "are, give the sweep another --run-dir"
            )
    facts = read_meta(cell.folder)
    if facts.get("finished"):
        cell.state, cell.note = "done", results(facts)
    elif (cell.folder / "checkpoints" / "latest.pt").exists() and cell.resumes:
        cell.state = "stopped"


def results(facts: dict[str, Any]) -> str:
    """What a finished run's meta.json says of its worth, in a few words."""
    found = facts.get("results") or {}
    if "final" in found:
        return f"return {found['final']['mean']:.4g} +- {found['final']['std']:.3g}"
    return "  ".join(f"{name} {value:.3g}" for name, value in found.items() if isinstance(value, float))
