"""Running statistics of vector observations: what they converge to, and what cannot spoil them."""

import numpy as np
import pytest
import torch
from conftest import metronomes, untrained

from world_model import ModelConfig, WorldModel
from world_model.distributions import symexp
from world_model.looped import LoopConfig
from world_model.observation import FARTHEST, Standardiser


def test_statistics_are_those_of_all_batches_at_first():
    torch.manual_seed(0)
    scale, shift = torch.tensor([0.05, 1.0, 30.0]), torch.tensor([5.0, 0.0, -1.0])
    batches = [torch.randn(16, 8, 3) * scale + shift for _ in range(50)]
    standardiser = Standardiser(3)
    for batch in batches:
        standardiser.track(batch)
    rows = torch.cat(batches).flatten(0, 1)
    assert torch.allclose(standardiser.mean, rows.mean(0), atol=1e-4)
    assert torch.allclose(standardiser.var, rows.var(0, correction=0), rtol=1e-3)
    z = standardiser(rows)
    assert torch.allclose(z.mean(0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(z.std(0), torch.ones(3), atol=1e-3)
    assert torch.allclose(standardiser.undo(z), rows, atol=1e-4)


def test_statistics_follow_what_comes_later():
    standardiser = Standardiser(1)
    for _ in range(1000):
        standardiser.track(torch.zeros(4, 1))
    for _ in range(3000):
        standardiser.track(torch.tensor([[1.0], [3.0]]))
    assert standardiser.mean.item() == pytest.approx(2.0, abs=0.02)
    assert standardiser.var.item() == pytest.approx(1.0, abs=0.02)


def test_a_batch_that_is_not_finite_leaves_them_as_they_are():
    standardiser = Standardiser(2)
    standardiser.track(torch.randn(8, 2))
    before = [buffer.clone() for buffer in standardiser.buffers()]
    standardiser.track(torch.tensor([[1.0, torch.nan], [2.0, 0.0]]))
    assert all(torch.equal(one, other) for one, other in zip(before, standardiser.buffers(), strict=True))


def test_an_entry_that_was_constant_may_move():
    standardiser = Standardiser(1)
    for _ in range(10):
        standardiser.track(torch.zeros(8, 1))
    assert standardiser(torch.tensor([5.0])).item() == FARTHEST


def test_small_entries_are_reconstructed_as_well_as_large_ones():
    """A position that varies by 0.05 beside a velocity that varies by 20."""
    torch.manual_seed(0)
    world = WorldModel(ModelConfig(LoopConfig(tokens=2, width=8, units=16), groups=6), {"state": 2}, 1)
    model = world.observation_model
    obs = {"state": torch.stack([0.05 * torch.randn(64, 4), 20.0 * torch.randn(64, 4)], -1)}
    model.track(obs)
    feat = torch.zeros(64, 4, world.feat_size)
    error = model.losses(feat, obs, torch.zeros(()))["reconstruction"]
    target = model.standardise(torch.sign(obs["state"]) * torch.log1p(obs["state"].abs()))
    assert target.std((0, 1)).tolist() == pytest.approx([1.0, 1.0], abs=0.05)
    assert error.shape == (64, 4)
    decoded = model.decode(feat)["state"]
    assert torch.allclose(decoded, symexp(model.predictions(feat)), atol=1e-5)


def test_the_averaged_copy_sees_the_same_statistics_and_a_checkpoint_keeps_them(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=160, prefill=100, eval_every=0)
    trainer.run()
    agent, other = trainer.agent, untrained(metronomes)
    mine = agent.world.observation_model.standardise
    assert mine.updates.item() == agent.updates
    assert agent.averaged.world.observation_model.standardise is mine
    other.load_state_dict(agent.state_dict())
    theirs = other.averaged.world.observation_model.standardise
    assert torch.equal(theirs.mean, mine.mean)
    assert torch.equal(theirs.var, mine.var)
    seen = trainer.replay.rows["obs/state"][0, : trainer.replay.count]
    assert mine.mean.numpy() == pytest.approx((np.sign(seen) * np.log1p(np.abs(seen))).mean(0), abs=0.1)
