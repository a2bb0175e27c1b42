"""The figure of `evaluate.py loops`: orbits, read-outs and channels, loop by loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.evaluation.anatomy import Anatomy
from agent.evaluation.plots import new_figure
from agent.evaluation.tables import save_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_anatomy(report: Anatomy, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write loops.csv, loops.json and loops.png. Raises UsageError when they cannot be written."""
    save_tables(folder, "loops", {**metadata, **report.plain()}, {"loops": report.loops}, draw_anatomy(report))


def draw_anatomy(report: Anatomy) -> Figure:
    """Distance to the end, directions, quality, agreement with the training depth, and which channels still move."""
    figure, axes = new_figure(15.0, 6.4, 2, 3)
    loops = np.array([row["loop"] for row in report.loops])

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] is None else row[name] for row in report.loops], float)

    (away, angle, quality), (agreement, ranks, channels) = axes
    away.plot(loops, np.maximum(column("distance"), 1e-16), label="median")
    away.plot(loops, np.maximum(column("distance_upper"), 1e-16), linewidth=0.7, label="upper quartile")
    away.set(title="distance to where the orbit ends / norm", yscale="log")
    angle.plot(loops, column("cosine"), label="change with the change before")
    angle.plot(loops, column("descent"), label="change with steepest descent of the KL")
    angle.set(title="cosine", ylim=(-1.05, 1.05))
    quality.plot(loops, column("kl"), label="KL(posterior || prior), nats")
    quality.set(title="what training lowers", ylim=(0, None))
    known: list[str] = [name for name in ("prior_kl", "reward", "value") if name in report.loops[0]]
    for name in known:
        agreement.plot(loops, np.maximum(column(name), 1e-9), label=name.replace("prior_kl", "prior, nats"))
    agreement.set(title=f"difference from loop {report.reference}", yscale="log")
    for name in known[1:]:
        ranks.plot(loops, column(f"{name}_rank"), label=name)
    ranks.set(title=f"rank correlation with loop {report.reference}", ylim=(-1.05, 1.05))
    moving = report.moving.numpy()
    order = np.argsort(-moving[0])
    channels.imshow(np.log10(np.maximum(moving[:, order], 1e-8)), aspect="auto", cmap="magma", origin="lower",
                    extent=(0, moving.shape[1], 0.5, len(loops) + 0.5))  # fmt: skip
    channels.set(title="log10 mean |change| of each channel", xlabel="channels, by their first change", ylabel="loop")
    for axis in axes.flat[:5]:
        axis.axvline(report.reference, color="0.8", linestyle=":")
        axis.set(xlabel="loop", xscale="log")
        axis.legend(frameon=False, fontsize=8)
    shares = ", ".join(f"{name} {share:.2f}" for name, share in report.orbits.items() if share)
    figure.suptitle(f"orbits: {shares}; dotted: the deepest of training")
    return figure
