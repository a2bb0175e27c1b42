"""What train_agent.py prints before and after a run, and the commands that it suggests."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Protocol

from agent.evaluation.atari_scores import human_normalised
from agent.evaluation.episodes import Episode, summarise
from agent.evaluation.statistics import format_summary
from agent.numbers import number
from agent.runtime import PROJECT
from agent.spaces import Spaces


class FinishedTrainer(Protocol):
    """What is printed of a trainer after its run."""

    @property
    def episodes(self) -> list[Episode]: ...

    def recent(self) -> dict[str, float]: ...


def print_header(
    title: str, spaces: Spaces, parameters: dict[str, int], machine: str, run_dir: Path, *notes: str
) -> None:
    """Print what is about to run and how to watch it; parameters are counts by module, notes further lines."""
    obs = ", ".join(f"{name} {size if isinstance(size, tuple) else f'({size},)'}" for name, size in spaces.obs.items())
    action = spaces.action
    print(f"task         {title}")
    print(f"observation  {obs}")
    print(f"action       {f'{action.size} choices' if action.discrete else f'({action.size},) in [-1, 1]'}")
    print("parameters   " + "  ".join(f"{name} {count:,}" for name, count in parameters.items()))
    print(f"device       {machine}")
    print(f"run folder   {run_dir}")
    watch = shlex.join([python_command(), "-m", "tensorboard.main", "--logdir", str(run_dir.absolute())])
    print(f"watch        {watch}")
    for note in notes:
        print(note)


def print_results(trainer: FinishedTrainer, task: str) -> dict[str, Any]:
    """Print the final evaluation, and return it for meta.json."""
    final, recent = summarise(trainer.episodes), trainer.recent()
    print(f"final evaluation: {format_summary(final)}")
    for label, value in recent.items():
        print(f"mean of the {label.replace('_', ' ')}: {number(value)}")
    human = human_normalised(task, final["mean"])
    if human is None:
        return {"final": final, **recent}
    print(f"human-normalised {human:.3f}")
    return {"final": final, **recent, "human_normalised": human}


def resume_command(run_dir: Path) -> str:
    """The command that goes on with the run."""
    return command("train_agent.py", "--resume", str(run_dir.absolute()))


def evaluate_command(run_dir: Path) -> str:
    """The command that plays evaluation episodes with the run's agent."""
    return command("evaluate.py", "policy", str(run_dir.absolute()))


def command(script: str, *words: str) -> str:
    """A command of the project that runs from any folder."""
    return shlex.join([python_command(), str(PROJECT / script), *words])


def python_command() -> str:
    """How to call this Python from any folder."""
    on_path = shutil.which("python")
    return "python" if on_path and Path(on_path).absolute() == Path(sys.executable) else sys.executable


def last_checkpoint_note(run_dir: Path) -> str:
    """Where the last checkpoint is, for a message about a failure."""
    path = run_dir / "checkpoints" / "latest.pt"
    return f"the last good checkpoint is untouched: {path}" if path.exists() else "nothing was saved yet"
