"""The folder of a run: its name, its checkpoints, and meta.json.

runs/dmc-cartpole_swingup/small-s0-20261123-1456/
  config.yaml  meta.json  metrics.jsonl  episodes.csv  eval.csv  curve.png  events.out.tfevents.*
  checkpoints/latest.pt    everything but the images of the replay, to go on with --resume
  checkpoints/best.pt      the agent of the best evaluation, without replay
  videos/eval_final.mp4
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.dreamer import Dreamer
from agent.replay import ReplayBuffer, with_images
from agent.spaces import Spaces

Store = Callable[[str, Mapping[str, Any]], None]

FORMAT = 2  # 1: before the controls, when the parameters of the core had other names
NEEDED = ("format", "task", "config", "spaces", "step", "agent")  # what every checkpoint holds
RESUMED = ("finished", "updates_done", "row", "memory", "returns", "evaluations", "best", "actions", "random")
"""What a checkpoint holds of the trainer, for a run that goes on."""
PACKAGES = ("torch", "numpy", "gymnasium", "dm-control", "mujoco")
PROJECT = Path(__file__).resolve().parent.parent


class UsageError(Exception):
    """What was typed cannot work; the message says what was expected and what to type."""


# ---------------------------------------------------------------------- folders


def new_run_dir(run_dir: str | None, slug: str, name: str) -> Path:
    """Make the folder of a new run: `run_dir` exactly, or runs/<slug>/<name>-<minute>, or that with -2, -3.

    Raises UsageError, and touches nothing, when `run_dir` is there and holds something.
    """
    if run_dir is not None:
        path = Path(run_dir)
        try:
            taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
            if not taken:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--run-dir {run_dir} cannot be made: {error.strerror}") from error
        if taken:
            raise UsageError(
                f"--run-dir {run_dir} is not empty, and runs never overwrite each other; "
                f"choose another folder, or go on with the run in it: --resume {run_dir}"
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


def find_checkpoint(run: Path | str, which: str = "latest") -> Path:
    """The checkpoint `which` ("latest" or "best") of a run folder, or `run` itself when it is a file.

    Raises UsageError when there is none.
    """
    run = Path(run)
    if run.is_file():
        return run
    if not run.exists():
        raise UsageError(f"there is no run {run}; give its folder (runs/TASK/NAME) or a checkpoint file")
    path = run / "checkpoints" / f"{which}.pt"
    if path.is_file():
        return path
    others = sorted(found.stem for found in run.glob("checkpoints/*.pt"))
    if others:
        raise UsageError(f"{run} has no checkpoint {which!r}; it has {', '.join(others)}")
    raise UsageError(f"{run} is not a run folder: it holds no checkpoints/{which}.pt")


# ---------------------------------------------------------------------- checkpoints


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save under a temporary name, then rename: a run that dies while saving keeps its last checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save({"format": FORMAT, **_compact(dict(content))}, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's word for every failure to write, a full disk among them
        raise OSError(errno.EIO, f"a checkpoint cannot be written ({error})", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Load a checkpoint to the CPU; nothing in the file is executed.

    Raises UsageError when the file is missing, damaged, or not a checkpoint of this program.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch itself does not look at the check sums
                raise ValueError(f"the check sum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises many kinds for many kinds of damage
        raise UsageError(
            f"{path} is damaged or not a checkpoint; the run's other one (latest.pt, best.pt) may still be good: "
            "evaluate.py policy RUN --checkpoint best"
        ) from error
    if not isinstance(content, dict) or any(key not in content for key in NEEDED):
        raise UsageError(f"{path} is a PyTorch file but not a checkpoint of this program")
    if content["format"] != FORMAT:
        raise UsageError(
            f"{path} has checkpoint format {content['format']}, this version reads format {FORMAT}; "
            "use the commit named in the run's meta.json"
        )
    return content


def make_store(run_dir: Path, task: str, config: Mapping[str, Any], spaces: Spaces) -> Store:
    """How the trainer saves: store("latest", content) writes checkpoints/latest.pt, complete."""
    header = {"task": task, "config": config, "spaces": spaces.plain()}

    def store(name: str, content: Mapping[str, Any]) -> None:
        write_checkpoint(run_dir / "checkpoints" / f"{name}.pt", {**header, **content})

    return store


def check_spaces(saved: Mapping[str, Any], spaces: Spaces) -> None:
    """Raise UsageError when the environments are no longer those that the checkpoint was trained in."""
    if saved["spaces"] != spaces.plain():
        raise UsageError(
            f"the checkpoint of {saved['task']} has other observations or actions ({saved['spaces']}) than "
            f"the task has now ({spaces.plain()}); use the environment it was trained in"
        )


def check_fits(saved: Mapping[str, Any], run_dir: Path, agent: Dreamer, replay: ReplayBuffer) -> None:
    """Raise UsageError where a run cannot go on from a checkpoint, before anything in its folder is touched.

    The agent and the replay are then in the checkpoint's state.
    """
    task = read_meta(run_dir).get("task", saved["task"])
    if task != saved["task"]:
        raise UsageError(f"{run_dir} is a run of {task}, but its latest.pt is of {saved['task']}: it was mixed up")
    missing = [name for name in RESUMED if not isinstance(saved["trainer"], dict) or name not in saved["trainer"]]
    try:
        if missing or not isinstance(saved["step"], int):
            raise KeyError(", ".join(missing) or "step")
        agent.load_state_dict(saved["agent"])
        replay.keep_images(images_folder(run_dir), exists=True)
        replay.load_state_dict(saved["replay"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        what = str(error).splitlines()[0]
        raise UsageError(
            f"the run {run_dir} cannot go on: its latest.pt is incomplete or of another version ({what}); the agent "
            "may still be good: evaluate.py policy RUN"
        ) from error


def images_folder(run_dir: Path) -> Path:
    """Where a run keeps the images of its replay."""
    return run_dir / "replay"


def replay_of(saved: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
    """The replay in a checkpoint of its run's folder, images included. Raises UsageError where there is none."""
    if "replay" not in saved:
        raise UsageError(f"{checkpoint} holds no experience: give the run's folder or its latest.pt")
    try:
        folder = images_folder(checkpoint.absolute().parent.parent)
        return with_images(saved["replay"], Spaces.of(saved["spaces"]).obs, folder)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _compact(tree: Any) -> Any:
    """Copy tensors that are a small part of a larger storage: torch.save writes whole storages."""
    if isinstance(tree, dict):
        return {key: _compact(value) for key, value in tree.items()}
    if isinstance(tree, Tensor) and tree.untyped_storage().nbytes() > tree.numel() * tree.element_size():
        return tree.clone(memory_format=torch.contiguous_format)
    return tree


# ---------------------------------------------------------------------- random states


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may draw from it
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of these generators, as tensors and plain values."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {"key": legacy["state"]["key"].tolist(), "pos": legacy["state"]["pos"]}},
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def restore_random_states(state: Mapping[str, Any]) -> None:
    """Undo what happened since `random_states`; a GPU's states only where there are as many GPUs."""
    random.setstate(state["python"])
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": state["numpy"]["state"]["pos"]}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------------- meta.json


def read_meta(run_dir: Path) -> dict[str, Any]:
    """The content of meta.json; empty where there is none, or a damaged one: nothing depends on it."""
    try:
        return dict(json.loads((run_dir / "meta.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
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
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
