"""Images of a replay in a memory-mapped file, which is itself the saved replay."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch

CHUNK = 1 << 24
"""Bytes that are taken from the disk at a time, before they are written: a full disk is then an error that says so, and
not the end of the process in the middle of a write."""


class ImageRows:
    """Rings of images, shape (E, L, H, W, C) uint8, in the file `path`; without a path in memory.

    However large it may become, the file starts at once, because it takes no room before rows are written. `written`
    (1,), in a second file beside it, counts them: after a crash it tells which images are newer than the checkpoint.
    With `exists` the file must be there, and be of this size: ValueError where it is not.
    """

    def __init__(self, path: Path | None, shape: tuple[int, ...], exists: bool = False):
        self.path = path
        if path is None:
            self.values: np.ndarray = np.zeros(shape, np.uint8)
            self.written = np.zeros(1, np.int64)
            return
        counter = path.with_suffix(".count")
        if exists and not (path.exists() and counter.exists()):
            raise ValueError(f"the images of the replay are missing: {path}")
        if exists and path.stat().st_size != np.prod(shape):
            raise ValueError(f"{path} has another capacity: keep --train.replay_rows as it was")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.values = np.memmap(path, np.uint8, "r+" if exists else "w+", shape=shape)
        self.written = np.memmap(counter, np.int64, "r+" if exists else "w+", shape=(1,))
        self.step = max(1, CHUNK // self.values[0, 0].size)  # rows of a chunk
        self.reserved = np.zeros(-(-shape[1] // self.step), bool)

    def write(self, number: int, images: np.ndarray) -> None:
        """Put (E, H, W, C) into the rings as row number `number` ever. Raises OSError when the disk is full."""
        at = number % self.values.shape[1]
        if self.path is not None and not self.reserved[at // self.step]:
            self.reserve(at // self.step)
        # First the number, which never falls: what was here is lost from now on, whatever happens next.
        self.written[0] = max(self.written[0], number + 1)
        self.values[:, at] = images

    def reserve(self, chunk: int) -> None:
        """Take the room of a chunk of rows of every ring from the disk."""
        envs, length = self.values.shape[:2]
        row, first = self.values[0, 0].size, chunk * self.step
        rows = min(self.step, length - first)
        if self.path is not None and hasattr(os, "posix_fallocate"):
            file = os.open(self.path, os.O_RDWR)
            try:
                for env in range(envs):
                    os.posix_fallocate(file, (env * length + first) * row, rows * row)
            except OSError as error:  # it comes without the name
                raise OSError(error.errno, error.strerror or "cannot be written", str(self.path)) from error
            finally:
                os.close(file)
        self.reserved[chunk] = True


def room(device: torch.device) -> float:
    """Bytes that are free on a GPU; of other devices nobody asks."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


class DeviceRows:
    """The same rings in the memory of a device, (E, L, H, W, C): sequences are then gathered there.

    They begin with the rows that are held so far, of those before row number `count`, and grow with the rings: a short
    run takes little of the memory. Raises MemoryError where there is no room.
    """

    def __init__(self, values: np.ndarray, count: int, device: torch.device | str):
        self.length, held = values.shape[1], min(count, values.shape[1])
        self.values = torch.empty((values.shape[0], 0, *values.shape[2:]), dtype=torch.uint8, device=device)
        self.grow(held)
        step = max(1, CHUNK // values[:, 0].size)
        for first in range(0, held, step):
            part = slice(first, min(first + step, held))
            self.values[:, part] = torch.from_numpy(np.ascontiguousarray(values[:, part])).to(device)

    def grow(self, rows: int) -> None:
        """Make room for at least `rows` rows of every ring, and for as many again."""
        before, device = self.values, self.values.device
        shape = before.shape[0], min(self.length, 2 * rows), *before.shape[2:]
        if 2 * math.prod(shape) > room(device):
            raise MemoryError  # an update wants room too
        try:
            self.values = torch.empty(shape, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:  # somebody else was quicker
            raise MemoryError from error
        self.values[:, : before.shape[1]] = before

    def write(self, at: int, images: np.ndarray) -> None:
        """Put (E, H, W, C) at place `at` of the rings."""
        if at >= self.values.shape[1]:
            self.grow(at + 1)
        self.values[:, at] = torch.from_numpy(np.ascontiguousarray(images)).to(self.values.device)

    def gather(self, env: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Images at places (env, rows), which are broadcast: (B, T, H, W, C)."""
        where = (torch.from_numpy(place).to(self.values.device, non_blocking=True) for place in (env, rows))
        return self.values[tuple(where)]
