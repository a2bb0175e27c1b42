"""The agent from Python: predict as stable-baselines3 has it, and the exported acting path."""

import inspect
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, Metronome, metronomes, untrained
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy

from agent.errors import UsageError
from agent.evaluation.episodes import run_episodes
from agent.interop.export import export_notes, export_policy
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.dreamer import Dreamer
from agent.learning.optimizer import OptimizerConfig
from agent.spaces import ActionSpec, Spaces
from world_model import ExitRule, LoopConfig, ModelConfig
from world_model.images import ImageConfig


def lively(make_envs=metronomes):
    """An untrained agent whose actions are not all alike."""
    agent = untrained(make_envs)
    torch.nn.init.normal_(agent.averaged.behavior.actor.net.out.weight)
    return agent


def test_predict_is_act_for_one_observation_or_many():
    agent, rng = lively(), np.random.default_rng(0)
    rows = rng.normal(size=(5, 3, 2)).astype(np.float32)
    many, one, named = None, None, None
    for t, obs in enumerate(rows):
        start = np.array([t == 0, t in (0, 2), t == 0])
        actions, many = agent.predict(obs, many, start, deterministic=True)
        alone, one = agent.predict(obs[1], one, bool(start[1]), deterministic=True)
        same, named = agent.predict({"state": obs}, named, start, deterministic=True)
        assert alone.shape == (1,)
        assert np.allclose(alone, actions[1], atol=1e-6)
        assert np.array_equal(same, actions)
    forgetful, _ = agent.predict(rows[-1], None, deterministic=True)
    assert not np.allclose(forgetful, actions)
    sampled, _ = agent.predict(rows[-1], many, deterministic=False)
    assert not np.allclose(sampled, actions)


def test_predict_samples_by_default_as_in_stable_baselines3():
    agent = lively()
    obs = np.zeros((4, 2), np.float32)
    torch.manual_seed(0)
    default, _ = agent.predict(obs)
    torch.manual_seed(0)
    sampled, _ = agent.predict(obs, deterministic=False)
    mean, _ = agent.predict(obs, deterministic=True)
    assert np.array_equal(default, sampled)
    assert not np.allclose(default, mean)
    parameters = [inspect.signature(kind.predict).parameters for kind in (Dreamer, BaseAlgorithm)]
    ours, theirs = ([(p.name, p.default) for p in list(signature.values())[1:]] for signature in parameters)
    assert ours == theirs


def test_stable_baselines3_evaluates_it_and_agrees_with_us():
    agent = lively()
    theirs, _ = evaluate_policy(agent, Metronome(), n_eval_episodes=3, warn=False)
    ours = run_episodes(agent, metronomes, 3, seed=0)
    assert theirs == pytest.approx(np.mean([episode["return"] for episode in ours]), rel=1e-5)


@pytest.mark.parametrize("loops", [1, 3])
def test_the_exported_program_acts_like_the_agent(tmp_path, loops):
    agent = lively()
    acting = export_policy(agent, tmp_path / "policy.pt2", loops)
    program = torch.export.load(tmp_path / "policy.pt2").module()
    agent.averaged.world.core.rule = ExitRule()
    state, memory = acting.initial(4), None
    for t, obs in enumerate(torch.randn(6, 4, 2)):
        first = torch.full((4,), t == 0)
        action, deter, stoch = program(obs, state[0], first, *state[1:])
        state = action, deter, stoch
        wanted, memory, depth = agent.act({"state": obs.numpy()}, memory, first.numpy(), False, loops)
        assert (depth == loops).all()
        assert np.allclose(action.clamp(-1, 1).numpy(), wanted, atol=1e-5)


def test_an_export_says_what_the_program_does_not_do():
    agent = lively()
    assert export_notes(agent) == []
    agent.averaged.behavior.cfg = replace(agent.averaged.behavior.cfg, jump=3)
    assert "holds every action for 3 decisions" in export_notes(agent)[0]
    agent.averaged.behavior.cfg = replace(agent.averaged.behavior.cfg, jump=1, decisions="plan")
    assert export_notes(agent) == ["this is the actor, and evaluations of this run plan"]


def test_the_exported_program_of_an_agent_that_sees_images_acts_like_it(tmp_path):
    torch.manual_seed(0)
    loop = LoopConfig(tokens=2, width=8, units=16)
    model = ModelConfig(loop, groups=3, classes=4, units=16, image=ImageConfig(base_channels=2))
    behavior = BehaviorConfig(horizon=3, starts=8, units=16)
    spaces = Spaces({"camera": (16, 32, 3), "joints": 3}, ActionSpec(4, True))
    agent = Dreamer(model, behavior, OptimizerConfig(), spaces)
    agent.averaged.world.observation_model.images.precision = "float32"  # as the exported program
    torch.nn.init.normal_(agent.averaged.behavior.actor.net.out.weight)
    acting = export_policy(agent, tmp_path / "policy.pt2", 2)
    program = torch.export.load(tmp_path / "policy.pt2").module()
    agent.averaged.world.core.rule = ExitRule()
    state, memory, choices = acting.initial(4), None, set()
    for t in range(6):
        obs = {"camera": torch.randint(256, (4, 16, 32, 3), dtype=torch.uint8), "joints": 3 * torch.randn(4, 3)}
        first = torch.full((4,), t == 0)
        state = program(obs, state[0], first, *state[1:])
        wanted, memory, _ = agent.act({k: v.numpy() for k, v in obs.items()}, memory, first.numpy(), False, 2)
        assert np.array_equal(state[0].argmax(-1).numpy(), wanted)
        choices.update(wanted.tolist())
    assert len(choices) > 1
    views = {name: value.numpy()[:, ::-1] for name, value in obs.items()}  # as OpenGL gives frames
    copies = {name: value.copy() for name, value in views.items()}
    shown, copied = (agent.predict(seen, memory, deterministic=True)[0] for seen in (views, copies))
    assert np.array_equal(shown, copied)


def test_the_command_exports(finished, script, tmp_path):
    run, _ = finished
    done = script("evaluate.py", "export", run, "policy.pt2", "--max-loops", 2)
    assert done.returncode == 0, done.stderr
    assert "observation state (4) -> action (2), 2 loops" in done.stdout
    assert (tmp_path / "policy.pt2").exists()
    refused = script("evaluate.py", "export", run, "nowhere/policy.pt2")
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr
    with pytest.raises(UsageError, match="cannot be written"):
        export_policy(lively(), tmp_path / "nowhere" / "x.pt2", 1)
    latest = run / "checkpoints" / "latest.pt"
    before = latest.read_bytes()
    refused = script("evaluate.py", "export", run, latest)
    assert (refused.returncode, latest.read_bytes() == before) == (2, True)
    assert "exists and is no exported program" in refused.stderr


def test_the_agent_is_imported_from_the_package_and_torch_only_then():
    code = (
        "import sys, gymnasium, agent\n"
        "assert 'LoopedDreamer/Dream-v0' in gymnasium.registry\n"
        "assert 'torch' not in sys.modules\n"
        "from agent import Dreamer\n"
        "assert Dreamer.__module__ == 'agent.learning.dreamer'\n"
        "assert 'Dreamer' in agent.__all__ and not hasattr(agent, 'Dremer')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_observation_with_other_entries_is_answered_with_help():
    agent = untrained(metronomes)
    with pytest.raises(ValueError, match="no entry 'state' .it has 'position'.: .*envs.make_env"):
        agent.predict({"position": np.zeros(2, np.float32)})
