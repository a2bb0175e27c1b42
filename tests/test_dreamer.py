"""The agent as a whole, tiny: one update moves what it should, and acting is what it says."""

import numpy as np
import pytest
import torch

from agent.errors import NonFiniteError
from agent.execution import Eager
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.dreamer import Dreamer, Update
from agent.learning.optimizer import OptimizerConfig, rate_factor
from agent.spaces import ActionSpec, Spaces
from world_model import Batch, LoopConfig, ModelConfig

CONTINUOUS, DISCRETE = ActionSpec(2, False), ActionSpec(3, True)


def make(spec: ActionSpec = CONTINUOUS, seed: int = 0, clip: float = 100.0, **behavior) -> Dreamer:
    torch.manual_seed(seed)
    loop = LoopConfig(tokens=2, width=8, units=16, mean_loops=2.0)
    model = ModelConfig(loop, groups=3, classes=4, units=16)
    behavior = {"horizon": 3, "starts": 8, "units": 16} | behavior
    agent = Dreamer(model, BehaviorConfig(**behavior), OptimizerConfig(), Spaces({"state": 3}, spec))
    for adam in agent.optimizers.values():
        adam.clip, adam.warmup = clip, 1
    return agent


def learn(agent: Dreamer, batch: Batch) -> Update:
    """One update, the plain way."""
    return Eager(agent).update(batch)


def make_batch(spec: ActionSpec = CONTINUOUS, seed: int = 1, size: int = 4, length: int = 6) -> Batch:
    gen = torch.Generator().manual_seed(seed)
    off = torch.zeros(size, length, dtype=torch.bool)
    batch = Batch(
        {"state": torch.randn(size, length, 3, generator=gen)},
        torch.rand(size, length, spec.size, generator=gen),
        torch.randn(size, length, generator=gen),
        off.clone(),
        off.clone(),
        off.clone(),
    )
    batch.is_last[0, 2] = batch.is_terminal[0, 2] = batch.is_first[0, 3] = True
    return batch


def flats(agent: Dreamer) -> dict[str, torch.Tensor]:
    return {name: adam.flat.detach().clone() for name, adam in agent.optimizers.items()}


def weights_of(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights by name (the slow critic is not among them)."""
    return {k: v.detach().clone() for k, v in policy.named_parameters() if ".slow." not in k}


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_an_update_changes_every_part(spec, gradient):
    agent = make(spec, actor_gradient=gradient)
    before, slow = flats(agent), agent.behavior.critic.slow.out.weight.clone()
    for seed in range(2):
        states, _, metrics, _ = learn(agent, make_batch(spec, seed))
    assert agent.updates == 2
    for name, flat in flats(agent).items():
        assert not torch.equal(flat, before[name]), name
        assert flat.isfinite().all()
    assert not torch.equal(agent.behavior.critic.slow.out.weight, slow)
    assert states.deter.shape == (4, 6, 2, 8)
    assert not states.deter.requires_grad
    assert ((states.stoch == 0) | (states.stoch == 1)).all()
    for name, value in metrics.items():
        assert value.isfinite().all(), name
        assert not value.requires_grad, name


def test_averaged_weights_follow_the_newest(monkeypatch):
    monkeypatch.setattr("agent.learning.dreamer.EMA_DECAY", 0.75)
    agent = make()
    start = weights_of(agent.policy)
    learn(agent, make_batch())
    first = weights_of(agent.policy)
    assert any(not torch.equal(first[k], start[k]) for k in start)
    averaged = weights_of(agent.averaged)
    for name, value in first.items():
        assert torch.allclose(averaged[name], value, atol=1e-6), name  # starts at the first weights
    for n in (2, 3, 6):
        old = averaged
        while agent.updates < n:
            old = weights_of(agent.averaged)
            learn(agent, make_batch(seed=n))
        averaged, now = weights_of(agent.averaged), weights_of(agent.policy)
        rate = max(0.25, 1 / n)
        for name, value in now.items():
            assert torch.allclose(averaged[name], old[name] + rate * (value - old[name]), atol=1e-6), name


def test_the_slow_critic_follows_the_critic():
    agent = make()
    for seed in range(3):
        critic = agent.behavior.critic
        slow = torch.cat([p.detach().flatten() for p in critic.slow.parameters()])
        learn(agent, make_batch(seed=seed))
        new = torch.cat([p.detach().flatten() for p in critic.net.parameters()])
        moved = torch.cat([p.detach().flatten() for p in critic.slow.parameters()])
        assert torch.allclose(moved, slow + 0.02 * (new - slow), atol=1e-7)
        assert not torch.equal(moved, slow)


def test_there_are_no_more_dreams_than_asked():
    update = learn(make(starts=8), make_batch())
    assert update.dream_depth.shape == (8, 3)  # 4 sequences, the last 2 rows of each
    update = learn(make(starts=0), make_batch())
    assert update.dream_depth.shape == (24, 3)


def test_many_sequences_still_teach_the_replayed_value():
    """Of a sequence with one row of its own the critic would learn nothing, and nobody would notice."""
    agent = make(starts=4)
    _, dream_depth, metrics, _ = learn(agent, make_batch())
    assert dream_depth.shape == (8, 3)
    assert metrics["behavior/replay_value_loss"] > 0.0


def test_dreams_start_from_the_last_rows_and_give_their_returns_back(monkeypatch):
    agent = make(starts=12)
    imagine, seen, replayed = agent.world.imagine, [], []

    def numbered(start, policy, horizon, alive, **settings):
        seen.append((start, alive))
        rollout = imagine(start, policy, horizon, alive, **settings)
        number = torch.arange(12.0)[:, None] + 100 * torch.arange(horizon)  # returns, for nothing goes on
        return rollout._replace(rewards=number, continues=torch.zeros(12, horizon))

    def replay_loss(*rows):
        replayed.extend(rows)
        return torch.zeros(())

    monkeypatch.setattr(agent.world, "imagine", numbered)
    monkeypatch.setattr(agent.behavior, "replay_loss", replay_loss)
    batch = make_batch()
    batch.is_terminal[2, 4] = batch.is_last[2, 4] = batch.is_last[3, 3] = True
    states = learn(agent, batch).states
    start, alive = seen[0]
    assert torch.equal(start.deter, states.deter[:, 3:].flatten(0, 1))
    assert torch.equal(start.stoch, states.stoch[:, 3:].flatten(0, 1))
    assert not start.feat().requires_grad  # dreams never teach the world model
    expected = torch.ones(4, 3)
    expected[2, 1] = 0.0
    assert torch.equal(alive.view(4, 3), expected)
    rows = states.feat(), batch.reward, batch.is_terminal, batch.is_last
    expected = *(row[:, 3:] for row in rows), torch.arange(12.0).view(4, 3)
    assert replayed.pop() is None  # rows of one decision each
    assert all(torch.equal(*pair) for pair in zip(replayed, expected, strict=True))


def gradients(agent: Dreamer) -> dict[str, torch.Tensor]:
    """What one update with fixed random numbers leaves in the flat gradients; `clip` must be large."""
    with torch.no_grad():  # a critic of zeros sends no gradient to what lies below it
        agent.behavior.critic.net.out.weight.copy_(torch.linspace(-1.0, 1.0, 95 * 16).view(95, 16))
    torch.manual_seed(5)
    learn(agent, make_batch())
    return {name: adam.flat.grad.clone() for name, adam in agent.optimizers.items()}


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_without_the_replay_value_loss_the_world_model_learns_from_its_own_alone(gradient, monkeypatch):
    alone = make()
    torch.manual_seed(5)
    depth = alone.world.sample_depth()
    alone.world.observation_model.track(make_batch().obs)
    loss, _ = alone.world.loss(alone.world.observe_sequence(make_batch(), depth), make_batch())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(alone.world.parameters()))])
    settings = {"actor_gradient": gradient, "entropy": 1.0, "clip": 1e9}
    with_it = gradients(make(**settings))
    monkeypatch.setattr("agent.learning.actor_critic.REPLAY_VALUE_SCALE", 0.0)
    without = gradients(make(**settings))
    assert torch.allclose(without["world"], expected, atol=1e-6)
    assert not torch.allclose(with_it["world"], expected, atol=1e-3)  # and with it, from that too (DreamerV3)


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
@pytest.mark.parametrize(
    ("which", "taught"), [("policy", {"actor"}), ("value", {"critic"}), ("replay", {"world", "critic"})]
)
def test_each_loss_of_the_behavior_teaches_its_own_part(gradient, which, taught, monkeypatch):
    agents = [make(actor_gradient=gradient, clip=1e9) for _ in range(2)]
    behavior = agents[1].behavior
    losses, replay_loss = behavior.losses, behavior.replay_loss

    def scaled(*rollout):
        policy_loss, value_loss, *rest = losses(*rollout)
        return (policy_loss * (3 if which == "policy" else 1), value_loss * (3 if which == "value" else 1), *rest)

    monkeypatch.setattr(behavior, "losses", scaled)
    if which == "replay":
        monkeypatch.setattr(behavior, "replay_loss", lambda *rows: 3 * replay_loss(*rows))
    plain, more = (gradients(agent) for agent in agents)
    assert {name for name in plain if not torch.allclose(plain[name], more[name], rtol=1e-4, atol=1e-7)} == taught


@pytest.mark.parametrize("field", ["reward", "obs"])
def test_bad_numbers_raise_before_any_weight_is_touched(field):
    agent = make()
    learn(agent, make_batch())
    before, averaged = flats(agent), weights_of(agent.averaged)
    batch = make_batch()
    (batch.reward if field == "reward" else batch.obs["state"])[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="reward" if field == "reward" else "reconstruction|world"):
        learn(agent, batch)
    assert all(torch.equal(flat, before[name]) for name, flat in flats(agent).items())
    assert all(torch.equal(value, averaged[name]) for name, value in weights_of(agent.averaged).items())


@pytest.mark.parametrize("field", ["reward", "obs"])
def test_an_agent_can_go_on_after_a_bad_batch(field):
    agent = make()
    batch = make_batch()
    (batch.reward if field == "reward" else batch.obs["state"])[1, 2] = float("nan")
    with pytest.raises(NonFiniteError):
        learn(agent, batch)
    metrics = learn(agent, make_batch(seed=2)).metrics
    assert all(value.isfinite().all() for value in metrics.values())
    assert all(flat.isfinite().all() for flat in flats(agent).values())


def test_a_bad_dream_raises_before_any_weight_is_touched():
    agent = make()
    learn(agent, make_batch())
    with torch.no_grad():
        agent.behavior.critic.net.out.bias[0] = float("nan")
    before = flats(agent)
    with pytest.raises(NonFiniteError, match="behavior"):
        learn(agent, make_batch(seed=2))
    for part in ("world", "actor"):
        assert torch.equal(flats(agent)[part], before[part])


@pytest.mark.parametrize("part", ["world", "actor", "critic"])
def test_a_bad_gradient_is_named_and_no_part_moves(part):
    agent = make()
    learn(agent, make_batch())
    before, averaged = flats(agent), weights_of(agent.averaged)
    slow = agent.behavior.critic.slow.out.weight.clone()
    bad = {"world": agent.world.cont, "actor": agent.behavior.actor.net, "critic": agent.behavior.critic.net}[part]
    hook = bad.out.bias.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=f"{part}/grad_norm"):
        learn(agent, make_batch(seed=2))
    hook.remove()
    assert all(torch.equal(flat, before[name]) for name, flat in flats(agent).items())
    assert all(torch.equal(value, averaged[name]) for name, value in weights_of(agent.averaged).items())
    assert torch.equal(agent.behavior.critic.slow.out.weight, slow)
    learn(agent, make_batch(seed=2))  # and the agent can go on
    assert all(flat.isfinite().all() for flat in flats(agent).values())


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_acting_without_exploration_is_deterministic(spec):
    agent = make(spec)
    learn(agent, make_batch(spec))
    obs = {"state": np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)}
    first = np.array([True, True, True])
    runs = []
    for _ in range(2):
        memory, actions = None, []
        for step in range(4):
            action, memory, depth = agent.act(obs, memory, first & (step == 0), explore=False)
            actions.append(action)
        runs.append(np.stack(actions))
    assert np.array_equal(*runs)
    assert depth.shape == (3,)
    assert action.shape == ((3,) if spec.discrete else (3, 2))
    assert runs[0].min() >= (0 if spec.discrete else -1.0)
    assert runs[0].max() <= (2 if spec.discrete else 1.0)
    explored = {agent.act(obs, None, first, explore=True)[0].tobytes() for _ in range(8)}
    assert len(explored) > 1


def test_acting_depends_on_no_other_environment():
    agent = make()
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    first = np.array([True] * 5)
    together = agent.act({"state": obs}, None, first, explore=False)[0]
    for row in range(5):
        alone = agent.act({"state": obs[row : row + 1]}, None, first[:1], explore=False)[0]
        assert np.allclose(alone[0], together[row], atol=1e-5)


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_gradients_reach_what_acting_remembers(spec):
    agent = make(spec)
    memory = agent.act({"state": np.ones((2, 3), np.float32)}, None, np.array([True, True]))[1]
    start = memory.state.map(lambda leaf: leaf.requires_grad_())
    rollout = agent.world.imagine(start, agent.behavior.actor.act, 2, grad=True)
    rollout.feat[1:].square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in (start.deter, start.stoch))


def test_evaluation_acts_with_the_averaged_weights():
    agent = make()
    obs, first = {"state": np.ones((1, 3), np.float32)}, np.array([True])
    base = agent.act(obs, None, first, explore=False)[0]
    with torch.no_grad():
        agent.behavior.actor.net.out.bias.add_(3.0)
    assert np.array_equal(agent.act(obs, None, first, explore=False)[0], base)
    assert not np.array_equal(agent.act(obs, None, first, explore=True)[0], base)


def test_rates_hold_and_then_fall():
    factors = [rate_factor(progress) for progress in (0.0, 0.5, 0.75, 1.0, 2.0)]
    assert factors == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])


def test_a_loaded_agent_goes_on_identically(tmp_path):
    agent = make()
    for seed in range(3):
        learn(agent, make_batch(seed=seed))
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    other = make(seed=7)
    other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    results = []
    for each in (agent, other):
        torch.manual_seed(11)
        for seed in (20, 21):
            learn(each, make_batch(seed=seed))
        results.append((flats(each), weights_of(each.averaged)))
    for mine, theirs in zip(*results, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert torch.equal(agent.behavior.scale.size, other.behavior.scale.size)


def test_both_copies_are_fitted_to_images_once_and_a_checkpoint_remembers_it():
    """The averaged encoder is the one that is evaluated: what an image usually looks like is no weight to average."""
    torch.manual_seed(0)
    model = ModelConfig(LoopConfig(tokens=2, width=8, units=16), groups=3, classes=4, units=16)
    behavior = BehaviorConfig(horizon=3, starts=8, units=16)
    spaces = Spaces({"image": (16, 16, 3)}, CONTINUOUS)
    agent, other = (Dreamer(model, behavior, OptimizerConfig(), spaces) for _ in range(2))
    bright, asked = torch.full((4, 1, 16, 16, 3), 200, dtype=torch.uint8), []

    def sample(*shape):
        asked.append(shape[:2])
        return make_batch()._replace(obs={"image": bright}), None

    agent.fit_image_normaliser(sample)
    learn(agent, make_batch()._replace(obs={"image": bright.expand(4, 6, 16, 16, 3)}))
    agent.fit_image_normaliser(sample)
    assert asked == [(256, 1)]
    other.load_state_dict(agent.state_dict())
    for policy in (agent.policy, agent.averaged, other.policy, other.averaged):
        assert (policy.world.observation_model.images.encoders["image"].normaliser.mean == 200.0).all()
    make().fit_image_normaliser(None)  # without images nothing is asked
