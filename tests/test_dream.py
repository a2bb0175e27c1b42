"""The learned world model as an environment."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import untrained
from gymnasium.utils.env_checker import check_env
from small import make_world, random_state

from agent.errors import UsageError
from agent.interop.baselines import DreamVecEnv
from agent.interop.dream_env import DreamBatch, load_dream
from agent.spaces import ActionSpec

SPEC = ActionSpec(2, False)


def dreams(count=3, horizon=4, seed=0, ends=-20.0, starts=5):
    """Dreams that go on, unless `ends` is large."""
    world = make_world()
    with torch.no_grad():
        world.cont.out.weight.zero_()
        world.cont.out.bias.fill_(-ends)
    return DreamBatch(world, SPEC, random_state(world, starts), count, horizon, seed)


def test_dreams_are_those_of_the_world_model(fixed_levels):
    batch = dreams(count=3)
    before = batch.state
    actions = np.array([[0.5, -1.0], [0.0, 0.0], [1.0, 1.0]], np.float32)
    step = batch.step(actions)
    rollout = batch.world.imagine(before, torch.from_numpy(actions)[:, None], 1)
    assert np.allclose(step.reward, rollout.rewards[:, 0].numpy(), atol=1e-6)
    shown = batch.world.decode(rollout.states.map(lambda leaf: leaf[:, 1]))
    for name, value in shown.items():
        assert np.allclose(step.obs[name], value.numpy(force=True), atol=1e-6)


def test_episodes_are_cut_at_the_horizon_or_end_where_the_model_says_so():
    batch = dreams(horizon=3)
    cuts = [batch.step(np.zeros((3, 2), np.float32)).truncated for _ in range(3)]
    assert [cut.all() for cut in cuts] == [False, False, True]
    over = dreams(ends=20.0).step(np.zeros((3, 2), np.float32))
    assert over.terminated.all()
    assert not over.truncated.any()


def test_new_episodes_begin_in_the_run_s_experience_and_leave_the_others_alone():
    batch = dreams(count=4)
    batch.step(np.zeros((4, 2), np.float32))
    before = batch.state
    which = torch.tensor([True, False, True, False])
    batch.reset(which)
    assert torch.equal(batch.state.deter[~which], before.deter[~which])
    known = batch.start_states.deter.flatten(1)
    for row in batch.state.deter[which].flatten(1):
        assert (known == row).all(1).any()
    assert batch.elapsed.tolist() == [0, 1, 0, 1]


def test_the_same_seed_is_the_same_dream_and_other_generators_are_left_alone():
    state, runs = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        batch = dreams(seed=seed)
        state = torch.get_rng_state()
        runs.append(np.concatenate([batch.step(np.ones((3, 2), np.float32)).obs["joints"] for _ in range(3)]))
        assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize(("count", "horizon"), [(0, 3), (3, 0)])
def test_dreams_need_a_number_and_a_horizon(count, horizon):
    with pytest.raises(UsageError, match="at least 1"):
        dreams(count, horizon)


def test_a_run_as_a_gymnasium_environment(finished):
    env = gym.make("agent:LoopedDreamer/Dream-v0", run=finished[0], horizon=5)
    check_env(env.unwrapped, skip_render_check=True)
    obs, _ = env.reset(seed=1)
    assert obs["state"].shape == (4,)
    over = [env.step(env.action_space.sample())[2:4] for _ in range(5)]
    assert any(any(end) for end in over)
    env.close()


def test_many_dreams_for_stable_baselines3(finished):
    env = DreamVecEnv(finished[0], "toy:cue5", count=6, horizon=3)
    obs = env.reset()
    assert obs.shape == (6, 4)
    for _ in range(3):
        obs, reward, done, infos = env.step(np.zeros(6, int))
        assert (obs.shape, reward.shape) == ((6, 4), (6,))
        for info, over in zip(infos, done, strict=True):
            assert ("terminal_observation" in info) == over
    assert done.any()
    env.seed(5)
    first = env.reset()
    assert not np.array_equal(env.reset(), first)
    env.seed(5)
    np.testing.assert_array_equal(env.reset(), first)
    assert env.get_attr("render_mode", [0, 1]) == [None, None]
    with pytest.raises(UsageError, match="dreams of toy:cue5, not of toy:serial"):
        DreamVecEnv(finished[0], "toy:serial")


def test_a_baseline_learns_in_the_dream_and_is_judged_in_the_real_world(finished, script):
    words = ("toy:cue5", "--agent", "ppo", "--preset", "debug", "--no-video", "--eval.episodes", 2)
    done = script("train_agent.py", *words, "--dream", finished[0], "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "learning in the dream of" in done.stdout
    refused = script("train_agent.py", "toy:serial", *words[1:], "--dream", finished[0], "--run-dir", "other")
    assert refused.returncode == 2
    assert "dreams of toy:cue5" in refused.stderr
    alone = script("train_agent.py", "toy:cue5", "--dream", finished[0])
    assert alone.returncode == 2
    assert "--dream is for baselines" in " ".join(alone.stderr.replace("│", " ").split())


def test_an_agent_of_the_library_that_learned_in_the_dream_is_scored(finished, script, tmp_path):
    from stable_baselines3 import A2C

    learner = A2C("MlpPolicy", DreamVecEnv(finished[0], count=2, horizon=3), n_steps=4, seed=0)
    learner.learn(16).save(tmp_path / "a2c.zip")
    words = ("evaluate.py", "policy", finished[0], "--episodes", 2, "--json", "-", "--sb3")
    played = script(*words, "a2c.zip")
    assert played.returncode == 0, played.stderr
    assert len(json.loads(played.stdout)["episodes"]) == 2
    (tmp_path / "no.zip").write_text("nothing")
    for file, message in (("no.zip", "is no agent of stable-baselines3"), ("none.zip", "there is no file")):
        refused = script(*words, file)
        assert refused.returncode == 2
        assert message in refused.stderr


def test_runs_that_cannot_dream(finished, tmp_path):
    with pytest.raises(UsageError, match="holds no experience"):
        load_dream(finished[0] / "checkpoints" / "best.pt")
    with pytest.raises(UsageError, match="is not a run folder"):
        load_dream(tmp_path)
    assert untrained().run_cap >= 1
