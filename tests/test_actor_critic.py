"""Policy and losses of the actor against closed forms."""

import pytest
import torch
from small_behavior import CONTINUOUS, DISCRETE, GAMMA, LAM, losses, make, make_rollout
from torch import Tensor

from agent.learning.actor_critic import ActorCritic, BehaviorConfig, lambda_return, rollout_weights
from agent.learning.gaussian import truncated_entropy
from agent.spaces import ActionSpec, from_env, to_env
from world_model import LatentState, LoopStats, Rollout

# ---------------------------------------------------------------------- the policy


def test_discrete_policy_agrees_with_torch():
    ac = make(DISCRETE)
    feat = torch.randn(7, 6)
    action = torch.eye(3)[torch.randint(0, 3, (7,))]
    probs = 0.99 * torch.softmax(ac.actor.net(feat), -1) + 0.01 / 3
    expected = torch.distributions.OneHotCategorical(probs)
    logp, entropy, _, _ = ac.actor.evaluate(feat, action)
    assert torch.allclose(logp, expected.log_prob(action), atol=1e-5)
    assert torch.allclose(entropy, expected.entropy(), atol=1e-5)
    assert torch.equal(ac.actor.act(feat, sample=False).argmax(-1), probs.argmax(-1))
    draws = ac.actor.act(feat[:1].expand(4000, 6))
    assert ((draws == 0) | (draws == 1)).all()
    assert torch.allclose(draws.mean(0), probs[0], atol=0.04)


def test_continuous_policy_agrees_with_torch():
    ac = make()
    feat, action = torch.randn(7, 6), torch.randn(7, 2)
    mean, std = ac.actor.parameters_of(feat)
    assert (mean.abs() < 1).all()
    assert ((std > 0.1) & (std < 1)).all()
    expected = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    logp, entropy, _, _ = ac.actor.evaluate(feat, action)
    assert torch.allclose(logp, expected.log_prob(action), atol=1e-5)
    assert torch.equal(entropy, truncated_entropy(mean, std).sum(-1))
    assert torch.equal(ac.actor.act(feat, sample=False), mean)
    draws = ac.actor.act(feat[:1].expand(4000, 6))
    assert torch.allclose(draws.mean(0), mean[0], atol=0.08)
    assert torch.allclose(draws.std(0), std[0], atol=0.05)


def test_actions_survive_the_way_to_the_environment():
    choice = torch.eye(3)[[2, 0, 1]]
    assert to_env(choice, DISCRETE).tolist() == [2, 0, 1]
    assert torch.equal(from_env(to_env(choice, DISCRETE), DISCRETE), choice)
    vector = torch.tensor([[0.5, -3.0]])
    assert to_env(vector, CONTINUOUS).tolist() == [[0.5, -1.0]]
    assert from_env(to_env(vector, CONTINUOUS), CONTINUOUS).tolist() == [[0.5, -1.0]]


def sensitivities(ac: ActorCritic, rollout: Rollout, monkeypatch) -> Tensor:
    """(B, H) derivative of the policy loss by log pi(a_k | s_k): minus weight times advantage, over B * H."""
    size, horizon = rollout.rewards.shape
    logp = torch.zeros(size, horizon, requires_grad=True)
    zero = torch.zeros(size, horizon)
    monkeypatch.setattr(ac.actor, "evaluate", lambda feat, action, out: (logp.t(), zero.t(), zero.t(), zero.mean()))
    return torch.autograd.grad(losses(ac, rollout)[0], logp)[0]


def test_loss_weighs_log_probabilities_by_weight_and_advantage(monkeypatch):
    ac, rollout = make(), make_rollout()
    ac.scale.floor = 1.0
    rollout = rollout._replace(alive=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    with torch.no_grad():
        values = ac.critic.value(rollout.states.feat())
    returns = lambda_return(rollout.rewards, rollout.continues, values, GAMMA, LAM)
    weight = rollout_weights(rollout.alive, rollout.continues, GAMMA)
    expected = -weight * (returns - values[:, :-1])  # all small: divided by the floor
    grad = sensitivities(ac, rollout, monkeypatch)
    assert torch.allclose(grad * grad.numel(), expected, atol=1e-4)
    assert (grad[2] == 0).all()


def test_advantage_sees_later_rewards_and_never_earlier_ones(monkeypatch):
    ac, rollout = make(), make_rollout()
    ac.scale.floor = 10.0  # above all advantages: their own size divides none of them
    base = sensitivities(ac, rollout, monkeypatch)
    for j in range(5):  # rewards[:, j] is r_{j+1}
        rewards = rollout.rewards.clone()
        rewards[:, j] += 0.5
        change = sensitivities(ac, rollout._replace(rewards=rewards), monkeypatch) - base
        assert (change[:, : j + 1].abs() > 0).all()
        assert (change[:, j + 1 :] == 0).all()


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS])
def test_terminal_starts_teach_nothing(spec):
    ac, rollout = make(spec, entropy=0.1), make_rollout(spec)
    for alive in (torch.zeros(4), torch.ones(4)):
        policy_loss, value_loss, _, _ = losses(ac, rollout._replace(alive=alive))
        grads = torch.autograd.grad(policy_loss, list(ac.actor.parameters()))
        grads += torch.autograd.grad(value_loss, list(ac.critic.net.parameters()))
        assert all(grad.any() == alive.any() for grad in grads)


def train_on_bandit(ac: ActorCritic, reward, steps: int) -> None:
    """Repeated one-step dreams in one state, with `reward` of the action."""
    adam = torch.optim.Adam(ac.actor.parameters(), lr=0.02)
    state = LatentState(torch.ones(64, 2, 2, 1), torch.ones(64, 2, 1, 4))
    feat = state.feat().transpose(0, 1)
    for _ in range(steps):
        with torch.no_grad():
            action = ac.policy(feat[0])[:, None]
        stats = LoopStats(torch.ones(64, 1), torch.zeros(64, 1, 1))
        dream = Rollout(state, action, reward(action), torch.zeros(64, 1), stats, torch.ones(64), feat)
        adam.zero_grad()
        losses(ac, dream)[0].backward()
        adam.step()


def test_the_better_choice_becomes_more_probable():
    ac = make(DISCRETE)
    feat = torch.ones(1, 6)
    before = ac.actor.parameters_of(feat)[0][0, 1].item()
    train_on_bandit(ac, lambda action: action[..., 1], 30)
    after = ac.actor.parameters_of(feat)[0][0, 1].item()
    assert after > before + 0.2


def test_the_mean_moves_to_the_better_actions():
    ac = make()
    train_on_bandit(ac, lambda action: action[..., 0] - action[..., 1], 30)
    mean = ac.actor.act(torch.ones(1, 6), sample=False)[0]
    start = make().actor.act(torch.ones(1, 6), sample=False)[0]
    assert mean[0] > start[0] + 0.2
    assert mean[1] < start[1] - 0.2


@pytest.mark.parametrize("mean", [-1.0, -0.4, 0.0, 0.9, 1.0])
@pytest.mark.parametrize("std", [0.1, 0.4, 1.0])
def test_truncated_entropy_is_that_of_the_density_cut_off_at_the_bounds(mean, std):
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((x - mean) / std) ** 2)
    density = density / torch.trapezoid(density, x)
    expected = -torch.trapezoid(density * torch.log(density), x)
    assert truncated_entropy(torch.tensor(mean), torch.tensor(std)) == pytest.approx(expected.item(), abs=1e-5)


def test_while_nothing_is_won_the_mean_stays_in_the_middle():
    """Adam brings even a tiny gradient to full size: without a pull to the middle all actions end at one bound."""
    ac = make(actor_gradient="dynamics", entropy=0.1)
    adam = torch.optim.Adam(ac.actor.parameters(), lr=0.01)
    torch.nn.init.zeros_(ac.critic.net.out.weight)
    for _ in range(300):
        rollout = make_rollout()
        actions = ac.actor.act(rollout.states.feat()[:, :-1])
        adam.zero_grad()
        losses(ac, rollout._replace(actions=actions, rewards=1e-5 * actions.sum(-1)))[0].backward()
        adam.step()
    mean, std = ac.actor.parameters_of(make_rollout().states.feat())
    assert mean.abs().max() < 0.4
    assert std.min() > 0.9


def test_a_mean_at_a_bound_comes_back_when_the_gradient_turns_and_stays_near_it_while_it_does_not():
    """tanh is flat far out, and Adam carries a mean there within a few hundred updates: nothing moved it back."""
    ac = make(actor_gradient="dynamics", entropy=0.1)
    torch.nn.init.zeros_(ac.critic.net.out.weight)
    adam = torch.optim.Adam(ac.actor.parameters(), lr=0.01)

    def train(updates: int, worth: float) -> Tensor:
        for _ in range(updates):
            rollout = make_rollout()
            actions = ac.actor.act(rollout.states.feat()[:, :-1])
            adam.zero_grad()
            losses(ac, rollout._replace(actions=actions, rewards=worth * actions.sum(-1)))[0].backward()
            adam.step()
        return ac.actor.parameters_of(make_rollout().states.feat())[0]

    assert train(400, 1.0).min() > 0.9
    assert train(100, -1.0).max() < 0.0


def test_saturation_is_the_squared_excess_before_the_tanh():
    ac, feat = make(), torch.randn(3, 6)
    with torch.no_grad():
        ac.actor.net.out.weight.zero_()
        ac.actor.net.out.bias.copy_(torch.tensor([3.5, -1.4, 0.0, 0.0]))
    assert ac.actor.evaluate(feat, torch.zeros(3, 2))[2].tolist() == pytest.approx([4.0] * 3)
    assert make(DISCRETE).actor.evaluate(feat, torch.eye(3))[2].tolist() == [0.0] * 3


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS])
def test_entropy_bonus_raises_the_entropy(spec):
    ac = make(spec, entropy=1.0)
    feat = make_rollout(spec).states.feat().flatten(0, 1)

    def entropy() -> float:
        return ac.actor.evaluate(feat, torch.zeros(len(feat), spec.size))[1].mean().item()

    before = entropy()
    adam = torch.optim.Adam(ac.actor.parameters(), lr=0.01)
    still = make_rollout(spec)._replace(rewards=torch.zeros(4, 5), continues=torch.ones(4, 5))
    torch.nn.init.zeros_(ac.critic.net.out.weight)  # no advantage anywhere
    for _ in range(20):
        adam.zero_grad()
        losses(ac, still)[0].backward()
        adam.step()
    assert entropy() > before + 1e-3


def test_entropy_weighs_the_same_per_dimension_however_many_there_are(monkeypatch):
    """Advantages 0 and entropies 1: what is left of the policy loss is the weight of the bonus."""
    for spec, expected in ((ActionSpec(1, False), 0.1), (ActionSpec(4, False), 0.05), (ActionSpec(4, True), 0.1)):
        ac = make(spec, entropy=0.1)
        rollout = make_rollout(spec)._replace(rewards=torch.zeros(4, 5), continues=torch.ones(4, 5))
        torch.nn.init.zeros_(ac.critic.net.out.weight)
        one = torch.ones(5, 4)  # time first
        monkeypatch.setattr(ac.actor, "evaluate", lambda feat, action, out, one=one: (one, one, 0 * one, one.mean()))
        weight = rollout_weights(rollout.alive, rollout.continues, GAMMA).mean()
        assert -losses(ac, rollout)[0] == pytest.approx(expected * weight.item())


def test_dynamics_gradient_reaches_the_actor_through_the_actions():
    ac = make(actor_gradient="dynamics")
    rollout = make_rollout()
    actions = ac.actor.act(rollout.states.feat()[:, :-1])
    rollout = rollout._replace(actions=actions, rewards=actions.sum(-1))
    loss, _, returns, metrics = losses(ac, rollout)
    grads = torch.autograd.grad(loss, list(ac.actor.parameters()))
    assert all(grad.any() for grad in grads)
    assert not returns.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
    # Larger actions are better here: the gradient raises the bias of both means.
    assert (grads[-1][:2] < 0).all()


def test_dynamics_gradient_reaches_the_actor_through_the_value_of_dreamt_states():
    ac = make(actor_gradient="dynamics")
    rollout = make_rollout()
    actions = ac.actor.act(rollout.states.feat()[:, :-1])
    moved = rollout.states.deter[:, 1:] + actions[..., None]
    states = rollout.states._replace(deter=torch.cat([rollout.states.deter[:, :1], moved], 1))
    loss, _, _, _ = losses(ac, rollout._replace(actions=actions, feat=states.feat().transpose(0, 1)))
    assert all(grad.any() for grad in torch.autograd.grad(loss, list(ac.actor.parameters())))


@pytest.mark.parametrize(("spec", "through"), [(ActionSpec(2, False), True), (ActionSpec(3, True), False)])
def test_by_default_continuous_actions_learn_through_the_world_model(spec, through):
    assert make(spec, actor_gradient="auto").dynamics_backprop == through
    assert make(spec, actor_gradient="dynamics").dynamics_backprop
    assert not make(spec).dynamics_backprop
    assert not make(spec, actor_gradient="auto", decisions="expansion").dynamics_backprop
    with pytest.raises(ValueError, match="expansion learns by reinforce: leave"):
        make(spec, actor_gradient="dynamics", decisions="expansion")


def test_dreams_and_entropy_follow_the_gradient_unless_they_are_given():
    for gradient, starts, entropy in (("dynamics", 64, 0.1), ("reinforce", 128, 0.025)):
        ac = make(ActionSpec(4, False), actor_gradient=gradient, entropy=None)
        assert (ac.starts, ac.entropy_weight) == (starts, pytest.approx(entropy / 2))
        given = make(ActionSpec(4, False), actor_gradient=gradient, starts=0, entropy=0.0)
        assert (given.starts, given.entropy_weight) == (0, 0.0)


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_the_value_loss_trains_the_critic_and_nothing_else(gradient):
    ac = make(actor_gradient=gradient)
    rollout = make_rollout()
    actions = ac.actor.act(rollout.states.feat()[:, :-1])
    deter = rollout.states.deter.clone().requires_grad_()
    states = rollout.states._replace(deter=deter)
    rollout = rollout._replace(feat=states.feat().transpose(0, 1), actions=actions, rewards=actions.sum(-1))
    policy_loss, value_loss, _, _ = losses(ac, rollout)
    others = [deter, *ac.actor.parameters()]
    grads = torch.autograd.grad(value_loss, others, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads)
    if gradient == "reinforce":  # likelihoods alone: neither the critic nor the dream is differentiated
        others = [deter, *ac.critic.net.parameters()]
        assert all(grad is None for grad in torch.autograd.grad(policy_loss, others, allow_unused=True))


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"starts": -1}, {"gamma": 0.0}, {"gamma": 1.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BehaviorConfig(**wrong)
