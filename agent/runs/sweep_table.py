"""What a sweep shows: a live table in a terminal, a line for every change of state in a file or pipe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent.runs.sweep_grid import SweepRun

COLOURS = {"running": "cyan", "failed": "bold red", "stopped": "yellow", "waiting": "dim", "saved": "yellow",
           "done": "green"}  # fmt: skip
"""By state, in the order in which runs keep their row where the terminal is too low for all of them."""


class SweepTable:
    """Shows the runs of a sweep. Use as a context manager, and call `update` when states may have changed."""

    def __init__(self, runs: Sequence[SweepRun], out: TextIO):
        self.runs, self.out = runs, out
        self.console = Console(file=out, force_terminal=out.isatty(), highlight=False)
        self.live: Live | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self.printed: dict[str, str] = {}
        """{run: state that was printed last}"""

    def __enter__(self) -> SweepTable:
        self._display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._display.__exit__(*error)

    @property
    def _display(self) -> AbstractContextManager[Any]:
        return self.live or nullcontext()

    def update(self) -> None:
        """Draw the table again, or print the runs whose state is new."""
        if self.live:
            self.live.update(self.table(), refresh=True)
            return
        width = max(len(run.name) for run in self.runs)
        for run in self.runs:
            if self.printed.get(run.name) != run.state:
                self.printed[run.name] = run.state
                note = run.note if run.state != "running" else ""
                print(f"{run.state:8s} {run.name:{width}s}  {note}".rstrip(), file=self.out, flush=True)

    def table(self) -> Table:
        """The runs as rows; where there are too many for the terminal, the running and failed ones first."""
        done = sum(run.state == "done" for run in self.runs)
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, caption_justify="left")
        table.caption = Text(f"{done} of {len(self.runs)} runs done")
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        ranks = list(COLOURS)
        first = sorted(range(len(self.runs)), key=lambda i: (ranks.index(self.runs[i].state), i))
        for index in sorted(first[: max(1, self.console.height - 2)]):
            run = self.runs[index]
            # Text and not str: a name may hold brackets, which would be read as markup.
            table.add_row(Text(run.state, COLOURS[run.state]), Text(run.name), Text(run.note))
        return table
