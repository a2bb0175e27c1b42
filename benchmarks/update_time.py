"""Milliseconds of one update, by part: world model, imagination, actor-critic, backward, optimiser.

    python benchmarks/update_time.py                    # the sizes of the default preset, and the reference size
    python benchmarks/update_time.py --threads 1 --updates 100

The reference size is 16 x 64 rows, 1,024 dreams of 15 steps, two fixed loops; it is timed with the actor's gradient
by REINFORCE, as DreamerV3 has it, and through the dynamics, as ours has it for continuous actions. The default size
is timed three times: at two fixed loops, with a gate that lets every state stop after one loop, as a trained gate does
on easy tasks, and with a gate that starts by letting none stop. Nothing else may run meanwhile. Medians over single
updates; the first ones are left out. Random data: the time does not depend on it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent.actor_critic import ActionSpec  # noqa: E402
from agent.config import Config, keep_memory  # noqa: E402
from agent.dreamer import Dreamer  # noqa: E402
from agent.spaces import Spaces  # noqa: E402
from world_model import Batch  # noqa: E402

SPACES = Spaces({"state": 5}, ActionSpec(1, False))  # those of dmc:cartpole_swingup


def random_batch(agent: Dreamer, size: int, length: int) -> Batch:
    """(B, T) rows of noise, none of them the first of an episode."""
    rows = torch.zeros(size, length)
    obs = {name: torch.randn(size, length, width) for name, width in SPACES.obs.items()}
    action = torch.rand(size, length, SPACES.action.size) * 2 - 1
    no = rows.bool()
    with torch.no_grad():
        start = agent.world.initial(size)
    return Batch(obs, action, torch.rand(size, length), no, no, no, start)


def measure(name: str, config: Config, updates: int, gate: float | None) -> None:
    """Print the medians of one configuration; gate sets what the exit gate predicts for every state."""
    torch.manual_seed(0)
    agent = Dreamer(config.model, config.behavior, config.optimizer, SPACES)
    if gate is not None:
        agent.world.core.rule.state.bias.data.fill_(gate)
    rows: list[dict[str, float]] = []
    for number in range(updates + 5):
        batch = random_batch(agent, config.train.batch, config.train.length)
        agent.seconds.clear()
        began = time.perf_counter()
        _, metrics = agent.update(batch)
        if gate is not None:  # the gate is trained by the update: put it back
            agent.world.core.rule.state.bias.data.fill_(gate)
        if number >= 5:
            rows.append({**agent.seconds, "total": time.perf_counter() - began})
    parts = {part: 1e3 * float(np.median([row[part] for row in rows])) for part in rows[0]}
    parameters = sum(adam.flat.numel() for adam in agent.adams.values())
    print(
        f"{name:34s} {parameters:>9,} "
        + " ".join(f"{value:13.1f}" for value in parts.values())
        + f" {float(metrics['loop/dream_depth']):10.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=Config().train.threads, help="intra-op threads")
    parser.add_argument("--updates", type=int, default=60, help="timed updates of each size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, {args.threads} threads, torch {torch.__version__}")
    names = ["world_model", "imagination", "actor_critic", "backward", "optimizer", "total"]
    print(f"{'median ms of an update':34s} {'params':>9s} " + " ".join(f"{n:>13s}" for n in names) + "  mean loops")
    default = Config()
    fixed = replace(default.model, loop=replace(default.model.loop, depth="fixed", exit="fixed", mean_loops=2))
    measure("default size, two fixed loops", replace(default, model=fixed), args.updates, None)
    measure("default size, all exit after one", default, args.updates, -1.0)
    measure("default size, none exits", default, args.updates, 1e3)
    wide = replace(fixed, units=160, loop=replace(fixed.loop, units=160))
    reference = replace(
        default,
        model=wide,
        behavior=replace(default.behavior, starts=1024, horizon=15, units=160),
        train=replace(default.train, batch=16, length=64),
    )
    for gradient in ("reinforce", "dynamics"):  # the first is what DreamerV3 does
        behavior = replace(reference.behavior, actor_gradient=gradient)
        name = f"16 x 64, 1,024 dreams, {gradient}"
        measure(name, replace(reference, behavior=behavior), max(10, args.updates // 3), None)


if __name__ == "__main__":
    main()
