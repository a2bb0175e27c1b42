"""Recordings, and how far dreams can be trusted: alignment, closed forms, the command."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import counters, untrained

from agent.data.dataset import Episodes
from agent.evaluation.normalised_error import NormalisedError
from agent.evaluation.recording import Recording, record
from agent.evaluation.rollout_error import (
    crossings,
    format_results,
    longest_horizon,
    mean_actions,
    realised_return,
    rollout_errors,
)
from agent.evaluation.rollout_plots import draw_truth, example_dream
from envs import make_vector_env
from world_model import LatentState


@pytest.mark.parametrize("policy", ["agent", "random"])
def test_recorded_rows_are_arrivals(policy):
    """toy:counter: row t says t, its reward is t, even episodes terminate and odd ones are truncated."""
    agent = untrained()
    player = agent if policy == "agent" else None
    recording = record(player, agent.spaces, counters, range(6))
    episodes = recording.episodes
    assert recording.policy == policy
    assert (episodes.length >= 4).all()  # 3 to 12 steps and the first row
    for i, length in enumerate(episodes.length.tolist()):
        assert torch.equal(episodes.obs["state"][i, :length, 0], torch.arange(float(length)))
        assert torch.equal(episodes.reward[i, :length], torch.arange(float(length)))
        assert (episodes.prev_action[i, 0] == 0).all()
        assert (episodes.prev_action[i, 1:length] != 0).all()
        for leaf in (episodes.obs["state"], episodes.reward, episodes.prev_action):
            assert not leaf[i, length:].any()
    assert recording.terminal.all()  # the first episode after a seeded reset has the number 0
    assert recording.contacts is None
    again = record(player, agent.spaces, counters, range(6))
    assert torch.equal(again.episodes.prev_action, episodes.prev_action)


def test_recordings_use_their_seeds_and_leave_generators_alone():
    agent, state = untrained(), torch.get_rng_state()
    seeds = []

    def make(count):
        envs = counters(count)
        reset = envs.reset

        def spy(*, seed=None, options=None):
            seeds.append(seed)
            return reset(seed=seed, options=options)

        envs.reset = spy
        return envs

    record(None, agent.spaces, make, range(5, 7))
    assert seeds == [[5, 6]]
    assert torch.equal(torch.get_rng_state(), state)


def test_contacts_are_recorded_where_the_simulator_tells():
    make = lambda count: make_vector_env("dmc:walker_stand", count, 0)  # noqa: E731
    agent = untrained(make)
    envs = make(1)
    _, info = envs.reset(seed=[9])
    envs.close()
    # A whole episode takes long; the first rows tell.
    limited = lambda count: Short(make(count))  # noqa: E731
    recording = record(None, agent.spaces, limited, range(9, 10))
    assert recording.contacts.shape == recording.episodes.reward.shape
    assert recording.contacts[0, 0] == info["dm_control.contacts"][0]


class Short:
    """Ends every episode after 5 steps."""

    def __init__(self, envs):
        self.envs, self.steps = envs, 0

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def step(self, action):
        self.steps += 1
        obs, reward, terminated, truncated, info = self.envs.step(action)
        return obs, reward, terminated, truncated | (self.steps == 5), info


def test_realised_return_by_hand():
    agent = untrained()
    behavior, gamma = agent.averaged.behavior, agent.behavior.cfg.gamma
    torch.nn.init.normal_(behavior.critic.net.out.weight)
    reward = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 5.0, 3.0, 4.0]])
    recording = Recording("agent", Episodes({}, torch.zeros(2, 4, 1), reward, torch.tensor([3, 4])), None,
                          torch.tensor([True, False]))  # fmt: skip
    zero = agent.world.initial(2)
    states = LatentState(torch.randn(2, 4, *zero.deter.shape[1:]), torch.rand(2, 4, *zero.stoch.shape[1:]))
    returns = realised_return(behavior, recording, states)
    end = float(behavior.critic.value(states.map(lambda leaf: leaf[1, 3]).feat()[None]))
    assert returns[0].tolist() == pytest.approx([1 + gamma * 2, 2.0, 0.0, 0.0])
    expected = [5 + gamma * (3 + gamma * (4 + gamma * end)), 3 + gamma * (4 + gamma * end), 4 + gamma * end, end]
    assert returns[1].tolist() == pytest.approx(expected, abs=5e-3)  # the two-hot value is summed in another order


def test_dreams_hold_actions_as_the_recording_did():
    """Three decisions each: a window at row 4 begins in the middle of the second one."""
    actor = SimpleNamespace(act=lambda feat, sample: feat[:, :1])
    behavior = SimpleNamespace(cfg=SimpleNamespace(jump=3, plans=False), actor=actor)
    act = mean_actions(behavior, torch.tensor([[-1.0], [-2.0]]), torch.tensor([4, 3]))
    actions = torch.cat([act(torch.full((2, 5), float(step))) for step in range(6)], 1)
    assert actions.tolist() == [[-1, -1, 2, 2, 2, 5], [0, 0, 0, 3, 3, 3]]
    behavior.cfg.jump = 1
    act = mean_actions(behavior, torch.tensor([[-1.0]]), torch.tensor([4]))
    assert [float(act(torch.full((1, 5), float(step)))) for step in range(3)] == [0, 1, 2]


def test_where_the_model_stops_being_better():
    rows = [
        {"policy": "agent", "loops": "1", "step": k, "observation": 0.1 * k, "copy": 0.25, "mean": 1.0,
         "reward": 0.3, "reward_copy": 0.1, "reward_mean": 0.4}
        for k in (1, 2, 3, 4)
    ]  # fmt: skip
    assert crossings(rows) == [
        {"policy": "agent", "loops": "1", "steps": 4, "observation_copy": 3, "observation_mean": None,
         "reward_copy": 1, "reward_mean": None}
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    agent = untrained()
    recordings = [record(player, agent.spaces, counters, range(8)) for player in (agent, None)]
    state = torch.get_rng_state()
    parts = agent.averaged.world, agent.averaged.behavior
    results = rollout_errors(*parts, recordings, 50, (1, 3), windows=32)
    assert torch.equal(torch.get_rng_state(), state)
    return agent, recordings, results


def test_simple_predictors_are_the_same_for_every_number_of_loops(measured):
    _, _, results = measured
    for name in ("copy", "mean", "reward_copy", "reward_mean"):
        one, other = (results.curve("agent", loops, name)[1] for loops in ("exit", "3"))
        assert np.array_equal(one, other)
    assert not np.array_equal(*(results.curve("agent", loops, "observation")[1] for loops in ("1", "3")))
    assert (results.curve("random", "3", "depth")[1] == 3).all()


def test_copying_a_counter_is_wrong_by_as_many_as_were_counted(measured):
    _, _, results = measured
    steps, wrong = results.curve("agent", "1", "reward_copy")
    assert wrong == pytest.approx(steps)


def test_horizons_beyond_the_episodes_are_cut_with_a_note(measured):
    _, recordings, results = measured
    longest = longest_horizon(recordings)
    assert max(row["step"] for row in results.errors) == longest < 50
    assert results.notes == [f"the episodes are long enough for {longest} steps, not for 50"]
    assert f"after {longest} steps" not in format_results(results).splitlines()[0]
    assert "norm of the state, 3 loops" in format_results(results)


def test_the_mean_has_an_error_of_one(measured):
    agent, recordings, _ = measured
    world = agent.averaged.world
    metric = NormalisedError.fit(world.observation_model, [recording.episodes for recording in recordings])
    errors = []
    for recording in recordings:
        real = torch.arange(recording.episodes.reward.shape[1]) < recording.episodes.length[:, None]
        errors.append(metric.error(metric.mean, world.observation_model.targets(recording.episodes.obs)[real]))
    assert float(torch.cat(errors).mean()) == pytest.approx(1.0, rel=0.02)


def test_the_norm_of_the_state_is_measured_for_a_thousand_steps(measured):
    _, _, results = measured
    assert {row["loops"] for row in results.norms} == {"exit", "1", "3"}
    assert max(row["step"] for row in results.norms) == 1000
    assert all(0 < row["mean"] <= row["largest"] < 100 for row in results.norms)


def test_dreams_are_drawn_in_the_units_of_the_recording():
    agent = untrained()
    world, recording = agent.averaged.world, record(agent, agent.spaces, counters, range(2))
    world.observation_model.standardise.mean.fill_(2.0)
    world.observation_model.standardise.var.fill_(9.0)
    example = example_dream(world, recording, 4)
    axis = draw_truth(world, recording, example).axes[0]
    drawn = axis.lines[1].get_ydata()  # behind the recorded values: the mean of the dreams
    decoded = next(iter(world.decode(example.dream.states).values()))[:, 1:]  # (SAMPLES, H, O)
    assert any(np.allclose(drawn, decoded.mean(0)[:, i].numpy(), rtol=1e-4) for i in range(decoded.shape[-1]))


def test_the_command_writes_tables_and_pictures(finished, script, tmp_path):
    run, _ = finished
    words = ("model", run, "--episodes", 3, "--horizon", 3, "--windows", 8, "--max-loops", 1, 2, "--out", "found")
    done = script("evaluate.py", *words, "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert {row["loops"] for row in content["errors"]} == {"exit", "1", "2"}
    assert "with exits" in done.stderr
    names = {path.name for path in (tmp_path / "found").iterdir()}
    pictures = {"errors", "norms", *(f"{kind}_{policy}" for kind in ("map", "truth", "loops")
                                     for policy in ("agent", "random"))}  # fmt: skip
    assert {f"{name}.png" for name in pictures} | {"errors.csv", "values.csv", "norms.csv", "model.json"} <= names
    assert any(name.startswith("events.out") for name in names)
    with (tmp_path / "found" / "errors.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 3 * 3  # policies, loops, steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no run nowhere"),
        (["RUN", "--horizon", "0"], "--horizon must be at least 1"),
        (["RUN", "--max-loops", "0"], "--max-loops must be from 1 to 10,000"),
        (["RUN", "--episodes", "0"], "--episodes must be at least 1"),
    ],
)
def test_bad_input(finished, script, words, message):
    words = [str(finished[0]) if word == "RUN" else word for word in words]
    refused = script("evaluate.py", "model", *words)
    assert refused.returncode == 2
    assert message in " ".join(refused.stderr.replace("│", " ").split())
