"""Open-loop errors on held-out episodes, and the unit that they are measured in."""

import pytest
import torch
from small import make_world

from agent.data.dataset import Episodes
from agent.evaluation.normalised_error import NormalisedError
from agent.evaluation.open_loop import (
    CONTEXT_ROWS,
    SAMPLES,
    choose_windows,
    exit_rule,
    open_loop,
    posterior_states,
    usable_horizons,
)
from world_model import ExitRule


def episodes_of(world, lengths, seed=0):
    gen = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), max(lengths)
    obs = {name: torch.randn(count, longest, size, generator=gen) for name, size in world.obs_sizes.items()}
    actions = torch.rand(count, longest, world.action_size, generator=gen) * 2 - 1
    return Episodes(obs, actions, torch.randn(count, longest, generator=gen), torch.tensor(lengths))


def test_open_loop_errors_are_those_of_a_dream_from_the_posterior_state():
    world = make_world(exit="fixed").eval()
    longest = CONTEXT_ROWS
    episodes = episodes_of(world, [CONTEXT_ROWS + longest])  # one place: after the last row of the context
    result = open_loop(world, episodes, [1, longest], windows=4)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        state = world.initial(1)
        for row in range(CONTEXT_ROWS):
            obs = {name: value[:, row] for name, value in episodes.obs.items()}
            first = torch.tensor([row == 0])
            state, _ = world.observe(obs, episodes.prev_action[:, row], first, state, sample=False)
        start = state.map(lambda leaf: leaf.expand(4 * SAMPLES, *leaf.shape[1:]))
        dream = world.imagine(start, episodes.prev_action[:, CONTEXT_ROWS:].expand(4 * SAMPLES, -1, -1), longest)
        truth = torch.cat([torch.sign(x) * torch.log1p(x.abs()) for x in episodes.obs.values()], -1)
        guess = torch.cat(list(world.decode(dream.states).values()), -1)[:, 1:]
        guess = (torch.sign(guess) * torch.log1p(guess.abs())).unflatten(0, (4, SAMPLES)).mean(1)
        reward = dream.rewards.unflatten(0, (4, SAMPLES)).mean(1)
        wrong = (guess - truth[:, CONTEXT_ROWS:]).square() / truth[0].var(0)
    assert torch.allclose(result.error[1], wrong[:, 0].mean(-1), atol=1e-5)
    assert torch.allclose(result.error[longest], wrong[:, -1].mean(-1), atol=1e-5)
    assert torch.allclose(result.reward[longest], (reward[:, -1] - episodes.reward[:, -1]).abs(), atol=1e-5)


def test_jumps_are_compared_at_the_decisions_that_they_end_on():
    world = make_world(jump=4, exit="fixed").eval()
    episodes = episodes_of(world, [CONTEXT_ROWS + 20])
    result = open_loop(world, episodes, [2, 3, 20], windows=1, jump=2, gamma=0.5)
    assert set(result.error) == set(result.reward) == {2, 20}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        states, _ = posterior_states(world, episodes)
        start = states.map(lambda leaf: leaf[:, CONTEXT_ROWS - 1].expand(SAMPLES, *leaf.shape[2:]))
        actions = episodes.prev_action[:, CONTEXT_ROWS:].unflatten(1, (10, 2)).expand(SAMPLES, -1, -1, -1)
        reward = world.imagine(start, actions, 10).rewards.mean(0)
    last = episodes.reward[0, -2:]
    assert result.reward[20] == pytest.approx(abs(reward[-1] - last[0] - 0.5 * last[1]).item(), abs=1e-5)


def test_given_windows_are_used_and_overlapping_ones_form_groups():
    world = make_world(exit="fixed").eval()
    episodes = episodes_of(world, [CONTEXT_ROWS + 120, CONTEXT_ROWS + 70])
    places = choose_windows(episodes, 20, 160)
    drawn, given = open_loop(world, episodes, [5, 20], 160), open_loop(world, episodes, [5, 20], places)
    assert torch.equal(drawn.error[20], given.error[20])
    assert torch.equal(open_loop(world, episodes, [5], places).places.row, places.row)
    groups = places.groups()
    assert (groups[(places.episode == 0) & (places.row < 40)] == groups[places.episode == 0].min()).all()
    assert len(set(groups[places.episode == 0])) == 3  # rows 19 to 119, 40 each
    assert not set(groups[places.episode == 0]) & set(groups[places.episode == 1])


def test_padding_does_not_enter_the_errors():
    world = make_world(exit="fixed")
    short = episodes_of(world, [CONTEXT_ROWS + 4, CONTEXT_ROWS + 9])
    padded = short._replace(obs={name: value.clone() for name, value in short.obs.items()}, reward=short.reward.clone())
    for value in (*padded.obs.values(), padded.reward):
        value[0, CONTEXT_ROWS + 4 :] = 1e3
    one, other = (open_loop(world, episodes, [2, 4], windows=16).means() for episodes in (short, padded))
    assert one == pytest.approx(other)


def test_known_posterior_states_can_be_passed_in():
    world = make_world(exit="fixed")
    episodes = episodes_of(world, [2 * CONTEXT_ROWS, 2 * CONTEXT_ROWS + 3])
    states, depth = posterior_states(world, episodes, 3)
    assert depth.shape == (2, 2 * CONTEXT_ROWS + 3)
    assert (depth == 3).all()
    one = open_loop(world, episodes, [5], windows=8, max_loops=3)
    other = open_loop(world, episodes, [5], windows=8, max_loops=3, states=states)
    assert torch.allclose(one.error[5], other.error[5], atol=1e-6)


def test_measuring_leaves_the_generators_and_the_exit_rule_alone():
    world = make_world()
    rule, state = world.core.rule, torch.get_rng_state()
    with exit_rule(world, ExitRule()):
        result = open_loop(world, episodes_of(world, [CONTEXT_ROWS + 5]), [5], windows=3, max_loops=3)
    assert (result.depth == 3).all()
    assert world.core.rule is rule
    assert torch.equal(torch.get_rng_state(), state)


def test_horizons_longer_than_the_episodes_are_left_out():
    world = make_world()
    episodes = episodes_of(world, [2 * CONTEXT_ROWS + 5, CONTEXT_ROWS])
    assert usable_horizons(episodes, (50, 25, 1, 26)) == [1, 25]
    with pytest.raises(ValueError, match="no held-out episode"):
        open_loop(world, episodes, [26], windows=3)
    assert usable_horizons(episodes_of(world, [8]), (1, 4, 5)) == [1, 4]  # half of a short episode is seen


def test_the_normalised_error_is_fitted_to_mean_and_variance_of_all_rows():
    world = make_world(sizes={"state": 2})
    gen = torch.Generator().manual_seed(0)
    episodes = [
        Episodes({"state": torch.randn(2, 700, 2, generator=gen)}, torch.zeros(2, 700, 2), torch.zeros(2, 700),
                 torch.tensor([700, 30]))
        for _ in range(2)
    ]  # fmt: skip
    rows = torch.cat([world.observation_model.targets(e.obs)[i, :n] for e in episodes for i, n in enumerate((700, 30))])
    metric = NormalisedError.fit(world.observation_model, episodes)
    assert torch.allclose(metric.mean, rows.mean(0), atol=1e-6)
    assert torch.allclose(metric.variance, rows.var(0), rtol=1e-5)


class Parrot:
    """ObservationModel whose guess is the feature itself."""

    def predictions(self, feat):
        return feat


def test_the_energy_score_is_that_of_a_loop_by_hand_and_knows_too_much_doubt():
    gen = torch.Generator().manual_seed(0)
    metric = NormalisedError(torch.zeros(3), torch.tensor([1.0, 4.0, 1e-9]), torch.tensor([True, True, False]))
    feat, truth = torch.randn(5 * 4, 3, generator=gen), torch.randn(5, 3, generator=gen)
    error, energy = metric.score(Parrot(), feat, 4, truth)
    scale = torch.tensor([1.0, 2.0])
    for i in range(5):
        x, y = feat[4 * i : 4 * i + 4, :2] / scale, truth[i, :2] / scale
        away = sum((a - y).norm() for a in x) / 4
        apart = sum((a - b).norm() for a in x for b in x) / (4 * 3)
        assert float(energy[i]) == pytest.approx(float(away - apart / 2) / 2**0.5, rel=1e-4)
        assert float(error[i]) == pytest.approx(float((x.mean(0) - y).square().mean()), rel=1e-4)
    truth = torch.randn(4000, 3, generator=gen)
    scores = []
    for spread in (0.5, 1.0, 2.0):  # of dreams of a truth whose own is 1
        dreams = spread * torch.randn(4000 * 8, 3, generator=gen)
        metric = NormalisedError(torch.zeros(3), torch.ones(3), torch.ones(3, dtype=torch.bool))
        scores.append(float(metric.score(Parrot(), dreams, 8, truth)[1].mean()))
    assert scores[1] < scores[0]
    assert scores[1] < scores[2]
