"""What a large replay of images costs: disk, memory, and the time to write, to sample and to open it again.

    python benchmarks/replay_size.py FOLDER            # a million 64 x 64 images: 12.3 GB in FOLDER, removed after
    python benchmarks/replay_size.py FOLDER --rows 50k --envs 4

Printed: seconds to make the buffer; rows per second that go in; the file's size on disk; memory of the process that is
not the file (Linux), before and when full; milliseconds to sample 16 sequences of 16 rows, median, with the file's
pages in the system's memory as the writing left them and with all of them dropped first; seconds to open it again.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from agent.data.replay import FLAGS, ReplayBuffer
from agent.settings import parse_count
from world_model import LatentState

SHAPE, DETER, STOCH = (64, 64, 3), (1, 128), (16, 8)
"""Sizes of an image and of the latents of the small preset."""


def make(folder: Path, rows: int, envs: int, exists: bool) -> ReplayBuffer:
    replay = ReplayBuffer(rows, envs, {"image": SHAPE}, 1, DETER, STOCH)
    replay.open_image_store(folder, exists)
    return replay


def own_memory() -> float:
    """Gigabytes of this process that are not a file's pages; nan where the system does not tell."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 / 1e9 if found else float("nan")


def drop_pages(replay: ReplayBuffer, file: Path) -> None:
    """Let the system forget what it holds of the file in memory."""
    mapped = replay.images["obs/image"].values._mmap
    mapped.flush()
    mapped.madvise(mmap.MADV_DONTNEED)
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def milliseconds(work: Callable[[], object], before: Callable[[], None] = lambda: None, times: int = 30) -> float:
    found = []
    for _ in range(times):
        before()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return 1e3 * float(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the file may lie; what is written is removed at the end")
    parser.add_argument("--rows", type=parse_count, default=1_000_000)
    parser.add_argument("--envs", type=int, default=16)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, began = Path(name), time.perf_counter()
        replay = make(folder, args.rows, args.envs, exists=False)
        print(f"made in       {time.perf_counter() - began:9.3f} s")
        empty, rng = own_memory(), np.random.default_rng(0)
        images = rng.integers(256, size=(64, args.envs, *SHAPE), dtype=np.uint8)
        zeros, off = np.zeros((args.envs, 1), np.float32), np.zeros(args.envs, bool)
        row = {"prev_action": zeros, "reward": zeros[:, 0], **dict.fromkeys(FLAGS, off)}
        state = LatentState(torch.zeros(args.envs, *DETER), torch.zeros(args.envs, *STOCH))
        began = time.perf_counter()
        for number in range(replay.length):
            replay.add({**row, "obs/image": images[number % len(images)]}, state)
        took, file = time.perf_counter() - began, folder / "image.images"
        print(f"written       {len(replay) / took:9,.0f} rows/s ({len(replay):,} rows in {took:.0f} s)")
        print(f"on disk       {os.stat(file).st_blocks * 512 / 1e9:9.2f} GB")
        print(f"memory        {own_memory():9.2f} GB, {empty:.2f} when empty")
        print(f"sampled       {milliseconds(lambda: replay.sample(16, 16)):9.2f} ms as the writing left it")
        cold = milliseconds(lambda: replay.sample(16, 16), lambda: drop_pages(replay, file))
        print(f"sampled       {cold:9.2f} ms with nothing of the file in memory")
        began = time.perf_counter()
        make(folder, args.rows, args.envs, exists=True)
        print(f"opened again  {time.perf_counter() - began:9.3f} s")


if __name__ == "__main__":
    main()
