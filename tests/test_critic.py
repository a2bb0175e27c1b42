"""The critic's losses against closed forms and recursions by hand."""

import pytest
import torch
from small_behavior import GAMMA, LAM, losses, make, make_rollout
from torch import Tensor

from agent.learning.actor_critic import REPLAY_VALUE_SCALE, lambda_return
from world_model import Batch
from world_model.averages import alone


def test_slow_critic_is_never_trained():
    ac = make()
    policy_loss, value_loss, _, _ = losses(ac, make_rollout())
    (policy_loss + value_loss).backward()
    assert all(p.grad is None for p in ac.critic.slow.parameters())


def test_critic_learns_the_return_of_each_state():
    ac = make()
    rewards = torch.tensor([2.0, -2.0, 5.0, 0.0]).view(4, 1).expand(4, 5)
    rollout = make_rollout()._replace(rewards=rewards, continues=torch.zeros(4, 5))
    adam = torch.optim.Adam(ac.critic.net.parameters(), lr=0.03)
    for _ in range(80):
        _, loss, returns, _ = losses(ac, rollout)
        adam.zero_grad()
        loss.backward()
        adam.step()
        ac.critic.slow.load_state_dict(ac.critic.net.state_dict())  # it holds nothing back
    assert torch.equal(returns, rewards)  # nothing goes on after the first step
    with torch.no_grad():  # only s_0 is ever reached
        assert torch.allclose(ac.critic.value(rollout.states.feat()[:, 0]), rewards[:, 0], atol=0.4)


def replay_rows() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows 0..7 of two environments: a terminal at row 2, a time limit at row 5 of the first."""
    gen = torch.Generator().manual_seed(3)
    feat, reward, boot = (torch.randn(2, 8, *s, generator=gen) for s in ((6,), (), ()))
    terminal, last = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    terminal[0, 2] = last[0, 2] = last[0, 5] = True
    return feat, reward, terminal, last, boot


def test_replay_targets_are_those_of_a_loop_by_hand(monkeypatch):
    ac = make()
    feat, reward, terminal, last, boot = replay_rows()
    expected = torch.zeros(2, 7)
    for b in range(2):
        future = float(boot[b, 7])
        for t in range(6, -1, -1):
            if terminal[b, t + 1]:
                future = float(reward[b, t + 1])
            elif last[b, t + 1]:
                future = float(reward[b, t + 1] + GAMMA * boot[b, t + 1])
            else:
                future = float(reward[b, t + 1] + GAMMA * ((1 - LAM) * boot[b, t + 1] + LAM * future))
            expected[b, t] = future
    seen = []

    def loss(logits, feat, target):
        seen.append(target)
        return torch.ones_like(target)

    monkeypatch.setattr(ac.critic, "loss", loss)
    total = ac.replay_loss(feat, reward, terminal, last, boot)
    counted = ~last[:, :-1]
    assert torch.allclose(seen[0][counted], expected[counted], atol=1e-5)
    # Rows 2 and 5 end an episode and count nothing.
    assert float(total) == pytest.approx(REPLAY_VALUE_SCALE * 12 / 14)


def test_replay_loss_ignores_what_lies_behind_an_end():
    ac = make()
    feat, reward, terminal, last, boot = replay_rows()
    feat.requires_grad_()
    (grad,) = torch.autograd.grad(ac.replay_loss(feat, reward, terminal, last, boot), feat)
    assert (grad[0, [2, 5, 7]] == 0).all()  # two ends, and the row that only gives its bootstrap
    assert (grad[0, [0, 1, 3, 4, 6]].abs().sum(-1) > 0).all()
    # Rewards, bootstraps and terminals of later episodes change nothing at rows 0 and 1.
    reward[0, 3:], boot[0, 2:] = 50.0, -50.0
    (other,) = torch.autograd.grad(ac.replay_loss(feat, reward, terminal, last, boot), feat)
    assert torch.equal(grad[0, :2], other[0, :2])
    assert not torch.equal(grad[0, 3:], other[0, 3:])


def test_an_episode_that_was_cut_off_ends_where_another_one_begins():
    """Of several environments one may be stopped at the first row of an episode: no last row is written."""
    no = torch.zeros(2, 5, dtype=torch.bool)
    first, last = no.clone(), no.clone()
    first[0, 0] = first[0, 3] = first[1, 1] = last[0, 1] = True
    batch = Batch({}, torch.zeros(2, 5, 1), torch.zeros(2, 5), first, last, no)
    assert batch.ends().tolist() == [[False, True, True, False, False], [True, False, False, False, False]]


def test_replay_loss_of_one_row_is_zero():
    ac = make()
    feat, *rest = (x[:, :1] for x in replay_rows())
    assert float(ac.replay_loss(feat, *rest)) == 0.0


def test_expansion_learns_at_observed_states_alone():
    """Dreams are their targets: what the critic says of imagined states has no gradient, and no weight."""
    rollout = make_rollout()
    usual, expansion = make(), make(decisions="expansion", actor_gradient="auto")
    expansion.load_state_dict(usual.state_dict())
    logits, values = expansion.values(rollout)
    returns = lambda_return(rollout.rewards, rollout.continues, values, GAMMA)
    actor_loss, loss, metrics = expansion.losses(rollout, returns, values, logits)
    advantage = (returns - values[:, :-1]).detach()[:, 0]  # (B,): the scale is that of what is learned from
    scale = usual.scale.update(advantage[:, None], alone)
    logp, *_ = usual.actor.evaluate(rollout.feat[:1].detach(), rollout.actions[:, :1].transpose(0, 1), None)
    assert float(metrics["behavior/advantage_scale"]) == pytest.approx(float(scale))
    expected = -(rollout.alive * logp[0] * advantage / scale).mean()
    assert float(actor_loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-4)
    first = usual.critic.loss(logits[:1], rollout.feat[:1].detach(), returns.detach().t()[:1])  # (1, B)
    assert float(loss.detach()) == pytest.approx(float((rollout.alive * first).mean().detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0].abs().max() > 0
    assert not gradient[1:].any()
