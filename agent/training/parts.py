"""The checkpoint of several ranks: one as of a process with the environments of all, from which any number goes on.

Symbols: N ranks, E environments of each (one ring of the replay for each), L rows of a ring.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.checkpoint import images_folder, ranks_of
from agent.data.replay import ReplayBuffer, with_images
from agent.runtime import random_states


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Replay and trainer of all ranks, from {"replay", "trainer"} of each: rings side by side, rank 0's first."""
    replays, trainers = ([part[name] for part in parts] for name in ("replay", "trainer"))
    replay = {**replays[0], "rows": side_by_side([each["rows"] for each in replays])}
    memories = [each["memory"] for each in trainers]
    trainer = {
        **trainers[0],
        "row": side_by_side([each["row"] for each in trainers]),
        "memory": side_by_side(memories) if all(memories) else None,
        "ranks": [
            {"random": each["random"], "rng": own["rng"], "highest": own["highest"], "bad_steps": each["bad_steps"]}
            for each, own in zip(trainers, replays, strict=True)
        ],
    }
    return {"replay": replay, "trainer": trainer}


def side_by_side(trees: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{name: (E, ...)} of every rank -> {name: (N * E, ...)}"""
    return {name: torch.cat([tree[name] for tree in trees]) for name in trees[0]}


def part_of(saved: Mapping[str, Any], rank: int, envs: int) -> dict[str, Any]:
    """The checkpoint as rank number `rank` of as many ranks, with `envs` environments each, goes on from it."""
    if ranks_of(saved) == 1:
        return dict(saved)
    mine, replay, trainer = slice(rank * envs, (rank + 1) * envs), saved["replay"], saved["trainer"]
    own = trainer["ranks"][rank]

    def cut(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[mine] for name, value in tree.items()}

    replay = {**replay, "rows": cut(replay["rows"]), "rng": own["rng"], "highest": own.get("highest", 1.0)}
    memory = trainer["memory"] and cut(trainer["memory"])
    trainer = {**trainer, "row": cut(trainer["row"]), "memory": memory, **{k: own[k] for k in ("random", "bad_steps")}}
    return {**saved, "replay": replay, "trainer": trainer}


# ---------------------------------------------------------------------- another number of ranks


COPIED = 1024
"""Images that are copied at a time."""


class Deal(NamedTuple):
    """Which row of the old rings each row of the new ones is: ring and place (rings, rows) each; and which of them were
    the first or the last of an old ring (rings, rows)."""

    ring: np.ndarray
    place: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def deal(replay: Mapping[str, Any], rings: int, length: int) -> Deal:
    """Deal the rows of a saved replay out to `rings` rings of at most `length` rows, in the order of time.

    The old rings are laid end to end and cut into equal pieces; of a piece that is too long the newest rows are kept.
    """
    old, held = replay["rows"]["reward"].shape
    places = np.arange(max(replay["first_intact"], replay["count"] - held, 0), replay["count"]) % max(1, held)
    piece = old * len(places) // rings
    number = (np.arange(rings)[:, None] * piece + np.arange(piece))[:, max(0, piece - length) :]  # (rings, rows)
    ring, at = number // max(1, len(places)), number % max(1, len(places))
    return Deal(ring, places[at], at == 0, at == len(places) - 1)


def dealt(saved: Mapping[str, Any], rank: int, size: int, envs: int, length: int) -> dict[str, Any]:
    """The checkpoint as rank number `rank` of `size`, with `envs` environments and rings of `length` rows, goes on from
    it, where another number of ranks has written it. Images stay where they are: see `deal_images`.

    Rows that were not neighbours become so. An episode therefore ends there, truncated, and another begins. What the
    environments showed last is given up, as new episodes begin.
    """
    replay, plan = saved["replay"], deal(saved["replay"], size * envs, length)
    mine = slice(rank * envs, (rank + 1) * envs)
    ring, place = plan.ring[mine], plan.place[mine]
    rows = {name: torch.from_numpy(value.numpy()[ring, place]) for name, value in replay["rows"].items()}
    begins, ends = torch.from_numpy(plan.begins[mine]), torch.from_numpy(plan.ends[mine])
    if ends.shape[1]:
        ends[:, -1] = True
    rows["is_first"] = rows["is_first"] | begins
    for name in ("is_last", "is_terminal"):  # of a first row: the end of an episode whose other rows are gone
        rows[name] = rows[name] & ~begins
    rows["is_last"] = rows["is_last"] | (ends & ~rows["is_first"])
    rows["reward"] = rows["reward"].masked_fill(begins, 0.0)
    rows["prev_action"] = rows["prev_action"].masked_fill(begins[..., None], 0.0)
    rng = replay["rng"] if rank == 0 else np.random.default_rng([rank, saved["step"]]).bit_generator.state
    replay = {**replay, "rows": rows, "count": ring.shape[1], "first_intact": 0, "rng": rng}
    trainer = {**saved["trainer"], "row": {}, "memory": None}
    if rank:
        trainer["random"] = random_states()
    return {**saved, "replay": replay, "trainer": trainer}


def intact(saved: dict[str, Any], replay: ReplayBuffer, folder: Path) -> dict[str, Any]:
    """The checkpoint without rows whose images were overwritten after it. Raises ValueError where files are missing."""
    sizes = {name.removeprefix("obs/"): size for name, size in replay.image_sizes.items()}
    first = with_images(saved["replay"], sizes, images_folder(folder, ranks_of(saved)))["first_intact"]
    return {**saved, "replay": {**saved["replay"], "first_intact": first}}


def deal_images(saved: Mapping[str, Any], replay: ReplayBuffer, folder: Path, rings: int, ranks: int) -> None:
    """Copy the images of a run's folder to where `ranks` ranks with `rings` rings of `replay`'s length look for them.

    The old files stay until the run is done (`drop_other_images`): the last checkpoints count on them. Raises
    ValueError where they are missing or too short, and OSError where the disk is full.
    """
    plan, old = deal(saved["replay"], rings, replay.length), saved["replay"]["rows"]["reward"].shape[0]
    target = images_folder(folder, ranks)
    target.mkdir(parents=True, exist_ok=True)
    for name, size in replay.image_sizes.items():
        file = f"{name.removeprefix('obs/')}.images"
        source = images_folder(folder, ranks_of(saved)) / file
        if not source.exists():
            raise ValueError(f"the images of the replay are missing: {source}")
        before = np.memmap(source, np.uint8, "r").reshape(old, -1, *size)  # (rings, L, H, W, C)
        make_room(target / file, rings, replay.length * math.prod(size), plan.ring.shape[1] * math.prod(size))
        after = np.memmap(target / file, np.uint8, "r+", shape=(rings, replay.length, *size))
        for ring in range(rings):
            for first in range(0, plan.ring.shape[1], COPIED):
                part = slice(first, first + COPIED)
                after[ring, part][: len(plan.ring[ring, part])] = before[plan.ring[ring, part], plan.place[ring, part]]
        np.array([plan.ring.shape[1]], np.int64).tofile((target / file).with_suffix(".count"))


def make_room(path: Path, rings: int, ring_bytes: int, used: int) -> None:
    """A new file of so many rings, with room on the disk for the first `used` bytes of each: a write into a mapped file
    on a full disk would end the process. Raises OSError."""
    with path.open("wb") as file:
        file.truncate(rings * ring_bytes)
        for ring in range(rings if used and hasattr(os, "posix_fallocate") else 0):
            os.posix_fallocate(file.fileno(), ring * ring_bytes, used)


def drop_other_images(folder: Path, ranks: int) -> None:
    """Delete the images that other numbers of ranks left in a run's folder, whose checkpoints are all of `ranks` now.

    What cannot be deleted stays.
    """
    root, own = images_folder(folder), images_folder(folder, ranks)
    for path in root.glob("*-ranks"):
        if path != own:
            shutil.rmtree(path, ignore_errors=True)
    for path in root.glob("*") if own != root else ():
        if path.suffix in (".images", ".count"):
            with suppress(OSError):
                path.unlink()
