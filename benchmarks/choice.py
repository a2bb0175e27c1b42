"""Is there anything to choose? What further loops bring to single steps, and how much of it can be known beforehand.

    python benchmarks/choice.py RUN DATASET                # RUN: of a looped core; from 1 to 2, 2 to 4, 4 to 8 loops
    python benchmarks/choice.py RUN DATASET --pairs 2:3 3:8 --csv choice.csv

Every step of the episodes is predicted from the posterior state before it, after 1, 2, .. loops: the error of the mean
of eight samples of the prior, and the KL of the posterior from the prior. What loops m+1..n bring to a step is the
error after m loops less that after n. Then half of the held-out steps may go on from m to n loops, the others stop:
those that the run's gate ranks highest; those that a reading of the loop state after m loops ranks highest, a ridge
regression and a small network, both fitted to the gain itself on the data set's other episodes (the gate's own
prediction is among what they read); and those that gained most, in hindsight. Printed: by how much the error is then
below that of a random half, in per cent of the error after m loops, with its standard error over runs of 25 steps,
and the rank correlation of each ranking with the gain. The data set must be one that RUN has not learned from
(evaluate.py collect TASK DATASET --run RUN), or the gate has seen what it is judged by.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.data.dataset import Rows, check_dataset, load_dataset, pad_episodes
from agent.errors import UsageError
from agent.evaluation.normalised_error import NormalisedError, targets_at
from agent.evaluation.open_loop import ALIKE_ROWS, SAMPLES, posterior_states
from agent.learning.dreamer import Dreamer
from world_model import LatentState, LoopedCore, WorldModel
from world_model.jumps import action_input


class Steps(NamedTuple):
    """M predictions one step ahead, in the order of the episodes: error and kl (R, M) after 1..R loops, states
    (R+1, M, N, D), input e (M, N, D)."""

    error: Tensor
    kl: Tensor
    states: Tensor
    e: Tensor

    def gain(self, first: int, last: int) -> Tensor:
        """(M,) what loops first+1..last took from the error."""
        return self.error[first - 1] - self.error[last - 1]

    def reading(self, loop: int) -> Tensor:
        """(M, F) all that is known after `loop` loops: the state, the size of its last change, and the input."""
        x, before = self.states[loop], self.states[loop - 1]
        return torch.cat([x.flatten(1), (x - before).flatten(1).abs(), self.e.flatten(1)], 1)


@torch.no_grad()
def predict(world: WorldModel, rows: Rows, loops: int, most: int) -> Steps:
    """Of all steps but the first two of each episode, or of `most` of them drawn at random."""
    core = world.core
    assert isinstance(core, LoopedCore)
    episodes = pad_episodes(rows)
    states, _ = posterior_states(world, episodes)
    row = torch.arange(episodes.reward.shape[1])
    places = ((row >= 2) & (row < episodes.length[:, None] - 1)).nonzero()
    episode, now = places[torch.randperm(len(places))[:most].sort().values].unbind(1)
    state = states.map(lambda leaf: leaf[episode, now])
    inputs = world.inputs(state, action_input(episodes.prev_action[episode, now + 1], None, world.cfg.jump))
    _, trace = core(state.deter, inputs, loops, core.prepare())
    observation_model = world.observation_model
    embed = observation_model({name: value[episode, now + 1] for name, value in episodes.obs.items()})
    embed = world.post_embed(embed)
    levels = world.latents.level((SAMPLES, len(episode)), inputs)  # the same for every depth
    targets = targets_at(observation_model, episodes, episode, now + 1)
    metric = NormalisedError.fit(observation_model, [episodes])
    error, kl = [], []
    for x in trace.states[1:]:
        deter = core.readout(state.deter, x, trace.gate)
        probs = world.prior_probs(deter)
        feats = [LatentState(deter, world.draw(probs, level)).feat() for level in levels]
        guess = sum(observation_model.predictions(feat) for feat in feats)
        error.append(metric.error(guess / SAMPLES, targets))
        posterior = world.latents.kl_form(world.posterior(deter, embed))
        kl.append(world.latents.kl(posterior, world.latents.kl_form(probs)))
    assert trace.e is not None
    return Steps(torch.stack(error), torch.stack(kl), torch.stack(trace.states), trace.e)


# ---------------------------------------------------------------------- rankings of steps


def ridge(x: Tensor, y: Tensor, ask: Tensor) -> Tensor:
    """Regression of y (M,) on x (M, F), read at ask (W, F); its penalty is the best on the last fifth of episodes."""
    cut = len(x) * 4 // 5
    mean = y[:cut].mean()
    square, product = x[:cut].T @ x[:cut], x[:cut].T @ (y[:cut] - mean)
    weights = [torch.linalg.solve(square + 10.0**k * torch.eye(x.shape[1]), product) for k in range(2, 9)]
    wrong = [(x[cut:] @ weight + mean - y[cut:]).square().mean() for weight in weights]
    return ask @ weights[int(torch.stack(wrong).argmin())] + mean


def network(x: Tensor, y: Tensor, ask: Tensor, epochs: int = 12) -> Tensor:
    """The same by 128 hidden units; what is read is the epoch that was best on the last fifth."""
    cut, size = len(x) * 4 // 5, y.std()
    net = nn.Sequential(nn.Linear(x.shape[1], 128), nn.SiLU(), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=0.1)
    best, read = float("inf"), ask.new_zeros(len(ask))
    goal = (y - y[:cut].mean()) / size
    for _ in range(epochs):
        for batch in torch.randperm(cut).split(128):
            optimizer.zero_grad()
            (net(x[batch]).squeeze(1) - goal[batch]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            wrong = float((net(x[cut:]).squeeze(1) - goal[cut:]).square().mean())
            if wrong < best:
                best, read = wrong, net(ask).squeeze(1).clone()
    return read


def advantage(score: Tensor, gain: Tensor, error: Tensor) -> tuple[float, float]:
    """By how much less is wrong if the half that `score` ranks highest goes on, and not a random half; and the standard
    error. In per cent of the mean error before."""
    goes_on = torch.zeros_like(gain)
    goes_on[score.argsort(descending=True)[: len(score) // 2]] = 1.0
    less = 100.0 * gain * (goes_on - goes_on.mean()) / error.mean()
    blocks = torch.stack([block.mean() for block in less.split(ALIKE_ROWS) if len(block) == ALIKE_ROWS])
    return float(less.mean()), float(blocks.std() / len(blocks) ** 0.5)


def compare(world: WorldModel, others: Steps, held: Steps, first: int, last: int) -> list[dict[str, float | str]]:
    """One row per ranking, for the loops from `first` to `last`."""
    core, gain, learned = world.core, held.gain(first, last), others.gain(first, last)
    x, ask = others.reading(first), held.reading(first)
    rankings = {}
    if hasattr(core.rule, "improvement"):
        with torch.no_grad():
            told, rankings["gate"] = (
                core.rule.improvement(part.states[first], part.states[first] - part.states[first - 1])
                for part in (others, held)
            )
        x, ask = torch.cat([x, told[:, None]], 1), torch.cat([ask, rankings["gate"][:, None]], 1)
    mean, std = x.mean(0), x.std(0) + 1e-4
    x, ask = (x - mean) / std, (ask - mean) / std
    rankings |= {"ridge": ridge(x, learned, ask), "network": network(x, learned, ask), "hindsight": gain}
    rows: list[dict[str, float | str]] = []
    for name, score in rankings.items():
        less, spread = advantage(score, gain, held.error[first - 1])
        rank = float(spearmanr(score, gain).statistic)
        rows.append({"loops": f"{first}:{last}", "ranking": name, "less": less, "se": spread, "rank": rank})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or checkpoint of a looped core")
    parser.add_argument("dataset", help="data set of the same task")
    parser.add_argument("--pairs", nargs="+", metavar="M:N", help="further loops to judge, from M to N")
    parser.add_argument("--steps", type=int, default=16_000, help="most steps of either part of the data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="write the table there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    try:
        saved, dataset = read_checkpoint(find_checkpoint(args.run)), load_dataset(args.dataset)
        check_dataset(dataset, saved["task"])
        world = Dreamer.from_checkpoint(saved, "cpu").averaged.world
        if not isinstance(world.core, LoopedCore):
            raise UsageError(f"the core of {args.run} is {world.cfg.core}, it has no loops")
        cap = world.cfg.loop.train_cap
        usual = [f"{m}:{min(2 * m, cap)}" for m in (1, 2, 4) if m < cap]
        pairs = [tuple(map(int, pair.split(":"))) for pair in args.pairs or usual]
        if any(len(pair) != 2 or not 1 <= pair[0] < pair[1] for pair in pairs):
            raise UsageError("--pairs are two numbers of loops, the second one larger: 1:2 2:4")
    except (UsageError, ValueError) as error:
        sys.exit(f"error: {error}")
    deepest = max(last for _, last in pairs)
    others, held = (predict(world, rows, deepest, args.steps) for rows in (dataset.train, dataset.held_out))
    print(f"{saved['task']}, {args.run}: {held.error.shape[1]} steps held out, {others.error.shape[1]} others")
    print("loops     " + " ".join(f"{loop:8d}" for loop in range(1, deepest + 1)))
    print("error     " + " ".join(f"{value:8.4f}" for value in held.error.mean(1)))
    print("KL (nats) " + " ".join(f"{value:8.3f}" for value in held.kl.mean(1)))
    table = []
    for first, last in pairs:
        gain = held.gain(first, last)
        print(f"\nfrom {first} to {last} loops: {gain.mean():.5f} +- {gain.std():.5f} of error less (spread of steps)")
        for row in compare(world, others, held, first, last):
            print("  {ranking:10s} {less:6.2f} % +- {se:.2f}    rank correlation {rank:6.3f}".format(**row))
            table.append({**row, "gain": float(gain.mean()), "gain_std": float(gain.std())})
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
