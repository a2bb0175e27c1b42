"""`train_agent.py` without what finds rare rewards, to measure what it is worth. Three parts are taken back.

    python benchmarks/without_exploration.py dmc:finger_spin --seed 10 --run-dir DIR
    python benchmarks/without_exploration.py --take-back noise dmc:finger_spin --seed 10 --run-dir DIR    # one of them

noise     the noise of actions is independent from step to step, in the random prefill too
entropy   the entropy bonus is that of a normal distribution that is not cut off at the bounds of actions
floor     advantages are divided by 1 at least
"""

import argparse
import runpy
import sys

import torch
from torch import Tensor

from agent.learning import actor_critic, noise
from agent.learning.gaussian import HALF_LOG_2PI
from agent.runtime import PROJECT


def normal_entropy(mean: Tensor, std: Tensor) -> Tensor:
    """Entropy of a normal distribution, elementwise."""
    return torch.log(std) + (0.5 + HALF_LOG_2PI)


PARTS = "noise", "entropy", "floor"


def take_back(*parts: str) -> None:
    """Change the modules of the agent, in this process."""
    if "noise" in parts:
        noise.TIME_SCALES = (0.0,)  # type: ignore[assignment]
        noise._DECAY = torch.zeros(1, 1)
    if "entropy" in parts:
        actor_critic.truncated_entropy = normal_entropy
    if "floor" in parts:
        actor_critic.AdvantageScale.__init__.__defaults__ = (1.0,)  # type: ignore[misc]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--take-back", action="append", choices=PARTS)
    args, sys.argv[1:] = parser.parse_known_args()
    take_back(*(args.take_back or PARTS))
    runpy.run_path(str(PROJECT / "train_agent.py"), run_name="__main__")
