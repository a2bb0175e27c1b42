"""What exits are worth: rules, fixed depths and random exits on one checkpoint, and where the loops go.

    python evaluate.py collect TASK DATASET --run RUN --episodes 40          # rows that RUN has not learned from
    python benchmarks/exits.py RUN DATASET                 # RUN: of train_agent.py, with or without --model-only
    python benchmarks/exits.py RUN DATASET --csv exits.csv --play 4
    python benchmarks/exits.py RUN DATASET --brief --windows 5000     # few rules, sharply: places come up repeatedly

Printed for the run's own rule, for a random exit with the same histogram, for every fixed depth, and for rules that
need no training: mean loops and their histogram, open-loop errors 5 and 15 steps ahead on held-out episodes, and the
median milliseconds of a timed dream of 15 steps with recorded actions (rules in turns; its own mean loops beside it),
and by how much the run's own rule errs more than this one at the longest horizon, with its standard error: windows that
overlap count as one, also where places come up repeatedly.
All start from the same states, inferred with the run's own rule, so that only the dream differs.

Then the rank correlation of the loops of a step with what happened in it, for the trained core and for one with its
first weights: on the held-out episodes, and with --play on episodes played now, in which dm_control's contacts are
counted too.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.data.dataset import Episodes, check_dataset, load_dataset, pad_episodes
from agent.errors import UsageError
from agent.evaluation.open_loop import choose_windows, exit_rule, open_loop, posterior_states, usable_horizons
from agent.evaluation.statistics import standard_error
from agent.learning.dreamer import Dreamer
from agent.learning.policy import Memory
from agent.runs.config import Config
from agent.runtime import keep_memory
from agent.settings import from_dict
from envs import make_env
from world_model import ExitRule, LatentState, RandomExit, WorldModel, make_rule

HORIZON = 15
DRAWS = 4
"""Draws of the depths of the random exit; its errors are their mean."""

OTHERS = {"residual": (0.05, 0.1, 0.2), "kl": (0.01, 0.05), "acceleration": (0.05, 0.1, 0.2)}


def histogram(depth: torch.Tensor, cap: int) -> list[float]:
    counts = torch.bincount(depth.flatten(), minlength=cap + 1)[1:]
    return (counts / counts.sum()).tolist()


class Bench:
    """Rules by name, what they cost and what their dreams are worth, on the same states and actions."""

    def __init__(self, world: WorldModel, episodes: Episodes, windows: int, starts: int, cap: int):
        self.world, self.episodes, self.windows, self.cap = world, episodes, windows, cap
        self.horizons = usable_horizons(episodes, (5, HORIZON))
        if not self.horizons:
            raise UsageError("the episodes of the data set are too short for predictions of 5 steps")
        self.states, _ = posterior_states(world, episodes, cap)
        self.rows: dict[str, dict[str, float]] = {}
        self.errors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # error and energy (W,), longest horizon
        self.shapes: dict[str, list[float]] = {}
        self.dreams: dict[str, Callable[[], torch.Tensor]] = {}
        place = choose_windows(episodes, self.horizons[-1], starts, seed=1)
        self.start: LatentState = self.states.map(lambda leaf: leaf[place.episode, place.row])
        self.actions = episodes.prev_action[place.episode[:, None], place.ahead]

    def measure(self, name: str, rule: ExitRule | None, most: int) -> None:
        """rule None is the run's own."""
        found = []
        for draw in range(DRAWS if isinstance(rule, RandomExit) else 1):
            if isinstance(rule, RandomExit):  # the latents are drawn as for all other rules
                rule.generator = torch.Generator().manual_seed(draw)
            with exit_rule(self.world, rule):
                found.append(open_loop(self.world, self.episodes, self.horizons, self.windows, 0, most, self.states))
        means = [each.means() for each in found]
        self.rows[name] = {key: float(np.mean([row[key] for row in means])) for key in means[0]}
        self.shapes[name] = histogram(torch.cat([each.depth for each in found]), self.cap)
        pairs = zip(*((each.error[self.horizons[-1]], each.energy[self.horizons[-1]]) for each in found), strict=True)
        error, energy = (torch.stack(parts).mean(0) for parts in pairs)
        self.errors[name] = error, energy
        self.groups = found[0].places.groups()

        def dream() -> torch.Tensor:
            with exit_rule(self.world, rule):
                return self.world.imagine(self.start, self.actions, self.horizons[-1], max_loops=most).loops.depth

        self.dreams[name] = dream

    def measure_all(self, brief: bool) -> None:
        flat = self.world.cfg.loop.tokens * self.world.cfg.loop.width
        own = f"own ({self.world.cfg.loop.exit})"
        self.measure(own, None, min(self.cap, self.world.run_cap))
        shape = tuple(self.shapes[own])
        self.measure("random, own histogram", make_rule("random", flat, self.cap, histogram=shape), self.cap)
        for depth in [max(1, round(self.rows[own]["loops"]))] if brief else range(1, self.cap + 1):
            self.measure(f"fixed {depth}", ExitRule(), depth)
        if brief:
            return
        for name, thresholds in OTHERS.items():
            for threshold in thresholds:
                self.measure(f"{name} {threshold}", make_rule(name, flat, self.cap, threshold), self.cap)

    def time(self, repeats: int) -> None:
        """Add dream_ms and dream_loops; rules take turns, so that all see the same machine."""
        torch.manual_seed(0)
        seconds: dict[str, list[float]] = {name: [] for name in self.dreams}
        for _ in range(repeats + 1):
            for name, dream in self.dreams.items():
                began = time.perf_counter()
                depth = dream()
                seconds[name].append(time.perf_counter() - began)
                self.rows[name]["dream_loops"] = float(depth.float().mean())
        for name, values in seconds.items():
            self.rows[name]["dream_ms"] = 1e3 * float(np.median(values[1:]))

    def compare(self) -> None:
        """Add by how much the run's own rule errs more than each, in the error of the mean and in the energy score, and
        the standard errors of these differences.

        Both predict from the same places, so the difference is known far better than either error.
        """
        own = next(iter(self.errors.values()))
        for name, found in self.errors.items():
            for label, mine, other in zip(("error", "energy"), own, found, strict=True):
                more = mine - other
                self.rows[name][f"d_{label}"] = float(more.mean())
                self.rows[name][f"d_{label}_se"] = standard_error(more.numpy(), self.groups)

    def report(self, path: Path | None) -> None:
        columns = list(next(iter(self.rows.values())))
        print(f"{'rule':24s} " + " ".join(f"{column:>11s}" for column in columns) + "  share of 1, 2, .. loops")
        for name, row in self.rows.items():
            shares = " ".join(f"{share:.2f}" for share in self.shapes[name])
            print(f"{name:24s} " + " ".join(f"{row[column]:11.4f}" for column in columns) + f"  {shares}")
        if path:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["rule", *columns, *(f"share_{k}" for k in range(1, self.cap + 1))])
                for name, row in self.rows.items():
                    writer.writerow([name, *(row[column] for column in columns), *self.shapes[name]])


# ---------------------------------------------------------------------- where the loops go


def events(world: WorldModel, episodes: Episodes) -> dict[str, torch.Tensor]:
    """(E, T) sizes of what happened between a row and the one before; the first rows are left out by the caller."""
    seen = torch.arange(episodes.reward.shape[1]) < episodes.length[:, None]
    obs = world.observation_model.targets(episodes.obs)
    obs = obs / obs[seen].std(0).clamp(min=1e-3)
    step = obs.diff(dim=1, prepend=obs[:, :1])
    bend = step.diff(dim=1, prepend=step[:, :1])
    reward = episodes.reward
    return {
        "change of the observation": step.norm(dim=-1),
        "turning (second difference)": bend.norm(dim=-1),
        "change of the reward": reward.diff(dim=1, prepend=reward[:, :1]).abs(),
        "size of the action": episodes.prev_action.norm(dim=-1),
    }


def correlations(
    world: WorldModel, episodes: Episodes, cap: int, more: dict[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """Spearman's rank correlation of loops with each event, over all rows but the first two of an episode."""
    _, depth = posterior_states(world, episodes, cap)
    rows = torch.arange(depth.shape[1])
    used = (rows >= 2) & (rows < episodes.length[:, None])
    loops = depth[used].numpy()
    found = {}
    for name, size in {**events(world, episodes), **(more or {})}.items():
        what = size[used].numpy()
        varies = loops.min() < loops.max() and what.min() < what.max()
        found[name] = float(spearmanr(loops, what).statistic) if varies else float("nan")
    return found


def play(agent: Dreamer, task: str, count: int, trained: bool) -> tuple[Episodes, dict[str, torch.Tensor]]:
    """Episodes of the agent (random actions where it has no policy), and their contacts by row."""
    rows: dict[str, list[list[np.ndarray]]] = {"obs": [], "action": [], "reward": [], "contacts": []}
    for number in range(count):
        env = make_env(task, seed=3_000_000_000 + number)
        physics = getattr(getattr(env.unwrapped, "_env", None), "physics", None)
        obs, _ = env.reset()
        action, reward, over = np.zeros(agent.spaces.action.size), 0.0, False
        memory: Memory | None = None
        for parts in rows.values():
            parts.append([])
        while True:
            contacts = 0 if physics is None else physics.data.ncon
            for name, value in (("obs", obs["state"]), ("action", action), ("reward", reward), ("contacts", contacts)):
                rows[name][-1].append(np.asarray(value, np.float32))
            if over:
                break
            batch = {"state": obs["state"][None]}
            taken, memory, _ = agent.act(batch, memory, np.array([len(rows["obs"][-1]) == 1]), explore=True)
            taken = taken[0] if trained else env.action_space.sample()
            action = np.eye(agent.spaces.action.size)[taken] if agent.spaces.action.discrete else taken
            obs, reward, terminated, truncated, _ = env.step(taken)  # type: ignore[assignment]
            over = terminated or truncated
        env.close()

    def padded(name: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(np.stack(part)) for part in rows[name]], True)

    length = torch.tensor([len(part) for part in rows["reward"]])
    contacts = padded("contacts")
    more = {"contacts": contacts, "contacts made or broken": contacts.diff(dim=1, prepend=contacts[:, :1]).abs()}
    return Episodes({"state": padded("obs")}, padded("action"), padded("reward"), length), more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or checkpoint of a looped core")
    parser.add_argument("dataset", help="data set of the same task")
    parser.add_argument("--windows", type=int, default=256, help="open-loop predictions per rule")
    parser.add_argument("--brief", action="store_true", help="the own rule, random, and one fixed depth near its mean")
    parser.add_argument("--starts", type=int, default=256, help="states that a timed dream starts from")
    parser.add_argument("--repeats", type=int, default=15, help="timed dreams of each rule")
    parser.add_argument("--max-loops", type=int, help="most loops; by default as in training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--play", type=int, default=0, metavar="N", help="episodes to play for the correlations")
    parser.add_argument("--csv", type=Path, help="write the table there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    try:
        saved, dataset = read_checkpoint(find_checkpoint(args.run)), load_dataset(args.dataset)
        check_dataset(dataset, saved["task"])
        agent = Dreamer.from_checkpoint(saved, "cpu")
        world = agent.averaged.world
        if args.play and world.observation_model.images:
            raise UsageError("--play is for tasks with vectors as observations")
        if not world.core.looping:
            raise UsageError(f"the core of {args.run} is {world.cfg.core}, it has no loops")
        episodes, cap = pad_episodes(dataset.held_out), args.max_loops or world.cfg.loop.train_cap
        bench = Bench(world, episodes, args.windows, args.starts, cap)
    except UsageError as error:
        sys.exit(f"error: {error}")
    print(f"{saved['task']}, {args.run}, cap {cap}, {len(episodes.length)} held-out episodes, {args.windows} windows")
    bench.measure_all(args.brief)
    bench.time(args.repeats)
    bench.compare()
    bench.report(args.csv)

    config = from_dict(Config, saved["config"])
    torch.manual_seed(config.seed)
    fresh = Dreamer(config.model, config.behavior, config.optimizer, agent.spaces).world
    sets: dict[str, tuple[Episodes, dict[str, torch.Tensor]]] = {"held-out episodes": (episodes, {})}
    if args.play:
        played = play(agent, saved["task"], args.play, not config.model_only)
        sets[f"{args.play} episodes played"] = played
    print("\nrank correlation of the loops of a step with what happened in it    trained   first weights")
    for label, (rows, more) in sets.items():
        print(label)
        trained, untrained = (correlations(each, rows, cap, more) for each in (world, fresh))
        for name, value in trained.items():
            print(f"  {name:64s} {value:8.3f} {untrained[name]:8.3f}")


if __name__ == "__main__":
    main()
