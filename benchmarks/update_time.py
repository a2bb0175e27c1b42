"""Milliseconds of one update, by part: world model, imagination, actor-critic, backward, optimiser.

    python benchmarks/update_time.py                    # the sizes of the default preset, and the reference size
    python benchmarks/update_time.py --threads 1 --updates 100
    python benchmarks/update_time.py --threads 1 --workers 2    # every update shared by two processes
    python benchmarks/update_time.py --images dmc       # or atari: at 1, 2 and 4 fixed loops, and with exits
    python benchmarks/update_time.py --images atari --device cuda --preset base
    python benchmarks/update_time.py --in-turn small tiny    # presets against each other, also on busy cores
    python benchmarks/update_time.py --in-turn small small+certified small+gru     # presets with other cores
    python benchmarks/update_time.py --plain --threads 1     # plain layers against fused ones, in turn

The reference size is 16 x 64 rows, 1,024 dreams of 15 steps, two fixed loops; it is timed with the actor's gradient
by REINFORCE, as DreamerV3 has it, and through the dynamics, as ours has it for continuous actions. The default size
is timed three times: at two fixed loops, with a gate that lets every state stop after one loop, as a trained gate does
on easy tasks, and with a gate that starts by letting none stop. Nothing else may run meanwhile. Medians over single
updates; the first ones are left out. Random data: the time does not depend on it. On a GPU an update is one part, a
recorded graph, and the first updates of every depth, which record it, are left out.

On a CPU the line below a row says what the matrix products of the update would take at the rate of PyTorch's product
of two 1,024 x 1,024 matrices, measured in the same run (the floor), and how many times as long the update takes.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from agent.errors import UsageError
from agent.execution import CudaGraphs, Eager, make_execution
from agent.execution.cuda_graphs import WARM_UPDATES
from agent.execution.fused import fused_layers
from agent.learning.dreamer import Dreamer
from agent.runs.config import Config
from agent.runs.presets import PRESETS, preset
from agent.runtime import keep_memory, set_threads
from agent.spaces import (
    ActionSpec,
    Spaces,
)
from world_model import Batch, LoopConfig
from world_model.exits import Gate

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


def product_rate(size: int = 1024, rounds: int = 9) -> float:
    """Operations per second of PyTorch's product of two matrices, the median of some rounds."""
    a, b, seconds = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(rounds):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / float(np.median(seconds))


class Products(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions that run inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.operations += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def operations(config: Config, gate: float | None, spaces: Spaces) -> float:
    """Of the matrix products of one update: the mean of some with plain layers, as their depth may be drawn."""
    agent = plain_agent(config, spaces)
    counted = []
    for _ in range(1 if config.model.loop.depth == "fixed" else 9):
        if gate is not None:
            agent.world.core.rule.state.bias.data.fill_(gate)
        with Products() as products:
            Eager(agent).update(random_batch(agent, config.train.batch, config.train.length))
        counted.append(products.operations)
    return float(np.median(counted))


def plain_agent(config: Config, spaces: Spaces, device: str = "cpu") -> Dreamer:
    """The same weights for the same settings."""
    torch.manual_seed(0)
    return Dreamer(config.model, config.behavior, config.optimizer, spaces, device)


def measure(
    name: str, config: Config, updates: int, gate: float | None, spaces: Spaces = SPACES, device: str = "cpu"
) -> None:
    """Print the medians of one configuration; gate sets what the exit gate predicts for every state."""
    agent = plain_agent(config, spaces, device)
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
    if device == "cpu":
        count = operations(config, gate, spaces)
        print(f"    {floor_of(count, parts['total'], product_rate())}")


def floor_of(count: float, total: float, rate: float) -> str:
    """What `count` operations take at a rate, and how many times as long an update takes (milliseconds)."""
    floor = 1e3 * count / rate
    work = f"{count / 1e9:.2f} GFLOP of products at {rate / 1e9:.0f} GFLOP/s"
    return f"{work}: floor {floor:.1f} ms, ratio {total / floor:.2f}"


def plain_in_turn(label: str, config: Config, gates: Mapping[str, float | None], updates: int) -> None:
    """Print medians of whole updates on walker_walk's sizes, with plain layers and with fused ones, for each gate.

    One update of each in turn, at the same depths, so that what else runs slows both; and the time over the floor.
    """
    plain, fused = (plain_agent(config, WALKER) for _ in range(2))
    executions = {"plain layers": Eager(plain), "fused layers": make_execution(fused)}
    print(f"{label:34s} " + " ".join(f"{gate:>15s}" for gate in gates) + "   over the floor")
    counts = [operations(config, gate, WALKER) for gate in gates.values()]
    times: dict[str, list[list[float]]] = {name: [[] for _ in gates] for name in executions}
    rates = []
    for number in range(updates + FIRST):
        for place, gate in enumerate(gates.values()):
            for name, execution in executions.items():
                if gate is not None:
                    execution.agent.world.core.rule.state.bias.data.fill_(gate)
                batch = random_batch(execution.agent, config.train.batch, config.train.length)
                torch.manual_seed(number)  # the same depth
                began = time.perf_counter()
                execution.update(batch)
                times[name][place].append(time.perf_counter() - began)
        rates.append(product_rate(rounds=1))
    floors = [1e3 * count / float(np.median(rates)) for count in counts]
    for name, taken in times.items():
        medians = [1e3 * float(np.median(each[FIRST:])) for each in taken]
        ratios = ", ".join(f"{ms / floor:.2f}" for ms, floor in zip(medians, floors, strict=True))
        print(f"{name:34s} " + " ".join(f"{ms:15.1f}" for ms in medians) + f"   {ratios}")
    for count in counts:
        print(f"    {floor_of(count, float('nan'), float(np.median(rates))).partition(', ratio')[0]}")


def with_core(name: str) -> Config:
    """The preset, or PRESET+CORE: the preset with this core."""
    chosen, _, core = name.partition("+")
    config = preset(chosen)
    return replace(config, model=replace(config.model, core=core or config.model.core))


def preset_name(name: str) -> str:
    """For argparse."""
    try:
        with_core(name)
    except (UsageError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def set_gate(agent: Dreamer, gain: float) -> None:
    """Let the exit gate, where there is one, predict this gain for every state."""
    if isinstance(rule := getattr(agent.world.core, "rule", None), Gate):
        rule.state.bias.data.fill_(gain)


def dream_time(agent: Dreamer, config: Config) -> float:
    """Seconds of one imagined step, without gradient, of as many states as in an update."""
    size, horizon = agent.behavior.starts or config.train.batch * config.train.length, config.behavior.horizon
    with torch.no_grad(), fused_layers():
        began = time.perf_counter()
        agent.world.imagine(agent.world.initial(size), agent.behavior.policy, horizon)
        return (time.perf_counter() - began) / horizon


def in_turn(names: list[str], updates: int) -> None:
    """Print medians of whole updates on walker_walk's sizes and of imagined steps, and the first one's time over each.

    One update of each in turn, so that what else runs slows all of them, at the same sampled depths; without and with
    further loops of the dreams.
    """
    columns = "update, all exit after one", "update, none exits", "imagined step, exit", "none exits"
    print(f"{'median ms':22s} {'params':>9s} {'core':>8s}   " + "   ".join(f"{column:>26s}" for column in columns))
    configs = {name: with_core(name) for name in names}
    agents = {name: plain_agent(config, WALKER) for name, config in configs.items()}
    executions = {name: make_execution(agent) for name, agent in agents.items()}
    taken: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for gate in (-1.0, 1e3):
        for number in range(updates + FIRST):
            for name, agent in agents.items():
                set_gate(agent, gate)  # trained by the update
                batch = random_batch(agent, configs[name].train.batch, configs[name].train.length)
                torch.manual_seed(number)  # the same depth
                began = now(agent)
                executions[name].update(batch)
                taken["update", name, gate].append(now(agent) - began)
                set_gate(agent, gate)
                taken["dream", name, gate].append(dream_time(agent, configs[name]))
    medians: dict[str, list[float]] = {name: [] for name in names}
    for (_, name, _), seconds in sorted(taken.items(), key=lambda item: (item[0][0] == "dream", item[0][2])):
        medians[name].append(1e3 * float(np.median(seconds[FIRST:])))
    for name, agent in agents.items():
        counts, first = agent.parameter_counts(), medians[names[0]]
        shown = (f"{ms:17.3f} ({one / ms:.2f} x)" for ms, one in zip(medians[name], first, strict=True))
        total = counts["world"] + counts["actor"] + counts["critic"]
        print(f"{name:22s} {total:>9,} {counts['core']:>8,}   " + "   ".join(shown))
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


def with_fixed_loops(config: Config) -> Config:
    """Two in every step."""
    loop = replace(config.model.loop, depth="fixed", exit="fixed", mean_loops=2)
    return replace(config, model=replace(config.model, loop=loop))


def reference_sizes(config: Config) -> dict[str, Config]:
    """16 x 64 rows and 1,024 dreams of 15 steps, with the actor's gradient by REINFORCE and through the dynamics."""
    fixed = with_fixed_loops(config)
    wide = replace(fixed.model, units=160, loop=replace(fixed.model.loop, units=160))
    train = replace(fixed.train, batch=16, length=64)
    sizes = {}
    for gradient in ("reinforce", "dynamics"):  # the first is what DreamerV3 does
        behavior = replace(fixed.behavior, starts=1024, horizon=15, units=160, actor_gradient=gradient)
        sizes[f"16 x 64, 1,024 dreams, {gradient}"] = replace(fixed, model=wide, behavior=behavior, train=train)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=Config().train.threads, help="intra-op threads; 0: tried out")
    parser.add_argument("--workers", type=int, default=1, help="processes that share an update")
    parser.add_argument("--updates", type=int, default=60, help="timed updates of each size")
    parser.add_argument("--images", choices=IMAGES, help="an agent that sees images, with the actions of dmc or atari")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes of the agent that sees images")
    parser.add_argument(
        "--in-turn", type=preset_name, nargs="+", metavar="PRESET[+CORE]", help="time these in turn, on vectors"
    )
    parser.add_argument("--plain", action="store_true", help="time plain and fused layers in turn, on vectors")
    parser.add_argument("--device", default="cpu", help="where the agent that sees images computes")
    args = parser.parse_args()
    args.threads = set_threads(args.threads)
    keep_memory()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, {args.threads} threads, {args.workers} processes, torch {torch.__version__}")
    if args.in_turn:
        in_turn(args.in_turn, args.updates)
        return
    if args.plain:
        gates = {"all exit at one": -1.0, "none exits": 1e3}
        plain_in_turn("small, median ms of an update", preset("small"), gates, args.updates)
        for name, config in reference_sizes(Config()).items():
            plain_in_turn(name, config, {"two fixed loops": None}, max(3, args.updates // 6))
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
    measure("default size, two fixed loops", with_fixed_loops(default), args.updates, None)
    measure("default size, all exit after one", default, args.updates, -1.0)
    measure("default size, none exits", default, args.updates, 1e3)
    for name, config in reference_sizes(default).items():
        measure(name, config, max(10, args.updates // 3), None)


if __name__ == "__main__":
    main()
