"""Print how large the project is to read: fields of the configuration, files and lines of the reading path.

    python -m docs.census
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agent.runs.config import Config
from agent.settings import names

ROOT = Path(__file__).resolve().parent.parent

READING_PATH = (
    "agent/learning/dreamer.py",
    "agent/learning/actor_critic.py",
    "world_model/types.py",
    "world_model/latent.py",
    "world_model/model.py",
    "world_model/looped.py",
)
"""The files that explain the algorithm, in the order in which to read them."""


def lines(path: str) -> int:
    """The number of lines of a file of the project."""
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def census() -> Iterator[str]:
    """The printed lines."""
    counts = {path: lines(path) for path in READING_PATH}
    yield f"configuration  {len(list(names(Config)))} fields"
    yield f"reading path   {len(counts)} files, {sum(counts.values()):,} lines"
    for path, count in counts.items():
        yield f"  {count:5d}  {path}"


if __name__ == "__main__":
    print("\n".join(census()))
