"""Exploration noise: its distribution, what a policy does with it, and what a checkpoint keeps of it."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import untrained

from agent.learning.noise import TIME_SCALES, begin_noise, next_noise, noise_of
from agent.learning.policy import Memory
from envs import make_vector_env


def noise_along(steps, envs=4000):
    """(T, E) noise of the first of two actions."""
    torch.manual_seed(0)
    processes, values = begin_noise(torch.zeros(envs, 2)), []
    for _ in range(steps):
        values.append(noise_of(processes)[:, 0])
        processes = next_noise(processes)
    return torch.stack(values)


def test_noise_is_standard_normal_at_every_step_and_as_correlated_as_its_time_scales_say():
    values = noise_along(20)
    assert values.mean(1).abs().max() < 0.06
    assert (values.std(1) - 1.0).abs().max() < 0.06
    for lag in (1, 4, 16):
        expected = np.mean([np.exp(-lag / scale) for scale in TIME_SCALES])
        correlation = (values[0] * values[lag]).mean()
        assert correlation == pytest.approx(expected, abs=0.06)


def test_environments_and_actions_have_noise_of_their_own():
    torch.manual_seed(0)
    noise = noise_of(next_noise(begin_noise(torch.zeros(3, 4000))))  # (E, A)
    assert torch.corrcoef(noise).fill_diagonal_(0.0).abs().max() < 0.06


def acted(trainer, steps=40, explore=True):
    """(T, E, A) policy outputs on the trainer's first row, shown again and again."""
    agent = trainer.agent
    obs = {name: np.zeros((3, size), np.float32) for name, size in agent.spaces.obs.items()}
    memory, actions = None, []
    for step in range(steps):
        _, memory, _ = agent.act(obs, memory, np.full(3, step == 0), explore)
        actions.append(memory.action)
    return torch.stack(actions), memory


def test_a_policy_explores_with_it_and_is_evaluated_without(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    sampled, memory = acted(trainer, 400)
    assert memory.noise.shape == (3, len(TIME_SCALES), sampled.shape[-1])
    lagged = (sampled[1:] * sampled[:-1]).mean() / sampled.square().mean()
    assert lagged > 0.5  # of independent actions: 0
    calm, memory = acted(trainer, explore=False)
    assert memory.noise is None
    assert calm.abs().max() < 0.2


def test_random_actions_are_uniform_and_the_memory_knows_them(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    agent, (_, memory) = trainer.agent, acted(trainer, 1)
    memory = memory._replace(noise=begin_noise(torch.zeros(4000, 1)))
    action, memory = agent.act_randomly(memory)
    assert np.array_equal(action, memory.action.numpy())
    assert np.histogram(action, 4, (-1.0, 1.0))[0] == pytest.approx([1000] * 4, abs=150)


def test_random_choices_are_uniform():
    agent = untrained(partial(make_vector_env, "toy:cue5", seed=0))
    count = agent.spaces.action.size
    action, memory = agent.act_randomly(Memory(None, torch.zeros(2000 * count, count)))
    assert agent.spaces.action.discrete
    assert np.bincount(action) == pytest.approx([2000] * count, abs=200)
    assert np.array_equal(action, memory.action.argmax(-1).numpy())


def test_a_resumed_run_goes_on_with_its_noise(make_trainer, tmp_path):
    one = make_trainer(tmp_path / "one", steps=60, prefill=40)
    one.run()
    other = make_trainer(tmp_path / "other", steps=60, prefill=40)
    saved = {"step": one.step, "agent": one.agent.state_dict(), "replay": one.replay.state_dict()}
    other.load_state_dict(saved | {"trainer": one.state_dict()})
    assert torch.equal(other.memory.noise, one.memory.noise)
