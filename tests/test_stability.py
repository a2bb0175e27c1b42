"""The running checks of stability say what they claim to."""

import dataclasses

import numpy as np
import pytest
import torch
from small import gradients, make_batch, make_world, world_loss

from world_model import WorldModel, stability


def test_norm_residual_and_cosine_of_each_loop():
    world = make_world(mean_loops=2.0, depth="update")
    batch = make_batch(world, size=2, length=5)
    torch.manual_seed(0)
    found = stability(world, batch, 3, horizon=4)
    torch.manual_seed(0)
    with torch.no_grad():
        states = world.observe_sequence(batch, 3).trace.states.flatten(3)
    for loop in (1, 2, 3):
        change = states[loop] - states[loop - 1]
        assert found[f"stability/norm_{loop}"] == pytest.approx(float(states[loop].norm(dim=-1).mean()))
        relative = change.norm(dim=-1) / states[loop].norm(dim=-1)
        assert found[f"stability/residual_{loop}"] == pytest.approx(float(relative.mean()))
    before = states[2] - states[1]
    cosine = torch.nn.functional.cosine_similarity(states[3] - states[2], before, dim=-1).mean()
    assert found["stability/cosine_3"] == pytest.approx(float(cosine), abs=1e-5)
    assert "stability/cosine_1" not in found
    assert found["stability/decay_max"] == world.core.prepare().decay.max()
    assert {name for name in found if "dream" in name} == {"stability/dream_norm_1", "stability/dream_norm_4"}


def test_the_direction_in_which_embeddings_vary_least_needs_enough_rows():
    world = make_world()
    few, many = make_batch(world, size=2, length=6), make_batch(world, size=20, length=6)
    assert "stability/embedding_least_std" not in stability(world, few, 1, horizon=4)
    embed = world.observation_model(many.obs).flatten(0, 1).detach().double()
    least = np.linalg.svd(embed - embed.mean(0), compute_uv=False)[-1] / np.sqrt(len(embed) - 1)
    found = stability(world, many, 1, horizon=4)["stability/embedding_least_std"]
    assert found == pytest.approx(least, rel=1e-3, abs=1e-5)


def test_gradient_over_time_sees_memory_and_its_absence():
    world = make_world()
    batch = make_batch(world, size=2, length=6)
    memoryless = dataclasses.replace(world.cfg, core="experiments.memoryless:MemorylessCore")
    kept = stability(world, batch, 2)
    cut = stability(WorldModel(memoryless, world.obs_sizes, world.action_size), batch, 2)
    for lag in (1, 2, 4):
        assert kept[f"stability/time_gradient_{lag}"] > 1e-4
        assert cut[f"stability/time_gradient_{lag}"] == 0.0
    assert "stability/time_gradient_8" not in kept


def test_looking_leaves_no_gradient_behind():
    world = make_world()
    batch = make_batch(world)
    stability(world, batch)
    assert all(parameter.grad is None for parameter in world.parameters())
    assert any(grad is not None for grad in gradients(world, world_loss(world, batch)[0]).values())
