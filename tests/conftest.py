"""What several test files share: a tiny trainer in this process, and the two scripts as commands."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agent.checkpoint import make_store, seed_everything, spaces_of
from agent.config import preset, to_dict
from agent.dreamer import Dreamer
from agent.evaluation import Evaluator
from agent.logger import Logger
from agent.replay import ReplayBuffer
from agent.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


class Metronome(gym.Env):
    """Ten steps an episode, nothing random: the reward is 1 - |action - beat| where the beat alternates."""

    length = 10

    def __init__(self):
        self.observation_space = gym.spaces.Dict({"state": gym.spaces.Box(-1.0, 1.0, (2,), np.float32)})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.time, self.last = 0, 0.0

    def look(self):
        return {"state": np.array([(-1.0) ** self.time, self.last], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.last = 0, 0.0
        return self.look(), {}

    def step(self, action):
        self.last = float(np.clip(action, -1.0, 1.0)[0])
        reward = 1.0 - abs(self.last - 0.5 * (-1.0) ** self.time)
        self.time += 1
        return self.look(), reward, False, self.time == self.length, {}


def metronomes(count, kind=Metronome):
    return SyncVectorEnv([kind] * count, autoreset_mode=AutoresetMode.NEXT_STEP)


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are fastest on one thread, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture
def fixed_levels(monkeypatch):
    """Latents are sampled at one fixed level of their distribution, whatever the number of draws."""

    def rand(*shape, dtype=None, **_):
        return torch.full(shape, 0.37, dtype=dtype)

    monkeypatch.setattr(torch, "rand", rand)


@pytest.fixture
def make_trainer():
    """make_trainer(folder, make_envs, seed=0, config=..., **train): a Trainer, built as train_agent.py does."""
    opened = []

    def make(folder, make_envs=metronomes, seed=0, config=None, saved=None, repeat=1, **train):
        config = config or preset("debug")
        config = replace(config, seed=seed, train=replace(config.train, **train))
        seed_everything(seed)
        envs = make_envs(config.train.envs)
        spaces, model = spaces_of(envs), config.model
        agent = Dreamer(model, config.behavior, config.optimizer, spaces)
        latent = (model.loop.tokens, model.loop.width), (model.groups, model.classes)
        rows = config.train.replay_rows
        replay = ReplayBuffer(rows, envs.num_envs, spaces.obs, spaces.action.size, *latent, seed)
        logger = Logger(folder, config.train.steps, saved["step"] if saved else 0, console=False)
        evaluate = Evaluator(config.eval, agent, make_envs, repeat)
        store = make_store(folder, "toy:test", to_dict(config), spaces)
        trainer = Trainer(config.train, agent, envs, replay, logger, evaluate, store, seed, repeat)
        if saved:
            trainer.load_state_dict(saved)
        opened.extend([logger, envs])
        return trainer

    yield make
    for each in opened:
        each.close()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One debug run, for all tests."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, str(ROOT / "train_agent.py"), "toy:cue5", "--preset", "debug", "--seed", "3"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = list((folder / "runs" / "toy-cue5").iterdir())
    assert len(runs) == 1
    return runs[0], done.stdout


@pytest.fixture
def script(tmp_path):
    """script("train_agent.py", "toy:cue", ...): run it in an empty folder, without a terminal."""

    def run(name, *words, timeout=120):
        command = [sys.executable, str(ROOT / name), *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)

    return run
