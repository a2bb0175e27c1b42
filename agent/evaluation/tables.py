"""What a command of evaluate.py leaves in a folder: tables as CSV, all numbers as JSON, and pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""One row of a table: column -> value."""


def save_tables(
    folder: Path,
    name: str,
    content: Mapping[str, Any],
    tables: Mapping[str, Sequence[Row]],
    figure: Figure | None = None,
) -> None:
    """Write TABLE.csv of each table that has rows, NAME.json and NAME.png.

    content: plain values, without numbers that JSON does not know. Raises UsageError when a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for table, rows in tables.items():
            if rows:
                with (folder / f"{table}.csv").open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): make room, or give another place") from error
