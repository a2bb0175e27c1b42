"""Milliseconds of one update, by part: world model, imagination, actor-critic, backward, optimiser.

    python benchmarks/update_time.py                    # the sizes of the default preset, and the reference size
    python benchmarks/update_time.py --threads 1 --updates 100
    python benchmarks/update_time.py --threads 1 --workers 2    # every update shared by two processes
    python benchmarks/update_time.py --images dmc       # or atari: at 1, 2 and 4 fixed loops, and with exits
    python benchmarks/update_time.py --images atari --device cuda --preset base
    python benchmarks/update_time.py --in-turn small tiny    # presets against each other, also on busy cores

The reference size is 16 x 64 rows, 1,024 dreams of 15 steps, two fixed loops; it is timed with the actor's gradient
by REINFORCE, as DreamerV3 has it, and through the dynamics, as ours has it for continuous actions. The default size
is timed three times: at two fixed loops, with a gate that lets every state stop after one loop, as a trained gate does
on easy tasks, and with a gate that starts by letting none stop. Nothing else may run meanwhile. Medians over single
updates; the first ones are left out. Random data: the time does not depend on it. On a GPU an update is one part, a
recorded graph, and the first updates of every depth, which record it, are left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import replace

import numpy as np
import torch

from agent.execution import CudaGraphs, make_execution
from agent.execution.cuda_graphs import WARM_UPDATES
from agent.learning.dreamer import Dreamer
from agent.runs.config import Config
from agent.runs.presets import PRESETS, preset
from agent.runtime import keep_memory, set_threads
from agent.spaces import (
    ActionSpec,
    Spaces,
)
from world_model import Batch, LoopConfig

SPACES = Spaces({"state": 5}, ActionSpec(1, False))  # those of dmc:cartpole_swingup
WALKER = Spaces({"state": 24}, ActionSpec(6, False))  # those of dmc:walker_walk
IMAGES = {
    "dmc": Spaces({"image": (64, 64, 3)}, ActionSpec(6, False)),
    "atari": Spaces({"image": (64, 64, 3)}, ActionSpec(18, True)),
}
FIRST = 5
"""Updates that are left out."""


def random_batch(agent: Dreamer, size: int, length: int) -> Batch:
    """(B, T) rows of noise, none of them the first of an episode."""
    rows, device = torch.zeros(size, length, device=agent.device), agent.device
    obs = {
        name: torch.randn(size, length, width, device=device)
        if isinstance(width, int)
        else torch.randint(0, 256, (size, length, *width), dtype=torch.uint8, device=device)
        for name, width in agent.spaces.obs.items()
    }
    action = torch.rand(size, length, agent.spaces.action.size, device=device) * 2 - 1
    no = rows.bool()
    with torch.no_grad():
        start = agent.world.initial(size)
    return Batch(obs, action, torch.rand(size, length, device=device), no, no, no, start)


def now(agent: Dreamer) -> float:
    """The time, when all that was begun is done."""
    if agent.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    name: str, config: Config, updates: int, gate: float | None, spaces: Spaces = SPACES, device: str = "cpu"
) -> None:
    """Print the medians of one configuration; gate sets what the exit gate predicts for every state."""
    torch.manual_seed(0)
    agent = Dreamer(config.model, config.behavior, config.optimizer, spaces, device)
    execution = make_execution(agent)
    graphs = isinstance(execution, CudaGraphs)
    first = FIRST + graphs * (WARM_UPDATES + 1) * 2 * config.model.loop.train_cap
    if gate is not None:
        agent.world.core.rule.state.bias.data.fill_(gate)
    rows: list[dict[str, float]] = []
    for number in range(updates + first):
        batch = random_batch(agent, config.train.batch, config.train.length)
        agent.clock.seconds.clear()
        began = now(agent)
        metrics = execution.update(batch).metrics
        took = now(agent) - began
        if gate is not None:  # the gate is trained by the update: put it back
            agent.world.core.rule.state.bias.data.fill_(gate)
        if number >= first:
            rows.append({**agent.clock.seconds, "total": took})
    execution.close()
    parts = {part: 1e3 * float(np.median([row[part] for row in rows])) for part in rows[0]}
    parameters = sum(adam.flat.numel() for adam in agent.optimizers.values())
    print(
        f"{name:34s} {parameters:>9,} "
        + " ".join(f"{value:13.1f}" for value in parts.values())
        + f" {float(metrics['loop/dream_depth']):10.2f}"
    )


def in_turn(names: list[str], updates: int) -> None:
    """Print medians of whole updates of presets on walker_walk's sizes, and the first one's time over each.

    One update of each in turn, so that what else runs slows all of them, at the same sampled depths; without and with
    further loops of the dreams.
    """
    print(f"{'median ms of an update':22s} {'params':>9s} {'core':>8s}   all exit after one     none exits")
    agents = {}
    for name in names:
        config = preset(name)
        torch.manual_seed(0)
        agents[name] = Dreamer(config.model, config.behavior, config.optimizer, WALKER, "cpu")
    executions = {name: make_execution(agent) for name, agent in agents.items()}
    medians: dict[str, list[float]] = {name: [] for name in names}
    for gate in (-1.0, 1e3):
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(updates + FIRST):
            for name, agent in agents.items():
                agent.world.core.rule.state.bias.data.fill_(gate)  # trained by the update
                batch = random_batch(agent, preset(name).train.batch, preset(name).train.length)
                torch.manual_seed(number)  # the same depth
                began = now(agent)
                executions[name].update(batch)
                if number >= FIRST:
                    times[name].append(now(agent) - began)
        for name in names:
            medians[name].append(1e3 * float(np.median(times[name])))
    for name, agent in agents.items():
        counts, first = agent.parameter_counts(), medians[names[0]]
        shown = (f"{ms:8.1f} ({one / ms:.2f} x)" for ms, one in zip(medians[name], first, strict=True))
        total = counts["world"] + counts["actor"] + counts["critic"]
        print(f"{name:22s} {total:>9,} {counts['core']:>8,}   " + "    ".join(shown))
        executions[name].close()


def image_rows(loop: LoopConfig) -> list[tuple[str, LoopConfig, float | None]]:
    """Label, core and what the gate says: 1, 2 and 4 fixed loops, then sampled depth with exits."""
    fixed = [replace(loop, depth="fixed", exit="fixed", mean_loops=float(loops)) for loops in (1, 2, 4)]
    rows: list[tuple[str, LoopConfig, float | None]] = [(f"{each.train_cap} fixed loops", each, None) for each in fixed]
    sampled = replace(loop, depth="update", exit="gate", mean_loops=2.0)
    return [*rows, ("sampled, all exit after one", sampled, -1.0), ("sampled, none exits", sampled, 1e3)]


def shared(config: Config, workers: int) -> Config:
    """The settings with updates that so many processes share."""
    return replace(config, optimizer=replace(config.optimizer, workers=workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=Config().train.threads, help="intra-op threads; 0: tried out")
    parser.add_argument("--workers", type=int, default=1, help="processes that share an update")
    parser.add_argument("--updates", type=int, default=60, help="timed updates of each size")
    parser.add_argument("--images", choices=IMAGES, help="an agent that sees images, with the actions of dmc or atari")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes of the agent that sees images")
    parser.add_argument("--in-turn", choices=PRESETS, nargs="+", help="time these presets in turn, on vectors")
    parser.add_argument("--device", default="cpu", help="where the agent that sees images computes")
    args = parser.parse_args()
    args.threads = set_threads(args.threads)
    keep_memory()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, {args.threads} threads, {args.workers} processes, torch {torch.__version__}")
    if args.in_turn:
        in_turn(args.in_turn, args.updates)
        return
    names = ["world_model", "imagination", "actor_critic", "backward", "optimizer", "total"]
    if args.workers > 1:
        names[4:5] = ["all_reduce", "optimizer", "workers"]
    if args.images:
        names = ["update", "total"] if args.device == "cuda" else names
    print(f"{'median ms of an update':34s} {'params':>9s} " + " ".join(f"{n:>13s}" for n in names) + "  mean loops")
    if args.images:
        for label, loop, gate in image_rows(preset(args.preset).model.loop):
            config = shared(preset(args.preset), args.workers)
            config = replace(config, model=replace(config.model, loop=loop))
            measure(label, config, args.updates, gate, IMAGES[args.images], args.device)
        return
    default = shared(Config(), args.workers)
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
