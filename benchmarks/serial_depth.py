"""Do the loops follow the difficulty? Loops against n on toy:serial, where a prediction needs n serial moves.

    python evaluate.py collect toy:serial datasets/serial --episodes 1300
    python train_agent.py toy:serial --dataset datasets/serial --model-only --offline.updates 14000 \\
        --optimizer.lr 4e-3 --model.loop.mean-loops 4 --model.loop.units 64 --model.loop.width 96 \\
        --model.loop.expand 1 --model.loop.gain leaky
    python benchmarks/serial_depth.py RUN

For transitions under random actions: the model sees the episode so far, predicts one step ahead with exits, and
the decoded position is compared with the true next one. Printed: error and loops by n, the rank correlation of
loops and n, the error when every prediction stops after 1, 2, .. loops, and all of it with other thresholds of the
exit rule, if asked for; drawn with --picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from agent.data.checkpoint import check_spaces, find_checkpoint, read_checkpoint
from agent.errors import UsageError
from agent.learning.dreamer import Dreamer
from agent.spaces import spaces_of
from envs import make_vector_env

EPISODES = 20


def transitions(agent: Dreamer, task: str, seed: int) -> dict[str, Any]:
    """Posterior states before a move, the action, n, and the position after it, over whole episodes."""
    world = agent.averaged.world
    envs = make_vector_env(task, EPISODES, seed)
    envs.action_space.seed(seed)
    obs, _ = envs.reset(seed=seed)
    bits = agent.spaces.obs["state"] - 8  # the rest is n = 0..8 as a count
    state, action = world.initial(EPISODES), torch.zeros(EPISODES, 2)
    first = torch.ones(EPISODES, dtype=torch.bool)
    found: dict[str, list[torch.Tensor]] = {"deter": [], "stoch": [], "action": [], "n": [], "next": []}
    over = False
    while not over:
        rows = torch.as_tensor(obs["state"])
        state, _ = world.observe({"state": rows}, action, first, state, sample=False)
        choice = envs.action_space.sample()
        action = torch.nn.functional.one_hot(torch.as_tensor(choice), 2).float()
        obs, _, terminated, truncated, _ = envs.step(choice)
        found["deter"].append(state.deter)
        found["stoch"].append(state.stoch)
        found["action"].append(action)
        found["n"].append(rows[:, bits:].sum(-1).long())
        found["next"].append(torch.as_tensor(obs["state"])[:, :bits])
        first = torch.zeros(EPISODES, dtype=torch.bool)
        over = bool((terminated | truncated).all())
    envs.close()
    return {name: torch.cat(parts) for name, parts in found.items()} | {"bits": bits}


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; nan when either does not vary."""
    return float(spearmanr(one, other).statistic) if np.ptp(one) and np.ptp(other) else float("nan")


def draw(path: Path, n: np.ndarray, loops: np.ndarray, error: np.ndarray, alone: np.ndarray) -> None:
    """How many loops the predictions of each n took, and the error by n: with exits, and when one loop is all."""
    powers, depths = np.arange(n.max() + 1), np.arange(1, loops.max() + 1)
    share = np.array([[(loops[n == power] == depth).mean() for power in powers] for depth in depths])
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    area = (-0.5, powers[-1] + 0.5, 0.5, depths[-1] + 0.5)
    image = left.imshow(share, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=area)
    figure.colorbar(image, ax=left, label="share of the predictions of this n")
    left.plot(powers, [loops[n == power].mean() for power in powers], "o-", color="C1", label="mean")
    left.set(xlabel="n", ylabel="loops", yticks=depths, title=f"rank correlation {rank_correlation(loops, n):.2f}")
    left.legend(frameon=False, loc="upper left")
    for values, label, style in ((alone, "one loop", "s--"), (error, "with exits", "o-")):
        right.plot(powers, [values[n == power].mean() for power in powers], style, label=label)
    right.set(xlabel="n", ylabel="share of predictions with a wrong bit", ylim=(-0.02, 1.02))
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or checkpoint of toy:serial")
    parser.add_argument("--seed", type=int, default=2_000_000_000)
    parser.add_argument("--csv", type=Path, help="write n, loops and error of every transition there")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    parser.add_argument("--thresholds", type=float, nargs="+", default=(), help="of the exit rule, tried as well")
    args = parser.parse_args()
    try:
        saved = read_checkpoint(find_checkpoint(args.run))
        if not saved["task"].startswith("toy:serial"):
            raise UsageError(f"{args.run} is a run of {saved['task']}; give one of toy:serial")
        check_spaces(saved, spaces_of(make_vector_env(saved["task"], 1, args.seed)))
        agent = Dreamer.from_checkpoint(saved, "cpu")
        if args.thresholds and not hasattr(getattr(agent.world.core, "rule", None), "threshold"):
            raise UsageError(f"{args.run} has no exit rule with a threshold; leave out --thresholds")
    except UsageError as error:
        sys.exit(f"error: {error}")
    world, rows = agent.averaged.world, transitions(agent, saved["task"], args.seed)
    from world_model import LatentState

    start = LatentState(rows["deter"], rows["stoch"])

    @torch.no_grad()
    def predict(max_loops: int | None) -> tuple[np.ndarray, np.ndarray]:
        """-> error (M,) 0 or 1, loops (M,)"""
        state, stats = world.dream_step(start, rows["action"], world.core.prepare(), max_loops, sample=False)
        wrong = (world.decode(state)["state"][:, : rows["bits"]] > 0) != (rows["next"] > 0)
        return wrong.any(-1).float().numpy(), stats.depth.numpy()

    n = rows["n"].numpy()
    error, loops = predict(None)
    if args.csv:
        table = np.stack([n, loops, error], 1).astype(int)
        np.savetxt(args.csv, table, "%d", ",", header="n,loops,error", comments="")
    if args.picture:
        draw(args.picture, n, loops, error, predict(1)[0])
    print(f"{len(n)} transitions, error {error.mean():.3f}, mean loops {loops.mean():.2f}")
    print("n     " + " ".join(f"{k:6d}" for k in range(9)))
    print("error " + " ".join(f"{error[n == k].mean():6.3f}" for k in range(9)))
    print("loops " + " ".join(f"{loops[n == k].mean():6.2f}" for k in range(9)))
    print(f"rank correlation of loops and n, single predictions: {rank_correlation(loops, n):.3f}")
    means = np.array([loops[n == k].mean() for k in range(9)])
    print(f"rank correlation of loops and n, means of each n: {rank_correlation(means, np.arange(9)):.3f}")
    for cap in range(1, world.run_cap + 1):
        error, loops = predict(cap)
        print(f"at most {cap} loops: error {error.mean():.3f}, mean loops {loops.mean():.2f}")
    for threshold in args.thresholds:
        world.core.rule.threshold = threshold
        error, loops = predict(None)
        found = f"error {error.mean():.3f}, mean loops {loops.mean():.2f}, correlation {rank_correlation(loops, n):.3f}"
        print(f"threshold {threshold}: {found}")


if __name__ == "__main__":
    main()
