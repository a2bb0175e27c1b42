"""The options of the commands of evaluate.py that look into a world model. What they do is in evaluate.py itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from agent.seeds import MODEL_RECORDING
from agent.settings import expand_home

MOST_LOOPS = 10_000
"""Of one step: each takes about a millisecond."""


def check_loops(*numbers: int | None) -> None:
    """Raise ValueError unless each of these numbers of loops can be computed, or is not given."""
    for loops in numbers:
        if loops is not None and not 1 <= loops <= MOST_LOOPS:
            raise ValueError(f"--max-loops must be from 1 to {MOST_LOOPS:,}, got {loops}")


@dataclass(frozen=True)
class ModelRunArgs:
    """What they have in common."""

    run: tyro.conf.Positional[str]
    """Run folder, or a checkpoint file."""
    episodes: int = 10
    """Episodes recorded of the agent; evaluate.py model also records as many of a random policy."""
    seed: int = 0
    """Which episodes."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint of a run folder."""
    out: str | None = None
    """Folder of the results; by default one in the run's folder, named after the command."""
    json: str | None = None
    """Write the numbers to this file too; - is standard output, which then holds nothing else."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "out", "json")
        self.at_least_one("episodes")
        MODEL_RECORDING.episodes(self.seed, self.episodes)

    def at_least_one(self, *names: str) -> None:
        """Raise ValueError unless each of these is 1 or more, or not given."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


@dataclass(frozen=True)
class ModelArgs(ModelRunArgs):
    """Open-loop prediction against the true environment: how far dreams can be trusted, with how many loops."""

    horizon: int = 50
    """Steps ahead, at most what the episodes are long enough for."""
    max_loops: tuple[int, ...] = ()
    """Fixed numbers of loops to compare beside the run's exit rule; by default 1, 2, .. up to the run's cap."""
    windows: int = 128
    """Predictions from each of the two recordings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("horizon", "windows")
        check_loops(*self.max_loops)


@dataclass(frozen=True)
class StabilityArgs(ModelRunArgs):
    """Bounds that follow from the weights beside what an adversarial search finds, and 1,000 dreamed steps: is the
    model stable, and is it right?"""

    max_loops: int | None = None
    """Loops of every step; by default the mean of training."""
    points: int = 256
    """States from which a search starts."""
    attack_steps: int = 200
    """Steps of gradient ascent of each search."""
    steps: int = 1000
    """Dreamed steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("points", "steps")
        check_loops(self.max_loops)
        if self.attack_steps < 0:
            raise ValueError(f"--attack-steps must be at least 0, got {self.attack_steps}")


@dataclass(frozen=True)
class ProbeArgs(ModelRunArgs):
    """How much of the true state can be read out of the latents linearly, also of models without a decoder."""

    horizons: tuple[int, ...] = (1, 5, 15, 50)
    """Imagined steps after which it is read out too."""
    player: str | None = None
    """random, or the run whose agent plays the episodes, the same for all that are compared; by default its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "player")
        if self.episodes < 2:
            raise ValueError("--episodes must be at least 2: a read-out is fitted on half of them")
        if any(steps < 1 for steps in self.horizons):
            raise ValueError(f"--horizons must be 1 or more, got {self.horizons}")


@dataclass(frozen=True)
class LoopsArgs(ModelRunArgs):
    """What a loop does: where the orbit of each state goes, and what the state after each loop says."""

    loops: int = 64
    """Loops of an orbit."""
    samples: int = 512
    """Recorded transitions whose loops are followed."""
    untrained: bool = False
    """Give the model its first weights, for comparison; results then lie in loops_untrained/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("loops")
        if self.samples < 2:
            raise ValueError(f"--samples must be at least 2, got {self.samples}")
