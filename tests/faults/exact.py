"""Runs that are killed at random and resumed, against one that was never stopped: they must be equal, bit by bit.

    python -m tests.faults.exact --count 30

The world has no chance, and checkpoints fall on the ends of its episodes, as the documentation asks for. What is
compared: all that the last checkpoint holds and all rows of the logs, without times.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.ends import COMMON, LIMIT, STEPS, mine, options, share_out, wait_for
from tests.faults.table import Table

TASK = ("gym:tests.faults.worlds:Beat-v0", *map(str, COMMON), "--train.eval-every", "200", "--train.save-every", "100")
"""Checkpoints fall on lines of metrics too: such a line is the mean over the updates since the last line, or since the
run was resumed."""
COLUMNS = ("number", "workers", "kills", "resumed_at", "outcome", "seconds", "wrong")
TIMES = ("seconds", "wall")
"""Names of values that differ between any two runs, beside speed/ and time/."""


class Killed:
    """A run that is killed at some moments; `saved` is what a resume begins with."""

    def __init__(self, folder, workers):
        from tests.faults import checks, runs

        self.run, self.checks, self.runs, self.saved, self.case = folder / "run", checks, runs, None, self
        self.real, self.resumed_at = False, []
        self.command = ["train_agent.py", *TASK, "--optimizer.workers", str(workers), "--run-dir", str(self.run)]
        self.folder = folder

    def part(self, moment=None, share=0.0):
        """One part of the run; the status of its end."""
        words = ["train_agent.py", "--resume", str(self.run)] if self.saved else self.command
        process = self.runs.Started(words, self.folder, f"part{len(self.resumed_at)}")
        if moment:
            wait_for(process, moment, share, self)
            process.signal(signal.SIGKILL)
        status = process.wait(LIMIT)
        process.seconds_until_alone()
        self.saved = self.runs.forked(self.checks.saved_step, self.run)
        self.resumed_at.append(self.saved and self.saved[0])
        return status


def contents(run):
    """What is compared of a finished run, as plain values."""
    from agent.data.checkpoint import find_checkpoint, read_checkpoint

    saved = read_checkpoint(find_checkpoint(run))
    found = {name: flat(saved[name]) for name in ("agent", "replay", "trainer", "step")}
    for name in ("episodes.csv", "eval.csv"):
        found[name] = (run / name).read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = {str(line["step"]): flat(line) for line in lines}
    return found


def flat(tree, name=""):
    """{dotted name: value} of a tree of tensors and plain values, without times."""
    if isinstance(tree, dict):
        kept = [str(key) for key in tree if key not in TIMES and not str(key).startswith(("speed/", "time/"))]
        parts = {str(key): part for key, part in tree.items()}
        return {full: value for key in kept for full, value in flat(parts[key], f"{name}.{key}").items()}
    if hasattr(tree, "numpy"):
        return {name: (str(tree.dtype), tuple(tree.shape), tree.contiguous().numpy().tobytes())}
    return {name: repr(tree)}


def differences(mine, other, name=""):
    """The names of values that are not the same."""
    if isinstance(mine, dict) and isinstance(other, dict):
        names = [*mine, *(key for key in other if key not in mine)]
        return [found for key in names for found in differences(mine.get(key), other.get(key), f"{name} {key}")]
    return [] if mine == other else [name.strip()]


def play(number, seed, work, references):
    """One case; its row."""
    rng, start = random.Random(f"{seed} exact {number}"), time.monotonic()
    workers = 2 if number % 5 == 4 else 1
    if workers not in references:
        whole = Killed(Path(tempfile.mkdtemp(prefix=f"whole{workers}-", dir=work)), workers)
        assert whole.part() == 0, whole.folder
        references[workers] = whole.runs.forked(contents, whole.run)
        shutil.rmtree(whole.folder)
    folder = Path(tempfile.mkdtemp(prefix=f"exact{number:03}-", dir=work))
    killed = Killed(folder, workers)
    kills = rng.choice((1, 1, 2, 3))
    for _ in range(kills):
        if not (killed.saved and killed.saved[1]):
            killed.part(rng.choice(("step", "step", "save", "end")), rng.random())
    wrong = []
    if not (killed.saved and killed.saved[1]):
        status = killed.part()
        wrong = [f"status {status}"] if status else []
    if not wrong:
        found, other = killed.runs.forked(contents, killed.run), dict(references[workers])
        if STEPS in killed.resumed_at[:-1]:  # in the final evaluation: the last line of metrics knows of no updates
            for values in (found, other):
                values["metrics.jsonl"] = {**values["metrics.jsonl"], str(STEPS): {}}
        wrong = differences(found, other)
    if not wrong:
        shutil.rmtree(folder)
    return {
        "number": number, "workers": workers, "kills": kills, "outcome": "differs" if wrong else "equal",
        "resumed_at": " ".join(map(str, killed.resumed_at[:-1])), "seconds": round(time.monotonic() - start, 1),
        "wrong": f"{len(wrong)}: " + ", ".join(wrong[:12]) if wrong else "",
    }  # fmt: skip


def main():
    args = options(30, "exact.csv")
    table, references = Table(args.out, COLUMNS), {}
    if args.jobs > 1:
        share_out(args, "tests.faults.exact")
    else:
        for number in mine(args, table):
            row = play(number, args.seed, args.work, references)
            table.add(row)
            print(*row.values(), flush=True)
    if args.part == "0/1":
        print(table.summary("workers"))
        return int(any(row["outcome"] != "equal" for row in table.rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
