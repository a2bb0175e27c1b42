"""Lambda-returns, the weights of imagined states, and the range of returns, against recursions by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_behavior import losses
from torch import Tensor

from agent.learning.actor_critic import (
    ADVANTAGE_FLOOR,
    ActorCritic,
    AdvantageScale,
    BehaviorConfig,
    lambda_return,
    rollout_weights,
)
from agent.spaces import ActionSpec
from world_model import LatentState, LoopStats, Rollout

GAMMA, LAM = 0.9, 0.8
unit = st.floats(0.0, 1.0)


def hand_returns(r: Tensor, c: Tensor, v: Tensor, gamma: float, lam: float) -> Tensor:
    out = torch.zeros_like(r)
    for b in range(r.shape[0]):
        last = float(v[b, -1])
        for k in reversed(range(r.shape[1])):
            last = float(r[b, k]) + gamma * float(c[b, k]) * ((1 - lam) * float(v[b, k + 1]) + lam * last)
            out[b, k] = last
    return out


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 12), unit, unit)
def test_lambda_return_is_the_recursion(seed, horizon, gamma, lam):
    gen = torch.Generator().manual_seed(seed)
    r, v = (torch.randn(3, n, generator=gen, dtype=torch.float64) for n in (horizon, horizon + 1))
    c = torch.rand(3, horizon, generator=gen, dtype=torch.float64)
    assert torch.allclose(lambda_return(r, c, v, gamma, lam), hand_returns(r, c, v, gamma, lam))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_constant_reward_has_the_geometric_series(lam):
    # With values at the fixed point r / (1 - gamma), every lambda-return is that value.
    r, c = torch.full((2, 7), 3.0), torch.ones(2, 7)
    v = torch.full((2, 8), 3.0 / (1 - GAMMA))
    assert torch.allclose(lambda_return(r, c, v, GAMMA, lam), v[:, :-1])
    # With values zero and lam 1 it is the finite sum.
    expected = 3.0 * (1 - GAMMA ** torch.arange(7.0, 0.0, -1.0)) / (1 - GAMMA)
    assert torch.allclose(lambda_return(r, c, torch.zeros(2, 8), GAMMA, 1.0)[0], expected)


def test_edges_of_gamma_and_lambda():
    r, v, c = torch.randn(3, 6), torch.randn(3, 7), torch.rand(3, 6)
    assert torch.equal(lambda_return(r, c, v, 0.0, 0.7), r)
    assert torch.allclose(lambda_return(r, c, v, GAMMA, 0.0), r + GAMMA * c * v[:, 1:])  # one step
    other = torch.cat([torch.randn(3, 6), v[:, -1:]], 1)
    assert torch.equal(lambda_return(r, c, v, GAMMA, 1.0), lambda_return(r, c, other, GAMMA, 1.0))


def test_a_zero_continue_cuts_the_future():
    r, v, c = torch.randn(2, 6), torch.randn(2, 7), torch.ones(2, 6)
    c[:, 2] = 0.0
    base = lambda_return(r, c, v, GAMMA, LAM)
    assert torch.allclose(base[:, 2], r[:, 2])
    r[:, 3:], v[:, 3:] = 99.0, -99.0
    assert torch.allclose(lambda_return(r, c, v, GAMMA, LAM)[:, :3], base[:, :3])


def test_weights_are_the_chance_to_be_there():
    c = torch.tensor([[0.5, 0.25, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    weight = rollout_weights(torch.tensor([1.0, 0.0]), c, GAMMA)
    expected = torch.tensor([1.0, GAMMA * 0.5, GAMMA**2 * 0.125, 0.0])
    assert torch.allclose(weight[0], expected)
    assert (weight[1] == 0).all()


def test_weight_of_a_state_knows_its_own_continue_and_not_the_next():
    c = torch.rand(1, 5, requires_grad=True)
    weight = rollout_weights(torch.ones(1), c, GAMMA)
    for k in range(5):  # c[:, j] is c_{j+1}
        (grad,) = torch.autograd.grad(weight[:, k].sum() + 0 * c.sum(), c, retain_graph=True)
        assert (grad[0, :k] > 0).all()
        assert (grad[0, k:] == 0).all()


def test_advantage_scale_is_a_running_average_of_the_mean_size():
    scale = AdvantageScale(floor=0.05)
    advantages = torch.tensor([[-6.0, 2.0], [1.0, -3.0]])  # mean size 3
    for n in range(1, 6):
        assert float(scale.update(advantages)) == pytest.approx(max(0.05, 3.0 * (1 - 0.99**n)), rel=1e-4)
    assert float(AdvantageScale(floor=0.5).update(advantages * 1e-3)) == 0.5  # small ones are not blown up


def test_advantage_scale_does_not_see_how_different_the_start_states_are():
    """The same advantages, on top of values that lie far apart."""
    ac = ActorCritic(BehaviorConfig(units=8), 3, ActionSpec(1, False))
    scales = []
    for gap in (0.0, 50.0):
        ac.scale.size.zero_()
        states = LatentState(torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 2))
        rewards = torch.tensor([[gap + 0.5], [-gap - 0.5]])
        values = torch.tensor([gap, -gap])  # of the two start states
        ac.critic.twohot.mean = lambda logits, values=values: values.expand(logits.shape[:-1])  # (H+1, B)
        stats = LoopStats(torch.ones(2, 1), torch.zeros(2, 1, 1))
        dream = Rollout(
            states, torch.zeros(2, 1, 1), rewards, torch.zeros(2, 1), stats, torch.ones(2), torch.ones(2, 2, 3)
        )
        scales.append(float(losses(ac, dream)[3]["behavior/advantage_scale"]))
        assert float(ac.scale.size) == pytest.approx(0.005)
    assert scales[0] == pytest.approx(scales[1]) == ADVANTAGE_FLOOR


def test_advantage_scale_leaves_out_what_is_not_finite():
    scale = AdvantageScale(floor=0.01)
    before = float(scale.update(torch.full((4,), 10.0)))
    assert float(scale.update(torch.tensor([1.0, float("nan")]))) == before == pytest.approx(0.1)
    assert float(scale.update(torch.tensor([1.0, float("inf")]))) == before
