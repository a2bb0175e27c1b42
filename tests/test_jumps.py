"""Jumps: which rows they cover, what they sum, and that values do not depend on their length."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import make_world, random_state

from agent.data.replay import ReplayBuffer
from agent.learning.policy import Memory
from agent.learning.sampling import sample
from agent.runs.presets import preset
from envs import make_vector_env
from world_model import Batch, LatentState
from world_model.jumps import action_input, jump_rows, pack

GAMMA = 0.9


def rows(length=12, first=(), last=(), terminal=()):
    """One sequence whose observation, action and reward are the number of the row."""
    number = torch.arange(float(length))[None]  # (1, T)
    flags = {name: torch.zeros(1, length, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    for name, places in (("is_first", first), ("is_last", last), ("is_terminal", terminal)):
        flags[name][0, list(places)] = True
    return Batch({"state": number[..., None]}, number[..., None], number, **flags)


def test_a_jump_covers_the_rows_up_to_its_last():
    batch, last = jump_rows(rows(), 3, 4, GAMMA)
    assert last.tolist() == [[2, 5, 8, 11]]
    assert batch.span.tolist() == [[3, 3, 3, 3]]
    assert batch.obs["state"].flatten().tolist() == [2, 5, 8, 11]
    assert batch.prev_action[0, 1, :, 0].tolist() == [3, 4, 5, 0]  # J = 4, of which three are taken
    assert batch.reward[0, 1] == pytest.approx(3 + GAMMA * 4 + GAMMA**2 * 5)


def test_a_jump_ends_with_the_episode_and_the_next_one_begins_alone():
    batch, last = jump_rows(rows(first=[5], last=[4], terminal=[4]), 3, 3, GAMMA)
    assert last.tolist() == [[2, 4, 5, 8]]
    assert batch.span.tolist() == [[3, 3, 1, 3]]  # the second terminates, and does not say when
    assert batch.prev_action[0, 1, :, 0].tolist() == [3, 4, 2]  # two taken; the third that of the decision before them
    assert batch.is_last.tolist() == batch.is_terminal.tolist() == [[False, True, False, False]]
    assert batch.is_first.tolist() == [[False, False, True, False]]
    assert batch.reward[0, 1] == pytest.approx(3 + GAMMA * 4)


def test_a_jump_that_is_cut_off_says_so():
    batch, last = jump_rows(rows(first=[5], last=[4]), 3, 3, GAMMA)
    assert last.tolist() == [[2, 4, 5, 8]]
    assert batch.span.tolist() == [[3, 2, 1, 3]]
    assert batch.prev_action[0, 1, :, 0].tolist() == [3, 4, 0]


def test_actions_that_a_terminated_jump_never_took_are_of_its_own_episode():
    batch, last = jump_rows(rows(first=[1, 5], last=[0, 4], terminal=[0, 4]), 6, 8, GAMMA)
    assert last.tolist() == [[0, 1]]
    batch, last = jump_rows(rows(length=18, first=[1, 5], last=[0, 4], terminal=[0, 4]), 6, 8, GAMMA)
    assert last[0, 2] == 4
    # three taken; nothing before them but the first row, which no action led to; and none beyond the sixth
    assert batch.prev_action[0, 2, :, 0].tolist() == [2, 3, 4, 4, 4, 4, 0, 0]


@pytest.mark.parametrize("jump", [1, 2, 4])
def test_how_often_a_jump_terminates_is_what_its_decisions_do_together(jump):
    """Every decision ends an episode with the chance 0.2; what a jump of k is said to cover must not tell."""
    gen, counts = torch.Generator().manual_seed(jump), torch.zeros(5, 2)
    for length in (1, 2, 3, 4):  # as drawn in training
        ended = torch.rand(2000, 12 * length, generator=gen) < 0.2
        first = F.pad(ended[:, :-1], (1, 0))
        ended &= ~first
        number = torch.zeros(2000, 12 * length)
        batch, _ = jump_rows(Batch({}, number[..., None], number, first, ended, ended), length, 4, 1.0)
        for span in range(1, 5):
            chosen = (batch.span == span) & ~batch.is_first
            counts[span] += torch.tensor([float(batch.is_terminal[chosen].sum()), float(chosen.sum())])
    assert float(counts[jump, 0] / counts[jump, 1]) == pytest.approx(1 - 0.8**jump, abs=0.02)


def test_a_jump_ends_before_an_episode_whose_predecessor_has_no_last_row():
    _, last = jump_rows(rows(first=[4]), 3, 3, GAMMA)
    assert last.tolist() == [[2, 3, 4, 7]]


def test_jumps_of_one_decision_are_the_rows():
    given = rows(first=[5], last=[4])
    batch, last = jump_rows(given, 1, 2, GAMMA)
    assert last.tolist() == [list(range(12))]
    assert torch.equal(batch.reward, given.reward)
    assert torch.equal(batch.prev_action[:, :, 0], given.prev_action)


def test_batch_mates_do_not_mix():
    one, two = rows(first=[5], last=[4]), rows()
    both = Batch(
        {"state": torch.cat([one.obs["state"], two.obs["state"]])},
        *(torch.cat(pair) for pair in zip(one[1:6], two[1:6], strict=True)),
    )
    batch, last = jump_rows(both, 3, 3, GAMMA)
    for row, alone in enumerate((one, two)):
        expected, where = jump_rows(alone, 3, 3, GAMMA)
        assert torch.equal(last[row], where[0])
        assert torch.equal(batch.prev_action[row], expected.prev_action[0])
        assert torch.equal(batch.reward[row], expected.reward[0])


def test_what_comes_after_the_actions_taken_is_not_read():
    actions = torch.randn(5, 4, 2)
    taken = torch.tensor([1, 2, 3, 4, 2])
    changed = actions + 10.0 * (torch.arange(4) >= taken[:, None])[..., None]
    assert torch.equal(pack(actions, taken), pack(changed, taken))
    assert torch.equal(pack(actions, taken)[:, 8:].argmax(-1) + 1, taken)


def test_a_held_action_is_taken_at_every_decision():
    action = torch.randn(3, 2)
    action = action.clamp(-1, 1)
    assert torch.equal(action_input(action, 3, 4), pack(action[:, None].expand(3, 4, 2), torch.full((3,), 3)))


@pytest.mark.parametrize("jump", [1, 2, 3, 4, 6])
def test_values_on_a_chain_do_not_depend_on_the_length_of_jumps(jump):
    """Rewards 0, 1, .., 11 along an episode that ends: its value from the start, summed jump by jump."""
    batch, _ = jump_rows(rows(last=[11], terminal=[11]), jump, 6, GAMMA)
    value, discount = 0.0, 1.0
    for reward, taken in zip(batch.reward[0].tolist(), batch.span[0].tolist(), strict=True):
        value += discount * reward
        discount *= GAMMA**taken
    assert value == pytest.approx(sum(GAMMA**t * t for t in range(12)), rel=1e-5)


def test_what_is_sampled_lies_where_it_is_said_to_lie():
    """Places of the last rows of jumps: their observations are the numbers of the rows, their actions those before."""
    torch.manual_seed(0)  # lengths are drawn: with others one of four may not come up in 20 batches
    replay = ReplayBuffer(400, 1, {"state": 1}, 1, (1, 2), (1, 2), seed=3)
    for number in range(300):
        value, no = np.full((1, 1), number, np.float32), np.zeros(1, bool)
        flags = {"is_first": no | (number % 50 == 0), "is_last": no | (number % 50 == 49), "is_terminal": no}
        row = {"obs/state": value, "prev_action": value / 300, "reward": value[0], **flags}
        replay.add(row, LatentState(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)))
    world = SimpleNamespace(cfg=SimpleNamespace(jump=4))
    agent = SimpleNamespace(world=world, behavior=SimpleNamespace(cfg=SimpleNamespace(gamma=GAMMA)), device="cpu")
    lengths = set()
    for _ in range(20):
        batch, where = sample(agent, replay, 8, 6)
        assert where.shape == (2, 8, 6)
        assert np.array_equal(batch.obs["state"][..., 0].numpy(), where[1])
        first = batch.prev_action[:, :, 0, 0] * 300
        assert torch.allclose(first, torch.from_numpy(where[1]) - batch.span + 1.0, atol=1e-3)
        lengths.add(int(batch.span.max()))
    assert lengths == {1, 2, 3, 4}


# ---------------------------------------------------------------------- the world model


def test_a_step_that_no_jump_is_as_long_as_is_refused():
    world = make_world(jump=2)
    start = random_state(world)
    for source in (lambda feat: torch.zeros(len(feat), 2), torch.zeros(3, 2, 2)):
        with pytest.raises(ValueError, match="a step covers 1 to 2 decisions with --model.jump 2, not 3"):
            world.imagine(start, source, 2, jump=3)
    with pytest.raises(ValueError, match="not 3"):
        world.imagine(start, torch.zeros(3, 2, 3, 2), 2)
    alone = make_world()
    with pytest.raises(ValueError, match="1 to 1"):
        alone.imagine(start, torch.zeros(3, 2, 2), 2, jump=2)
    assert alone.imagine(start, torch.zeros(3, 2, 1, 2), 2).feat.shape[0] == 3  # steps of one decision


def test_a_model_without_jumps_reads_actions_as_they_are():
    action = torch.rand(3, 2)
    assert torch.equal(action_input(action, None, 1), action)
    assert torch.equal(action_input(3 * action + 1, None, 1), torch.ones(3, 2))


def test_an_action_that_is_held_is_dreamed_like_the_same_action_at_every_decision():
    world = make_world(jump=4)
    start, action = random_state(world), torch.rand(3, 5, 2)
    held = world.imagine(start, action, 5, sample=False, jump=3)
    each = world.imagine(start, action[:, :, None].expand(3, 5, 3, 2), 5, sample=False)
    other = world.imagine(start, action, 5, sample=False, jump=2)
    assert torch.equal(held.feat, each.feat)
    assert not torch.equal(held.feat, other.feat)


def walk(sequences, length, seed):
    """Positions that follow the first action between 0 and 1, as a batch of single decisions."""
    gen = torch.Generator().manual_seed(seed)
    action = torch.rand(sequences, length, 2, generator=gen) * 2 - 1
    at, seen = torch.rand(sequences, generator=gen), []
    for t in range(length):
        at = (at + 0.1 * action[:, t, 0]).clamp(0, 1)
        seen.append(at)
    position = torch.stack(seen, 1)[..., None]
    no = torch.zeros(sequences, length, dtype=torch.bool)
    obs = {"joints": position.expand(-1, -1, 3), "touch": position.expand(-1, -1, 2)}
    return Batch(obs, action, position[..., 0], no, no, no)


def test_one_jump_learns_what_its_decisions_do_together():
    """Trained on jumps of one to four decisions: each of four actions moves the position that one jump predicts."""
    world = make_world(jump=4, width=32, units=32)
    adam = torch.optim.Adam(world.parameters(), 3e-3)
    for update in range(240):
        jump = 1 + update % 4
        batch, _ = jump_rows(walk(16, 6 * jump, update), jump, 4, 1.0)
        world.observation_model.track(batch.obs)
        loss, _ = world.loss(world.observe_sequence(batch, 1), batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
    rows = walk(512, 20, 10_000)
    with torch.no_grad():
        seen, _ = jump_rows(rows.map(lambda leaf: leaf[:, :16]), 4, 4, 1.0)
        state = world.observe_sequence(seen, 1).states.map(lambda leaf: leaf[:, -1])
        actions = rows.prev_action[:, 16:]  # (B, k, A)
        dream = world.imagine(state, actions[:, None], 1, sample=False)
        before, after = world.decode(dream.states)["joints"][..., 0].unbind(1)
    moved = (after - before)[:, None]
    effect = torch.linalg.lstsq(actions[..., 0], moved).solution  # (k, 1)
    other = torch.linalg.lstsq(actions[..., 1], moved).solution  # of the actions that do nothing
    assert effect.min() > 0.03  # in truth 0.1, less at the ends
    assert other.abs().max() < 0.02


@pytest.mark.parametrize("task", ["gym:Pendulum-v1", "toy:cue"])
def test_an_agent_that_acts_holds_its_action_as_long_as_in_imagination(task, make_trainer, tmp_path):
    config = preset("debug")
    config = replace(config, model=replace(config.model, jump=3), behavior=replace(config.behavior, jump=3))
    agent = make_trainer(tmp_path, partial(make_vector_env, task, seed=0), config=config).agent
    for explore in (True, False):
        memory, actions, gen = None, [], np.random.default_rng(0)
        for step in range(9):  # the second environment begins a new episode at step 4
            obs = {name: gen.random((2, size), np.float32) for name, size in agent.spaces.obs.items()}
            _, memory, _ = agent.act(obs, memory, np.array([step == 0, step in (0, 4)]), explore)
            actions.append(memory.action)
        changed = [(a != b).any(-1).tolist() for a, b in pairwise(actions)]  # (T-1, E)
        may_change = [[step in (3, 6), step in (3, 4, 7)] for step in range(1, 9)]
        if agent.spaces.action.discrete:  # a new choice may be the old one
            assert all(not any(np.greater(*both)) for both in zip(changed, may_change, strict=True))
        else:
            assert changed == may_change
    assert memory.holds.tolist() == [0, 1]
    assert torch.equal(Memory.of(memory.plain(), torch.device("cpu")).holds, memory.holds)
