"""`make faults`: all of them in their long form, with their tables in one folder. Cases of a table are not repeated."""

import argparse
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--jobs", default="2")
parser.add_argument("--out", type=Path, default=Path("runs/faults"))
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
failed = []
for name, words in {
    "ends": ("--count", "300"), "exact": ("--count", "30"), "fuzz": ("--count", "1000"), "soak": ("--hours", "12"),
}.items():  # fmt: skip
    print(f"--- {name}", flush=True)
    command = [sys.executable, "-m", f"tests.faults.{name}", *words, "--out", str(args.out / f"{name}.csv")]
    if subprocess.call(command + (["--jobs", args.jobs] if name != "soak" else [])):
        failed.append(name)
print("failed: " + ", ".join(failed) if failed else f"all is well; tables in {args.out}")
sys.exit(bool(failed))
