"""Fixed data sets of whole episodes, on which world models are trained and compared.

    DATASET/
      dataset.json   metadata: task, spaces, source, number of episodes and rows, returns
      rows.npz       whole episodes of arrival rows, one after the other (see `replay.py`)

Every tenth episode is held out of training.

Symbols: E episodes, T rows of the longest one, L rows of all episodes together, A dimensions of the policy's action.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from agent.data.checkpoint import replay_of
from agent.data.replay import DERIVED, FLAGS
from agent.errors import UsageError
from agent.numbers import byte_size, number
from agent.runtime import available_memory
from agent.spaces import Spaces

HELD_OUT_EVERY = 10
"""One episode in this many is held out."""
IN_MEMORY = 3
"""What is read, its two parts, and the replay that training fills with the larger one."""

Rows = dict[str, np.ndarray]
"""Columns of arrival rows: name -> (L, ...), observations under "obs/NAME"."""


class Dataset(NamedTuple):
    """Whole episodes of `task`, split into training and held-out ones."""

    task: str
    spaces: Spaces
    train: Rows
    held_out: Rows


class Episodes(NamedTuple):
    """Episodes side by side, padded with zeros.

    obs {name: (E, T, O) or (E, T, H, W, C)}, prev_action (E, T, A), reward (E, T), length (E,) in rows.
    """

    obs: dict[str, torch.Tensor]
    prev_action: torch.Tensor
    reward: torch.Tensor
    length: torch.Tensor

    def to(self, device: torch.device | str) -> Episodes:
        """The same on another device."""
        obs = {name: value.to(device) for name, value in self.obs.items()}
        return Episodes(obs, self.prev_action.to(device), self.reward.to(device), self.length.to(device))


def export_dataset(
    saved: Mapping[str, Any], folder: Path | str, source: Path, keep: np.ndarray | None = None, variant: str = ""
) -> dict[str, Any]:
    """Write the replay of the checkpoint `saved`, read from the file `source`, to the new folder; returns the metadata.

    Episodes that are incomplete, because they were running or their beginning was overwritten, are left out.
    keep (O,): which entries of the observation "state" are kept, in a data set of the task's `variant`.
    Raises UsageError when the checkpoint holds no replay, and as `write_dataset`.
    """
    rows, spaces = whole_episodes(replay_of(saved, source)), saved["spaces"]
    if keep is not None:
        rows["obs/state"] = rows["obs/state"][:, keep]
        spaces = {**spaces, "obs": {"state": int(keep.sum())}}
    learned_from = saved.get("config", {}).get("dataset")  # its episodes lie in the replay too
    named = f"{source}, with episodes of {learned_from}" if learned_from else str(source)
    return write_dataset(rows, folder, {"task": saved["task"] + variant, "spaces": spaces, "source": named})


def rows_of(episodes: Episodes, terminal: torch.Tensor) -> Rows:
    """Recorded episodes (E, T, ...) as rows (L, ...); terminal (E,): those that terminated. See `pad_episodes`."""
    real = torch.arange(episodes.reward.shape[1]) < episodes.length[:, None]  # (E, T)
    last = torch.arange(episodes.reward.shape[1]) == episodes.length[:, None] - 1
    columns = {f"obs/{name}": value for name, value in episodes.obs.items()}
    columns |= {"prev_action": episodes.prev_action, "reward": episodes.reward}
    columns |= {"is_first": torch.zeros_like(last), "is_last": last, "is_terminal": last & terminal[:, None]}
    columns["is_first"][:, 0] = True
    return {name: value[real].numpy() for name, value in columns.items()}


def check_target(folder: Path | str, episodes: int = HELD_OUT_EVERY) -> None:
    """Raise UsageError where no data set of so many episodes can be written: known before any is played."""
    if episodes < HELD_OUT_EVERY:
        raise UsageError(f"{episodes} whole episodes are too few: a data set needs at least {HELD_OUT_EVERY}")
    if Path(folder).exists():
        raise UsageError(f"{folder} exists, and data sets never overwrite each other; choose another name")


def write_dataset(rows: Rows, folder: Path | str, source: Mapping[str, Any]) -> dict[str, Any]:
    """Write whole episodes to the new folder; returns the metadata. source: its task, spaces and source.

    Raises UsageError when there are too few episodes, or the folder exists.
    """
    starts = np.flatnonzero(rows["is_first"])
    check_target(folder, len(starts))
    try:
        rows = checked_rows(rows, Spaces.of(source["spaces"]))
    except ValueError as error:
        raise UsageError(f"no data set can be made of this: {error}") from error
    returns = np.add.reduceat(rows["reward"], starts)
    metadata = {
        **source,
        "episodes": len(starts),
        "rows": len(rows["reward"]),
        "mean_return": float(returns.mean()),
        "best_return": float(returns.max()),
    }
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        np.savez_compressed(temporary / "rows.npz", **rows)  # type: ignore[arg-type]
        (temporary / "dataset.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise UsageError(f"the data set {folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return metadata


def dataset_line(metadata: Mapping[str, Any]) -> str:
    """What a data set holds, for the terminal."""
    return (
        f"{metadata['task']}: {metadata['episodes']} whole episodes, {metadata['rows']:,} rows, mean return "
        f"{number(metadata['mean_return'])}, best {number(metadata['best_return'])}"
    )


def load_dataset(folder: Path | str) -> Dataset:
    """Read a data set; nothing in it is executed. Raises UsageError when it is not one, or too large for memory."""
    folder = Path(folder)
    try:
        metadata = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        task, spaces = str(metadata["task"]), Spaces.of(metadata["spaces"])
        with zipfile.ZipFile(folder / "rows.npz") as archive:
            size, free = sum(file.file_size for file in archive.infolist()), available_memory()
        if IN_MEMORY * size > free:
            raise UsageError(
                f"the data set {folder} needs {byte_size(IN_MEMORY * size)} of memory and {byte_size(free)} "
                "are free: make a smaller one, with fewer episodes"
            )
        with np.load(folder / "rows.npz", allow_pickle=False) as file:
            rows = checked_rows({name: file[name] for name in file.files}, spaces)
    except UsageError:
        raise
    except Exception as error:  # numpy, zipfile and json raise many types of errors for damaged files
        what = error.strerror if isinstance(error, OSError) else " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{folder} is not a data set ({what}); make one from a run: python evaluate.py dataset RUN FOLDER"
        ) from error
    episode = np.cumsum(rows["is_first"]) - 1
    held_out = episode % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Dataset(
        task,
        spaces,
        {name: value[~held_out] for name, value in rows.items()},
        {name: value[held_out] for name, value in rows.items()},
    )


def checked_rows(rows: Rows, spaces: Spaces) -> Rows:
    """Rows of whole episodes as a replay takes them. Raises ValueError that names the column which does not fit."""
    shapes: dict[str, tuple[int, ...]] = {"prev_action": (spaces.action.size,), "reward": ()}
    shapes |= {f"obs/{name}": (size,) if isinstance(size, int) else size for name, size in spaces.obs.items()}
    shapes |= dict.fromkeys(FLAGS, ())
    if rows.keys() != shapes.keys():
        raise ValueError(f"it has the columns {', '.join(sorted(rows)) or 'none'}, expected {', '.join(shapes)}")
    count, result = len(np.atleast_1d(rows["reward"])), {}
    for name, shape in shapes.items():
        value = np.asarray(rows[name])
        kinds, kind = ("b", bool) if name in FLAGS else ("u", np.uint8) if len(shape) == 3 else ("fiu", np.float32)
        if value.dtype.kind not in kinds or (kind == np.uint8 and value.dtype != kind):
            raise ValueError(f"column {name} is of type {value.dtype}, expected {np.dtype(kind)}")
        if value.shape != (count, *shape):
            raise ValueError(f"column {name} has the shape {value.shape}, expected {(count, *shape)}")
        with np.errstate(over="ignore"):
            result[name] = value.astype(kind, copy=False)
        if kind == np.float32 and not np.isfinite(result[name]).all():
            raise ValueError(f"column {name} holds values that are not finite")
    first, last = result["is_first"], result["is_last"]
    if not count or not first[0] or not last[-1] or (last[:-1] != first[1:]).any():
        raise ValueError("its rows are no whole episodes, from is_first to is_last, one after the other")
    if wrong := actions_out_of_range(result["prev_action"], first, spaces):
        raise ValueError(f"column prev_action holds {wrong}")
    if (result["is_terminal"] & ~last).any():
        raise ValueError("column is_terminal is set inside of an episode, where is_last is not")
    if first.sum() < HELD_OUT_EVERY:
        raise ValueError(f"it has {first.sum()} episodes, and needs at least {HELD_OUT_EVERY}")
    return result


def actions_out_of_range(action: np.ndarray, first: np.ndarray, spaces: Spaces) -> str:
    """What is wrong with actions (L, A), or an empty text; before the first rows (L,) of episodes there is none."""
    if spaces.action.discrete:
        choices = ((action == 0.0) | (action == 1.0)).all(-1) & (action.sum(-1) == 1.0)
        return "" if (choices | first).all() else "actions that are no choice, one 1 among zeros"
    return "" if (np.abs(action) <= 1.0 + 1e-4).all() else "actions outside of -1 to 1"  # but for rounding


def check_dataset(dataset: Dataset, task: str) -> None:
    """Raise UsageError when the data set is of another task."""
    if dataset.task != task:
        raise UsageError(f"the data set is of {dataset.task}, not of {task}: give that task, or another --dataset")


def whole_episodes(replay: Mapping[str, Any]) -> Rows:
    """The whole episodes of a saved replay (`with_images`) in the order of time, environment after environment."""
    rows = {name: np.asarray(value) for name, value in replay["rows"].items() if name not in DERIVED}
    envs, held = rows["reward"].shape
    order = (replay["count"] + np.arange(held)) % held if replay["count"] > held else np.arange(held)
    order = order[max(0, replay["first_intact"] - (replay["count"] - held)) :]
    pieces = []  # (environment, positions of the rows of one episode)
    for env in range(envs):
        first, last = rows["is_first"][env, order], rows["is_last"][env, order]
        starts = np.flatnonzero(first)
        for start, end in zip(starts, [*(starts[1:] - 1), len(order) - 1], strict=False):  # no start: no pair
            if last[end]:
                pieces.append((env, order[start : end + 1]))
    return {
        name: np.concatenate([value[env, at] for env, at in pieces]) if pieces else value[0, :0]
        for name, value in rows.items()
    }


def pad_episodes(rows: Rows) -> Episodes:
    """Whole episodes (L, ...) side by side, (E, T, ...)."""
    starts = np.flatnonzero(rows["is_first"])
    lengths = np.diff([*starts, len(rows["is_first"])])

    def padded(value: np.ndarray) -> torch.Tensor:
        kind = np.uint8 if value.dtype == np.uint8 else np.float32
        episodes = np.zeros((len(starts), lengths.max(), *value.shape[1:]), kind)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            episodes[row, :length] = value[start : start + length]
        return torch.from_numpy(episodes)

    obs = {name.removeprefix("obs/"): padded(value) for name, value in rows.items() if name.startswith("obs/")}
    return Episodes(obs, padded(rows["prev_action"]), padded(rows["reward"]), torch.from_numpy(lengths))
