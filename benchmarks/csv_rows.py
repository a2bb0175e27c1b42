"""Tables of the measuring scripts: CSV files that go on where they were stopped, and numbers on the command line."""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.errors import UsageError


def check_place(path: Path) -> None:
    """Raise UsageError where no file can be written there: known before anything is computed."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: {path.absolute().parent} must be a folder, and the name a file's")


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The whole rows of a CSV file with these columns; none where there is no file yet. A last line that was cut off is
    left out. Raises UsageError where the file is another table, or cannot be written."""
    check_place(path)
    lines = whole_lines(path)
    if not lines:
        return []
    if next(csv.reader(lines)) != list(columns):
        raise UsageError(f"{path} is another table (its columns are {lines[0].strip()}): give another --out")
    rows = csv.DictReader(lines)
    return [row for row in rows if None not in row and None not in row.values()]


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> dict[str, str]:
    """Write a row behind the whole ones of a CSV file, with a head where there is none; returns it as it is read."""
    lines, text = whole_lines(path), io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not lines:
        writer.writeheader()
    writer.writerow(row)
    with path.open("ab") as file:
        file.truncate(sum(len(line.encode()) for line in lines))
        file.write(text.getvalue().encode())
    return {name: str(row[name]) for name in columns}


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file that end, with their ends."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write a new CSV file in place of one that is there, whole or not at all. Raises UsageError where it cannot."""
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


# ---------------------------------------------------------------------- numbers


def at_least_one(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not (text.isdecimal() and 1 <= int(text) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def seed_number(text: str) -> int:
    """A whole number from 0 to 2^31 - 1, for argparse."""
    if not (text.isdecimal() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give a whole number from 0 to {2**31 - 1}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def stopped() -> int:
    """What a script says and returns after Ctrl-C."""
    print("stopped; the same command goes on", file=sys.stderr)
    return 130
