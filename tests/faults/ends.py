"""Random ends of small runs: each is started, ended at a random moment in a random way, resumed, and checked.

    python -m tests.faults.ends --count 300 --jobs 2 --out ends.csv

Cases that are in the file already are not repeated. Exit status 1 where something was wrong.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.faults import disk
from tests.faults.table import Table

STEPS, SAVE_EVERY = 700, 120
COMMON = ("--preset", "debug", "--device", "cpu", "--no-video", "--steps", STEPS, "--train.save-every", SAVE_EVERY,
          "--train.eval-every", 250, "--train.log-every", 50, "--train.ratio", 0.1, "--train.threads", 1,
          "--eval.episodes", 3, "--eval.interim-episodes", 2)  # fmt: skip
TASKS = {
    "vector": ("gym:CartPole-v1",),
    "discrete": ("toy:cue5",),
    "images": ("gym:tests.faults.worlds:Told-v0",),
    "several": ("gym:CartPole-v1", "--train.envs", "3"),
    "processes": ("gym:tests.faults.worlds:Told-v0", "--train.envs", "2"),
    "rendered": ("dmc:cartpole_balance@fast_pixels", "--train.envs", "2"),
}
"""The last two have environments in processes of their own."""
KILOBYTES = {"vector": 1500, "discrete": 1500, "several": 1500, "images": 18000}
"""What a run's folder takes, about."""
KINDS = {"KILL": 22, "TERM": 10, "INT": 10, "HUP": 7, "USR1": 4, "USR1 in a slice": 4, "two signals": 10, "pipe": 8,
         "pipe and INT": 6, "disk": 10, "worker": 5, "environment": 5}  # fmt: skip
AGAIN = {name: KINDS[name] for name in ("KILL", "TERM", "INT", "HUP", "two signals", "pipe", "pipe and INT")}
"""Kinds by which a resumed run is ended."""
MOMENTS = {"start": 15, "step": 50, "save": 15, "end": 20}
SIGNALS = {"TERM": signal.SIGTERM, "INT": signal.SIGINT, "HUP": signal.SIGHUP, "USR1": signal.SIGUSR1}
LIMIT = 400.0
"""Seconds after which a run counts as hung."""
COLUMNS = ("number", "task", "workers", "real", "kinds", "moments", "struck", "statuses", "lost_steps", "lost_seconds",
           "orphan_seconds", "resumes", "outcome", "seconds", "wrong", "folder")  # fmt: skip


@dataclass
class Case:
    """One case, which depends on its number and the seed alone. ends: (kind, moment, share in [0, 1)) of each part."""

    number: int
    task: str
    workers: int
    real: bool
    ends: list[tuple[str, str, float]]

    @classmethod
    def draw(cls, seed, number):
        rng = random.Random(f"{seed} {number}")
        pick = lambda table: rng.choices(list(table), list(table.values()))[0]  # noqa: E731
        real, kind = rng.random() < 0.1, pick(KINDS)
        task = rng.choice(["vector", "discrete", "images", "several"])
        if kind == "environment":
            task = "rendered" if real else "processes"
        workers = 2 if kind == "worker" or rng.random() < 0.2 else 1
        ends = [(kind, pick(MOMENTS), rng.random())]
        if kind in ("worker", "environment"):  # there is one from the first update on, or from the beginning
            ends = [(kind, rng.choice(("start", "step", "step")), 0.7 * rng.random())]
        while rng.random() < 0.3 and len(ends) < 3:  # ended again
            ends.append((pick(AGAIN), pick(MOMENTS), rng.random()))
        return cls(number, task, workers, real, ends)


class Trial:
    """One case under way, in the folder `folder`."""

    def __init__(self, case, folder):
        from tests.faults import checks, runs

        self.case, self.folder, self.checks, self.runs = case, folder, checks, runs
        self.run = folder / "run"
        kinds = [kind for kind, _, _ in case.ends]
        if "disk" in kinds:
            self.run = folder / "disk" / "run"
        slices = ("--train.slice", "60") if "USR1 in a slice" in kinds else ()
        words = (*TASKS[case.task], *COMMON, "--optimizer.workers", case.workers, *slices)
        self.command = ["train_agent.py", *map(str, words), "--run-dir", str(self.run)]
        self.wrong, self.statuses, self.lost = [], [], [(0, 0.0)]
        self.struck, self.orphan_seconds, self.resumes, self.reference, self.printed = 0, 0.0, 0, None, None
        self.seen = 0  # the last step that anything of the run has shown

    def start(self, piped=False, limit=None):
        """Start the run, or the next part of it. limit: largest file in bytes that it may write."""
        words, resumes = self.command, self.saved is not None and "--train.slice" not in self.command
        self.resumes += self.saved is not None
        if resumes:
            words = ["train_agent.py", "--resume", str(self.run)]
        if resumes and self.case.real and self.printed:
            words = self.printed
        name = f"part{len(self.statuses)}"
        real, slow = self.case.real or isinstance(words, str), self.case.task == "processes"
        return self.runs.Started(words, self.folder, name, real, piped, slow, limit)

    def play(self):
        """Every part, the last one without a fault."""
        self.saved = None
        for kind, moment, share in self.case.ends:
            if self.saved and self.saved[1]:
                break
            limit = disk.make(self.folder, share, KILOBYTES[self.case.task]) if kind == "disk" else None
            process = self.start("pipe" in kind, limit)
            wait_for(process, moment, share, self)
            if kind == "disk":
                disk.fill(self.folder, share)
            struck = kind == "disk" or strike(process, kind, share)
            self.struck += struck
            self.finish(process, kind, struck)
        if not self.saved or not self.saved[1]:
            process = self.start()
            self.finish(process, "none", False)
        if not self.saved or not self.saved[1]:
            self.wrong.append("the last part did not come to an end")
        else:
            legs = self.resumes + 1
            self.wrong += self.runs.forked(self.checks.problems, self.run, legs, True, self.reference)

    def finish(self, process, kind, struck):
        """Wait for the end of a part, and look at what it left."""
        status = process.wait(LIMIT)
        died = time.time()
        disk.grow(self.folder)
        self.orphan_seconds = max(self.orphan_seconds, process.seconds_until_alone())
        self.statuses.append(status)
        before, self.saved = self.saved, self.runs.forked(self.checks.saved_step, self.run)
        out, err = process.text()
        match = re.search(r"to go on:\n  (.*)", out + err)
        self.printed = match and match[1]
        self.judge(process, kind if struck else "none", status, before, out, err)
        if self.saved:
            step, finished, written = self.saved
            seen, began = self.checks.seen_step(self.run), step if before is None else before[0]
            lost, same = seen - step, (seen, step) == (self.seen, began)  # same: this part ended before it did anything
            self.seen = seen
            self.lost.append((max(0, lost), died - written if lost > 0 else 0.0))
            self.reference = self.reference or self.checks.settings(self.run)
            losing = kind in ("KILL", "two signals", "disk", "pipe and INT") and status != 0
            allowed = SAVE_EVERY + 6 if losing else 0
            if lost > allowed and not same:
                self.wrong.append(f"{kind}: {lost} steps lost, {allowed} allowed")
            if not finished:
                found = self.runs.forked(self.checks.problems, self.run, self.resumes + 1, False, None)
                self.wrong += [f"after {kind}: {problem}" for problem in found]
        if process.reader:
            process.close_pipe()

    def judge(self, process, kind, status, before, out, err):
        """Whether a part ended with the status and the words that are documented."""
        say = lambda text: self.wrong.append(f"{kind}: {text}; {err.strip()[-300:]}")  # noqa: E731
        if self.orphan_seconds == float("inf"):
            say("a process of the run is left alive")
        over = self.saved is not None and self.saved[1]
        own = status != -signal.SIGKILL  # processes that are about to begin say that their parent has gone
        if "Traceback" in err and own and not (status == -signal.SIGINT and self.saved == before):
            say("a traceback")
        unexpected = {
            "none": status != 0, "pipe": status != 0, "disk": status not in (0, 2),
            "worker": status != 1 and not (status == 0 and over),
            "environment": status != (1 if before or self.saved else 2) and not (status == 0 and over),
        }  # fmt: skip
        if unexpected.get(kind, not self.answers_signal(kind, status, before, over)):
            say(f"status {status}")
        begun = self.saved is not None and self.saved != before
        if status > 0 and begun and not over and "pipe" not in kind and kind != "two signals" and not self.printed:
            say("no line says how to go on")

    def answers_signal(self, kind, status, before, over):
        """Whether a part that got a signal has the status that is documented: 128 and the signal, with all saved.

        Before training begins, after its end, and with a second signal, the process may die of the signal itself.
        """
        name = kind.removesuffix(" in a slice").rpartition(" ")[2]
        numbers = [SIGNALS[name]] if name in SIGNALS else list(SIGNALS.values())
        if kind == "KILL":
            return status == -signal.SIGKILL or (status == 0 and over)
        asked = 75 if "slice" in kind else 128 + numbers[0]
        if status == asked or (kind == "two signals" and status - 128 in numbers) or (status == 0 and over):
            return True
        early = -status in numbers or (status == 130 and signal.SIGINT in numbers)
        return early and (over or self.saved in (None, before) or kind == "two signals")

    def row(self, seconds):
        """The case as a row of the table."""
        case = self.case
        steps, lost_seconds = max(step for step, _ in self.lost), max(seconds for _, seconds in self.lost)
        return {
            "number": case.number, "task": case.task, "workers": case.workers, "real": int(case.real),
            "kinds": " + ".join(kind for kind, _, _ in case.ends),
            "moments": " + ".join(f"{moment} {share:.2f}" for _, moment, share in case.ends),
            "struck": self.struck, "statuses": " ".join(map(str, self.statuses)), "lost_steps": steps,
            "lost_seconds": round(lost_seconds, 1),
            "orphan_seconds": round(self.orphan_seconds, 1), "resumes": self.resumes,
            "outcome": "wrong" if self.wrong else "ok", "seconds": round(seconds, 1), "wrong": "; ".join(self.wrong),
            "folder": self.folder if self.wrong else "",
        }  # fmt: skip


# ---------------------------------------------------------------------- moments and faults


def wait_for(process, moment, share, trial):
    """Wait until the moment of the fault, or the end of the process."""
    first = trial.saved[0] if trial.saved else 0
    target = {"start": -1, "save": -1, "step": first + share * (STEPS - first), "end": STEPS - 1}[moment]
    temporary = trial.run / "checkpoints" / "latest.pt.tmp"
    saves, there = 0, False
    while process.poll() is None:
        if moment == "start":
            time.sleep((6.0 if trial.case.real else 1.5) * share)
            return
        if moment == "save":
            before, there = there, temporary.exists()
            saves += there and not before
            if saves > 6 * share:
                return
        elif trial.checks.seen_step(trial.run) >= target:
            time.sleep(share * (2.0 if moment == "end" else 0.3))
            return
        time.sleep(0.001 if moment == "save" else 0.01)


def strike(process, kind, share):
    """Let the fault happen; False where the process had ended already."""
    if kind in ("worker", "environment"):
        while not (children := process.children()):
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        time.sleep(share)  # it may still import
        children = process.children()
        if process.poll() is not None or not children:
            return False
        os.kill(children[int(share * len(children))], signal.SIGKILL)
        return True
    if process.poll() is not None:
        return False
    if kind.startswith("pipe"):
        process.close_pipe()
    rng = random.Random(share)
    if kind == "two signals":
        process.signal(rng.choice(list(SIGNALS.values())))
        time.sleep(rng.random())
        process.signal(rng.choice(list(SIGNALS.values())))
    elif kind == "KILL":
        process.signal(signal.SIGKILL)
    elif kind != "pipe":
        process.signal(SIGNALS[kind.removesuffix(" in a slice").rpartition(" ")[2]])
    return True


# ---------------------------------------------------------------------- the program


def play(case, work):
    """Play one case; its row. The folder stays where something is wrong."""
    folder = Path(tempfile.mkdtemp(prefix=f"end{case.number:03}-", dir=work))
    trial, start = Trial(case, folder), time.monotonic()
    try:
        trial.play()
    except Exception as error:
        trial.wrong.append(f"{type(error).__name__}: {error}")
        (folder / "harness.txt").write_text(traceback.format_exc())
    finally:
        disk.release(folder, keep=bool(trial.wrong))
    row = trial.row(time.monotonic() - start)
    if not trial.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        (folder / "case.json").write_text(json.dumps({**row, "command": trial.command}, indent=1, default=str))
    return row


def options(count, out, **more):
    """The options that the programs of this package share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default=out)
    parser.add_argument("--work", default=tempfile.gettempdir(), help="folder for the runs; those with faults stay")
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def share_out(args, module):
    """Start args.jobs processes of this program, each with its part of the cases, and wait for them."""
    words = [sys.executable, "-m", module, *sys.argv[1:]]
    parts = [subprocess.Popen([*words, "--jobs", "1", "--part", f"{job}/{args.jobs}"]) for job in range(args.jobs)]
    for part in parts:
        part.wait()


def mine(args, table):
    """The numbers of the cases that are still to be played by this process."""
    part, parts = map(int, args.part.split("/"))
    done = table.done()
    return [number for number in range(args.count) if number % parts == part and number not in done]


def main():
    args = options(300, "ends.csv")
    table = Table(args.out, COLUMNS)
    if args.jobs > 1:
        share_out(args, "tests.faults.ends")
    else:
        for number in mine(args, table):
            row = play(Case.draw(args.seed, number), args.work)
            table.add(row)
            print(f"{number:4}  {row['outcome']:6} {row['task']:10} {row['kinds']:28} {row['statuses']:12} "
                  f"{row['seconds']:6} s  {row['wrong'][:400]}", flush=True)  # fmt: skip
    if args.part == "0/1":
        print(table.summary("kinds" if args.count < 50 else "task", ("lost_steps", "lost_seconds", "orphan_seconds")))
        return int(any(row["outcome"] == "wrong" for row in table.rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
