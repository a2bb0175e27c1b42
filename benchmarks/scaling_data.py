"""Pairs of a data set for the scaling study: an observation, k actions, and the change of the observation after them.

Symbols as in `world_model/types.py`; k decisions, P pairs, L rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.data.dataset import Dataset, Rows
from agent.errors import UsageError


class Pairs(NamedTuple):
    """Rows (L, ...) of whole episodes, and the P rows at which a pair starts; episode (P,) which one it is of."""

    obs: Tensor
    action: Tensor
    start: Tensor
    episode: Tensor
    k: int

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (B,) by number -> observation (B, O) and actions (B, k, A)."""
        start = self.start[rows]
        # row t + 1 holds the action that was taken at t: (B, k)
        taken = start[:, None] + torch.arange(1, self.k + 1)
        return self.obs[start], self.action[taken]

    def change(self, rows: Tensor, after: int | None = None) -> Tensor:
        """(B,) -> (B, O) after all k decisions, or after so many of them."""
        start = self.start[rows]
        return self.obs[start + (self.k if after is None else after)] - self.obs[start]


def write_once(path: Path, text: str) -> None:
    """Write a new file, whole or not at all; one that is there stays."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def same_data(path: Path, name: str, dataset: Dataset) -> None:
    """Write down beside the results in `path` which data set `name` they are of.

    Raises UsageError when there are results of another one of this name.
    """
    digest = hashlib.sha256()
    for rows in (dataset.train, dataset.held_out):
        for column in sorted(rows):
            digest.update(np.ascontiguousarray(rows[column]).tobytes())
    counts = {"train_rows": len(dataset.train["reward"]), "held_out_rows": len(dataset.held_out["reward"])}
    own, file = {"task": dataset.task, **counts, "sha256": digest.hexdigest()}, path.with_name(f"data-{name}.json")
    write_once(file, json.dumps(own, indent=2) + "\n")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found != own:
        rows = f"{found['task']} with {found['train_rows'] + found['held_out_rows']:,} rows"
        raise UsageError(f"{path} holds results of another {name}, {rows}: give another --out, or rename the data set")


def vectors(rows: Rows) -> np.ndarray:
    """(L, O) all vectors of the observations side by side. Raises UsageError when there are images among them."""
    columns = [rows[name] for name in sorted(rows) if name.startswith("obs/")]
    if any(column.ndim != 2 for column in columns):
        raise UsageError("the data set holds images, and this study is of vectors: collect a task without pixels")
    return np.concatenate(columns, 1)


def pairs_of(rows: Rows, k: int, share: float = 1.0, seed: int = 0) -> Pairs:
    """All pairs k decisions apart, none across the end of an episode; of a random share of the episodes.

    Raises UsageError when no episode has k decisions.
    """
    episode = np.cumsum(rows["is_first"]) - 1
    count = int(episode[-1]) + 1
    kept = np.random.default_rng(seed).permutation(count)[: max(1, round(share * count))]
    start = np.flatnonzero((episode[:-k] == episode[k:]) & np.isin(episode[:-k], kept))
    if not len(start):
        raise UsageError(f"no episode of the data set lasts {k} decisions: give smaller --steps, or longer episodes")
    action = np.clip(rows["prev_action"], -1.0, 1.0)
    arrays = vectors(rows), action, start, episode[start]
    obs, action_, start_, episode_ = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    return Pairs(obs, action_, start_, episode_, k)


class Standard(NamedTuple):
    """mean and std (O,) of training rows; a number that does not vary keeps its scale."""

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> Standard:
        """Of values (P, O)."""
        mean, std = values.double().mean(0), values.double().std(0, correction=0)
        std = torch.where(std > 1e-6 * mean.abs().clamp(min=1.0), std, torch.ones_like(std))
        return cls(mean.float(), std.float())

    def __call__(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


class Problem(NamedTuple):
    """Training and held-out pairs of one data set and k, and how both are standardised."""

    train: Pairs
    held: Pairs
    obs: Standard
    change: Standard

    @classmethod
    def of(cls, dataset: Dataset, k: int, share: float, seed: int) -> Problem:
        """share: of the training episodes; the held-out ones are always all there."""
        train, held = pairs_of(dataset.train, k, share, seed), pairs_of(dataset.held_out, k)
        everything = torch.arange(len(train.start))
        return cls(train, held, Standard.fit(train.obs[train.start]), Standard.fit(train.change(everything)))

    def batch(self, pairs: Pairs, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) -> observation (B, O), actions (B, k, A), change (B, O), standardised."""
        obs, actions = pairs.inputs(rows)
        return self.obs(obs), actions, self.change(pairs.change(rows))

    def between(self, rows: Tensor, loops: int) -> Tensor:
        """Training pairs (B,) -> (T-1, B, O): changes up to about j/T of the k decisions, j from 1 to T - 1."""
        after = [max(1, round(loop * self.train.k / loops)) for loop in range(1, loops)]
        return torch.stack([self.change(self.train.change(rows, decisions)) for decisions in after])

    @property
    def sizes(self) -> tuple[int, int]:
        """O and A."""
        return self.train.obs.shape[1], self.train.action.shape[1]
