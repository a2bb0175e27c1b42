"""Sweeps: a grid of runs as folders, each one plain command, a few at a time, shown in one table.

    python train_agent.py TASK --sweep behavior.horizon=5,15,30 --sweep seed=0,1,2 --jobs 2 --run-dir DIR
    python train_agent.py --sweep task=@dmc18 --sweep seed=0,1 --jobs 2 --run-dir DIR
    python train_agent.py TASK --sweep seed=0,1,2 --on ray --cpus 2 --run-dir DIR

The state of a sweep is its folders and nothing else: finished runs are skipped, interrupted ones resumed, whatever
the order of the values. A run that died before its first checkpoint is started anew, and its folder is renamed to
NAME.unsaved1. Where the runs work is handed in: on this machine (`Local`), or on a cluster (`on_ray.py`).
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TextIO

from agent.errors import UsageError
from agent.runs.folder import in_use, read_meta
from agent.runs.node_run import last_line
from agent.runs.on_ray import on_ray
from agent.runs.sweep_grid import (
    LOST,
    MOST_LOSSES,
    MOST_RUNS,
    Parse,
    RunProcess,
    SweepGrid,
    SweepRun,
    describe_results,
    make_runs,
)
from agent.runs.sweep_table import SweepTable
from agent.runs.tune import run_tune
from agent.runtime import PROJECT
from agent.training.schedule import UNFINISHED
from agent.training.signals import ignores_hangup

PROGRAM = (sys.executable, str(PROJECT / "train_agent.py"))


class Place(Protocol):
    """Where runs work."""

    def start(self, run: SweepRun, arguments: Sequence[str]) -> RunProcess:
        """Start train_agent.py with these arguments; its output goes to the end of `run.log`."""


class Local:
    """This machine. lock: the open lock file of the sweep's folder. The runs inherit it, so that nobody else can use
    the folder while one of them lives."""

    def __init__(self, program: Sequence[str] = PROGRAM, lock: TextIO | None = None):
        self.program, self.inherited = program, [] if lock is None else [lock.fileno()]

    def start(self, run: SweepRun, arguments: Sequence[str]) -> RunProcess:
        with run.log.open("ab") as log:
            # A process group of its own: Ctrl-C in the terminal reaches the run through this process, once.
            return LocalProcess(
                [*self.program, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
                pass_fds=self.inherited, log=run.log,
            )  # fmt: skip


class LocalProcess(subprocess.Popen[bytes]):
    """A `RunProcess` of this machine. log: where its output goes."""

    def __init__(self, *arguments: Any, log: Path, **options: Any):
        self.log = log
        super().__init__(*arguments, **options)

    def said(self) -> str:
        return last_line(self.log)


class Sweep:
    """Starts the runs at a place, at most `jobs` at a time."""

    def __init__(self, runs: list[SweepRun], jobs: int, place: Place, out: TextIO | None = None):
        self.runs, self.jobs, self.place, self.out = runs, jobs, place, out or sys.stdout
        self.interrupts = self.passed_on = 0

    def run(self, pause: float = 0.5) -> int:
        """Returns the exit status: 0 all runs are done, 1 some failed, 130 after Ctrl-C, when the running ones were
        saved. Also where this process cannot go on, they are saved before."""
        with self.signals(), self.nothing_left_behind(pause), SweepTable(self.runs, self.out) as table:
            while True:
                self.pass_on()
                for run in self.runs:
                    self.poll(run)
                room = self.jobs - sum(run.state == "running" for run in self.runs)
                waiting = [run for run in self.runs if run.state in ("waiting", "stopped")]
                for run in waiting[:room] if not self.interrupts else []:
                    try:
                        self.start(run)
                    except OSError as error:  # its folder or its log cannot be written
                        run.state, run.note = "failed", f"cannot be started: {error}"
                table.update()
                if room == self.jobs and (self.interrupts or not waiting):
                    break
                time.sleep(pause)
        failed = [run for run in self.runs if run.state == "failed"]
        for run in failed:
            print(f"failed: {run.name}, see {run.log}", file=self.out)
        return 130 if self.interrupts else 1 if failed else 0

    def start(self, run: SweepRun) -> None:
        """Start the run, or resume it. One whose node was lost may still be ending in a folder that is seen here."""
        if run.losses and run.folder.exists():
            if in_use(run.folder):
                return
            if read_meta(run.folder).get("finished"):
                run.state, run.note = "done", describe_results(read_meta(run.folder))
                return
            run.state = run.begun()
        arguments = run.arguments
        if run.state == "stopped":
            arguments = ["--resume", str(run.folder)]
        elif run.folder.exists() and any(run.folder.iterdir()):
            set_aside(run.folder)
        run.log.parent.mkdir(parents=True, exist_ok=True)
        run.process = self.place.start(run, arguments)
        run.state, run.note = "running", ""

    def poll(self, run: SweepRun) -> None:
        """Bring the state of a running run up to date."""
        if run.process is None:
            return
        status = run.process.poll()
        if status is None:
            run.note = run.process.said()
            return
        process, run.process = run.process, None
        if status == LOST:
            run.losses += 1
            again = run.losses <= MOST_LOSSES and not self.interrupts
            run.state, run.note = run.begun() if again else "failed", f"its node was lost ({process.said()})"
            return
        meta = read_meta(run.folder)
        if status == 0 and meta.get("finished"):
            run.state, run.note = "done", describe_results(meta)
        elif status == UNFINISHED and not self.interrupts:
            run.state, run.note = "stopped", last_line(run.log)
        elif self.interrupts:
            kept = "saved" if run.can_resume else "stopped"  # what cannot go on begins anew
            run.state, run.note = kept if status in (130, UNFINISHED) else "failed", last_line(run.log)
        else:
            run.state, run.note = "failed", f"status {status}: {last_line(run.log)}"

    @contextmanager
    def nothing_left_behind(self, pause: float) -> Iterator[None]:
        """Where an error ends the sweep, the runs at work are saved and ended first."""
        try:
            yield
        except BaseException:
            working = [run.process for run in self.runs if run.process is not None]
            for process in working:
                process.send_signal(signal.SIGINT)
            while any(process.poll() is None for process in working):
                time.sleep(pause)
            raise

    def pass_on(self) -> None:
        """Pass what has come of Ctrl-C, SIGTERM and the loss of the terminal on to the running runs, which save."""
        new, self.passed_on = self.interrupts - self.passed_on, self.interrupts
        for run in self.runs if new else ():
            if run.process is not None:
                run.process.send_signal(signal.SIGINT)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, Ctrl-C, SIGTERM and the loss of the terminal are counted, see `pass_on`; no further run starts. Under
        nohup the terminal may be lost."""

        def interrupt(*_: Any) -> None:
            self.interrupts += 1

        signals = (signal.SIGINT, signal.SIGTERM, *(() if ignores_hangup() else (signal.SIGHUP,)))
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


@contextmanager
def folder_lock(folder: Path) -> Iterator[TextIO]:
    """Lock the folder of a sweep; gives the open lock file.

    Raises UsageError while another sweep, or a run that it left behind, holds the lock, and where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".sweep.lock").open("a+")  # another sweep's, which is still read, is not emptied
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


def place_of(grid: SweepGrid, lock: TextIO) -> AbstractContextManager[Place]:
    """Where the runs of a sweep work. lock: the open lock file of its folder."""
    return on_ray(lock, grid.cpus, grid.gpus) if grid.on == "ray" else nullcontext(Local(lock=lock))


def run_sweep(grid: SweepGrid, parse: Parse) -> int:
    """Check the grid, then run it, or print its commands. Returns the exit status; raises UsageError."""
    runs = make_runs(grid, parse)
    if grid.print_commands:
        for run in runs:
            print(run.command)
        return 0
    folder = runs[0].folder.parent
    with folder_lock(folder) as lock, place_of(grid, lock) as place:
        most = f"{grid.jobs} at a time" if grid.jobs < MOST_RUNS else "as many at a time as there is room for"
        print(f"{len(runs)} runs, {most}, in {folder}")
        if grid.tune:
            return run_tune(runs, grid, parse(runs[0].arguments), place)
        status = Sweep(runs, grid.jobs, place).run()
    if status == 130:
        print("stopped; the same command goes on")
    return status
