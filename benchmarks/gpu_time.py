"""Everything about speed that only a GPU can show, in one table and under ten minutes.

    python benchmarks/gpu_time.py
    python benchmarks/gpu_time.py --minutes 4 --out gpu.csv

For five agents (vectors and images; the actor's gradient through the dynamics and by REINFORCE; `small` and `base`):
milliseconds of an update kernel by kernel, as a CUDA graph, and as a graph of compiled code; the kernels of an update,
as the profiler counts them; the busy share, which is the time inside of kernels over the time of an update; and the
memory at its peak. Rows are printed as they are measured, the cheapest first. What does not fit into --minutes is left
out and said to be. Random data: the time does not depend on it.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from update_time import IMAGES, WALKER, now, plain_agent, random_batch

from agent.execution import CudaGraphs, Eager, make_execution
from agent.execution.cuda_graphs import WARM_UPDATES
from agent.learning.dreamer import Dreamer
from agent.runs.config import Config
from agent.runs.presets import preset
from agent.spaces import Spaces

COLUMNS = (
    "agent", "gradient", "execution", "depth", "ms", "ms_low", "ms_high", "kernels", "busy", "memory_mb", "updates",
    "seconds",
)  # fmt: skip


class Row(NamedTuple):
    """An agent to be timed."""

    name: str
    preset: str
    spaces: Spaces
    gradient: str


ROWS = (
    Row("small, vectors", "small", WALKER, "dynamics"),
    Row("small, vectors", "small", WALKER, "reinforce"),
    Row("base, vectors", "base", WALKER, "dynamics"),
    Row("base, images, continuous", "base", IMAGES["dmc"], "dynamics"),
    Row("base, images, discrete", "base", IMAGES["atari"], "reinforce"),
)
EXECUTIONS = ("eager", "graphs", "compiled")


def config_of(row: Row, execution: str) -> Config:
    """Its settings, at a fixed depth of two loops with exits, so that every update does the same."""
    config = preset(row.preset)
    loop = replace(config.model.loop, depth="fixed", mean_loops=2.0, max_loops=4)
    return replace(
        config,
        model=replace(config.model, loop=loop),
        behavior=replace(config.behavior, actor_gradient=row.gradient),
        optimizer=replace(config.optimizer, gpu=execution),
    )


def kernels(execution: Eager, agent: Dreamer, config: Config) -> tuple[int, float]:
    """Kernels of one update, and the milliseconds spent inside of them; (0, 0.0) where there is no GPU."""
    if agent.device.type != "cuda":
        return 0, 0.0
    batch = random_batch(agent, config.train.batch, config.train.length)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        execution.update(batch)
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = [e for e in events if not e.name.startswith("Mem")]  # copies are no kernels
    return len(events), sum(event.device_time for event in events) / 1e3


def measure(row: Row, execution_name: str, updates: int, device: str) -> dict[str, Any]:
    """One row of the table."""
    began, config = time.perf_counter(), config_of(row, execution_name)
    agent = plain_agent(config, row.spaces, device)
    if agent.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    execution = make_execution(agent)
    warm = WARM_UPDATES + 2 if isinstance(execution, CudaGraphs) else 3
    taken = []
    for number in range(warm + updates):
        batch = random_batch(agent, config.train.batch, config.train.length)
        start = now(agent)
        execution.update(batch)
        if number >= warm:
            taken.append(1e3 * (now(agent) - start))
    launched, inside = kernels(execution, agent, config)
    median = float(np.median(taken))
    peak = torch.cuda.max_memory_allocated() / 2**20 if agent.device.type == "cuda" else 0.0
    execution.close()
    return {
        "agent": row.name, "gradient": row.gradient, "execution": execution_name, "depth": 2, "ms": round(median, 2),
        "ms_low": round(float(np.quantile(taken, 0.25)), 2), "ms_high": round(float(np.quantile(taken, 0.75)), 2),
        "kernels": launched, "busy": round(inside / median, 3), "memory_mb": round(peak), "updates": updates,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no row after this time")
    parser.add_argument("--updates", type=int, default=30, help="timed updates of each row")
    parser.add_argument("--out", type=Path, default=None, help="write the rows to this CSV file too")
    parser.add_argument("--device", default="cuda", help="cuda; cpu tries the script out, kernel by kernel")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU here; --device cpu tries the script out", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    print(f"{'agent':26s} {'gradient':10s} {'execution':10s} {'ms':>8s} {'kernels':>8s} {'busy':>6s} {'MB':>6s}")
    rows, end, left_out = [], time.monotonic() + 60.0 * args.minutes, []
    for execution in EXECUTIONS if args.device == "cuda" else EXECUTIONS[:1]:  # compiling takes longest
        for row in ROWS:
            if time.monotonic() > end:
                left_out.append(f"{row.name}, {row.gradient}, {execution}")
                continue
            rows.append(found := measure(row, execution, args.updates, args.device))
            print(
                f"{found['agent']:26s} {found['gradient']:10s} {execution:10s} {found['ms']:8.2f} "
                f"{found['kernels']:8,d} {found['busy']:6.2f} {found['memory_mb']:6,d}",
                flush=True,
            )
    for line in left_out:
        print(f"left out, as {args.minutes:g} minutes are over: {line}")
    if args.out:
        with args.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
