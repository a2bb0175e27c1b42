"""What does depth bring to a prediction that covers k decisions? Error by loops, width, data and k, with controls.

    python evaluate.py collect dmc:acrobot_swingup datasets/acrobot --episodes 100
    python evaluate.py collect dmc:cheetah_run datasets/cheetah --episodes 100
    python benchmarks/scaling.py datasets/acrobot datasets/cheetah --out scaling
    python benchmarks/scaling.py --report scaling                               # once more, from what is there

Every cell trains one net (`scaling_cells.py`): the observation at time t and the k actions from there on in, the change
of the observation up to t + k out. It writes a row of OUT/cells.csv as it ends. A command that is given again goes on
where it was, and may ask for more; cells that are there are not run again, and OUT/data-NAME.json refuses another data
set of the same name. --shard 0/2 and --shard 1/2 share the cells
of a grid between two processes with the same --out.

The report (`scaling_report.py`) fits and draws what the rows say: OUT/report.md with its pictures and tables. It is
made at the end and with --report.

Columns of cells.csv: the data set's folder name and task; core, match (none, params, flops), width and loops of the
looped net that it is or is the control of, k, share of the training episodes, seed; the net's own width, hidden width,
units and loops; training pairs; trained numbers of core and net, operations per sample; training and test error,
squared error over the variance of the change; the interval of the test error over held-out episodes (95 %,
bootstrap), what every one of them says, and the seconds of the cell.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scaling_cells import CORES, TOLERANCE, Cell, Grid, Outcome, Settings, shape_of, train_cell
from scaling_data import Problem, same_data, write_once
from scaling_report import write_report

from agent.data.dataset import Dataset, load_dataset
from agent.errors import UsageError
from agent.evaluation.statistics import bootstrap_interval
from agent.numbers import number
from agent.runtime import keep_memory, set_threads

COLUMNS = (
    *("data", "task", "core", "match", "width", "loops", "k", "share", "seed"),
    *("own_width", "own_hidden", "own_units", "own_loops", "pairs", "core_params", "params", "flops"),
    *("train_error", "test_error", "test_low", "test_high", "seconds", "episodes"),
)


# ---------------------------------------------------------------------- the folder


class Folder:
    """OUT: settings.json, what all its cells share, and cells.csv. Made where it is not there.

    Raises UsageError when it holds cells of other settings, or something else under these names.
    """

    def __init__(self, path: Path, settings: Settings):
        self.cells, wanted = path / "cells.csv", asdict(settings)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_once(path / "settings.json", json.dumps(wanted, indent=2) + "\n")
            write_once(self.cells, ",".join(COLUMNS) + "\n")
            found = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else "its settings.json cannot be read"
            raise UsageError(f"--out {path}: {what}; give another folder") from error
        if found != wanted:
            words = " ".join(f"--{name} {value}" for name, value in found.items() if wanted.get(name) != value)
            raise UsageError(f"--out {path} holds cells that were trained with {words}: give that, or another --out")

    def rows(self) -> list[dict[str, str]]:
        """The finished cells. A line that was cut off is none."""
        return read_cells(self.cells)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, in one piece: several processes may do so, and after a line that was cut off."""
        line = io.StringIO()
        csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(row)
        with self.cells.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            broken = file.read(1) != b"\n"
        handle = os.open(self.cells, os.O_WRONLY | os.O_APPEND)
        try:
            # commas that make the rest of a row longer than any row
            rest = "," * len(COLUMNS) + "\n" if broken else ""
            os.write(handle, (rest + line.getvalue()).encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def read_cells(path: Path) -> list[dict[str, str]]:
    """Rows of a cells.csv; of a cell that is there twice the first. Raises UsageError when it is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}; give the --out of an earlier command") from error
    if not lines or lines[0].strip().split(",") != list(COLUMNS):
        raise UsageError(f"{path} has other columns than this version writes: give another --out")
    whole = [row for row in csv.reader(line for line in lines[1:] if line.endswith("\n")) if len(row) == len(COLUMNS)]
    found: dict[Cell, dict[str, str]] = {}
    for values in whole:
        row = dict(zip(COLUMNS, values, strict=True))
        found.setdefault(cell_of(row), row)
    return list(found.values())


def cell_of(row: dict[str, str]) -> Cell:
    """The cell that a row is of."""
    width, loops, k = int(row["width"]), int(row["loops"]), int(row["k"])
    return Cell(row["data"], row["core"], row["match"], width, loops, k, float(row["share"]), int(row["seed"]))


def row_of(cell: Cell, task: str, outcome: Outcome) -> dict[str, Any]:
    """What is written of a cell."""
    shape, errors = outcome.shape, outcome.episodes
    low, high = bootstrap_interval(errors, np.mean) if np.isfinite(errors).all() else (float("nan"),) * 2
    values = {"train_error": outcome.train_error, "test_error": outcome.test_error, "test_low": low, "test_high": high}
    return {
        **cell._asdict(),
        "task": task,
        **{f"own_{name}": getattr(shape, name) for name in ("width", "hidden", "units", "loops")},
        "pairs": outcome.pairs,
        **outcome.size._asdict(),
        **{name: f"{value:.6g}" for name, value in values.items()},
        "seconds": f"{outcome.seconds:.1f}",
        "episodes": " ".join(f"{error:.5g}" for error in errors),
    }


# ---------------------------------------------------------------------- the run


def run_grid(
    datasets: dict[str, Dataset], grid: Grid, settings: Settings, out: Path, shard: tuple[int, int] = (0, 1)
) -> int:
    """Train the cells of this shard that are not there; returns how many were trained."""
    folder = Folder(out, settings)
    for name, dataset in datasets.items():
        same_data(folder.cells, name, dataset)
    own, done = list(grid.cells())[shard[0] :: shard[1]], {cell_of(row) for row in folder.rows()}
    missing = [cell for cell in own if cell not in done]
    print(f"{len(own)} cells, {len(own) - len(missing)} of them are there")
    problems: dict[tuple[str, int, float, int], Problem] = {}
    trained = 0
    for place, cell in enumerate(missing, 1):
        key = cell.data, cell.k, cell.share, cell.seed if cell.share < 1 else 0
        if key not in problems:  # one at a time is held: the cells of a problem are neighbours
            problems = {key: Problem.of(datasets[cell.data], *key[1:])}
        problem, head = problems[key], f"[{place}/{len(missing)}] {in_words(cell)}"
        shape = shape_of(cell, problem.sizes, settings)
        if shape is None:
            print(f"{head}: left out, no such net comes within {TOLERANCE:.0%} of the size", flush=True)
            continue
        outcome = train_cell(problem, shape, settings, cell.seed)
        folder.add(row_of(cell, datasets[cell.data].task, outcome))
        trained += 1
        found = f"error {number(outcome.test_error, 3)} (training {number(outcome.train_error, 3)})"
        print(f"{head}: {found}, {outcome.size.params:,} parameters, {outcome.seconds:.0f} s", flush=True)
    return trained


def in_words(cell: Cell) -> str:
    """One cell on a line of the terminal."""
    match = "" if cell.match == "none" else f" of equal {cell.match}"
    share = "" if cell.share == 1 else f", {cell.share:g} of the data"
    size = f"width {cell.width}, loops {cell.loops}"
    return f"{cell.data} k={cell.k} {cell.core}{match} ({size}{share}), seed {cell.seed}"


# ---------------------------------------------------------------------- command line


def several(kind: Callable[[str], Any], least: float, most: float = float("inf")) -> Callable[[str], tuple[Any, ...]]:
    """Reads numbers between commas, each once."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            values = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError:
            values = ()
        if not values or not all(least <= value <= most for value in values):
            what = "whole numbers" if kind is int else "numbers"
            bounds = f"from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} {bounds}, with commas between them")
        return values

    return read


def chosen(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads some of the names, with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        values = tuple(dict.fromkeys(text.split(",")))
        if wrong := [value for value in values if value not in names]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r}: expected some of {','.join(names)}")
        return values

    return read


def one(kind: Callable[[str], Any], least: float) -> Callable[[str], Any]:
    """Reads one number."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value < float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} from {least:g}")
        return value

    return read


def shard_of(text: str) -> tuple[int, int]:
    """Reads I/N."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 0/2 and 1/2")
    return int(first), int(count)


def make_parser() -> argparse.ArgumentParser:
    """The options; their defaults are those of Grid and Settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grid, settings = Grid(()), Settings()
    add = parser.add_argument
    add("datasets", nargs="*", metavar="DATASET", help="folders of recorded data sets")
    add("--out", type=Path, help="folder of cells.csv and the report")
    add("--report", type=Path, metavar="OUT", help="only make the report of that folder")
    add("--steps", type=several(int, 1), default=grid.steps, help="k, decisions that a prediction covers")
    add("--loops", type=several(int, 1), default=grid.loops, help="T")
    add("--widths", type=several(int, 1), default=grid.widths, help="of the looped nets")
    add("--data", type=several(float, 1e-6, 1.0), default=grid.shares, help="shares of the training episodes")
    add("--seeds", type=several(int, 0), default=grid.seeds)
    add("--cores", type=chosen(CORES), default=grid.cores, help=f"some of {','.join(CORES)}")
    add("--match", type=chosen(("params", "flops")), default=grid.match, help="what controls have in common")
    add("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="only every Nth cell, from the Ith on")
    add("--updates", type=one(int, 1), default=settings.updates)
    add("--batch", type=one(int, 1), default=settings.batch)
    add("--lr", type=one(float, 1e-6), default=settings.lr, help="highest learning rate of Adam")
    add("--tokens", type=one(int, 1), default=settings.tokens, help="N, of the core's state")
    add("--expand", type=one(float, 1e-6), default=settings.expand, help="hidden width of the block over its width")
    add("--gain", choices=("euler", "leaky"), default=settings.gain, help="how the input enters a loop")
    add("--threads", type=one(int, 1), default=1, help="of PyTorch")
    return parser


def load(folders: Sequence[str]) -> dict[str, Dataset]:
    """{folder name: data set}. Raises UsageError when two have the same name, and as `load_dataset`."""
    names = [Path(folder).resolve().name for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two data sets are called {twice.pop()}, and their rows would be mixed up: rename a folder")
    return {name: load_dataset(folder) for name, folder in zip(names, folders, strict=True)}


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = make_parser().parse_args(words)
    try:
        if args.report:
            if args.datasets or args.out:
                raise UsageError("--report makes the report of what is there: leave out the data sets and --out")
            print(write_report(read_cells(args.report / "cells.csv"), args.report))
            return 0
        if not args.datasets or not args.out:
            raise UsageError("expected data sets and --out DIR, or --report DIR; --help lists the options")
        set_threads(args.threads)
        keep_memory()
        settings = Settings(args.updates, args.batch, args.lr, args.tokens, args.expand, args.gain)
        names = tuple(Path(folder).resolve().name for folder in args.datasets)
        axes = args.steps, args.loops, args.widths, args.data, args.seeds, args.cores, args.match
        run_grid(load(args.datasets), Grid(names, *axes), settings, args.out, args.shard)
        print(write_report(read_cells(args.out / "cells.csv"), args.out))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the cell that was running", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
