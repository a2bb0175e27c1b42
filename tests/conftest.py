"""What several test files share: a tiny trainer, untrained agents, one finished run, and the two scripts."""

import importlib.util
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_ranks import SEED

from agent.data.checkpoint import CheckpointStore
from agent.data.replay import ReplayBuffer
from agent.evaluation.episodes import Evaluator
from agent.execution import Ranks, make_execution
from agent.learning.dreamer import Dreamer
from agent.logs.logger import Logger
from agent.logs.silent import SilentLogger
from agent.runs.presets import preset
from agent.runtime import seed_everything
from agent.settings import to_dict
from agent.spaces import spaces_of
from agent.training.evaluations import Evaluations
from agent.training.rank_trainer import RankTrainer
from agent.training.trainer import Trainer
from envs import make_vector_env

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script: Ctrl-C is tested anyway
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: programs that a test starts would ignore it too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
ALONE = Ranks()


def benchmark(name: str):
    """The script benchmarks/`name`.py as a module of its own, whose names a test may replace. As when it is started, it
    finds those beside it."""
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


counters = partial(make_vector_env, "toy:counter", seed=0)


def untrained(make_envs=counters):
    """An agent with the first weights of the debug preset."""
    config = preset("debug")
    torch.manual_seed(0)
    return Dreamer(config.model, config.behavior, config.optimizer, spaces_of(make_envs(1)))


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
    """make_trainer(folder, make_envs, seed=0, config=..., **train): a Trainer, built as train_agent.py does.

    failures: a list for evaluations that fail; without it their error is raised. ranks: those of a run of several.
    """
    opened = []

    def make(
        folder, make_envs=metronomes, seed=0, config=None, saved=None, repeat=1, failures=None, ranks=ALONE, **train
    ):
        def report(step, what, error):
            if failures is None:
                raise error
            failures.append((step, what, error))

        config = config or preset("debug")
        config = replace(config, seed=seed, train=replace(config.train, **train))
        envs = make_envs(config.train.envs)
        spaces, model = spaces_of(envs), config.model
        with SEED:
            seed_everything(seed)
            agent = Dreamer(model, config.behavior, config.optimizer, spaces)
        latent = (model.loop.tokens, model.loop.width), (model.groups, model.classes)
        rows = config.train.replay_rows
        replay = ReplayBuffer(rows, envs.num_envs, spaces.obs, spaces.action.size, *latent, seed)
        if ranks.rank:
            logger = SilentLogger(folder)
        else:
            logger = Logger(folder, config.train.steps, saved["step"] if saved else 0, console=False)
        evaluate = Evaluator(config.eval, agent, make_envs, repeat)
        store = CheckpointStore(folder, "toy:test", to_dict(config), spaces)
        if ranks.rank:
            store = lambda name, content, beside=False: None  # noqa: E731
        execution = make_execution(agent, ranks)
        evaluations = Evaluations(agent, evaluate, logger, store, report)
        kind = Trainer if ranks.size == 1 else partial(RankTrainer, ranks)
        trainer = kind(config.train, agent, execution, envs, replay, logger, evaluations, store, seed, repeat)
        if saved:
            trainer.load_state_dict(saved)
        opened.extend([logger, envs, execution])
        return trainer

    yield make
    for each in opened:
        each.close()


def spawn(folder, name, *words):
    """Run a script as a command of its own in `folder`, without a terminal."""
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One debug run, for all tests: its folder, which nobody may change, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    done = spawn(folder, "train_agent.py", "toy:cue5", "--preset", "debug", "--seed", "3")
    assert done.returncode == 0, done.stderr
    runs = list((folder / "runs" / "toy-cue5").iterdir())
    assert len(runs) == 1
    return runs[0], done.stdout


@pytest.fixture
def script(tmp_path, monkeypatch, capfd):
    """script("train_agent.py", "toy:cue", ...): like `spawn`, in an empty folder and without a new process.

    An exception that would be a traceback fails the test.
    """
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / name), *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return subprocess.CompletedProcess(words, stop.value.code, *capfd.readouterr())

    return run
