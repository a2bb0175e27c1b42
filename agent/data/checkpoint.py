"""The checkpoint files of a run.

RUN/checkpoints/latest.pt    everything but the images of the replay, from which --resume continues
RUN/checkpoints/best.pt      the agent of the best evaluation, without replay
RUN/replay/                  the images of the replay, see `image_store.py`

A checkpoint is a dictionary of tensors and plain values: NEEDED, and in latest.pt also "replay" and "trainer".
"""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.data.replay import with_images
from agent.errors import UsageError
from agent.spaces import Spaces

FORMAT = 3
"""Layout of checkpoints. Files of another format are refused; the commit that wrote them reads them."""
NEEDED = ("format", "task", "config", "spaces", "step", "agent")
"""What every checkpoint holds."""

Store = Callable[[str, Mapping[str, Any]], None]
"""store("latest", content) writes checkpoints/latest.pt."""


# ---------------------------------------------------------------------- writing


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save under a temporary name, then rename: a run that dies while saving keeps its previous checkpoint.

    Raises OSError when the file cannot be written, for example to a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save({"format": FORMAT, **_compact(dict(content))}, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch raises it for every failure to write, a full disk among them
        raise OSError(errno.EIO, f"a checkpoint cannot be written ({error})", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_store(run_dir: Path, task: str, config: Mapping[str, Any], spaces: Spaces) -> Store:
    """A function that saves checkpoints of this run: what it is given, with task, config and spaces."""
    header = {"task": task, "config": config, "spaces": spaces.plain()}

    def store(name: str, content: Mapping[str, Any]) -> None:
        write_checkpoint(run_dir / "checkpoints" / f"{name}.pt", {**header, **content})

    return store


def _compact(tree: Any) -> Any:
    """Copy tensors that are a small part of a larger storage: torch.save writes whole storages."""
    if isinstance(tree, dict):
        return {key: _compact(value) for key, value in tree.items()}
    if isinstance(tree, Tensor) and tree.untyped_storage().nbytes() > tree.numel() * tree.element_size():
        return tree.clone(memory_format=torch.contiguous_format)
    return tree


# ---------------------------------------------------------------------- reading


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
    others = sorted(other.stem for other in run.glob("checkpoints/*.pt"))
    if others:
        raise UsageError(f"{run} has no checkpoint {which!r}; it has {', '.join(others)}")
    raise UsageError(f"{run} is not a run folder: it holds no checkpoints/{which}.pt")


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint file belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Load a checkpoint to the CPU; nothing in the file is executed.

    Raises UsageError when the file is missing, damaged, of another format, or not a checkpoint of this program.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not verify check sums
                raise ValueError(f"the check sum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises many types of errors for damaged files
        raise UsageError(
            f"{path} is damaged or not a checkpoint; the run's other one (latest.pt, best.pt) may still be good: "
            "evaluate.py policy RUN --checkpoint best"
        ) from error
    if not isinstance(content, dict) or any(key not in content for key in NEEDED):
        raise UsageError(f"{path} is a PyTorch file but not a checkpoint of this program")
    if content["format"] != FORMAT:
        raise UsageError(
            f"{path} has checkpoint format {content['format']}, and this version reads format {FORMAT} only; "
            "check out the commit named in the run's meta.json to use it"
        )
    return content


def check_spaces(saved: Mapping[str, Any], spaces: Spaces) -> None:
    """Raise UsageError when the task's spaces are no longer those of the checkpoint."""
    if saved["spaces"] != spaces.plain():
        raise UsageError(
            f"the checkpoint of {saved['task']} has other observations or actions ({saved['spaces']}) than "
            f"the task has now ({spaces.plain()}); use the environment it was trained in"
        )


# ---------------------------------------------------------------------- replay


def images_folder(run_dir: Path) -> Path:
    """Where a run keeps the images of its replay."""
    return run_dir / "replay"


def replay_of(saved: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
    """The replay in a checkpoint of a run's folder, with its images. Raises UsageError where there is none."""
    if "replay" not in saved:
        raise UsageError(f"{checkpoint} holds no experience: give the run's folder or its latest.pt")
    try:
        folder = images_folder(checkpoint.absolute().parent.parent)
        return with_images(saved["replay"], Spaces.of(saved["spaces"]).obs, folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
