"""Do dreams answer to actions as the simulator does? For runs on dmc: tasks, from numbers or from pictures.

    python benchmarks/control.py RUN [RUN ..] --data balance.npz [--csv FILE]

The first RUN's agent plays (every second episode exploring) unless FILE.npz exists; all runs are then judged on the
same recording. What the simulator itself would observe, positions and velocities, is read from a run's latents by
ridge regression, so that dreams can be compared with the simulator in its own numbers. Printed for each run:

    read     R2 of that, over the numbers, on the fifth of the episodes that the regression has not seen
    reward   R2 of the reward that the model expects, over all rows, which it has not seen either
    error    of dreams under the recorded actions, in standard deviations of what is read (1: no better than the mean)
    answer   by how much a dream differs after K steps of full actions from one after K steps of the opposite ones,
             against the simulator from the same place: 1 as in the world, less where the dream believes that actions
             do less, which is what an actor learns from it
    reward_answer  the same of the sum of the K rewards
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import UsageError
from agent.learning.dreamer import Dreamer
from envs import TaskError, TaskId, prepare_rendering
from envs.dmc import ACTION_REPEAT, TASKS, DMControl
from world_model import LatentState

EPISODES, ROWS = 20, 200
SETTLED = 10  # rows after which an agent has seen enough of an episode for its latents to be read
FIRST, EVERY, AHEAD = 30, 20, 25  # rows from which dreams start, and how far they go
STEPS = (1, 3, 5, 10)
LEAST = 0.1
"""Standard deviations by which the answers of a number must differ to be asked for, or that share of the largest."""
SAMPLES = 16
SEED = 1_500_000_000


def observed(env: DMControl) -> np.ndarray:
    """(S,) what the task observes in numbers at this moment, whatever the agent is shown."""
    entries = env._env.task.get_observation(env._env.physics)
    return np.concatenate([np.ravel(value) for value in entries.values()])


def record(agent: Dreamer, task: TaskId) -> dict[str, np.ndarray]:
    """Episodes of the agent, and the simulator's answers to full actions from places in them."""
    look = {"pixels": "field", "fast_pixels": "fast"}.get(task.variant)
    env = DMControl(*TASKS[task.base], seed=SEED, pixels=look)
    rng = np.random.default_rng(SEED)
    rows: dict[str, list[np.ndarray]] = {}
    physics = []
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=SEED + episode)
        memory, reward = None, 0.0
        for row in range(ROWS):
            physics.append(env._env.physics.get_state())
            seen = {name: value[None] for name, value in obs.items()}
            action, memory, _ = agent.act(seen, memory, np.array([row == 0]), explore=episode % 2 == 0)
            told = {"numbers": observed(env), "action": action[0], "reward": np.float32(reward), **obs}
            for name, value in told.items():
                rows.setdefault(name, []).append(value)
            obs, reward, *_ = env.step(action[0])
    found = {name: np.stack(value).reshape(EPISODES, ROWS, *value[0].shape) for name, value in rows.items()}
    states = np.stack(physics).reshape(EPISODES, ROWS, -1)
    starts = [(e, row) for e in range(EPISODES) for row in range(FIRST, ROWS - AHEAD, EVERY)]
    sides = rng.choice([-1.0, 1.0], (len(starts), found["action"].shape[-1])).astype(np.float32)
    answers = np.zeros((2, len(starts), max(STEPS), found["numbers"].shape[-1]))
    rewards = np.zeros((2, len(starts), max(STEPS)))
    for i, place in enumerate(starts):
        for way, sign in enumerate((-1.0, 1.0)):
            env.reset(seed=SEED)
            with env._env.physics.reset_context():
                env._env.physics.set_state(states[place])
            for step in range(max(STEPS)):
                _, rewards[way, i, step], *_ = env.step(sign * sides[i])
                answers[way, i, step] = observed(env)
    env.close()
    name = np.array(task.base)
    answered = {"answers": answers, "reward_answers": rewards}
    return found | {"task": name, "starts": np.array(starts), "sides": sides, **answered}


class Reader:
    """Ridge regression from features (..., F) to the simulator's numbers (..., S).

    A large weight would shrink what is read, and with it the answers: with 3 held-out rows are read best.
    """

    def __init__(self, feat: Tensor, numbers: Tensor, weight: float = 3.0):
        x, y = feat.flatten(0, -2), numbers.flatten(0, -2)
        self.mean, self.spread = x.mean(0), x.std(0) + 0.1
        self.middle, self.scale = y.mean(0), y.std(0).clamp(min=1e-6)
        x, y = (x - self.mean) / self.spread, (y - self.middle) / self.scale
        self.map = torch.linalg.solve(x.t() @ x + weight * torch.eye(x.shape[1]), x.t() @ y)

    def __call__(self, feat: Tensor) -> Tensor:
        """In standard deviations from the mean."""
        out: Tensor = ((feat - self.mean) / self.spread) @ self.map
        return out

    def true(self, numbers: Tensor) -> Tensor:
        return (numbers - self.middle) / self.scale


@torch.no_grad()
def watch(agent: Dreamer, data: dict[str, np.ndarray]) -> LatentState:
    """(EPISODES, ROWS, ...) states of an agent that sees the recording."""
    if missing := [name for name in agent.spaces.obs if name not in data and name != "state"]:
        raise UsageError(f"the recording has no {missing[0]!r}: let a run that sees it record another --data")
    memory, states = None, []
    actions = torch.as_tensor(data["action"])
    recorded = {**data, "state": data["numbers"].astype(np.float32)}
    for row in range(ROWS):
        seen = {name: torch.as_tensor(recorded[name][:, row]) for name in agent.spaces.obs}
        _, memory, _ = agent.averaged.act(seen, memory, torch.full((EPISODES,), row == 0), False)
        memory = memory._replace(action=actions[:, row])
        states.append(memory.state)
    return LatentState(*(torch.stack(part, 1) for part in zip(*states, strict=True)))


def share(dreamt: Tensor, true: Tensor) -> float:
    """By which factor the true answers (starts, S) explain the dreamt ones (least squares), the mean over the numbers.

    Not of all together: what an action drives directly moves most, and is the least of what has to be known of it.
    Numbers that the actions have not moved yet are left out.
    """
    size = true.square().mean(0)
    moved = size > LEAST**2 * size.max().clamp(max=1.0)
    return float(((dreamt * true).mean(0)[moved] / size[moved]).mean())


@torch.no_grad()
def judge(agent: Dreamer, data: dict[str, np.ndarray]) -> dict[str, float]:
    """The numbers of one run: read, error_K and answer_K."""
    world, numbers = agent.averaged.world, torch.as_tensor(data["numbers"]).float()
    states = watch(agent, data)
    feat, known = states.feat()[:, SETTLED:], numbers[:, SETTLED:]
    held = torch.arange(EPISODES) % 5 == 4
    part = Reader(feat[~held], known[~held])
    wrong = (part(feat[held]) - part.true(known[held])).square().flatten(0, 1)
    varies = part.true(known[held]).flatten(0, 1).var(0, unbiased=False).clamp(min=1e-6)
    found = {"read": float((1.0 - wrong.mean(0) / varies).mean())}
    true = torch.as_tensor(data["reward"])[:, SETTLED:]
    expected = world.twohot.mean(world.reward(feat))
    found["reward"] = float(1.0 - (expected - true).square().mean() / true.var(unbiased=False).clamp(min=1e-6))

    read = Reader(feat, known)
    episode, row = torch.as_tensor(data["starts"]).unbind(1)
    start = states.map(lambda leaf: leaf[episode, row].repeat_interleave(SAMPLES, 0))
    actions = torch.as_tensor(data["action"])

    def dreamt(taken: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """(starts, H, A) actions -> (H, starts, S) the mean of the samples, as it is read, and the rewards'."""
        dream = world.imagine(start, taken.repeat_interleave(SAMPLES, 0), steps)
        seen = read(dream.feat[1:]).unflatten(1, (-1, SAMPLES)).mean(2)
        return seen, dream.rewards.t().unflatten(1, (-1, SAMPLES)).mean(2)

    own, _ = dreamt(torch.stack([actions[episode, row + k] for k in range(AHEAD)], 1), AHEAD)
    for steps in (*STEPS, AHEAD):
        missed = own[steps - 1] - read.true(numbers[episode, row + steps])
        found[f"error_{steps}"] = float(missed.square().mean().sqrt())
    sides = torch.as_tensor(data["sides"])[:, None].expand(-1, max(STEPS), -1)
    (one, one_reward), (other, other_reward) = dreamt(sides, max(STEPS)), dreamt(-sides, max(STEPS))
    truth = torch.as_tensor(data["answers"][1] - data["answers"][0]).float().transpose(0, 1) / read.scale
    paid = torch.as_tensor(data["reward_answers"][1] - data["reward_answers"][0]).float().t()
    for steps in STEPS[1:]:
        found[f"answer_{steps}"] = share((one - other)[steps - 1], truth[steps - 1])
        sums = ((one_reward - other_reward)[:steps].sum(0), paid[:steps].sum(0))
        found[f"reward_answer_{steps}"] = share(*(each[:, None] for each in sums))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders or checkpoints of one dmc: task")
    parser.add_argument("--data", type=Path, help="recording to use, or to make where there is none")
    parser.add_argument("--csv", type=Path, help="write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data: dict[str, np.ndarray] = {}
    table = []
    try:
        prepare_rendering(True)
        for run in args.runs:
            saved = read_checkpoint(find_checkpoint(run))
            task, agent = TaskId.parse(saved["task"]), Dreamer.from_checkpoint(saved, "cpu")
            if task.suite != "dmc" or task.variant == "nov" or task.action_repeat != ACTION_REPEAT:
                raise UsageError(
                    f"{run} is a run of {task}: a dmc: task is needed, with velocities or from pictures, "
                    f"and with {ACTION_REPEAT} steps per action"
                )
            if not data and args.data and args.data.exists():
                with np.load(args.data) as file:
                    data = dict(file)
                if "reward" not in data:
                    raise UsageError(f"{args.data} is of a version that recorded no rewards: give another --data")
            if not data:
                data = record(agent, task)
                if args.data:
                    np.savez(args.data, **data)
            if (recorded := str(data["task"])) != task.base:
                raise UsageError(f"the recording is of {recorded}, and {run} a run of {task}: give another --data")
            table.append({"run": run, **judge(agent, data)})
            print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v:30s}" for k, v in table[-1].items()))
    except (TaskError, UsageError) as error:
        sys.exit(f"error: {error}")
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
