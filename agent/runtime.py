"""The process that a run lives in: device, threads, memory, random generators."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent.errors import UsageError

PROJECT = Path(__file__).resolve().parents[1]
"""The folder of the two scripts."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""What asks a run to end: Ctrl-C; SLURM, Docker and `kill`; a closed terminal; SLURM's warning before a job's end."""


def cores() -> int:
    """Processors that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def resolve_device(name: str) -> torch.device:
    """The device that auto, cpu, cuda or cuda:1 stands for. Raises UsageError where it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: no CUDA device here; use --device cpu")
    return device


def set_threads(wanted: int) -> int:
    """Give PyTorch `wanted` threads per operation, or with 0 the faster of one and two; returns the number.

    Two threads save a quarter of an update's time on two idle cores, and cost several times as much as they
    save on busy ones, because threads that wait for each other keep their core busy. So it is tried out.
    """
    if wanted == 0:
        small, wide, weight = torch.ones(128, 256), torch.ones(2048, 256), torch.ones(256, 128)
        seconds = {}
        for threads in (1, 2) if cores() > 1 else (1,):
            torch.set_num_threads(threads)
            rounds = []
            for _ in range(15):
                start = time.perf_counter()
                for _ in range(20):
                    (small @ weight).relu_()
                (wide @ weight).relu_()
                rounds.append(time.perf_counter() - start)
            seconds[threads] = sum(sorted(rounds)[2:])  # the first rounds start the threads
        wanted = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(wanted)
    return wanted


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that can be taken without swapping, by the machine and by the limits of a container or a job; infinite
    where the system does not tell. root: where /proc and /sys lie."""
    free = [math.inf, *_free_in_control_groups(root)]
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        free.append(1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    return max(0.0, min(free))


def _free_in_control_groups(root: Path) -> Iterator[float]:
    """What the limit of each control group that holds this process leaves; pages of files can be dropped at any time.

    Linux has two layouts: one tree of groups, or one tree for each resource.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, resources, path = line.split(":", 2)
        if resources and "memory" not in resources.split(","):
            continue
        limit, used = ("limit_in_bytes", "usage_in_bytes") if resources else ("max", "current")
        top = root / "sys/fs/cgroup" / resources
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit: "max"
                most, now = (int((folder / f"memory.{name}").read_text()) for name in (limit, used))
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                prefix = "total_" if resources else ""
                files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield float(most - now + files)
            if folder == top:
                break


def keep_memory() -> None:
    """Let the C library keep freed memory for the next update instead of handing it back to the system.

    Tensors of a few megabytes otherwise cost a page fault per 4 KiB, every time: at 1,024 dreams a fifth of an
    update. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest: smaller blocks come from the heap
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: so much may lie free at its end


# ---------------------------------------------------------------------- random generators


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


# ---------------------------------------------------------------------- time


class Stopwatch:
    """Seconds spent in each named part, summed over all rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = time.perf_counter()

    def start(self) -> Stopwatch:
        """Begin a round."""
        self.since = time.perf_counter()
        return self

    def lap(self, part: str) -> None:
        """What passed since the last lap, or the start, was spent in this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.since
        self.since = now

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """What happens inside is spent in this part."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
