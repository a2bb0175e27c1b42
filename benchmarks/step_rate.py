"""Is a training slower than before? Steps per second of two checkouts, called in turn, and the ratio.

    git worktree add ../before e426ba3
    python benchmarks/step_rate.py ../before . --rounds 5

Every training is short and runs alone, with one thread. Its steps per second are those between two lines of
metrics.jsonl, so that imports, the first updates and the final evaluation do not count. Of every row the median over
the rounds is taken; a ratio below 1 means that the second checkout is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

DEBUG = ("--preset", "debug", "--train.log-every", "1000", "--train.save-every", "10000")
TRAININGS = {
    "CartPole, no updates": ("gym:CartPole-v1", *DEBUG, "--steps", "16k", "--train.ratio", "0"),
    "CartPole, three copies, no updates": (
        "gym:CartPole-v1", *DEBUG, "--steps", "31k", "--train.ratio", "0", "--train.envs", "3",
    ),
    "cartpole_swingup, no updates": ("dmc:cartpole_swingup", *DEBUG, "--steps", "21k", "--train.ratio", "0"),
    "CartPole, debug": ("gym:CartPole-v1", "--preset", "debug", "--steps", "3k", "--train.log-every", "250"),
    "cartpole_swingup, small": ("dmc:cartpole_swingup", "--steps", "4k", "--train.log-every", "500"),
}  # fmt: skip
"""Steps of environments alone, where checks weigh most, and whole trainings."""
FIRST = {"cartpole_swingup, small": 2500}
"""Step of the first line that counts, where that is not 1,000."""


def steps_per_second(checkout: Path, name: str) -> float:
    """Of one training."""
    words = ("--train.threads", "1", "--device", "cpu", "--no-video", "--train.eval-every", "0", "--eval.episodes", "1")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_agent.py", *TRAININGS[name], *words, "--run-dir", f"{folder}/run"]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["step"] >= FIRST.get(name, 1000)][:-1]  # the last is after the evaluation
    return (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["wall"] - rows[0]["wall"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the older commit")
    parser.add_argument("after", type=Path, help="of the newer one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    print(f"{'median steps per second':36s} {'before':>8s} {'after':>8s} {'ratio':>7s}   ratios by round", flush=True)
    for name in (name for name in TRAININGS if args.only in name):
        taken: dict[Path, list[float]] = {args.before: [], args.after: []}
        for number in range(args.rounds):
            for checkout in (args.before, args.after) if number % 2 == 0 else (args.after, args.before):
                taken[checkout].append(steps_per_second(checkout, name))
        ratios = " ".join(f"{new / old:.3f}" for old, new in zip(*taken.values(), strict=True))
        old, new = (float(np.median(rates)) for rates in taken.values())
        print(f"{name:36s} {old:8.1f} {new:8.1f} {new / old:7.3f}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
