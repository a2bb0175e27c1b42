"""Images of a replay buffer: in a memory-mapped file that is itself the saved replay, and copies on a GPU.

Symbols: E environments (one ring each), L rows per ring, B sequences, T rows of a sequence.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch

CHUNK_BYTES = 1 << 24
"""Bytes of a file that are allocated at a time, before they are written: a full disk then raises an error with a
message, instead of killing the process in the middle of a write to mapped memory."""


class ImageStore:
    """Rings of images (E, L, H, W, C) uint8, in the file `path`, or in memory where it is None.

    A file of any size is made at once, because it occupies no disk space before rows are written. `written` (1,), in
    a second file beside it, counts the rows: after a crash it tells which images are newer than the checkpoint.
    With `exists` the files must be there and of this size. Raises ValueError where they are not. mine: the rings that
    `values` holds, where other processes write the others.
    """

    def __init__(self, path: Path | None, shape: tuple[int, ...], exists: bool = False, mine: slice = slice(None)):
        self.path, self.first = path, mine.start or 0
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
        self.values = np.memmap(path, np.uint8, "r+" if exists else "w+", shape=shape)[mine]
        self.written = np.memmap(counter, np.int64, "r+" if exists else "w+", shape=(1,))
        self.chunk_rows = max(1, CHUNK_BYTES // self.values[0, 0].size)
        self.allocated = np.zeros(-(-shape[1] // self.chunk_rows), bool)  # by chunk

    def write(self, number: int, images: np.ndarray) -> None:
        """Store (E, H, W, C) as row number `number`, counted from the first row ever written.

        Raises OSError when the disk is full.
        """
        at = number % self.values.shape[1]
        if self.path is not None and not self.allocated[at // self.chunk_rows]:
            self.allocate(at // self.chunk_rows)
        # The count first, which never falls: the old image is lost from now on, even if the process dies here.
        self.written[0] = max(self.written[0], number + 1)
        self.values[:, at] = images

    def allocate(self, chunk: int) -> None:
        """Allocate disk space for one chunk of rows of every ring."""
        envs, length = self.values.shape[:2]
        row_bytes, first = self.values[0, 0].size, chunk * self.chunk_rows
        rows = min(self.chunk_rows, length - first)
        if self.path is not None and hasattr(os, "posix_fallocate"):
            file = os.open(self.path, os.O_RDWR)
            try:
                for env in range(self.first, self.first + envs):
                    os.posix_fallocate(file, (env * length + first) * row_bytes, rows * row_bytes)
            except OSError as error:  # the system's error lacks the name of the file
                raise OSError(error.errno, error.strerror or "cannot be written", str(self.path)) from error
            finally:
                os.close(file)
        self.allocated[chunk] = True


def free_bytes(device: torch.device) -> float:
    """Free memory of a GPU; infinite for other devices, where it is not limited here."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


class DeviceImages:
    """A copy of the rings on a device, (E, rows so far, H, W, C), from which sequences are gathered there.

    It holds the rows before row number `count` and grows with the rings, so that a short run takes little memory.
    Raises MemoryError where the device has too little.
    """

    def __init__(self, values: np.ndarray, count: int, device: torch.device | str):
        self.length, held = values.shape[1], min(count, values.shape[1])
        self.values = torch.empty((values.shape[0], 0, *values.shape[2:]), dtype=torch.uint8, device=device)
        self.grow(held)
        step = max(1, CHUNK_BYTES // values[:, 0].size)
        for first in range(0, held, step):
            part = slice(first, min(first + step, held))
            self.values[:, part] = torch.from_numpy(np.ascontiguousarray(values[:, part])).to(device)

    def grow(self, rows: int) -> None:
        """Make place for twice `rows` rows of every ring, at most for whole rings."""
        before, device = self.values, self.values.device
        shape = before.shape[0], min(self.length, 2 * rows), *before.shape[2:]
        if 2 * math.prod(shape) > free_bytes(device):  # updates need memory too
            raise MemoryError
        try:
            self.values = torch.empty(shape, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:  # another process took it in the meantime
            raise MemoryError from error
        self.values[:, : before.shape[1]] = before

    def write(self, at: int, images: np.ndarray) -> None:
        """Store (E, H, W, C) at position `at` of the rings."""
        if at >= self.values.shape[1]:
            self.grow(at + 1)
        self.values[:, at] = torch.from_numpy(np.ascontiguousarray(images)).to(self.values.device)

    def gather(self, env: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Images at positions (env, rows), which broadcast to (B, T): (B, T, H, W, C)."""
        index = (torch.from_numpy(array).to(self.values.device, non_blocking=True) for array in (env, rows))
        return self.values[tuple(index)]
