"""The checkpoint files of a run.

RUN/checkpoints/latest.pt    everything but the images of the replay, from which --resume continues
RUN/checkpoints/previous.pt  the latest.pt before it, which is used where latest.pt is damaged
RUN/checkpoints/best.pt      the agent of the best evaluation, without replay
RUN/replay/                  the images of the replay, see `image_store.py`

A checkpoint is a dictionary of tensors and plain values: NEEDED, and in latest.pt also "replay" and "trainer".
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from agent.data.replay import with_images
from agent.errors import UsageError
from agent.runtime import available_memory
from agent.spaces import Spaces

FORMAT = 5
"""Layout of checkpoints. Files of another format are refused; the commit that wrote them reads them."""
NEEDED = {"format": int, "task": str, "config": dict, "spaces": dict, "step": int, "agent": dict}
"""What every checkpoint holds."""
BESIDE_SECONDS = 0.25
"""Where a checkpoint takes longer to write, the next ones are written beside training: they grow, and training is not
to stop for more than half a second."""


class Store(Protocol):
    """store("latest", content) writes checkpoints/latest.pt; beside: training may go on meanwhile."""

    def __call__(self, name: str, content: Mapping[str, Any], beside: bool = False) -> None: ...


# ---------------------------------------------------------------------- writing


def write_checkpoint(path: Path, content: Mapping[str, Any], keep: Path | None = None) -> None:
    """Save under a temporary name, bring it to the disk, then rename: whatever happens, one whole file is left.

    keep: the name that the file before gets. Raises OSError when the file cannot be written, for example to a full
    disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save({"format": FORMAT, **_compact(dict(content))}, temporary)
        sync(temporary)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync(path.parent)
    except RuntimeError as error:  # torch raises it for every failure to write, a full disk among them
        raise OSError(errno.EIO, f"a checkpoint cannot be written ({error})", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the system can do that."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems without it
                raise
        finally:
            os.close(file)


class CheckpointStore:
    """Saves checkpoints of one run: what it is given, with task, config and spaces.

    Every method raises OSError for what could not be written, also beside training.
    """

    def __init__(self, run_dir: Path, task: str, config: Mapping[str, Any], spaces: Spaces):
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.header = {"task": task, "config": config, "spaces": spaces.plain()}
        self.writer: threading.Thread | None = None
        self.failure: Exception | None = None
        self.seconds = 0.0
        """What the last latest.pt took to be written."""
        for left in self.folder.glob("*.tmp"):  # by a process that was killed
            left.unlink()

    def __call__(self, name: str, content: Mapping[str, Any], beside: bool = False) -> None:
        """Write checkpoints/NAME.pt. beside: from a copy, while training goes on, if it takes long, unless the last one
        could not be written that way."""
        if self.writer is not None:
            self.writer.join()
        failed, self.writer, self.failure = self.failure is not None, None, None
        content = {**self.header, **content}
        if beside and not failed and self.seconds > BESIDE_SECONDS and tensor_bytes(content) < 0.5 * available_memory():
            self.writer = threading.Thread(target=self.write_beside, args=(name, copied(content)))
            self.writer.start()
        else:
            self.write(name, content)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        start, latest = time.perf_counter(), name == "latest"
        if latest:
            for path in images_folder(self.run_dir).rglob("*"):  # the images are there before what counts on them
                sync(path)
        write_checkpoint(self.folder / f"{name}.pt", content, self.folder / "previous.pt" if latest else None)
        if latest:
            self.seconds = time.perf_counter() - start

    def write_beside(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            self.write(name, content)
        except Exception as error:  # raised where somebody is to hear of it
            self.failure = error

    def wait(self) -> None:
        """Wait for what is being written."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def copied(tree: Any) -> Any:
    """A copy in memory that nobody changes, of tensors on the CPU."""
    if isinstance(tree, Tensor):
        tree = tree.detach()
        return tree.clone(memory_format=torch.contiguous_format) if tree.device.type == "cpu" else tree.cpu()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copied(value) for value in tree)
    return tree


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(tensor_bytes(value) for value in values)


def all_finite(tree: Any) -> bool:
    """Whether all tensors are finite."""
    if isinstance(tree, Tensor):
        return bool(tree.isfinite().all())
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return all(map(all_finite, values))


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
    if which == "latest" and "previous" in others:  # ended between two renames
        return path.with_stem("previous")
    if others:
        raise UsageError(f"{run} has no checkpoint {which!r}: give one that it has, {', '.join(others)}")
    if (run / "config.yaml").is_file():
        alone = "\nmodel_only: true\n" in (run / "config.yaml").read_text(encoding="utf-8", errors="replace")
        why = "was a world model alone, which does not go on" if alone else "ended before its first checkpoint"
        raise UsageError(f"{run} {why}: give the command anew that started it")
    raise UsageError(f"{run} is not a run folder: it holds no checkpoints/{which}.pt")


def has_saved(run: Path | str) -> bool:
    """Whether a run folder holds a checkpoint to go on from: the latest one, or where a run ended between two renames
    the one before it."""
    return any((Path(run) / "checkpoints" / name).is_file() for name in ("latest.pt", "previous.pt"))


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint file belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Load a checkpoint to the CPU; nothing in the file is executed. "file" in it tells the file at `path` from later
    ones.

    In place of a latest.pt that is damaged the one before it is read, with a line on standard error; "damaged" in it is
    then true.
    Raises UsageError when the file is missing, damaged, of another format, or not a checkpoint of this program.
    """
    path = Path(path)
    previous = path.with_name("previous.pt")
    written = fingerprint(path)
    try:
        return {**read_file(path), "file": written}
    except Damaged:
        if path.name != "latest.pt" or not previous.is_file():
            raise
        content = read_file(previous)
        print(f"note: {path} is damaged; the one before it is used, of step {content['step']:,}", file=sys.stderr)
        return {**content, "file": written, "damaged": True}


def set_damaged_aside(folder: Path) -> None:
    """Rename a damaged latest.pt of a run's folder: it would replace previous.pt, the only whole one, at the next
    save."""
    path = folder / "checkpoints" / "latest.pt"
    if path.exists():
        os.replace(path, path.with_name("latest.pt.damaged"))


class Damaged(UsageError):
    """A file that is no checkpoint, or no longer one."""


def read_file(path: Path) -> dict[str, Any]:
    """The content of one checkpoint file."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not verify check sums
                raise ValueError(f"the check sum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises many types of errors for damaged files
        raise Damaged(
            f"{path} is damaged or not a checkpoint; the run's other one (latest.pt, best.pt) may still be good: "
            "evaluate.py policy RUN --checkpoint best"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int) or NEEDED.keys() - content:
        raise Damaged(f"{path} is a PyTorch file but not a checkpoint of this program; give the folder of a run")
    if content["format"] != FORMAT:
        raise UsageError(
            f"{path} has checkpoint format {content['format']}, and this version reads format {FORMAT} only; "
            "check out the commit named in the run's meta.json to use it"
        )
    if wrong := [name for name, kind in NEEDED.items() if not isinstance(content[name], kind)]:
        raise Damaged(f"{path} is not a checkpoint of this program: its {wrong[0]} is of another type")
    if not all_finite(content):
        raise Damaged(f"{path} holds numbers that are not finite; best.pt may still be good: --checkpoint best")
    return content


def fingerprint(path: Path) -> tuple[int, int] | None:
    """Tells a file from those that replace it; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def check_spaces(saved: Mapping[str, Any], spaces: Spaces) -> None:
    """Raise UsageError when the task's spaces are no longer those of the checkpoint."""
    if saved["spaces"] != spaces.plain():
        raise UsageError(
            f"the checkpoint of {saved['task']} has other observations or actions ({saved['spaces']}) than "
            f"the task has now ({spaces.plain()}); use the environment it was trained in"
        )


# ---------------------------------------------------------------------- replay


def images_folder(run_dir: Path, ranks: int = 1) -> Path:
    """Where a run keeps the images of its replay; those of several ranks are dealt out otherwise."""
    return run_dir / "replay" if ranks == 1 else run_dir / "replay" / f"{ranks}-ranks"


def ranks_of(saved: Mapping[str, Any]) -> int:
    """How many ranks wrote a checkpoint."""
    trainer = saved.get("trainer")  # not in that of a world model alone
    return len(trainer.get("ranks", ())) or 1 if isinstance(trainer, Mapping) else 1


def replay_of(saved: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
    """The replay in a checkpoint of a run's folder, with its images. Raises UsageError where there is none."""
    if "replay" not in saved:
        if saved.get("config", {}).get("model_only"):
            raise UsageError(f"{checkpoint} is of a world model alone: give a run that has acted")
        raise UsageError(f"{checkpoint} holds no experience: give the run's folder or its latest.pt")
    try:
        folder = images_folder(checkpoint.absolute().parent.parent, ranks_of(saved))
        if min(saved["replay"]["count"], saved["replay"]["first_intact"]) < 0:
            raise ValueError(f"{checkpoint} holds no whole replay: its rows are not counted")
        return with_images(saved["replay"], Spaces.of(saved["spaces"]).obs, folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{checkpoint} holds no whole replay ({error}); use the latest.pt of another run") from error
