"""Sweeps: a grid of runs as folders, each one plain command, a few at a time, watched in one table.

    python train_agent.py TASK --sweep behavior.horizon=5,15,30 --sweep seed=0,1,2 --jobs 2 --run-dir DIR

The state of a sweep is its folders and nothing else: finished runs are skipped, interrupted ones resumed, and what
died before its first checkpoint is put aside and started anew.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from agent.errors import UsageError
from agent.runs.folder import PROJECT, read_meta
from agent.runs.grid import Cell, Grid, Parse, make_cells, results
from agent.training.schedule import UNFINISHED

PROGRAM = (sys.executable, str(PROJECT / "train_agent.py"))


class Sweep:
    """Runs the cells, at most `jobs` at a time, by `program` and their words. `run` returns the exit status.

    lock: an open file whose lock the runs hold too, so that nobody takes the folder while one of them lives.
    """

    def __init__(
        self, cells: list[Cell], jobs: int, program: Sequence[str] = PROGRAM, out: TextIO | None = None,
        lock: TextIO | None = None,
    ):  # fmt: skip
        self.inherited = [] if lock is None else [lock.fileno()]
        self.cells, self.jobs, self.program, self.out = cells, jobs, program, out or sys.stdout
        self.live = self.out.isatty()
        self.shown: dict[str, str] = {}
        self.lines = 0
        self.stops = 0

    def run(self, pause: float = 0.5) -> int:
        """0: all runs are done; 1: some failed; 130: Ctrl-C, the runs under way were saved."""
        with self.signals():
            while True:
                for cell in self.cells:
                    self.watch(cell)
                running = sum(cell.state == "running" for cell in self.cells)
                waiting = [cell for cell in self.cells if cell.state in ("waiting", "stopped")]
                for cell in waiting[: self.jobs - running] if not self.stops else []:
                    self.start(cell)
                    running += 1
                self.show()
                if not running:
                    break
                time.sleep(pause)
        failed = [cell for cell in self.cells if cell.state == "failed"]
        for cell in failed:
            print(f"failed: {cell.name}, see {cell.log}", file=self.out)
        return 130 if self.stops else 1 if failed else 0

    def start(self, cell: Cell) -> None:
        """Begin the cell's run, or go on with it."""
        words = cell.words
        if cell.state == "stopped":
            words = ["--resume", str(cell.folder)]
        elif cell.folder.exists() and any(cell.folder.iterdir()):
            self.put_aside(cell.folder)
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with cell.log.open("ab") as log:
            # A group of its own: Ctrl-C in the terminal reaches it through us, once.
            cell.process = subprocess.Popen(
                [*self.program, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
                pass_fds=self.inherited,
            )  # fmt: skip
        cell.state, cell.note = "running", ""

    @staticmethod
    def put_aside(folder: Path) -> None:
        """Rename what a run left that died before its first checkpoint."""
        for number in itertools.count(1):
            aside = folder.with_name(f"{folder.name}.unsaved{number}")
            if not aside.exists():
                os.replace(folder, aside)
                return

    def watch(self, cell: Cell) -> None:
        """Bring the state of a running cell up to date."""
        if cell.process is None:
            return
        status = cell.process.poll()
        if status is None:
            cell.note = last_line(cell.log)
            return
        cell.process = None
        facts = read_meta(cell.folder)
        if status == 0 and facts.get("finished"):
            cell.state, cell.note = "done", results(facts)
        elif status == UNFINISHED and not self.stops:
            cell.state, cell.note = "stopped", last_line(cell.log)
        elif self.stops:
            cell.state, cell.note = "saved" if status in (130, UNFINISHED) else "failed", last_line(cell.log)
        else:
            cell.state, cell.note = "failed", f"status {status}: {last_line(cell.log)}"

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, being told to end and the loss of the terminal are passed on to the runs, which save; no new one
        begins."""

        def stop(*_: Any) -> None:
            self.stops += 1
            for cell in self.cells:
                if cell.process is not None and cell.process.poll() is None:
                    cell.process.send_signal(signal.SIGINT)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def show(self) -> None:
        """Draw the table again; in a file or pipe, a line for every cell whose state is new."""
        width = max(len(cell.name) for cell in self.cells)
        if not self.live:
            for cell in self.cells:
                if self.shown.get(cell.name) != cell.state:
                    self.shown[cell.name] = cell.state
                    note = cell.note if cell.state != "running" else ""
                    print(f"{cell.state:8s} {cell.name:{width}s}  {note}".rstrip(), file=self.out, flush=True)
            return
        columns, rows = shutil.get_terminal_size()
        lines = [f"{cell.state:8s} {cell.name:{width}s}  {cell.note}".rstrip()[: columns - 1] for cell in self.cells]
        if len(lines) > rows - 2:  # what does not fit: the finished first, then the waiting
            order = {"running": 0, "failed": 1, "stopped": 2, "waiting": 3, "saved": 4, "done": 5}
            keep = sorted(range(len(lines)), key=lambda i: (order[self.cells[i].state], i))[: rows - 2]
            lines = [lines[i] for i in sorted(keep)]
        done = sum(cell.state == "done" for cell in self.cells)
        lines.append(f"{done} of {len(self.cells)} runs done")
        back = f"\x1b[{self.lines}F" if self.lines else ""
        print(back + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", file=self.out, flush=True)
        self.lines = len(lines)


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
def only_one(folder: Path) -> Iterator[TextIO]:
    """The lock of the folder. Raises UsageError while another sweep, or a run that it left behind, holds it, and where
    it cannot be made."""
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


def run_sweep(grid: Grid, parse: Parse) -> int:
    """Check the grid, then run it, or print its commands. Returns the exit status; raises UsageError."""
    cells = make_cells(grid, parse)
    if grid.show:
        for cell in cells:
            print(cell.command)
        return 0
    folder = cells[0].folder.parent
    with only_one(folder) as lock:
        print(f"{len(cells)} runs, {grid.jobs} at a time, in {folder}")
        status = Sweep(cells, grid.jobs, lock=lock).run()
    if status == 130:
        print("stopped; the same command goes on")
    return status
