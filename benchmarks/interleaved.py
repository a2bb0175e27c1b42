"""Is an update slower than before? benchmarks/update_time.py of two checkouts, called in turn, and the ratio.

    git worktree add ../before a181edb
    python benchmarks/interleaved.py ../before . --rounds 5 -- --threads 1 --updates 20
    python benchmarks/interleaved.py ../before . --rounds 3 -- --threads 1 --updates 10 --images dmc --preset pixels
    python benchmarks/interleaved.py ../before . --rounds 5 -- --threads 1 --updates 20 --workers 2

What the machine does meanwhile hits both alike. Of every row the median over the rounds is taken; a ratio above 1
means that the second checkout is slower. Both run under the Python that runs this script.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROW = re.compile(r"^(?P<label>.{34}) +[\d,]+ (?P<numbers>[\d. ]+)$")


def totals(checkout: Path, words: list[str]) -> dict[str, float]:
    """{row: milliseconds of an update} as the checkout's update_time.py prints them."""
    command = [sys.executable, "benchmarks/update_time.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    rows = [match for line in run.stdout.splitlines() if (match := ROW.match(line))]
    return {row["label"].strip(): float(row["numbers"].split()[-2]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the older commit")
    parser.add_argument("after", type=Path, help="of the newer one; behind --: options of update_time.py")
    parser.add_argument("--rounds", type=int, default=5)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    taken: dict[Path, dict[str, list[float]]] = {args.before: {}, args.after: {}}
    for number in range(args.rounds):
        for checkout in (args.before, args.after) if number % 2 == 0 else (args.after, args.before):
            for label, total in totals(checkout, words).items():
                taken[checkout].setdefault(label, []).append(total)
    print(f"{'median ms of an update':34s} {'before':>9s} {'after':>9s} {'ratio':>7s}   ratios by round")
    for label, before in taken[args.before].items():
        after = taken[args.after][label]
        ratios = " ".join(f"{new / old:.3f}" for old, new in zip(before, after, strict=True))
        old, new = float(np.median(before)), float(np.median(after))
        print(f"{label:34s} {old:9.1f} {new:9.1f} {new / old:7.3f}   {ratios}")


if __name__ == "__main__":
    main()
