"""benchmarks/control.py: what it holds against dreams is what the simulator does."""

import numpy as np
import pytest
import torch
from conftest import benchmark

from envs import TaskId
from envs.dmc import DMControl


@pytest.fixture
def control(monkeypatch):
    module = benchmark("control")
    monkeypatch.setattr(module, "EPISODES", 2)
    monkeypatch.setattr(module, "ROWS", 80)
    return module


class Swaying:
    """Acts like a pendulum, whatever it sees."""

    def act(self, obs, memory, first, explore):
        memory = 0 if first[0] else memory + 1
        return np.full((1, 1), np.sin(memory / 3.0), np.float32), memory, None


def test_answers_are_those_of_the_simulator_from_the_recorded_places(control):
    data = control.record(Swaying(), TaskId.parse("dmc:cartpole_balance"))
    assert data["numbers"].shape == (2, 80, 5)
    assert np.allclose(data["numbers"], data["state"], atol=1e-6)
    assert len(data["starts"]) == 2 * 2
    episode, row = data["starts"][1]
    env = DMControl("cartpole", "balance")
    env.reset(seed=control.SEED + int(episode))
    for t in range(row):
        assert env.step(data["action"][episode, t])[1] == pytest.approx(data["reward"][episode, t + 1])
    for step in range(3):
        obs, reward, *_ = env.step(data["sides"][1])
        assert reward == pytest.approx(data["reward_answers"][1, 1, step], abs=1e-4)
    env.close()
    # The velocities' warm start of the solver is not part of a state, so not to the last bit.
    assert np.allclose(data["answers"][1, 1, 2], obs["state"], atol=1e-4)
    other = np.abs(data["answers"][0, 1, 2] - obs["state"])
    assert other.max() > 0.5  # full actions the other way lead elsewhere


def test_every_number_that_moves_counts_alike(control):
    true = torch.tensor([[10.0, 1.0, 0.01], [-10.0, -1.0, 0.01]])
    dreamt = true * torch.tensor([1.0, 0.2, -7.0])
    assert control.share(dreamt, true) == pytest.approx(0.6)  # and the last has not moved


def test_numbers_are_read_from_features_that_hold_them(control):
    gen = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 200, 3, generator=gen) * torch.tensor([1.0, 5.0, 0.2])
    feat = numbers @ torch.randn(3, 8, generator=gen) + 2.0
    read = control.Reader(feat, numbers, weight=1e-3)
    assert torch.allclose(read(feat), read.true(numbers), atol=1e-2)
    assert read.true(numbers).flatten(0, 1).std(0).tolist() == pytest.approx([1.0] * 3, abs=1e-3)
