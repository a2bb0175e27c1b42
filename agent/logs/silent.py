"""The log of a rank that writes nothing: its episodes are kept for rank 0, which logs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from agent.logs.logger import Logger


class SilentLogger(Logger):
    """Takes what a `Logger` takes. waiting: episodes (step, environment, return, length) not yet fetched."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.waiting: list[tuple[int, int, float, int]] = []

    def episode(self, step: int, env: int, ret: float, length: int) -> None:
        self.waiting.append((step, env, ret, length))

    def add(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def write(self, step: int) -> dict[str, float]:
        return {}

    def progress(self, step: int, share: float | None = None) -> None:
        pass

    def evaluation(self, step: int, rows: Iterable[Mapping[str, float]]) -> None:
        pass

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        pass

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        pass

    def gif(self, step: int, tag: str, frames: np.ndarray, fps: float) -> None:
        pass

    def hparams(self, settings: Mapping[str, object], metrics: Mapping[str, float | None]) -> None:
        pass

    def close(self) -> None:
        pass
