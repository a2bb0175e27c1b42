"""The command that takes exploration back: independent noise, the entropy of an uncut normal, the old floor."""

import os
import subprocess
import sys

from agent.runtime import PROJECT

TAKEN_BACK = """
import torch
from agent.learning import actor_critic
from small_behavior import make
from benchmarks.without_exploration import PARTS, take_back

before = actor_critic.truncated_entropy
take_back("floor")
assert actor_critic.truncated_entropy is before
assert make().scale.update(torch.full((4, 5), 1e-3)) == 1.0
take_back(*PARTS)
from agent.learning.noise import begin_noise, next_noise, noise_of

torch.manual_seed(0)
first = begin_noise(torch.zeros(20_000, 1))
second = next_noise(first)
both = torch.stack([noise_of(first), noise_of(second)]).squeeze(-1)
assert abs(torch.corrcoef(both)[0, 1]) < 0.03 and abs(both.std() - 1) < 0.03
actor = make().actor
feat = torch.randn(7, 6)
mean, std = actor.parameters_of(feat)
entropy = torch.distributions.Normal(mean, std).entropy().sum(-1)
assert torch.allclose(actor.evaluate(feat, mean)[1], entropy)
assert make().scale.update(torch.full((4, 5), 1e-3)) == 1.0
"""


def test_without_exploration_noise_is_independent_the_entropy_uncut_and_small_advantages_stay_small():
    paths = os.pathsep.join((str(PROJECT), str(PROJECT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", TAKEN_BACK], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
