"""A run of many simulated hours, whose memory, open files, threads and disk must stay flat.

    python -m tests.faults.soak --hours 12 --out soak.csv

CartPole counts 0.02 s a step: 12 hours are 2,160,000 steps, of eight environments with few updates, and with as many
checkpoints, evaluations and lines as a long run has. Samples of the process and all that it started are written every
few seconds; at the end the first tenth is compared with the last one. Exit status 1 where something grew.
"""

import argparse
import csv
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

STEP_SECONDS = 0.02
EVALUATIONS, CHECKPOINTS, LINES = 200, 400, 2000
COLUMNS = ("seconds", "step", "resident_mb", "processes", "threads", "files", "disk_mb", "log_mb")
MOST = {"resident_mb": 1.05, "processes": 1.0, "threads": 1.0, "files": 1.0, "disk_mb": 1.05}
"""What the median of the last tenth may be of that of the first one. log_mb, which grows, is shown beside."""
LOGS = ("metrics.jsonl", "episodes.csv", "eval.csv")


def sample(process, run, checks, runs):
    """One row of the table."""
    pids, row = runs.session(process.pid), dict.fromkeys(COLUMNS, 0)
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            row["files"] += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:  # it has just ended
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        row["resident_mb"] += int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
        row["threads"] += int(fields["Threads"])
    sizes = {path: path.stat().st_blocks * 512 / 2**20 for path in run.rglob("*") if path.is_file()}
    logs = sum(size for path, size in sizes.items() if path.name in LOGS or "tfevents" in path.name)
    row |= {"seconds": time.monotonic() - process.began, "step": checks.seen_step(run), "processes": len(pids)}
    row |= {"disk_mb": sum(sizes.values()) - logs, "log_mb": logs}
    return {name: round(value, 2) for name, value in row.items()}


def compare(rows):
    """Lines that put the first tenth beside the last one, and the names of what grew more than it may."""
    rows = rows[len(rows) // 50 :]  # without the beginning, before the first update
    tenth = max(1, len(rows) // 10)
    lines, grown = [f"{'':12}{'first tenth':>14}{'last tenth':>14}{'ratio':>8}"], []
    for name in COLUMNS[2:]:
        # Medians, because a sample may fall on a checkpoint that is being written.
        first = statistics.median(float(row[name]) for row in rows[:tenth])
        last = statistics.median(float(row[name]) for row in rows[-tenth:])
        lines.append(f"{name:12}{first:14.2f}{last:14.2f}{last / first if first else 1.0:8.3f}")
        if name in MOST and last > MOST[name] * first:
            grown.append(name)
    return "\n".join(lines), grown


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hours", type=float, default=12.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--out", default="soak.csv")
    parser.add_argument("--work", default=tempfile.gettempdir())
    parser.add_argument("--envs", type=int, default=8)
    args = parser.parse_args()
    from tests.faults import checks, runs

    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=args.work))
    run, steps = folder / "run", int(args.hours * 3600 / STEP_SECONDS)
    words = ["gym:CartPole-v1", "--preset", "debug", "--device", "cpu", "--no-video", "--train.threads", 1,
             "--steps", steps, "--train.envs", args.envs, "--train.ratio", 0.004,
             "--train.eval-every", steps // EVALUATIONS, "--train.save-every", steps // CHECKPOINTS,
             "--train.log-every", steps // LINES, "--run-dir", run]  # fmt: skip
    process = runs.Started(["train_agent.py", *map(str, words)], folder, "soak", real=True)
    rows = []
    with Path(args.out).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        while process.poll() is None:
            time.sleep(args.every)
            if process.poll() is None and checks.seen_step(run) > 0:
                rows.append(sample(process, run, checks, runs))
                writer.writerow(rows[-1])
                file.flush()
    text, grown = compare(rows)
    print(f"{steps:,} steps in {time.monotonic() - process.began:.0f} s, status {process.status}, {len(rows)} samples")
    print(text)
    wrong = runs.forked(checks.problems, run, 1, False)
    for line in [*(f"{name} grew" for name in grown), *wrong]:
        print(f"wrong: {line}")
    if not (grown or wrong or process.status):
        shutil.rmtree(folder)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
