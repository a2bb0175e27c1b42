"""The losses of the world model: who learns from what."""

import dataclasses

import pytest
import torch
from small import ACTIONS, SIZES, gradients, make_batch, make_world, observe, world_loss
from torch import distributions

from world_model import LoopConfig, ModelConfig, WorldModel
from world_model.latent import kl_divergence


def is_gate(name: str) -> bool:
    return ".rule." in name


def test_the_exit_regression_moves_only_the_gate():
    world = make_world(mean_loops=3.0)
    post = observe(world, make_batch(world))
    loss, _ = world.exit_loss(post)
    for name, grad in gradients(world, loss).items():
        moved = grad is not None and bool(grad.any())
        assert moved == is_gate(name), name


def test_only_the_exit_regression_moves_the_gate(fixed_levels):
    with_gate, without = make_world(mean_loops=3.0), make_world(mean_loops=3.0, exit="fixed")
    without.load_state_dict(with_gate.state_dict(), strict=False)
    batch = make_batch(with_gate)
    total, post, _ = world_loss(with_gate, batch)
    alone, _ = with_gate.exit_loss(post)
    expected = gradients(without, world_loss(without, batch)[0])
    regression = gradients(with_gate, alone)
    for name, grad in gradients(with_gate, total).items():
        if is_gate(name):
            assert torch.allclose(grad, regression[name])
            assert name not in expected
        else:
            assert torch.allclose(grad, expected[name], atol=1e-6), name


def test_the_exit_gate_learns_by_how_much_another_loop_lowers_the_kl(fixed_levels, monkeypatch):
    world = make_world(mean_loops=4.0)
    batch = make_batch(world, length=1)
    post = world.observe_sequence(batch, 4)
    with torch.no_grad():  # posterior and prior of a state that stops after 1, 2, 3 and 4 loops
        runs = [world.observe_sequence(batch, loops) for loops in (1, 2, 3, 4)]
        kls = torch.stack([kl_divergence(run.post_dist, run.prior_dist) for run in runs])
        last = torch.stack([kl_divergence(post.post_dist, run.prior_dist) for run in runs])
    gain = kls[:-1] - kls[1:]
    assert gain.abs().max() > 1e-2
    assert (gain - (last[:-1] - last[1:])).abs().max() > 1e-2  # not those with the posterior of the last loop
    asked = []

    def improvement(x, change):
        asked.append((x, change))
        return torch.ones(len(x))

    monkeypatch.setattr(world.core.rule, "improvement", improvement)
    loss, metrics = world.exit_loss(post)
    assert torch.allclose(loss, (1.0 - gain).square().mean(), rtol=1e-4)
    assert set(metrics) == {"loop/exit_loss", "loop/gain_second"}
    assert metrics["loop/exit_loss"] == loss
    assert torch.allclose(metrics["loop/gain_second"], gain[0].mean(), rtol=1e-4)
    states = post.trace.states[:, :, 0]  # x_0 .. x_4
    assert torch.equal(asked[0][0], states[1:4].flatten(0, 1))
    assert torch.equal(asked[0][1], states[1:4].sub(states[:3]).flatten(0, 1))


@pytest.mark.parametrize(("loss", "side"), [("dynamics", "prior."), ("representation", "post_")])
def test_each_kl_loss_trains_its_own_head(loss, side, monkeypatch):
    monkeypatch.setattr("world_model.model.FREE_NATS", 0.0)
    world = make_world()
    batch = make_batch(world, length=1)
    grads = gradients(world, world.losses(observe(world, batch), batch)[loss].mean())
    for name, grad in grads.items():
        if name.startswith(("prior.", "post_")):
            assert (grad is not None and bool(grad.abs().max() > 1e-6)) == name.startswith(side), name


@pytest.mark.parametrize("latents", ["categorical", "gaussian"])
def test_the_dynamics_loss_is_the_divergence_of_its_latents(latents, monkeypatch):
    monkeypatch.setattr("world_model.model.FREE_NATS", 0.0)
    torch.manual_seed(0)
    cfg = ModelConfig(LoopConfig(2, 8, units=16), latents=latents, groups=3, classes=4, units=16)
    world = WorldModel(cfg, SIZES, ACTIONS)
    batch = make_batch(world)
    post = observe(world, batch)
    kinds = {
        "categorical": lambda x: distributions.Categorical(logits=x),
        "gaussian": lambda x: distributions.Normal(x[..., :4], x[..., 4:].exp()),
    }
    two = (kinds[latents](x) for x in (post.post_dist, post.prior_dist))
    known = distributions.kl_divergence(*two).flatten(2).sum(-1)
    torch.testing.assert_close(world.losses(post, batch)["dynamics"], known, rtol=1e-3, atol=1e-4)


def test_the_reward_weighs_what_it_is_told_to():
    world, batch = make_world(), make_batch(make_world())
    torch.manual_seed(0)
    once = world_loss(world, batch, 1)[2]
    world.cfg = dataclasses.replace(world.cfg, reward_scale=30.0)
    torch.manual_seed(0)
    often = world_loss(world, batch, 1)[2]
    assert float(often["world/reward_loss"]) == pytest.approx(30.0 * float(once["world/reward_loss"]), rel=1e-5)
    assert float(often["world/continue_loss"]) == pytest.approx(float(once["world/continue_loss"]), rel=1e-5)


def test_loss_is_finite_at_every_depth_and_with_ends_of_episodes():
    world = make_world(depth="update")
    batch = make_batch(world)
    batch.is_last[0, 2] = batch.is_terminal[0, 2] = batch.is_first[0, 3] = True
    for loops in (1, 2, 4, None):
        loss, post, metrics = world_loss(world, batch, loops)
        assert loss.isfinite()
        assert all(value.isfinite().all() and not value.requires_grad for value in metrics.values())
        assert all(grad is None or grad.isfinite().all() for grad in gradients(world, loss).values())


def test_continue_head_learns_terminals_and_not_time_limits():
    world = make_world()
    batch = make_batch(world)
    batch.is_last[:, 1] = True
    with torch.no_grad():
        world.cont.out.weight.zero_()
        world.cont.out.bias.fill_(50.0)  # certain to go on
    truncated = world_loss(world, batch)[2]["world/continue_loss"]
    batch.is_terminal[0, 1] = True
    terminal = world_loss(world, batch)[2]["world/continue_loss"]
    assert float(truncated) == pytest.approx(0.0, abs=1e-6)
    assert float(terminal) == pytest.approx(50.0 / 18, rel=1e-4)


def test_overfitting_one_batch_lowers_the_loss():
    world = make_world()
    with torch.no_grad():
        world.reward.out.weight.zero_()
    batch = make_batch(world, size=4, length=5)
    adam = torch.optim.Adam(world.parameters(), lr=1e-2)
    history = []
    for _ in range(60):
        loss, _, metrics = world_loss(world, batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append({"total": loss.item(), "recon": metrics["world/reconstruction_loss"].item()})
    late = {key: sum(row[key] for row in history[-5:]) / 5 for key in history[0]}
    assert late["total"] < 0.7 * history[0]["total"]
    assert late["recon"] < 0.6 * history[0]["recon"]


def test_reconstruction_counts_as_often_as_its_weight_says(monkeypatch):
    losses = []
    for scale in (1.0, 3.0):
        world = make_world()
        monkeypatch.setattr("world_model.observation.REC_SCALE", scale)
        torch.manual_seed(3)
        losses.append(world_loss(world, make_batch(world))[2]["world/reconstruction_loss"])
    assert losses[1] == pytest.approx(3.0 * float(losses[0]))
