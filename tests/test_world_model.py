"""The world model: shapes, resets, acting, and the alignment of imagination."""

from itertools import pairwise

import pytest
import torch
from small import ACTIONS, gradients, make_batch, make_world, observe, random_state, world_loss
from torch import Tensor

from world_model import Batch


def cut(batch: Batch, first: int, last: int | None = None) -> Batch:
    """Rows first..last of a batch, without the start state."""
    rows = slice(first, last)
    return Batch({k: v[:, rows] for k, v in batch.obs.items()}, *(v[:, rows] for v in batch[1:6]))


# ---------------------------------------------------------------------- states


def test_shapes_of_states_and_decoded_observations():
    world = make_world()
    assert world.initial(4).deter.shape == (4, 2, 8)
    assert world.initial(4).stoch.shape == (4, 3, 4)
    assert world.initial(4).feat().shape == (4, world.feat_size)
    post = observe(world, make_batch(world))
    assert post.states.deter.shape == (3, 6, 2, 8)
    assert post.post_dist.shape == post.prior_dist.shape == (3, 6, 3, 4)
    decoded = world.decode(post.states)
    assert {k: v.shape for k, v in decoded.items()} == {"joints": (3, 6, 3), "touch": (3, 6, 2)}
    one = post.states.map(lambda leaf: leaf[:, 0])
    assert {k: v.shape for k, v in world.decode(one).items()} == {"joints": (3, 3), "touch": (3, 2)}


@pytest.mark.parametrize("name", ["state", "position"])
def test_a_single_observation_may_have_any_name(name):
    world = make_world(sizes={name: 3})
    loss, _, _ = world_loss(world, make_batch(world))
    assert loss.isfinite()


def test_is_first_forgets_everything_before(fixed_levels):
    world = make_world()
    batch = make_batch(world)
    batch.is_first[:, 3] = True
    base = observe(world, batch)
    other = make_batch(world, seed=9)
    mixed = batch._replace(
        obs={k: torch.cat([other.obs[k][:, :3], v[:, 3:]], 1) for k, v in batch.obs.items()},
        prev_action=torch.cat([other.prev_action[:, :4], batch.prev_action[:, 4:]], 1),  # row 3 holds junk
        start=random_state(world),
    )
    changed = observe(world, mixed)
    assert not torch.allclose(base.states.deter[:, 2], changed.states.deter[:, 2])
    assert torch.equal(base.states.deter[:, 3:], changed.states.deter[:, 3:])
    assert torch.equal(base.states.stoch[:, 3:], changed.states.stoch[:, 3:])
    fresh = observe(world, cut(batch, 3))
    assert torch.allclose(base.states.deter[:, 3:], fresh.states.deter, atol=1e-5)
    assert torch.equal(base.states.stoch[:, 3:], fresh.states.stoch)


def test_resets_begin_at_the_learned_start(fixed_levels):
    world = make_world()
    batch = make_batch(world)._replace(start=random_state(world))
    untouched = gradients(world, world_loss(world, batch)[0])["core.start"]
    batch.is_first[1, 3] = True
    learning = gradients(world, world_loss(world, batch)[0])["core.start"]
    assert untouched is None or not untouched.any()
    assert learning.any()
    assert torch.equal(world.initial(2).deter, world.core.start.expand(2, -1, -1))


def test_the_first_step_of_an_episode_has_a_gradient_of_ordinary_size():
    world = make_world()

    def sensitivity(deter: Tensor) -> float:
        inputs = torch.zeros(3, 3 * 4 + ACTIONS, requires_grad=True)  # no latents and no action yet
        out = world.core(deter.detach(), inputs, 4, world.core.prepare())[0]
        grads = [torch.autograd.grad(out[..., d].sum(), inputs, retain_graph=True)[0] for d in range(8)]
        return torch.stack(grads).norm().item()

    usual = sensitivity(random_state(world).deter)
    assert sensitivity(world.initial(3).deter) < 5 * usual
    assert sensitivity(torch.zeros(3, 2, 8)) > 20 * usual  # why a state of zeros must not occur


def test_is_first_resets_only_its_own_row(fixed_levels):
    world = make_world()
    batch = make_batch(world)
    base = observe(world, batch)
    batch.is_first[1, 3] = True
    reset = observe(world, batch)
    assert torch.equal(base.states.deter[[0, 2]], reset.states.deter[[0, 2]])
    assert torch.equal(base.states.deter[1, :3], reset.states.deter[1, :3])
    assert not torch.allclose(base.states.deter[1, 3], reset.states.deter[1, 3])


def test_a_sequence_continues_from_its_start_state(fixed_levels):
    world = make_world()
    batch = make_batch(world)
    whole = observe(world, batch)
    rest = cut(batch, 2)._replace(start=whole.states.map(lambda leaf: leaf[:, 1]))
    assert torch.allclose(observe(world, rest).states.deter, whole.states.deter[:, 2:], atol=1e-5)


def test_acting_equals_the_training_scan(fixed_levels):
    world = make_world(exit="fixed")
    batch = make_batch(world)
    batch.is_first[0, 0] = batch.is_first[1, 4] = True
    expected = observe(world, batch).states
    state = world.initial(3)
    for t in range(6):
        obs = {k: v[:, t] for k, v in batch.obs.items()}
        state, stats = world.observe(obs, batch.prev_action[:, t], batch.is_first[:, t], state)
        assert torch.allclose(state.deter, expected.deter[:, t], atol=1e-5)
        assert torch.equal(state.stoch, expected.stoch[:, t])
        assert stats.depth.tolist() == [2, 2, 2]


def test_acting_without_sampling_takes_the_most_probable_latents():
    world = make_world()
    batch = make_batch(world)
    obs = {k: v[:, 0] for k, v in batch.obs.items()}
    args = obs, batch.prev_action[:, 0], batch.is_first[:, 0], random_state(world)
    state, _ = world.observe(*args, sample=False)
    again, _ = world.observe(*args, sample=False)
    assert torch.equal(state.stoch, again.stoch)
    probs = world.posterior(state.deter, world.post_embed(world.observation_model(obs)))
    assert torch.equal(state.stoch.argmax(-1), probs.argmax(-1))
    draws = {str(world.observe(*args)[0].stoch.argmax(-1).tolist()) for _ in range(20)}
    assert len(draws) > 1


def test_actions_beyond_the_bounds_count_as_the_bounds(fixed_levels):
    world = make_world()
    wild = torch.tensor([[3.0, -9.0], [0.5, 1.5], [-0.2, 0.0]])
    tame = wild.clamp(-1, 1)
    state, batch = random_state(world), make_batch(world)
    dreams = [world.imagine(state, a[:, None], 1).states.deter for a in (wild, tame, tame * 0.9)]
    assert torch.equal(dreams[0], dreams[1])
    assert not torch.allclose(dreams[0], dreams[2])
    obs = {k: v[:, 0] for k, v in batch.obs.items()}
    acted = [world.observe(obs, a, batch.is_first[:, 0], state)[0].deter for a in (wild, tame)]
    assert torch.equal(*acted)
    rows = [batch._replace(prev_action=a[:, None].expand(-1, 6, -1)) for a in (wild, tame)]
    assert torch.equal(*(observe(world, r).states.deter for r in rows))


# ---------------------------------------------------------------------- imagination


def test_rollout_alignment():
    world = make_world()
    start, seen = random_state(world), []

    def policy(feat: Tensor) -> Tensor:
        seen.append(feat)
        return torch.randn(3, ACTIONS)

    alive = torch.tensor([1.0, 0.0, 1.0])
    rollout = world.imagine(start, policy, 5, alive)
    assert rollout.states.deter.shape == (3, 6, 2, 8)
    assert rollout.actions.shape == (3, 5, ACTIONS)
    assert rollout.rewards.shape == rollout.continues.shape == rollout.loops.depth.shape == (3, 5)
    assert rollout.loops.residual.shape == (3, 5, world.cfg.loop.run_cap)
    assert torch.equal(rollout.states.deter[:, 0], start.deter)
    assert torch.equal(rollout.states.stoch[:, 0], start.stoch)
    assert torch.equal(rollout.alive, alive)
    assert len(seen) == 5
    for k, feat in enumerate(seen):  # a_k is chosen at s_k
        assert torch.equal(feat, rollout.states.map(lambda leaf, k=k: leaf[:, k]).feat())
        assert torch.equal(feat, rollout.feat[k])
    with torch.no_grad():
        for k in range(5):  # r_{k+1} and c_{k+1} are read from s_{k+1}
            feat = rollout.states.map(lambda leaf, k=k: leaf[:, k + 1]).feat()
            assert torch.allclose(rollout.rewards[:, k], world.twohot.mean(world.reward(feat)), rtol=1e-3)
            assert torch.allclose(rollout.continues[:, k], torch.sigmoid(world.cont(feat))[:, 0], atol=1e-6)
    assert all(not torch.allclose(a, b, rtol=1e-2) for a, b in pairwise(rollout.rewards.unbind(1)))
    assert not rollout.rewards.requires_grad


def test_each_imagined_step_follows_from_state_and_action(fixed_levels):
    world = make_world()
    actions = torch.linspace(-1, 1, 24).view(3, 4, ACTIONS)
    rollout = world.imagine(random_state(world), actions, 4)
    assert torch.equal(rollout.actions, actions)
    assert torch.equal(rollout.alive, torch.ones(3))
    with torch.no_grad():
        for k in range(4):
            before = rollout.states.map(lambda leaf, k=k: leaf[:, k])
            state, stats = world.dream_step(before, actions[:, k], world.core.prepare())
            assert torch.equal(state.deter, rollout.states.deter[:, k + 1])
            assert torch.equal(state.stoch, rollout.states.stoch[:, k + 1])
            assert torch.equal(stats.depth, rollout.loops.depth[:, k])
    moved = actions.clone()
    moved[:, 2] *= -1
    other = world.imagine(random_state(world), moved, 4)
    assert torch.equal(other.states.deter[:, :3], rollout.states.deter[:, :3])
    assert not torch.allclose(other.states.deter[:, 3], rollout.states.deter[:, 3])


def test_imagination_samples_the_prior_or_takes_its_mode():
    world = make_world()
    start = random_state(world)
    actions = torch.zeros(3, 3, ACTIONS)
    first, second = (world.imagine(start, actions, 3, sample=False) for _ in range(2))
    assert torch.equal(first.states.deter, second.states.deter)
    with torch.no_grad():
        prior = world.prior_probs(first.states.deter[:, 1:])
    assert torch.equal(first.states.stoch[:, 1:].argmax(-1), prior.argmax(-1))
    crowd = start.map(lambda leaf: leaf[:1].repeat(4000, 1, 1))
    many = world.imagine(crowd, torch.zeros(4000, 1, ACTIONS), 1)
    with torch.no_grad():
        probs = world.prior_probs(many.states.deter[:1, 1])
    assert torch.allclose(many.states.stoch[:, 1].mean(0), probs[0], atol=0.04)


def test_imagination_loops_can_be_overridden():
    world = make_world(exit="fixed")
    rollout = world.imagine(random_state(world), torch.zeros(3, 2, ACTIONS), 2, max_loops=7)
    assert (rollout.loops.depth == 7).all()
    assert rollout.loops.residual.shape == (3, 2, 7)


def test_imagination_needs_a_horizon():
    world = make_world()
    with pytest.raises(ValueError, match="horizon"):
        world.imagine(random_state(world), torch.zeros(3, 0, ACTIONS), 0)


def test_gradient_flows_through_a_dream_only_when_asked():
    world = make_world()
    actions = torch.zeros(3, 4, ACTIONS, requires_grad=True)
    rollout = world.imagine(random_state(world), actions, 4, grad=True)
    (grad,) = torch.autograd.grad(rollout.rewards[:, 2].sum(), actions)
    assert (grad[:, :3].abs().sum((0, 2)) > 0).all()
    assert (grad[:, 3] == 0).all()
