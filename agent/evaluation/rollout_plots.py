"""Figures of rollout errors, of example dreams beside their recorded episodes, and of the loops along an episode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from agent.evaluation.open_loop import SAMPLES, context_rows, posterior_states
from agent.evaluation.plots import GIF_FPS, comparison_clip, frame_strip, image_comparison, new_figure, pixels_of
from agent.evaluation.recording import Recording
from agent.evaluation.rollout_error import NAIVE, RolloutErrors, loops_in_words
from agent.logs.video import write_video
from world_model import Rollout, WorldModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAIVE_STYLES = {"copy": ("0.45", "--"), "mean": ("0.65", ":")}
"""Colour and line style of each naive predictor."""


# ---------------------------------------------------------------------- errors


def draw_errors(results: RolloutErrors) -> Figure:
    """Errors of observation and reward, drift and norm of the state, by imagination step; a row per policy."""
    policies = list(dict.fromkeys(row["policy"] for row in results.errors))
    labels = list(dict.fromkeys(row["loops"] for row in results.errors))
    figure, axes = new_figure(15.0, 3.4 * len(policies), len(policies), 4)
    for row, policy in enumerate(policies):
        for column, (name, title) in enumerate((
            ("observation", "squared error / variance"), ("reward", "reward, absolute error"),
            ("drift", "distance to the posterior state / its norm"), ("norm", "norm of the state"),
        )):  # fmt: skip
            panel: Axes = axes[row, column]
            for number, loops in enumerate(labels):
                steps, value = results.curve(policy, loops, name)
                panel.plot(steps, value, color=f"C{number}", label=loops_in_words(loops))
            for predictor, (colour, dash) in NAIVE_STYLES.items():
                if name in ("observation", "reward"):
                    curve = predictor if name == "observation" else f"reward_{predictor}"
                    steps, value = results.curve(policy, labels[0], curve)
                    panel.plot(steps, value, dash, color=colour, label=NAIVE[predictor])
            panel.set(title=f"{policy}: {title}", xlabel="imagined steps")
            panel.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def draw_norms(results: RolloutErrors) -> Figure:
    """Norm of the state along long dreams: mean, and the largest of all dreams."""
    figure, axes = new_figure(6.0, 3.4, 1)
    for number, loops in enumerate(dict.fromkeys(row["loops"] for row in results.norms)):
        rows = [row for row in results.norms if row["loops"] == loops]
        steps = [row["step"] for row in rows]
        axes[0, 0].plot(steps, [row["mean"] for row in rows], color=f"C{number}", label=loops_in_words(loops))
        axes[0, 0].plot(steps, [row["largest"] for row in rows], color=f"C{number}", linewidth=0.7, alpha=0.6)
    axes[0, 0].set(xlabel="imagined steps of the agent (thin: the largest)", ylabel="norm of the state")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def draw_map(results: RolloutErrors, policy: str) -> Figure:
    """Observation error by number of loops (rows) and imagination step (columns)."""
    labels = list(dict.fromkeys(row["loops"] for row in results.errors))
    table = np.array([results.curve(policy, loops, "observation")[1] for loops in labels])
    figure, axes = new_figure(8.0, 1.2 + 0.5 * len(labels), 1)
    panel = axes[0, 0]
    heat_map = panel.imshow(np.maximum(table, 1e-4), aspect="auto", norm="log", cmap="magma_r",
                            extent=(0.5, table.shape[1] + 0.5, len(labels) - 0.5, -0.5))  # fmt: skip
    panel.set_yticks(range(len(labels)), ["exits" if loops == "exit" else loops for loops in labels])
    panel.set(xlabel="imagined steps", ylabel="loops", title=f"{policy}: squared error / variance")
    figure.colorbar(heat_map)
    return figure


# ---------------------------------------------------------------------- an example


class Example(NamedTuple):
    """SAMPLES dreams of H steps along the longest episode of a recording, number `episode`, from its row `row`."""

    episode: int
    row: int
    dream: Rollout


@torch.no_grad()
def example_dream(world: WorldModel, recording: Recording, horizon: int) -> Example:
    """Dreams with the recorded actions, of `horizon` steps or as many as the episode has."""
    episodes = recording.episodes
    longest = int(episodes.length.argmax())
    row = context_rows(episodes) - 1
    horizon = min(horizon, int(episodes.length[longest]) - 1 - row)
    states, _ = posterior_states(world, episodes)
    # (E, T, ...) -> (SAMPLES, ...)
    start = states.map(lambda leaf: leaf[longest : longest + 1, row].repeat_interleave(SAMPLES, 0))
    actions = episodes.prev_action[longest : longest + 1, row + 1 : row + 1 + horizon].repeat_interleave(SAMPLES, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Example(longest, row, world.imagine(start, actions, horizon))


@torch.no_grad()
def draw_truth(world: WorldModel, recording: Recording, example: Example, entries: int = 6) -> Figure:
    """The recorded values and those of dreams with the same actions, for the `entries` that vary most."""
    episodes, observation_model, (pick, row, dream) = recording.episodes, world.observation_model, example
    horizon = dream.rewards.shape[1]
    if observation_model.decoder:
        decoded = observation_model.flatten(observation_model.decode(dream.feat[1:]))  # (H, SAMPLES, O)
        dreamed = decoded.transpose(0, 1).numpy(force=True)
        recorded = observation_model.flatten(episodes.obs)[pick, : row + 1 + horizon].numpy(force=True)
    else:  # images alone, which `save_clips` shows
        dreamed, recorded = np.zeros((SAMPLES, horizon, 0)), np.zeros((row + 1 + horizon, 0))
    names = [f"{name}[{i}]" for name, size in observation_model.vectors.items() for i in range(size)]
    chosen = sorted(np.argsort(-recorded.std(0), kind="stable")[:entries])
    figure, axes = new_figure(9.0, 1.2 * (len(chosen) + 1), len(chosen) + 1, share_x=True)
    ahead = np.arange(row + 1, row + 1 + horizon)
    curves = [(names[i], recorded[:, i], dreamed[..., i]) for i in chosen]
    reward = episodes.reward[pick, : row + 1 + horizon].numpy()
    curves.append(("reward", reward, dream.rewards.numpy(force=True)))
    for panel, (name, real, dreams) in zip(axes[:, 0], curves, strict=True):
        panel.plot(real, color="0.2", label="recorded")
        panel.plot(ahead, dreams.mean(0), color="C1", label=f"mean of {SAMPLES} dreams")
        panel.fill_between(ahead, dreams.min(0), dreams.max(0), color="C1", alpha=0.2, linewidth=0)
        panel.axvline(row, color="0.7", linestyle=":")
        panel.set_ylabel(name, fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    axes[-1, 0].set_xlabel(f"step of the episode ({recording.policy}); observed left of the dotted line")
    return figure


@torch.no_grad()
def save_clips(world: WorldModel, recording: Recording, example: Example, folder: Path) -> None:
    """Images, those of the first dream and the difference: truth_POLICY_NAME.gif, and some frames as PNG."""
    from matplotlib.image import imsave

    first_dream, row = example.dream.states.map(lambda leaf: leaf[:1, 1:]), example.row + 1
    loops = example.dream.loops.depth[0].numpy(force=True)
    for name, dreamed in world.decode(first_dream).items():
        if name not in world.observation_model.vectors:
            recorded = recording.episodes.obs[name][example.episode, row : row + len(loops)]
            parts = image_comparison(recorded, dreamed[0])
            imsave(folder / f"truth_{recording.policy}_{name}.png", frame_strip(parts))
            frames = comparison_clip(parts, loops, world.run_cap)
            write_video(folder / f"truth_{recording.policy}_{name}.gif", frames, GIF_FPS)


@torch.no_grad()
def draw_loops(world: WorldModel, recording: Recording) -> Figure:
    """Loops of every step of the longest episode, with the reward and the steps at which contacts change."""
    episodes = recording.episodes
    pick = int(episodes.length.argmax())
    length = int(episodes.length[pick])
    _, depth = posterior_states(world, episodes)
    figure, axes = new_figure(11.0, 3.6, 2, share_x=True)
    top, bottom = axes[:, 0]
    top.step(np.arange(length), depth[pick, :length].numpy(), where="mid", color="C0", linewidth=0.8)
    top.set(ylabel="loops", ylim=(0.5, world.run_cap + 0.5), title=f"{recording.policy}: loops along an episode")
    reward = episodes.reward[pick, :length].numpy()
    bottom.plot(reward, color="C2", label="reward")
    if recording.contacts is not None:
        contacts = recording.contacts[pick, :length].numpy()
        changed = np.flatnonzero(np.diff(contacts, prepend=contacts[:1]))
        bottom.plot(changed, np.full(len(changed), reward.min()), "|", color="C3", label="contact made or broken")
    bottom.set(xlabel="step of the episode", ylabel="reward")
    bottom.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


# ---------------------------------------------------------------------- everything


def draw_all(
    world: WorldModel, recordings: Sequence[Recording], results: RolloutErrors, horizon: int, folder: Path
) -> dict[str, Figure]:
    """{name: figure} of everything; clips of images are written to `folder` at once."""
    figures = {"errors": draw_errors(results)}
    if results.norms:
        figures["norms"] = draw_norms(results)
    for recording in recordings:
        figures[f"map_{recording.policy}"] = draw_map(results, recording.policy)
        example = example_dream(world, recording, horizon)
        figures[f"truth_{recording.policy}"] = draw_truth(world, recording, example)
        save_clips(world, recording, example, folder)
        figures[f"loops_{recording.policy}"] = draw_loops(world, recording)
    return figures


def save_all(figures: dict[str, Figure], folder: Path) -> None:
    """Write the figures into the folder, as PNG files and as TensorBoard events."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
            board.add_image(f"model/{name}", pixels_of(figure), dataformats="HWC")
