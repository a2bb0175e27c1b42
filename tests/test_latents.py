"""The kinds of the stochastic part of a state, against closed forms and known distributions."""

import pytest
import torch
from small import make_batch
from torch.distributions import Normal, kl_divergence

from agent.data.replay import ReplayBuffer
from world_model import LatentState, LoopConfig, ModelConfig, WorldModel
from world_model.latents import KINDS, LARGEST_STD, SMALLEST_STD, Categorical, Gaussian, Simplicial

SHAPE = (5, 3, 4)  # M, S, K


def outputs_of(kind, seed=0, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, kind.size, generator=gen, dtype=torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_shapes_of_every_kind(name):
    kind = KINDS[name](3, 4)
    distribution = kind.distribution(outputs_of(kind))
    compared = kind.kl_form(distribution)
    assert distribution.shape[:2] == (5, 3)
    assert kind.kl(compared, compared).shape == kind.entropy(compared).shape == (5,)
    assert float(kind.kl(compared, compared).abs().max()) < 1e-5
    other = kind.kl_form(kind.distribution(outputs_of(kind, 1)))
    assert (kind.kl(compared, other) > 0).all()
    for level in (kind.level((5,), distribution), None):
        assert kind.draw(distribution, level).shape == SHAPE


def test_gaussian_divergence_and_entropy_are_those_of_torch():
    kind = Gaussian(3, 4)
    p, q = (kind.distribution(outputs_of(kind, seed, 3.0)) for seed in (0, 1))
    normals = [Normal(x[..., :4], x[..., 4:].exp()) for x in (p, q)]
    assert torch.allclose(kind.kl(p, q), kl_divergence(*normals).sum((-2, -1)), rtol=1e-4)
    assert torch.allclose(kind.entropy(p), normals[0].entropy().sum((-2, -1)), rtol=1e-5)


def test_gaussian_samples_have_their_mean_and_deviation():
    kind = Gaussian(1, 2)
    distribution = torch.tensor([1.0, -2.0, 0.5, 2.0]).view(1, 1, 4)
    distribution = torch.cat([distribution[..., :2], distribution[..., 2:].log()], -1).expand(40_000, 1, 4)
    drawn = kind.draw(distribution, kind.level((40_000,), distribution))
    assert torch.allclose(drawn.mean(0), torch.tensor([[1.0, -2.0]]), atol=0.05)
    assert torch.allclose(drawn.std(0), torch.tensor([[0.5, 2.0]]), rtol=0.03)
    assert torch.equal(kind.draw(distribution, None)[0], torch.tensor([[1.0, -2.0]]))
    extreme = kind.draw(distribution[:2], torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, 2))
    assert extreme.isfinite().all()


def test_gaussian_deviations_keep_to_their_bounds_and_start_at_one():
    kind = Gaussian(1, 1)
    std = kind.distribution(torch.tensor([[0.0, -1e4], [0.0, 0.0], [0.0, 1e4]]))[..., 1].exp().flatten()
    assert std.tolist() == pytest.approx([SMALLEST_STD, 1.0, LARGEST_STD], rel=1e-4)


def test_gradients_pass_through_gaussian_samples():
    kind = Gaussian(3, 4)
    outputs = outputs_of(kind).requires_grad_()
    drawn = kind.draw(kind.distribution(outputs), torch.full((5, 3, 4), 0.9))
    (gradient,) = torch.autograd.grad(drawn.sum(), outputs)
    assert (gradient != 0).all()


def test_simplicial_latents_are_what_a_class_would_be_drawn_from():
    one, other = Simplicial(3, 4), Categorical(3, 4)
    outputs = outputs_of(one, scale=2.0)
    probs = one.distribution(outputs)
    assert torch.equal(one.draw(probs, torch.rand(5, 3, 1)), probs)
    assert torch.equal(one.draw(probs, None), probs)
    assert torch.allclose(probs.sum(-1), torch.ones(5, 3))
    assert torch.equal(probs, other.distribution(outputs))


@pytest.mark.parametrize("name", KINDS)
def test_a_world_model_learns_with_every_kind(name):
    torch.manual_seed(0)
    loop = LoopConfig(tokens=1, width=8, units=16, mean_loops=2.0)
    cfg = ModelConfig(loop, latents=name, groups=3, classes=4, units=16)
    world = WorldModel(cfg, {"joints": 3, "touch": 2}, 2)
    batch, losses = make_batch(world, 8, 6), []
    adam = torch.optim.Adam(world.parameters(), 3e-3)
    for _ in range(100):
        post = world.observe_sequence(batch, 2)
        loss, metrics = world.loss(post, batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert post.states.stoch.shape == (8, 6, 3, 4)
    assert torch.isfinite(metrics["world/posterior_entropy"])
    dream = world.imagine(post.states.map(lambda leaf: leaf[:, -1]).detach(), torch.zeros(8, 20, 2), 20)
    assert dream.feat.isfinite().all()
    assert dream.states.stoch.shape == (8, 21, 3, 4)


@pytest.mark.parametrize("name", KINDS)
def test_the_replay_gives_latents_back(name):
    onehot = name == "categorical"
    replay = ReplayBuffer(40, 2, {"row": 1}, 1, (1, 2), (3, 4), onehot=onehot)
    row = {"obs/row": np_zeros(2, 1), "prev_action": np_zeros(2, 1), "reward": np_zeros(2)}
    row |= {flag: np_zeros(2).astype(bool) for flag in ("is_first", "is_last", "is_terminal")}
    kind = KINDS[name](3, 4)
    written = []
    for number in range(6):
        distribution = kind.distribution(torch.randn(2, kind.size))
        stoch = kind.draw(distribution, kind.level((2,), distribution))
        state = LatentState(torch.full((2, 1, 2), float(number)), stoch)
        replay.add(row, state)
        written.append(state.stoch)
    batch, where = replay.sample(16, 2)
    for sequence, (env, first) in enumerate(zip(where[0, :, 0], where[1, :, 0], strict=True)):
        assert torch.allclose(batch.start.stoch[sequence], written[first - 1][env], atol=1e-2)
    fresh = LatentState(torch.zeros(16, 2, 1, 2), written[0][0].expand(16, 2, 3, 4))
    replay.write_back(where, fresh, torch.zeros(16, 2))
    again, _ = replay.sample(400, 1)
    assert torch.isclose(again.start.stoch, written[0][0], atol=1e-2).all((1, 2)).any()


def np_zeros(*shape):
    return torch.zeros(shape).numpy()


def test_the_exit_rule_that_compares_probabilities_is_refused_without_any():
    with pytest.raises(ValueError, match="exit rule kl"):
        ModelConfig(LoopConfig(exit="kl"), latents="gaussian")
