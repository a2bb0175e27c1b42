"""Environments are closed by whoever made them, also where something fails."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Metronome, metronomes, untrained

from agent.data.checkpoint import write_checkpoint
from agent.errors import EnvironmentFailure, UsageError
from agent.evaluation.episodes import EvalConfig, run_episodes
from agent.evaluation.recording import record
from agent.evaluation.video import save_video
from agent.interop.baselines import Baseline, make_sb3_env
from agent.spaces import spaces_of
from agent.training.train_config import TrainConfig


class Counted(Metronome):
    """Knows which of its instances are open; fails at step `fails_at`."""

    opened = []
    fails_at = None
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode
        Counted.opened.append(self)

    def step(self, action):
        if self.time == Counted.fails_at:
            raise RuntimeError("broken")
        return super().step(action)

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        if self in Counted.opened:
            Counted.opened.remove(self)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Nothing is open at the end of the test."""
    monkeypatch.setattr(Counted, "opened", [])
    if "Counted-v0" not in gym.registry:
        gym.register("Counted-v0", entry_point=Counted)
    yield
    assert Counted.opened == []


def checkpoint_of_another_task(finished, folder):
    """The finished run's checkpoint, with the task of `Counted`, whose observations are others."""
    content = torch.load(finished[0] / "checkpoints" / "latest.pt", weights_only=True)
    write_checkpoint(folder / "other.pt", {**content, "task": "gym:Counted-v0"})
    return folder / "other.pt"


@pytest.mark.parametrize("command", ["policy", "model"])
def test_commands_close_what_they_refuse(finished, script, tmp_path, command):
    refused = script("evaluate.py", command, checkpoint_of_another_task(finished, tmp_path))
    assert refused.returncode == 2
    assert "other observations or actions" in refused.stderr


def test_collect_closes_its_environments(finished, script):
    done = script("evaluate.py", "collect", "gym:Counted-v0", "data", "--episodes", 10)
    assert done.returncode == 0, done.stderr
    refused = script("evaluate.py", "collect", "gym:Counted-v0", "more", "--episodes", 10, "--run", finished[0])
    assert refused.returncode == 2
    assert "other observations or actions" in refused.stderr


def test_evaluations_recordings_and_videos_close_environments_that_fail(monkeypatch, tmp_path):
    agent, make_envs = untrained(metronomes), lambda count: metronomes(count, Counted)
    monkeypatch.setattr(Counted, "fails_at", 3)
    with pytest.raises(EnvironmentFailure, match="broken"):
        run_episodes(agent, make_envs, 2, 0)
    with pytest.raises(RuntimeError, match="broken"):
        record(agent, agent.spaces, make_envs, range(2))
    assert save_video(tmp_path / "a.gif", agent, Counted, EvalConfig()) == "no video: broken"


def test_baselines_close_their_environment():
    spaces = spaces_of(metronomes(1))
    with pytest.raises(UsageError, match="use ppo or sac"):
        Baseline("dqn", spaces, make_sb3_env(Counted), TrainConfig())
    agent = Baseline("ppo", spaces, make_sb3_env(Counted), TrainConfig(steps=2000))
    assert len(Counted.opened) == 1
    agent.close()


def test_a_baselines_run_closes_its_environment(script):
    words = ("--agent", "ppo", "--preset", "debug", "--no-video", "--eval.episodes", 1, "--run-dir", "run")
    done = script("train_agent.py", "gym:Counted-v0", *words)
    assert done.returncode == 0, done.stderr
