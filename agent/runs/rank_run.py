"""A run of several ranks: rank 0 is the run that a person sees, the others follow it and write nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent.data.checkpoint import CheckpointStore
from agent.environment_failures import environment_traceback
from agent.errors import EnvironmentFailure, NonFiniteError, RankLost, UsageError, WorkerFailure
from agent.execution.ranks import Ranks, started_as_rank
from agent.logs.silent import SilentLogger
from agent.runs.config import Config
from agent.runs.folder import Meta
from agent.runs.run import AgentTrainer, Run, train_to_end
from agent.seeds import TRAINING
from agent.settings import from_dict, to_dict
from agent.training.parts import drop_other_images


def refuse_ranks(what: str) -> None:
    """Raise UsageError where torchrun has started several ranks for something that does not share its updates."""
    if started_as_rank()[1] > 1:
        raise UsageError(f"torchrun starts ranks that share the updates of one Looped Dreamer: start {what} without it")


def seed_of(seed: int, rank: int) -> int:
    """The seed of a rank's environments, actions and samples: that of the run for rank 0, others for the others."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]) % TRAINING.size
    return mixed if rank else seed


def device_of(device: torch.device) -> torch.device:
    """One GPU for each rank of a machine, where torchrun has started several."""
    if device.type != "cuda" or started_as_rank()[1] == 1:
        return device
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise UsageError(f"this machine has {have} GPUs: give --nproc-per-node {have}, or --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def shared_config(config: Config, ranks: Ranks) -> Config:
    """The settings of rank 0: a preset may choose others on a machine with other processors."""
    return from_dict(Config, ranks.broadcast_object(to_dict(config)))


def config_of_rank(config: Config, ranks: Ranks) -> Config:
    """The settings with the part of one rank: of the batch, of the replay's rows, and a seed. Raises UsageError."""
    train, size = config.train, ranks.size
    if size == 1:
        return config
    if train.batch % size:
        raise UsageError(
            f"--train.batch {train.batch} cannot be shared evenly by {size} ranks: give a multiple of {size}"
        )
    rows = (train.length + 1) * train.envs * size
    for name in ("prefill", "replay_rows"):
        if getattr(train, name) < rows:
            option = name.replace("_", "-")
            raise UsageError(f"--train.{option} must be at least {rows} for {size} ranks, got {getattr(train, name)}")
    mine = replace(train, batch=train.batch // size, replay_rows=train.replay_rows // size)
    alone = replace(config.optimizer, workers=1)
    try:
        return replace(config, train=mine, optimizer=alone, seed=seed_of(config.seed, ranks.rank))
    except ValueError as error:
        share = f"each of {size} ranks has {mine.batch} of the {train.batch} sequences"
        raise UsageError(f"{error} for each rank: {share}, so give a larger --train.batch, or fewer ranks") from error


class _NoStore(CheckpointStore):
    """Keeps nothing."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def __call__(self, name: str, content: Mapping[str, Any], beside: bool = False) -> None:
        pass

    def wait(self) -> None:
        pass


class _NoMeta(Meta):
    """Writes nothing."""

    def __init__(self) -> None:
        pass

    def update(self, **values: Any) -> None:
        pass


@contextmanager
def folder_of(ranks: Ranks, claim: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """The run's folder, which rank 0 claims."""
    if ranks.rank:
        yield Path(ranks.broadcast_object())
        return
    with claim() as folder:
        ranks.broadcast_object(str(folder))
        yield folder


@contextmanager
def run_of(ranks: Ranks, folder: Path, opened: Callable[[], AbstractContextManager[Run]]) -> Iterator[Run]:
    """The open run of rank 0; one that writes and prints nothing but errors on the others."""
    if ranks.rank == 0:
        with opened() as run:
            yield run
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield Run(folder, SilentLogger(folder), _NoStore(folder), _NoMeta())


def train_ranks_to_end(ranks: Ranks, run: Run, trainer: AgentTrainer, config: Config) -> int:
    """As `train_to_end`, where a launcher ends all ranks by SIGTERM as soon as one has ended: rank 0 still has
    something to say then. The others end after it."""
    if ranks.rank:
        with sigterm_ignored():
            return follow_to_end(ranks, trainer)
    with sigterm_ignored() if ranks.size > 1 else contextlib.nullcontext():
        status = train_to_end(run, trainer, config)
    if status == 0:
        drop_other_images(run.folder, ranks.size)
    return status


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """Outside of the trainer's loop, which hears it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def follow_to_end(ranks: Ranks, trainer: AgentTrainer) -> int:
    """Run the trainer of a rank that is not the first, which says what ended all of them. Returns the exit status."""
    rank, status = ranks.rank, 1
    try:
        status = 0 if trainer.run() else 128 + trainer.signal
    except EnvironmentFailure as error:
        print(f"{environment_traceback(error)}rank {rank}: the environment failed: {error}", file=sys.stderr)
    except RankLost as error:
        print(f"rank {rank}: {error}; this rank ends too, after step {trainer.step:,}", file=sys.stderr)
    except (NonFiniteError, WorkerFailure):
        pass  # rank 0 says it
    if not ranks.lost:
        ranks.wait_for_rank_0()
    return status
