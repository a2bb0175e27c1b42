"""Pictures of what `agent.evaluation.rollout_error` measured, and of where the loops of an episode go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from agent.evaluation.open_loop import SAMPLES, context_of, watch
from agent.evaluation.plots import FILM_FPS, compared, film, film_strip, new_figure, pixels_of
from agent.evaluation.recording import Recording
from agent.evaluation.rollout_error import RolloutErrors, in_words
from agent.logs.video import write_video
from world_model import Rollout, WorldModel, symexp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = {"copy": ("0.45", "--", "last state copied"), "mean": ("0.65", ":", "mean of the recording")}


def draw_errors(found: RolloutErrors) -> Figure:
    """Errors of observation and reward, drift and size of the state, by imagination step; a row per policy."""
    policies = list(dict.fromkeys(row["policy"] for row in found.errors))
    labels = list(dict.fromkeys(row["loops"] for row in found.errors))
    figure, axes = new_figure(15.0, 3.4 * len(policies), len(policies), 4)
    for row, policy in enumerate(policies):
        for column, (name, title) in enumerate((
            ("observation", "squared error / variance"), ("reward", "reward, absolute error"),
            ("drift", "distance from the watched state / its size"), ("norm", "size of the state"),
        )):  # fmt: skip
            panel: Axes = axes[row, column]
            for number, loops in enumerate(labels):
                steps, value = found.curve(policy, loops, name)
                panel.plot(steps, value, color=f"C{number}", label=in_words(loops))
            for rival, (colour, dash, words) in GREY.items():
                if name in ("observation", "reward"):
                    steps, value = found.curve(policy, labels[0], rival if name == "observation" else f"reward_{rival}")
                    panel.plot(steps, value, dash, color=colour, label=words)
            panel.set(title=f"{policy}: {title}", xlabel="imagined steps")
            panel.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def draw_norms(found: RolloutErrors) -> Figure:
    """Size of the state along long dreams: mean, and the largest of all dreams."""
    figure, axes = new_figure(6.0, 3.4, 1)
    for number, loops in enumerate(dict.fromkeys(row["loops"] for row in found.norms)):
        rows = [row for row in found.norms if row["loops"] == loops]
        steps = [row["step"] for row in rows]
        axes[0, 0].plot(steps, [row["mean"] for row in rows], color=f"C{number}", label=in_words(loops))
        axes[0, 0].plot(steps, [row["largest"] for row in rows], color=f"C{number}", linewidth=0.7, alpha=0.6)
    axes[0, 0].set(xlabel="imagined steps, acting on (thin: the largest)", ylabel="size of the state")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def draw_map(found: RolloutErrors, policy: str) -> Figure:
    """Observation error by number of loops (rows) and imagination step (columns)."""
    labels = list(dict.fromkeys(row["loops"] for row in found.errors))
    table = np.array([found.curve(policy, loops, "observation")[1] for loops in labels])
    figure, axes = new_figure(8.0, 1.2 + 0.5 * len(labels), 1)
    panel = axes[0, 0]
    shown = panel.imshow(np.maximum(table, 1e-4), aspect="auto", norm="log", cmap="magma_r",
                         extent=(0.5, table.shape[1] + 0.5, len(labels) - 0.5, -0.5))  # fmt: skip
    panel.set_yticks(range(len(labels)), ["exits" if loops == "exit" else loops for loops in labels])
    panel.set(xlabel="imagined steps", ylabel="loops", title=f"{policy}: squared error / variance")
    figure.colorbar(shown)
    return figure


class Example(NamedTuple):
    """SAMPLES dreams of H steps along the longest episode of a recording, number `pick`, from its row number `row`."""

    pick: int
    row: int
    dream: Rollout


@torch.no_grad()
def example(world: WorldModel, recording: Recording, horizon: int) -> Example:
    """Dreams with the actions that were played, of as many steps as the episode has."""
    episodes = recording.episodes
    pick = int(episodes.length.argmax())
    row = context_of(episodes) - 1
    horizon = min(horizon, int(episodes.length[pick]) - 1 - row)
    states, _ = watch(world, episodes)
    start = states.map(lambda leaf: leaf[pick : pick + 1, row].repeat_interleave(SAMPLES, 0))
    actions = episodes.prev_action[pick : pick + 1, row + 1 : row + 1 + horizon].repeat_interleave(SAMPLES, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Example(pick, row, world.imagine(start, actions, horizon))


@torch.no_grad()
def draw_truth(world: WorldModel, recording: Recording, shown: Example, entries: int = 6) -> Figure:
    """What happened and what dreams with the same actions said, for the entries that move most."""
    episodes, observation_model, (pick, row, dream) = recording.episodes, world.observation_model, shown
    horizon = dream.rewards.shape[1]
    if observation_model.decoder:
        guess = symexp(observation_model.decoder(dream.feat[1:])).transpose(0, 1).numpy()  # (SAMPLES, H, O)
        truth = observation_model.flatten(episodes.obs)[pick, : row + 1 + horizon].numpy()
    else:  # images have films
        guess, truth = np.zeros((SAMPLES, horizon, 0)), np.zeros((row + 1 + horizon, 0))
    names = [f"{name}[{i}]" for name, size in observation_model.vectors.items() for i in range(size)]
    chosen = sorted(np.argsort(-truth.std(0), kind="stable")[:entries])
    figure, axes = new_figure(9.0, 1.2 * (len(chosen) + 1), len(chosen) + 1, share_x=True)
    ahead = np.arange(row + 1, row + 1 + horizon)
    lines = [(names[i], truth[:, i], guess[..., i]) for i in chosen]
    reward = episodes.reward[pick, : row + 1 + horizon].numpy()
    lines.append(("reward", reward, dream.rewards.numpy(force=True)))
    for panel, (name, real, dreamt) in zip(axes[:, 0], lines, strict=True):
        panel.plot(real, color="0.2", label="what happened")
        panel.plot(ahead, dreamt.mean(0), color="C1", label=f"mean of {SAMPLES} dreams")
        panel.fill_between(ahead, dreamt.min(0), dreamt.max(0), color="C1", alpha=0.2, linewidth=0)
        panel.axvline(row, color="0.7", linestyle=":")
        panel.set_ylabel(name, fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    axes[-1, 0].set_xlabel(f"step of the episode ({recording.policy}); left of the dotted line the model sees")
    return figure


@torch.no_grad()
def save_films(world: WorldModel, recording: Recording, shown: Example, folder: Path) -> None:
    """What images showed, what the first dream saw and the difference: truth_POLICY_NAME.gif, and moments as PNG."""
    from matplotlib.image import imsave

    first, row = shown.dream.states.map(lambda leaf: leaf[:1, 1:]), shown.row + 1
    loops = shown.dream.loops.depth[0].numpy(force=True)
    for name, guess in world.decode(first).items():
        if name not in world.observation_model.vectors:
            truth = recording.episodes.obs[name][shown.pick, row : row + len(loops)]
            parts = compared(truth, guess[0])
            imsave(folder / f"truth_{recording.policy}_{name}.png", film_strip(parts))
            frames = film(parts, loops, world.run_cap)
            write_video(folder / f"truth_{recording.policy}_{name}.gif", frames, FILM_FPS)


@torch.no_grad()
def draw_loops(world: WorldModel, recording: Recording) -> Figure:
    """Loops of every step along one episode, with changes of the reward and contacts made or broken."""
    episodes = recording.episodes
    pick = int(episodes.length.argmax())
    length = int(episodes.length[pick])
    _, depth = watch(world, episodes)
    figure, axes = new_figure(11.0, 3.6, 2, share_x=True)
    top, bottom = axes[:, 0]
    top.step(np.arange(length), depth[pick, :length].numpy(), where="mid", color="C0", linewidth=0.8)
    top.set(ylabel="loops", ylim=(0.5, world.run_cap + 0.5), title=f"{recording.policy}: where the loops go")
    reward = episodes.reward[pick, :length].numpy()
    bottom.plot(reward, color="C2", label="reward")
    if recording.contacts is not None:
        contacts = recording.contacts[pick, :length].numpy()
        changed = np.flatnonzero(np.diff(contacts, prepend=contacts[:1]))
        bottom.plot(changed, np.full(len(changed), reward.min()), "|", color="C3", label="contact made or broken")
    bottom.set(xlabel="step of the episode", ylabel="reward")
    bottom.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def draw_all(
    world: WorldModel, recordings: Sequence[Recording], found: RolloutErrors, horizon: int, folder: Path
) -> dict[str, Figure]:
    """{name: figure}; the films of images are written at once."""
    figures = {"errors": draw_errors(found)}
    if found.norms:
        figures["norms"] = draw_norms(found)
    for recording in recordings:
        figures[f"map_{recording.policy}"] = draw_map(found, recording.policy)
        shown = example(world, recording, horizon)
        figures[f"truth_{recording.policy}"] = draw_truth(world, recording, shown)
        save_films(world, recording, shown, folder)
        figures[f"loops_{recording.policy}"] = draw_loops(world, recording)
    return figures


def save_all(figures: dict[str, Figure], folder: Path) -> None:
    """Write the figures as PNG files, and for TensorBoard into the same folder."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
            board.add_image(f"model/{name}", pixels_of(figure), dataformats="HWC")
