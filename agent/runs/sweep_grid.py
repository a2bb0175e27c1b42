"""The grid of a sweep: its fields and values, the runs that they make, and what the runs' folders already hold."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.data.checkpoint import find_checkpoint, has_saved, read_checkpoint
from agent.errors import UsageError
from agent.numbers import mean_and_spread, number
from agent.runs.cli import load_yaml
from agent.runs.config import Config
from agent.runs.folder import read_meta
from agent.runs.header import command
from agent.runs.suites import expand
from agent.settings import differences, known_name, option, to_dict

Parse = Callable[[Sequence[str]], Config]
"""Arguments of train_agent.py -> their settings, checked; raises UsageError or ends the program like the real one."""

MAY_DIFFER = {"run_dir", "resume", "video", "device", "train.threads", "optimizer.workers"}
"""Settings in which a run that is already there may differ from what the sweep would give it."""


PATHS = {"--run-dir", "--dataset", "--config", "--dream"}
"""Options whose values are paths."""


MOST_RUNS = 10_000
"""Of one sweep: they are checked one by one before the first one starts."""


@dataclass(frozen=True)
class SweepGrid:
    """A parsed sweep."""

    fields: dict[str, list[str]]
    """{dotted name of a setting: its values as typed, lists of tasks as their tasks}"""
    jobs: int
    """Runs at a time."""
    print_commands: bool
    """Only print the commands of the runs."""
    arguments: list[str]
    """The other arguments, the same for all runs."""
    on: str = "here"
    """here, or ray: on the nodes of a Ray cluster."""
    cpus: float = 1.0
    """Of a node, for one run; as Ray counts them."""
    gpus: float = 0.0
    tune: bool = False
    """Whether runs that fall behind end early."""


class RunProcess(Protocol):
    """A run at work, on this machine or another one."""

    def poll(self) -> int | None:
        """None while it works, then its exit status; LOST where its node was lost."""

    def send_signal(self, number: int) -> None:
        """Send it a signal."""

    def said(self) -> str:
        """The last line of its output."""


LOST = -1000
"""In place of an exit status."""

MOST_LOSSES = 3
"""How often a run starts again because its node was lost."""


@dataclass
class SweepRun:
    """One run of the grid."""

    name: str
    folder: Path
    arguments: list[str]
    """Of train_agent.py."""
    can_resume: bool = True
    """Whether an interrupted run of this kind can be resumed."""
    state: str = "waiting"
    """waiting, running, stopped (to be resumed), saved (by Ctrl-C), done or failed."""
    note: str = ""
    """A few words beside the state: the last line of its log, or its result."""
    process: RunProcess | None = None
    losses: int = 0
    """How often its node was lost."""

    def begun(self) -> str:
        """stopped, where there is something to go on with, else waiting."""
        return "stopped" if has_saved(self.folder) and self.can_resume else "waiting"

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def elsewhere(self, arguments: Sequence[str]) -> list[str]:
        """Arguments as a node of a cluster understands them: paths, this run's folder among them, are absolute."""
        return [str(self.folder.absolute()) if w == str(self.folder) else w for w in _with_absolute_paths(arguments)]

    @property
    def command(self) -> str:
        """What a person would type, in any folder."""
        return command("train_agent.py", *_with_absolute_paths(self.arguments))


def parse_sweep(argv: Sequence[str]) -> SweepGrid | None:
    """The sweep that a command line asks for; None where there is no --sweep. Raises UsageError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--sweep", action="append", metavar="FIELD=V1,V2,..")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--on", choices=("here", "ray"), default="here")
    parser.add_argument("--cpus", type=float, default=1.0)
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--tune", action="store_true")
    try:
        options, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; write --sweep FIELD=V1,V2 --jobs N") from error
    if not options.sweep:
        only_here = ("--jobs", "--commands", "--on", "--cpus", "--gpus", "--tune")
        alone = [option for option in only_here if on_command_line(argv, option)]
        if alone:
            raise UsageError(f"{', '.join(alone)} belongs to a sweep: add --sweep FIELD=V1,V2, or leave it out")
        return None
    jobs = options.jobs if options.jobs is not None else 1 if options.on == "here" else MOST_RUNS
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if options.on == "here" and (options.cpus, options.gpus) != (1.0, 0.0):
        raise UsageError("--cpus and --gpus are what a run takes of a Ray cluster: add --on ray, or leave them out")
    if options.tune and options.on == "here":
        raise UsageError("--tune lets Ray Tune end runs early: add --on ray")
    if min(options.cpus, options.gpus) < 0 or not options.cpus + options.gpus < math.inf:
        raise UsageError(f"--cpus and --gpus must be 0 or more, got {options.cpus:g} and {options.gpus:g}")
    fields: dict[str, list[str]] = {}
    for text in options.sweep:
        name, equals, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not equals or not all(values):
            raise UsageError(f"--sweep {text} gives no values; write --sweep FIELD=V1,V2, as in --sweep seed=0,1,2")
        field = known_name(Config, name)
        if field in ("run_dir", "resume") or field in fields:
            raise UsageError(f"--sweep {text}: {'twice' if field in fields else 'every run has its own'} {field}")
        if len(set(values)) < len(values):
            raise UsageError(f"--sweep {text} holds a value twice")
        fields[field] = expand(values) if field == "task" else values
    if math.prod(map(len, fields.values())) > MOST_RUNS:
        raise UsageError(f"the sweep has more than {MOST_RUNS:,} runs: give fewer values")
    return SweepGrid(fields, jobs, options.commands, others, options.on, options.cpus, options.gpus, options.tune)


def make_runs(grid: SweepGrid, parse: Parse) -> list[SweepRun]:
    """All runs of the grid, their settings checked before the first one starts, and what their folders hold.

    Raises UsageError.
    """
    base, shared = _split_run_dir(grid.arguments)
    if "task" in grid.fields and shared and not shared[0].startswith("-"):
        raise UsageError(f"--sweep task=... names the tasks already: leave {shared[0]} out, or add it to them")
    short = {field: field.rpartition(".")[2] for field in grid.fields}
    if len(set(short.values())) < len(short):
        short = {field: field for field in grid.fields}
    runs = []
    for values in itertools.product(*grid.fields.values()):
        chosen = dict(zip(grid.fields, values, strict=True))
        name = ",".join(f"{short[field]}={_folder_name(value)}" for field, value in chosen.items())
        arguments = [chosen.pop("task")] if "task" in chosen else []
        arguments += shared
        for field, value in chosen.items():
            arguments += _as_option(field, value)
        config = parse(arguments)
        if config.resume:
            raise UsageError("--sweep starts new runs and resumes its own by itself: leave --resume out")
        arguments += _as_checked(config, arguments) + _one_core_each(grid, config, arguments)
        folder = base / name
        can_resume = config.agent == "dreamer" and not config.model_only
        run = SweepRun(name, folder, [*arguments, "--run-dir", str(folder)], can_resume)
        inspect(run, config)
        runs.append(run)
    if len({run.name for run in runs}) < len(runs):
        raise UsageError(
            "two runs of the sweep would have the same folder: their values differ in punctuation only; "
            "sweep them apart, each with a --run-dir of its own"
        )
    return runs


def _as_checked(config: Config, arguments: Sequence[str]) -> list[str]:
    """More arguments, so that a run on another machine has the preset that was checked here: it depends on GPUs and
    cores."""
    more: list[str] = []
    if not any(word.startswith("--preset") for word in arguments):
        more += ["--preset", config.preset]
    if config.preset == "base" and not any(word.startswith("--train.envs") for word in arguments):
        more += ["--train.envs", str(config.train.envs)]
    return more


def _one_core_each(grid: SweepGrid, config: Config, arguments: Sequence[str]) -> list[str]:
    """More arguments for runs that share the machine with others: one thread and one process each."""
    more: list[str] = []
    if grid.on == "ray" and grid.cpus > 1:
        return more
    if grid.jobs > 1 and config.train.threads == 0:
        more += ["--train.threads", "1"]  # they would choose two where they find the machine idle
    given = any(word.startswith("--optimizer.workers") for word in arguments)
    if grid.jobs > 1 and config.agent == "dreamer" and config.optimizer.workers > 1 and not given:
        more += ["--optimizer.workers", "1"]  # the other jobs have the other cores
    return more


def on_command_line(argv: Sequence[str], option: str) -> bool:
    """Whether an option stands on a command line, alone or with its value behind =."""
    return any(word.partition("=")[0] == option for word in argv)


def _as_option(field: str, value: str) -> list[str]:
    """A setting as arguments of the command line; switches are spelt --name and --no-name."""
    head, _, last = field.rpartition(".")
    if value.lower() in ("true", "false"):
        stem = last if value.lower() == "true" else f"no-{last}"
        return [option(f"{head}.{stem}" if head else stem)]
    return [option(field), value]


def _split_run_dir(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder of the sweep, and the other arguments. Raises UsageError where there is none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", "--run_dir", nargs="?")
    options, others = parser.parse_known_args(arguments)
    if not options.run_dir:
        raise UsageError("a sweep needs a folder for its runs: give --run-dir DIR")
    return Path(os.path.expanduser(options.run_dir)), others


def _with_absolute_paths(arguments: Sequence[str]) -> list[str]:
    """The same arguments for any working directory."""
    result: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if equals and name in PATHS:
            word = f"{name}={Path(os.path.expanduser(value)).absolute()}"
        elif result and result[-1] in PATHS:
            word = str(Path(os.path.expanduser(word)).absolute())
        result.append(word)
    return result


def _folder_name(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", value)


def inspect(run: SweepRun, config: Config) -> None:
    """Set the run's state by what its folder holds: waiting, done, or stopped.

    Raises UsageError where the folder holds a run with other settings: it would be taken for this one.
    """
    if not run.folder.exists() or not any(run.folder.iterdir()):
        return
    saved = run.folder / "config.yaml"
    if saved.exists():
        settings = to_dict(load_yaml(saved))
        changed = [name for name in differences(to_dict(config), settings) if name not in MAY_DIFFER]
        if changed:
            raise UsageError(
                f"{run.folder} holds a run with other settings ({', '.join(changed)}): finished runs stay as they "
                "are, give the sweep another --run-dir"
            )
    meta = read_meta(run.folder)
    run.state = run.begun()
    if meta.get("finished") or (not meta and run.state == "stopped" and saved_as_finished(run.folder)):
        run.state, run.note = "done", describe_results(meta)


def saved_as_finished(folder: Path) -> bool:
    """Whether the checkpoint of a run says that it is over, where its meta.json is damaged."""
    try:
        trainer = read_checkpoint(find_checkpoint(folder)).get("trainer")
    except UsageError:  # which the run says when it goes on
        return False
    return isinstance(trainer, dict) and bool(trainer.get("finished"))


def describe_results(meta: dict[str, Any]) -> str:
    """The results of a finished run, from its meta.json, in a few words; none where it is damaged."""
    results: Any = meta.get("results")
    try:
        if "final" in results:
            return f"return {mean_and_spread(results['final']['mean'], results['final']['std'])}"
        return "  ".join(f"{name} {number(value, 3)}" for name, value in results.items() if isinstance(value, float))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""
