"""Objectives without a decoder: known values, no collapse, and whole runs."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import integrate
from small import make_batch, world_loss
from small_ranks import together

from world_model import LoopConfig, ModelConfig, WorldModel, objectives
from world_model.objectives import (
    EMBEDDING,
    effective_rank,
    random_directions,
    redundancy_loss,
    sigreg,
)

PREDICTIVE = ["redundancy", "sigreg"]


def make_world(objective, seed=0):
    torch.manual_seed(seed)
    loop = LoopConfig(tokens=2, width=8, units=16, mean_loops=2.0, depth="fixed")
    cfg = ModelConfig(loop, groups=3, classes=4, units=16, objective=objective)
    return WorldModel(cfg, {"joints": 3, "touch": 2}, 2)


# ---------------------------------------------------------------------- the statistic


def by_quadrature(samples):
    """The integral over t of |phi(t) - exp(-t^2/2)|^2 exp(-t^2/2) from -3 to 3, of samples along one direction."""

    def integrand(t):
        phi = np.exp(1j * t * samples).mean()
        return abs(phi - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2)

    return integrate.quad(integrand, -3.0, 3.0, limit=200)[0]


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.standard_normal(400),
        lambda rng: 0.5 * rng.standard_normal(400),
        lambda rng: 2.0 * rng.standard_normal(400) + 1.0,
        lambda rng: rng.uniform(-1, 1, 400),
        lambda rng: np.sign(rng.standard_normal(400)),
    ],
)
def test_the_penalty_is_the_integral_that_it_approximates(draw):
    samples = draw(np.random.default_rng(0))
    found = sigreg(torch.tensor(samples, dtype=torch.float32)[:, None], torch.ones(1, 1))
    assert float(found) == pytest.approx(by_quadrature(samples), rel=0.02, abs=1e-4)


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, 1.05 / 1024), (0.5, 158 / 1024), (2.0, 238 / 1024), (0.0, 0.402)]
)
def test_the_penalty_of_known_distributions(scale, expected):
    torch.manual_seed(0)
    values = [
        float(sigreg(scale * torch.randn(1024, 16), random_directions(16, 64, torch.zeros(1)))) for _ in range(5)
    ]
    assert np.mean(values) == pytest.approx(expected, rel=0.15)


def test_leading_dimensions_have_a_statistic_each():
    torch.manual_seed(0)
    z, directions = torch.randn(5, 64, 4), random_directions(4, 8, torch.zeros(1))
    z *= torch.arange(1.0, 6.0)[:, None, None]
    each = [float(sigreg(part, directions)) for part in z]
    assert float(sigreg(z, directions)) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("keep", [0.0, 0.9, 0.999])
def test_embeddings_that_change_slowly_are_not_punished(keep):
    """Normal numbers at every time, whatever they have to do with those before."""
    torch.manual_seed(0)
    objective, z = objectives.SIGReg(5, 5, EMBEDDING), [torch.randn(16, EMBEDDING)]
    objective.projector = torch.nn.Identity()
    for _ in range(15):
        z.append(keep * z[-1] + math.sqrt(1.0 - keep**2) * torch.randn(16, EMBEDDING))
    found = objective.losses(torch.zeros(16, 16, 5), torch.stack(z, 1))["sigreg"].mean()
    assert float(found) == pytest.approx(objectives.SIGREG_SCALE * 1.05 / 16, rel=0.3)


def test_it_is_least_for_a_normal_and_pulls_samples_there():
    """Samples on a line, and too wide, become isotropic with unit variance."""
    torch.manual_seed(0)
    z = (2.0 * torch.randn(256, 1) * torch.ones(1, 3) + 0.3 * torch.randn(256, 3)).requires_grad_()
    assert float(effective_rank(z)) < 1.3
    adam = torch.optim.Adam([z], 0.1)
    for _ in range(800):
        adam.zero_grad()
        sigreg(z, random_directions(3, 32, z)).backward()
        adam.step()
    assert float(effective_rank(z)) > 2.4
    assert z.std(0).detach().numpy() == pytest.approx(np.ones(3), abs=0.5)


def test_directions_have_length_one_and_are_new_each_time():
    one, other = (random_directions(5, 7, torch.zeros(1)) for _ in range(2))
    assert torch.allclose(one.norm(dim=0), torch.ones(7))
    assert not torch.allclose(one, other)


def test_the_effective_rank_of_known_matrices():
    torch.manual_seed(0)
    assert float(effective_rank(torch.randn(20_000, 8))) == pytest.approx(8.0, rel=0.01)
    assert float(effective_rank(torch.randn(100, 1) @ torch.randn(1, 8))) == pytest.approx(1.0, abs=1e-3)
    assert float(effective_rank(torch.ones(100, 8))) == 0.0
    half = torch.randn(20_000, 8)
    half[:, 4:] = 0.0
    assert float(effective_rank(half)) == pytest.approx(4.0, rel=0.01)


def test_redundancy_is_zero_for_what_is_right_and_independent():
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(redundancy_loss(3.0 * x + 2.0, x, 1.0)[0]) == pytest.approx(0.0, abs=1e-4)
    assert float(redundancy_loss(-x, x, 1.0)[0]) == pytest.approx(8.0, rel=1e-2)  # both wrong: 2 * (1 + 1)^2
    same = x[:, :1].expand(4, 2)  # both numbers say the same: C = 1 everywhere
    assert float(redundancy_loss(same, same, 0.5)[0]) == pytest.approx(0.5 * 2, rel=1e-2)


# ---------------------------------------------------------------------- in a world model


def learned(world, updates=150):
    """Train on one batch; returns the losses of the first and the last update."""
    batch, history = make_batch(world, 8, 6), []
    adam = torch.optim.Adam(world.parameters(), 3e-3)
    for _ in range(updates):
        loss, _, metrics = world_loss(world, batch, 2)
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append({name: float(value) for name, value in metrics.items()})
    embed = world.observation_model.watched(world.observation_model(batch.obs)).flatten(0, 1).detach()
    return history[0], history[-1], embed


@pytest.mark.parametrize("objective", PREDICTIVE)
def test_embeddings_are_learned_to_be_predicted(objective):
    world = make_world(objective)
    assert not world.observation_model.decodes
    assert world.decode(world.initial(2)) == {}
    first, last, _ = learned(world)
    name = {"redundancy": "world/redundancy_loss", "sigreg": "world/embedding_loss"}[objective]
    assert last[name] < 0.8 * first[name]
    assert "world/reconstruction_loss" not in last


def test_the_penalty_keeps_embeddings_from_collapse(monkeypatch):
    """The same predictions without it: all embeddings become one."""
    _, _, kept = learned(make_world("sigreg"))
    monkeypatch.setattr(objectives, "SIGREG_SCALE", 0.0)
    _, last, collapsed = learned(make_world("sigreg"))
    assert float(kept.std(0).mean()) > 0.5
    assert float(collapsed.std(0).mean()) < 0.1
    assert kept.shape[1] == EMBEDDING
    assert last["world/embedding_loss"] < 1.0  # and its predictions are perfect


def test_the_next_embedding_is_predicted_without_the_latents_of_its_observation():
    torch.manual_seed(0)
    objective, feat = objectives.SIGReg(8, 5, 6), torch.randn(3, 4, 8)
    monkey = torch.zeros(3, 4, EMBEDDING)
    objective.stored = torch.nn.Identity()
    objective.stored.forward = lambda _: monkey
    feat.requires_grad_()
    (gradient,) = torch.autograd.grad(objective.losses(feat, torch.randn(3, 4, 6))["embedding"].sum(), feat)
    assert gradient[..., :5].abs().min() > 0
    assert not gradient[..., 5:].any()


def test_redundancy_does_not_move_what_is_predicted():
    torch.manual_seed(0)
    embed = torch.randn(3, 4, 6, requires_grad=True)
    loss = objectives.Redundancy(8, 5, 6).losses(torch.randn(3, 4, 8), embed)["redundancy"].sum()
    assert loss.requires_grad
    assert torch.autograd.grad(loss, embed, allow_unused=True) == (None,)


def test_directions_are_those_of_all_ranks():
    def directions(ranks):
        gen = torch.Generator().manual_seed(ranks.rank)
        drawn = torch.randn(5, 7, generator=gen)
        return random_directions(5, 7, torch.zeros(1), lambda _: ranks.average(drawn))

    one, other = together(2, directions)
    assert torch.equal(one, other)
    assert torch.allclose(one.norm(dim=0), torch.ones(7))


def test_gradients_of_the_embedding_reach_both_sides():
    world = make_world("sigreg")
    batch = make_batch(world)
    post = world.observe_sequence(batch, 2)
    error = world.losses(post, batch)["embedding"].mean()
    encoder, projector = world.observation_model.encoder, world.observation_model.objective.projector
    weights = [projector.weight, *encoder.parameters(), *world.core.parameters()]
    grads = torch.autograd.grad(error, weights, allow_unused=True)
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in grads[:3])
    assert any(grad is not None and float(grad.abs().max()) > 0 for grad in grads[3:])


def test_collapse_is_watched_and_nothing_is_shown(script, tmp_path):
    run, words = tmp_path / "run", ("--preset", "debug", "--no-video", "--model.objective", "sigreg")
    done = script("train_agent.py", "toy:cue5", *words, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ranks = [line["stability/embedding_rank"] for line in lines if "stability/embedding_rank" in line]
    assert ranks
    assert all(0.0 < rank <= 1.0 for rank in ranks)
    for command in ("model", "stability", "loops"):
        refused = script("evaluate.py", command, run)
        assert refused.returncode == 2
        assert "trained without a decoder" in refused.stderr


def test_what_an_objective_may_be(script):
    refused = script("train_agent.py", "toy:cue5", "--model.objective", "sigregg")
    assert refused.returncode == 2
    assert "sigreg" in refused.stderr
