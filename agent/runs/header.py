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
    print(f"watch        {python_command()} -m tensorboard.main --logdir {shlex.quote(str(run_dir))}")
    for note in notes:
        print(note)


def print_results(trainer: FinishedTrainer, task: str) -> dict[str, Any]:
    """Print the final evaluation, and return it for meta.json."""
    final, recent = summarise(trainer.episodes), trainer.recent()
    print(f"final evaluation: {format_summary(final)}")
    for label, value in recent.items():
        print(f"mean of the {label.replace('_', ' ')}: {value:.4g}")
    human = human_normalised(task, final["mean"])
    if human is None:
        return {"final": final, **recent}
    print(f"human-normalised {human:.3f}")
    return {"final": final, **recent, "human_normalised": human}


def resume_command(run_dir: Path) -> str:
    """The command that goes on with the run."""
    return f"{python_command()} train_agent.py --resume {shlex.quote(str(run_dir))}"


def evaluate_command(run_dir: Path) -> str:
    """The command that plays evaluation episodes with the run's agent."""
    return f"{python_command()} evaluate.py policy {shlex.quote(str(run_dir))}"


def python_command() -> str:
    """How to call this Python from the current folder, as a person would type it."""
    here, executable = Path.cwd(), Path(sys.executable)
    if executable.is_relative_to(here):
        return shlex.quote(str(executable.relative_to(here)))
    on_path = shutil.which("python")
    return "python" if on_path and Path(on_path).absolute() == executable else shlex.quote(str(executable))


def last_checkpoint_note(run_dir: Path) -> str:
    """Where the last checkpoint is, for a message about a failure."""
    path = run_dir / "checkpoints" / "latest.pt"
    return f"the last good checkpoint is untouched: {path}" if path.exists() else "nothing was saved yet"
