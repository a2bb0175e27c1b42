"""The command line of train_agent.py, and settings in YAML files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from agent.data.checkpoint import find_checkpoint, has_saved, read_checkpoint
from agent.errors import UsageError
from agent.runs.config import Config, saved_config
from agent.runs.header import evaluate_command
from agent.runs.presets import PRESETS, preset
from agent.runs.suites import refuse_list
from agent.settings import differences, from_dict, home_expanded, merge, option, parse_count, shown, to_dict

COUNTS = ConstructorRegistry()
"""Use `with COUNTS:` around tyro: whole numbers are then read by `parse_count`."""


@COUNTS.primitive_rule
def _counts(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """The rule."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


NO_TASK = (
    "which task? For example: python train_agent.py dmc:cartpole_swingup, gym:CartPole-v1 or, done in seconds, "
    "toy:cue5 --preset debug; --help lists the options"
)
LARGEST_YAML = 1 << 18
"""Bytes of a file of settings; a run's config.yaml has 3,000."""


def parse_cli(
    argv: Sequence[str], shows_images: Callable[[str], bool] = lambda task: False
) -> tuple[Config, dict[str, Any] | None]:
    """Read the command line of train_agent.py: the settings, and of a run that goes on its checkpoint.

    Precedence: defaults < preset < --config FILE < command line. A run goes on with --resume, or, where it is trained
    in slices, by its first command given again. shows_images says whether a word is a task of images, which has a
    preset of its own on a CPU. Unknown options and impossible values end the program with status 2 and a message, as
    tyro does it. Raises UsageError for the rest.
    """
    path, argv = _split_config_file(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for word in ("--preset", "--resume", "--device", "--run-dir", "--train.slice"):
        early.add_argument(word, nargs="?")  # a missing value is for tyro to complain about
    first, _ = early.parse_known_args([re.sub("^--run_dir", "--run-dir", word) for word in argv])
    run = first.resume and _path("resume", first.resume)
    if path is not None and run is not None:
        raise UsageError("--config starts a new run and --resume goes on with an old one: give one of the two")
    run_dir = _path("run_dir", first.run_dir or "")
    values = {} if path is None else _read_config_file(path)
    if run is None and run_dir and _sliced(getattr(first, "train.slice"), values) and has_saved(run_dir):
        run = run_dir
    if run is not None:
        _run_folder(run)
        saved = read_checkpoint(find_checkpoint(run))
        return _parse_resumed(argv, saved, run), saved
    words = [word for word in (*argv, values.get("task")) if isinstance(word, str)]
    default = "pixels" if any(map(shows_images, words)) else "small"
    if first.device != "cpu" and torch.cuda.is_available():
        default = "base"
    name = first.preset or values.get("preset") or default
    if values.get("preset") not in (None, name):
        theirs = shown(values["preset"])
        raise UsageError(f"--config {path} has the settings of preset {theirs}: leave --preset {name} out")
    base = preset(name if name in PRESETS else default)  # tyro and from_dict complain about another one
    if path is not None:
        try:
            base = from_dict(Config, merge(to_dict(base), values))
        except UsageError as error:
            raise UsageError(f"--config {path}: {error}") from error
    config = _parse(argv, base)
    if not config.task:
        raise UsageError(NO_TASK)
    refuse_list(config.task)
    return config, None


def _split_config_file(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """What --config names, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    options, others = parser.parse_known_args(argv)
    if options.config == "":
        raise UsageError("--config needs a file: --config runs/TASK/NAME/config.yaml")
    return options.config and _path("config", options.config), others


def _path(name: str, text: str) -> str:
    """`home_expanded`, before the settings are read. Raises UsageError."""
    try:
        return home_expanded(name, text)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read_config_file(path: str) -> dict[str, Any]:
    """The content of the file, without what belongs to the run that wrote it. Raises UsageError."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold names with values, as the config.yaml of a run does")
    return {name: value for name, value in values.items() if name not in ("run_dir", "resume")}


def _sliced(word: str | None, values: dict[str, Any]) -> bool:
    """Whether --train.slice, or else the file of settings, asks for slices; a word that is no number is no use here."""
    train = values.get("train")
    value = word if word is not None else train.get("slice") if isinstance(train, dict) else None
    try:
        return float(value or 0.0) > 0.0
    except (TypeError, ValueError):
        return False


def _run_folder(resume: str) -> Path:
    """The run's folder; what --resume names may be its latest.pt too. Raises UsageError for anything else."""
    path = Path(resume)
    if resume and path.is_file():
        path = path.resolve()
        if path.parent.name != "checkpoints" or not (path.parent.parent / "config.yaml").exists():
            raise UsageError(
                f"--resume {resume}: a copied checkpoint has no run around it to go on with; give the run's folder"
            )
        if path.name != "latest.pt":
            run = path.parent.parent
            raise UsageError(f"--resume goes on from latest.pt, or by itself from previous.pt: give the folder {run}")
        return path.parent.parent
    if not resume:
        raise UsageError("--resume needs the folder of a run (runs/TASK/NAME)")
    return path


def _parse(argv: Sequence[str], base: Config) -> Config:
    with COUNTS:
        return tyro.cli(Config, args=list(argv), default=base, prog="train_agent.py")


def _parse_resumed(argv: Sequence[str], saved: Mapping[str, Any], run: str) -> Config:
    """The settings of a stopped run; only what leaves the run the same run may be given anew."""
    before = replace(saved_config(saved), resume=run, run_dir=str(_run_folder(run)))
    if before.agent != "dreamer" or before.model_only:
        kind = "a world model alone" if before.model_only else before.agent
        raise UsageError(f"{run} is a run of {kind}, which cannot go on: start it anew in another --run-dir")
    if "trainer" not in saved:
        raise UsageError(f"{run} holds the agent alone; --resume needs the run's folder or its latest.pt")
    config = _parse(argv, before)
    if config.run_dir and before.run_dir and Path(config.run_dir).resolve() == Path(before.run_dir).resolve():
        config = replace(config, run_dir=before.run_dir)  # ./runs/walker and runs/walker/ are runs/walker
    may_change = ("steps", "minutes", "slice", "eval_every", "log_every", "save_every", "threads", "on_bad_step")
    kept = {name: getattr(before.train, name) for name in may_change}
    fast = {name: getattr(before.optimizer, name) for name in ("gpu", "workers")}
    same = replace(
        config, task=before.task, device=before.device, video=before.video, eval=before.eval,
        train=replace(config.train, **kept), optimizer=replace(config.optimizer, **fast),
    )  # fmt: skip
    if changed := differences(to_dict(before), to_dict(same)):
        raise UsageError(
            f"--resume goes on with the run's own settings; {', '.join(map(option, changed))} cannot change: "
            "leave that out, or start a new run"
        )
    if config.train.steps < min(saved["step"], before.train.steps):
        raise UsageError(f"--steps {config.train.steps}: the run {run} has done {saved['step']} already")
    trainer = saved["trainer"]  # a damaged one is refused where it is loaded
    if isinstance(trainer, dict) and trainer.get("finished"):
        out_of_time = 0.0 < 60.0 * config.train.minutes <= float(trainer.get("seconds", 0.0))
        more = "--train.minutes 0" if out_of_time else f"--steps {2 * saved['step']}"
        if out_of_time or config.train.steps <= saved["step"]:
            raise UsageError(
                f"the run {run} is complete with {saved['step']} steps; to extend it give more, for example "
                f"{more}, or see what it is worth: {evaluate_command(Path(run))}"
            )
    return config


# --- YAML files


def save_yaml(config: Config, path: Path) -> None:
    """Write all settings, readable with `load_yaml`."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_yaml(path: Path | str) -> Config:
    """Read settings; those that are not in the file keep their defaults. Raises UsageError."""
    return from_dict(Config, read_yaml(path))


def read_yaml(path: Path | str) -> Any:
    """The content of a YAML file; {} where it is empty. Nothing in it is executed. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_YAML + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST_YAML:
        raise UsageError(f"{path} cannot be read: it is too large for a file of settings")
    try:
        values = yaml.safe_load(content.decode("utf-8")) or {}
    except RecursionError:
        raise UsageError(f"{path} cannot be read: it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:  # a date such as 2000-99-99 among them
        raise UsageError(f"{path} cannot be read: it is no YAML: {' '.join(str(error).split())}") from error
    if not _is_small(values):
        raise UsageError(f"{path} cannot be read: its references stand for too many values")
    return values


def _is_small(content: Any) -> bool:
    """Whether this is little where every reference is followed: ten lines of YAML can stand for billions of values."""
    waiting, seen = [content], 0
    while waiting and seen <= LARGEST_YAML:
        value = waiting.pop()
        seen += 1
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
    return not waiting
