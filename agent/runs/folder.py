"""The folder of a run: its name, and meta.json, which says how the run was made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, SoftFileLock, Timeout

from agent.data.checkpoint import find_checkpoint, fingerprint, set_damaged_aside
from agent.errors import UsageError
from agent.runs.header import resume_command
from agent.runtime import PROJECT

PACKAGES = ("torch", "numpy", "gymnasium", "dm-control", "mujoco")


FILES = {"config.yaml", "meta.json", "metrics.jsonl", "episodes.csv", "eval.csv"}
BEGUN = {*FILES, "open_loop.csv", "probe.csv", "replay", "checkpoints", ".lock"}
"""What is in the folder of a run before its first checkpoint, beside TensorBoard's files."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside of this nobody else writes into the run's folder. The lock ends with the process, however it ends.

    Raises UsageError where another process has it.
    """
    lock: FileLock | SoftFileLock = FileLock(folder / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except NotImplementedError:  # a file system without locks: a file is one, and old ones are recognised by it
            lock = SoftFileLock(folder / ".lock")
            lock.acquire(timeout=0)
    except Timeout:
        process = read_meta(folder).get("process", {})
        owner = f"process {process.get('id')} on {process.get('host')}" if process else "another process"
        raise UsageError(f"{folder} is in use by {owner}: wait until it has ended, or give another --run-dir") from None
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror})"
        raise UsageError(f"{what}: make room, or give another --run-dir") from error
    try:
        yield
    finally:
        lock.release()


def in_use(folder: Path) -> bool:
    """Whether another process writes into the run's folder."""
    try:
        with locked(folder):
            return False
    except UsageError:
        return True


@contextmanager
def claimed(run_dir: str | None, slug: str, name: str, saved: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """The folder of a run, for this process alone: a new one (see `new_run_dir`), or that of the checkpoint `saved`,
    from which a run goes on.

    Raises UsageError where it belongs to another run, or another process.
    """
    if saved is None:
        folder = new_run_dir(run_dir, slug, name)
        with locked(folder):
            if not unbegun(folder):  # another process was faster
                raise UsageError(f"{folder} is not empty: another run began in it; choose another --run-dir")
            yield folder
        return
    folder = Path(run_dir or "")
    with locked(folder):
        check_task(saved, folder)
        for name in sorted(FILES):
            if (folder / name).is_dir():
                raise UsageError(f"{folder / name} is a folder where a file should be: move it away, then resume again")
        if saved["file"] != fingerprint(find_checkpoint(folder)):
            raise UsageError(f"{folder} has gone on in another process meanwhile: give the command again")
        if saved.get("damaged"):
            set_damaged_aside(folder)
        yield folder


def unbegun(folder: Path) -> bool:
    """Whether a folder is empty, or holds a run that ended before its first checkpoint: nothing is lost in it."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents")}
    if "config.yaml" in names and not names & {"meta.json", ".lock"}:
        return False  # settings that a person wrote
    return {name.removesuffix(".old") for name in names} <= BEGUN and not list(folder.glob("checkpoints/*.pt"))


def new_run_dir(run_dir: str | None, slug: str, name: str) -> Path:
    """Make the folder of a new run: `run_dir` exactly, or runs/<slug>/<name>-<minute>, or that with -2, -3.

    Raises UsageError, and touches nothing, when `run_dir` is there and holds something.
    """
    if run_dir is not None:
        path = Path(run_dir)
        try:
            taken = path.is_file() or (path.is_dir() and not unbegun(path))
            if not taken:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--run-dir {run_dir} cannot be made: {error.strerror}") from error
        if taken:
            raise UsageError(
                f"--run-dir {run_dir} is not empty, and runs never overwrite each other; "
                f"choose another folder, or go on with the run in it: {resume_command(path)}"
            )
        return path
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M')}"
    for number in range(1, 1000):
        path = Path("runs", slug, stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{path} cannot be made ({error.strerror}); choose a --run-dir") from error
    raise UsageError(f"there are a thousand runs named {stem}; choose a --run-dir")


def check_task(saved: Mapping[str, Any], run_dir: Path) -> None:
    """Raise UsageError where the checkpoint in a run's folder is that of another task."""
    task = read_meta(run_dir).get("task", saved["task"])
    if task != saved["task"]:
        raise UsageError(f"{run_dir} is a run of {task}, but its latest.pt is of {saved['task']}: it was mixed up")


def read_meta(run_dir: Path) -> dict[str, Any]:
    """The content of meta.json; empty where there is none, or a damaged one: nothing depends on it."""
    kinds = {"wall_seconds": int | float, "commands": list, "process": dict}
    try:
        meta = dict(json.loads((run_dir / "meta.json").read_text(encoding="utf-8")))
        return meta if all(isinstance(meta[name], kind) for name, kind in kinds.items() if name in meta) else {}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


class Meta:
    """meta.json: how this run was made. Written at the start, updated by `update`.

    A resumed run keeps the wall time and the commands of its first part.
    """

    def __init__(self, run_dir: Path, task: str, device: torch.device, parameters: Mapping[str, int]):
        self.path = run_dir / "meta.json"
        before = read_meta(run_dir)
        self.started, self.wall_before = time.monotonic(), float(before.get("wall_seconds", 0.0))
        self.content = {
            "task": task,
            "commands": [*before.get("commands", []), shlex.join([Path(sys.executable).name, *sys.argv])],
            "process": {"id": os.getpid(), "host": socket.gethostname()},
            "git": _git_state(),
            "versions": {"python": platform.python_version()} | _versions(),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "parameters": dict(parameters),
            "started": before.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
        }
        self.update(finished=False)

    def update(self, **values: Any) -> None:
        """Set values and write the file."""
        wall = self.wall_before + time.monotonic() - self.started
        self.content |= {**values, "wall_seconds": round(wall, 1)}
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def _git_state() -> dict[str, Any]:
    """Commit of the source and whether files differ from it; empty where there is no git or no commit."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PROJECT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
