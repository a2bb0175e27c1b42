"""Sweeps: a grid of runs as folders, each one plain command, a few at a time, shown in one table.

    python train_agent.py TASK --sweep behavior.horizon=5,15,30 --sweep seed=0,1,2 --jobs 2 --run-dir DIR
    python train_agent.py --sweep task=@dmc18 --sweep seed=0,1 --jobs 2 --run-dir DIR

The state of a sweep is its folders and nothing else: finished runs are skipped, interrupted ones resumed, whatever
the order of the values. A run that died before its first checkpoint is started anew, and its folder is renamed to
NAME.unsaved1.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from agent.errors import UsageError
from agent.runs.folder import read_meta
from agent.runs.sweep_grid import Parse, SweepGrid, SweepRun, describe_results, make_runs
from agent.runs.sweep_table import SweepTable
from agent.runtime import PROJECT
from agent.training.schedule import UNFINISHED

PROGRAM = (sys.executable, str(PROJECT / "train_agent.py"))


class Sweep:
    """Starts the runs, at most `jobs` at a time, by `program` and their arguments.

    lock: the open lock file of the sweep's folder. The runs inherit it, so that nobody else can use the folder while
    one of them lives.
    """

    def __init__(
        self, runs: list[SweepRun], jobs: int, program: Sequence[str] = PROGRAM, out: TextIO | None = None,
        lock: TextIO | None = None,
    ):  # fmt: skip
        self.inherited = [] if lock is None else [lock.fileno()]
        self.runs, self.jobs, self.program, self.out = runs, jobs, program, out or sys.stdout
        self.interrupts = 0

    def run(self, pause: float = 0.5) -> int:
        """Returns the exit status: 0 all runs are done, 1 some failed, 130 after Ctrl-C, when the running ones were
        saved."""
        with self.signals(), SweepTable(self.runs, self.out) as table:
            while True:
                for run in self.runs:
                    self.poll(run)
                running = sum(run.state == "running" for run in self.runs)
                waiting = [run for run in self.runs if run.state in ("waiting", "stopped")]
                for run in waiting[: self.jobs - running] if not self.interrupts else []:
                    self.start(run)
                    running += 1
                table.update()
                if not running:
                    break
                time.sleep(pause)
        failed = [run for run in self.runs if run.state == "failed"]
        for run in failed:
            print(f"failed: {run.name}, see {run.log}", file=self.out)
        return 130 if self.interrupts else 1 if failed else 0

    def start(self, run: SweepRun) -> None:
        """Start the run, or resume it."""
        arguments = run.arguments
        if run.state == "stopped":
            arguments = ["--resume", str(run.folder)]
        elif run.folder.exists() and any(run.folder.iterdir()):
            set_aside(run.folder)
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            # A process group of its own: Ctrl-C in the terminal reaches the run through this process, once.
            run.process = subprocess.Popen(
                [*self.program, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
                pass_fds=self.inherited,
            )  # fmt: skip
        run.state, run.note = "running", ""

    def poll(self, run: SweepRun) -> None:
        """Bring the state of a running run up to date."""
        if run.process is None:
            return
        status = run.process.poll()
        if status is None:
            run.note = last_line(run.log)
            return
        run.process = None
        meta = read_meta(run.folder)
        if status == 0 and meta.get("finished"):
            run.state, run.note = "done", describe_results(meta)
        elif status == UNFINISHED and not self.interrupts:
            run.state, run.note = "stopped", last_line(run.log)
        elif self.interrupts:
            run.state, run.note = "saved" if status in (130, UNFINISHED) else "failed", last_line(run.log)
        else:
            run.state, run.note = "failed", f"status {status}: {last_line(run.log)}"

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, Ctrl-C, SIGTERM and the loss of the terminal are passed on to the running runs, which save; no
        further run starts."""

        def interrupt(*_: Any) -> None:
            self.interrupts += 1
            for run in self.runs:
                if run.process is not None and run.process.poll() is None:
                    run.process.send_signal(signal.SIGINT)

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, interrupt) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def set_aside(folder: Path) -> None:
    """Rename the folder of a run that died before its first checkpoint, so that the run can start anew."""
    for number in itertools.count(1):
        target = folder.with_name(f"{folder.name}.unsaved{number}")
        if not target.exists():
            os.replace(folder, target)
            return


def last_line(log: Path, tail: int = 4096) -> str:
    """The last line of a log that says something."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - tail))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip(" │─╰╯")), "")


@contextmanager
def folder_lock(folder: Path) -> Iterator[TextIO]:
    """Lock the folder of a sweep; gives the open lock file.

    Raises UsageError while another sweep, or a run that it left behind, holds the lock, and where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".sweep.lock").open("w")
    except OSError as error:
        raise UsageError(f"--run-dir {folder} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another sweep, or a run that it left behind, is at work in {folder}: wait for it, or take another "
                "folder"
            ) from None
        yield lock


def run_sweep(grid: SweepGrid, parse: Parse) -> int:
    """Check the grid, then run it, or print its commands. Returns the exit status; raises UsageError."""
    runs = make_runs(grid, parse)
    if grid.print_commands:
        for run in runs:
            print(run.command)
        return 0
    folder = runs[0].folder.parent
    with folder_lock(folder) as lock:
        print(f"{len(runs)} runs, {grid.jobs} at a time, in {folder}")
        status = Sweep(runs, grid.jobs, lock=lock).run()
    if status == 130:
        print("stopped; the same command goes on")
    return status
