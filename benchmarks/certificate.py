"""Does any attack exceed a certificate? Bounds of cores from their weights, beside adversarial searches.

    python benchmarks/certificate.py
    python benchmarks/certificate.py --attacks 10000 --steps 30 --cores certified contracting
    python benchmarks/certificate.py --attacks 2000 --runs RUN RUN --out attacks.csv

Cores looped (which certifies nothing of a loop), certified and contracting, of one and four tokens, with the first
weights of a seed, with random ones and with ten times these; and the cores of trained runs. Each search starts at a
random state, from 0.1 to 10 times as large as the first state of an episode, with random inputs, and climbs the ratio
of the distances of two states after and before a loop, or an environment step of two loops. One row each: what is
certified, the largest singular value where the searches start, and the largest ratio that was found. A certificate that
is exceeded by more than rounding ends the program with status 1.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from csv_rows import at_least_one, check_place, seed_number, write_rows

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import UsageError
from agent.interop.load import load_dreamer
from agent.runtime import set_threads
from world_model import CoreSizes, LoopConfig, LoopedCore, certificate
from world_model.attack import Points, StateMap, expansion, loop_map, step_map
from world_model.certified import ContractingCore
from world_model.controls.matching import make_core

KINDS = ("looped", "certified", "contracting")
WEIGHTS = ("first", "random", "ten times random")
SIZES = CoreSizes(groups=8, classes=4, actions=4)
LOOPS = 2
ROUNDING = 1e-6
"""Relative; searches run in float64."""
COLUMNS = ("core", "tokens", "weights", "map", "certificate", "start", "attacked", "attacks")


def core_of(kind: str, tokens: int, weights: str, seed: int) -> LoopedCore:
    """A core of width 32 in float64."""
    torch.manual_seed(seed)
    core = make_core(kind, LoopConfig(tokens=tokens, width=32, units=32, mean_loops=float(LOOPS)), SIZES)
    assert isinstance(core, LoopedCore)
    if weights != "first":
        with torch.no_grad():
            for weight in core.parameters():
                weight.copy_(torch.randn_like(weight) * (10.0 if weights.startswith("ten") else 1.0))
    return core.double()


def trained_core(run: str) -> LoopedCore:
    """The averaged core of a run, in float64. Raises UsageError where it has no loops."""
    agent = load_dreamer(read_checkpoint(find_checkpoint(run)), run)
    core = agent.averaged.world.core
    if not isinstance(core, LoopedCore):
        raise UsageError(f"the core of {run} has no loops: give a run of a core that has")
    return copy.deepcopy(core).double()


def starts(core: LoopedCore, count: int) -> tuple[Points, Points]:
    """Random states of many sizes, with inputs of a loop and of a step."""
    shape = (count, *core.start.shape)
    reads = core.prelude_in.in_features - (0 if isinstance(core, ContractingCore) else core.start.numel())
    size = 10.0 ** torch.empty(count, 1, 1, dtype=torch.double).uniform_(-1.0, 1.0)
    state = size * torch.randn(shape, dtype=torch.double)
    return Points(state, torch.randn(shape, dtype=torch.double)), Points(state, torch.randn(count, reads).double())


def attacked(name: str, tokens: int, weights: str, core: LoopedCore, attacks: int, steps: int) -> list[dict[str, Any]]:
    """Rows of the loop and of the step."""
    bound, (of_loop, of_step) = certificate(core), starts(core, attacks)
    maps: list[tuple[str, float, StateMap, Points]] = [
        ("loop", bound.loop, loop_map(core), of_loop),
        (f"step of {LOOPS} loops", bound.step, step_map(core, LOOPS), of_step),
    ]
    rows = []
    for label, certified, f, points in maps:
        start = highest = 0.0
        for some in zip(*(part.split(500) for part in points), strict=True):
            found = expansion(f, Points(*some), steps)
            if not (found.visited.isfinite().all() and found.attacked.isfinite().all()):
                raise UsageError(f"a search of {name} gave numbers that are not finite")  # max() would leave them out
            start, highest = max(start, float(found.visited.max())), max(highest, float(found.attacked.max()))
        rows.append(dict(zip(COLUMNS, (name, tokens, weights, label, certified, start, highest, attacks), strict=True)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", type=at_least_one, default=500, help="searches of each row")
    parser.add_argument("--steps", type=at_least_one, default=100, help="steps of gradient ascent of a search")
    parser.add_argument("--runs", nargs="*", default=[], help="trained runs, beside untrained cores")
    parser.add_argument("--cores", nargs="+", choices=KINDS, default=KINDS, help="untrained ones")
    parser.add_argument("--seed", type=seed_number, default=10)
    parser.add_argument("--out", type=Path, default=None, help="write the rows to this CSV file too")
    args = parser.parse_args()
    set_threads(1)
    try:
        if args.out:
            check_place(args.out)
        cores = [
            (kind, tokens, weights, core_of(kind, tokens, weights, args.seed))
            for kind in args.cores for tokens in (1, 4) for weights in WEIGHTS
        ]  # fmt: skip
        trained = [(run, trained_core(run)) for run in args.runs]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cores += [(type(core).__name__, core.cfg.tokens, f"trained: {Path(run).name}", core) for run, core in trained]
    print(f"{'core':16s} {'N':>2s} {'weights':18s} {'map':16s} {'certificate':>11s} {'start':>10s} {'attacked':>10s}")
    rows, exceeded = [], False
    for case in cores:
        for row in attacked(*case, args.attacks, args.steps):
            rows.append(row)
            exceeded |= row["attacked"] > row["certificate"] * (1.0 + ROUNDING)
            bound = "none" if math.isinf(row["certificate"]) else f"{row['certificate']:.6f}"
            print(
                f"{row['core']:16s} {row['tokens']:2d} {row['weights']:18s} {row['map']:16s} {bound:>11s} "
                f"{row['start']:10.4g} {row['attacked']:10.4g}",
                flush=True,
            )
    if args.out:
        write_rows(args.out, rows, COLUMNS)
    print("a certificate was exceeded" if exceeded else "no certificate was exceeded")
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
