"""The numbers of a command as JSON, in a file or on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from agent.errors import UsageError
from agent.logs.streams import failure_of

Write = Callable[[dict[str, Any]], None]
"""Writes numbers to the target of --json."""


@contextmanager
def json_output(target: str | None) -> Iterator[Write]:
    """A function that writes to `target`: a file, "-" for standard output, or None for nowhere.

    With "-", standard output holds the JSON alone: all that is printed, also by environments, goes to standard error.
    Raises UsageError where the target cannot be written, before the command does its work where that shows.
    """
    stdout = sys.stdout
    if target not in (None, "-"):
        folder = Path(str(target)).absolute().parent
        if not folder.is_dir() or Path(str(target)).is_dir():
            raise UsageError(f"--json {target} cannot be written: {folder} must be a folder, and the name a file's")
        if Path(str(target)).is_file() and Path(str(target)).suffix != ".json":
            raise UsageError(f"{target} exists and does not end in .json, so it may be something else: choose another")

    def write(content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        if target == "-":
            stdout.write(text)
            if error := failure_of(stdout):
                raise UsageError(f"--json - cannot be written: {error.strerror}")
        elif target is not None:
            try:
                Path(target).write_text(text, encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--json {target} cannot be written: {error.strerror}") from error

    with redirect_stdout(sys.stderr) if target == "-" else nullcontext():
        yield write
