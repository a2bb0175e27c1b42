"""Baselines of stable-baselines3: the same files, evaluation and refusals as any run."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Metronome, metronomes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agent.data.checkpoint import CheckpointStore, read_checkpoint
from agent.errors import EnvironmentFailure, UsageError
from agent.evaluation.episodes import Evaluator, run_episodes
from agent.interop.baseline_trainer import BaselineTrainer
from agent.interop.baselines import Baseline, make_sb3_env
from agent.logs.logger import Logger
from agent.runs.config import Config
from agent.settings import to_dict
from agent.spaces import spaces_of
from agent.training.evaluations import Evaluations
from agent.training.train_config import TrainConfig

WORDS = ("--preset", "debug", "--no-video", "--eval.episodes", 2, "--run-dir", "run")


def raised(step, what, error):
    """A failed evaluation fails the test."""
    raise error


def test_a_baseline_learns_with_our_files(tmp_path):
    """Random actions return 3.75, the best constant one 5, the best policy 10."""
    cfg = TrainConfig(steps=1200, prefill=100, eval_every=400, log_every=200, replay_rows=1200)
    spaces = spaces_of(metronomes(1))
    agent = Baseline("sac", spaces, make_sb3_env(Metronome), cfg)
    agent.model.learning_rate = 3e-3
    agent.model._setup_lr_schedule()
    evaluate = Evaluator(Config().eval, agent, metronomes, 1)
    logger = Logger(tmp_path, cfg.steps, console=False)
    store = CheckpointStore(tmp_path, "toy:test", to_dict(Config(agent="sac")), spaces)
    trainer = BaselineTrainer(cfg, agent, logger, Evaluations(agent, evaluate, logger, store, raised), store)
    assert trainer.run()
    logger.close()
    assert trainer.step == 1200
    assert np.mean([episode["return"] for episode in trainer.episodes]) > 7.0
    with (tmp_path / "eval.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"400", "800", "1200"}
    with (tmp_path / "episodes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 120
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "train/critic_loss" in lines[-2]
    assert {line["episode/length"] for line in lines[:-1]} == {10.0}
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    with (tmp_path / "episodes.csv").open() as file:
        episodes = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
    logged = [(event.step, event.value) for event in events.Scalars("episode/return")]
    assert logged == [(step, pytest.approx(ret)) for step, ret in episodes]
    again = Baseline.from_checkpoint(read_checkpoint(tmp_path / "checkpoints" / "latest.pt"))
    episodes = run_episodes(again, metronomes, 10, Config().eval.first_seed)
    assert [row["return"] for row in episodes] == [row["return"] for row in trainer.episodes]


def test_a_run_of_the_command_line(script, tmp_path):
    done = script("train_agent.py", "toy:cue5", "--agent", "ppo", *WORDS)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "meta.json", "eval.csv", "episodes.csv", "metrics.jsonl", "curve.png"} <= names
    played = script("evaluate.py", "policy", "run", "--episodes", 2, "--json", "-")
    assert played.returncode == 0, played.stderr
    assert json.loads(played.stdout)["summary"]["loops"] == 1.0
    for words, message in (
        (["evaluate.py", "model", "run"], "has no world model"),
        (["evaluate.py", "policy", "run", "--exit", "fixed"], "has no loops"),
        (["evaluate.py", "export", "run", "x.pt2"], "has no world model"),
        (["train_agent.py", "--resume", "run"], "is a run of ppo, which cannot go on: start it anew"),
        (["train_agent.py", "toy:cue5", "--agent", "sac", "--preset", "debug"], "use ppo or dqn"),
        (["train_agent.py", "toy:cue5", "--agent", "td3"], "--agent"),
        (["train_agent.py", "toy:cue5", "--agent", "ppo", "--train.envs", 4], "knows nothing of --train.envs"),
        (["train_agent.py", "toy:cue5", "--agent", "ppo", "--train.prefill", 50], "knows nothing of --train.prefill"),
        (["train_agent.py", "toy:cue5", "--agent", "ppo", "--train.slice", 5], "--train.slice: leave that out"),
        (["train_agent.py", "toy:cue5", "--agent", "ppo", "--steps", 100], "end within the 100 random actions"),
    ):
        refused = script(*words)
        assert refused.returncode == 2, words
        assert message in " ".join(refused.stderr.split())


def test_an_agent_of_another_action_space_is_refused(tmp_path):
    """Its actions would be clipped and stretched to the task's, without a word."""
    cfg = TrainConfig(steps=300, prefill=100, eval_every=0)
    agent = Baseline("sac", spaces_of(metronomes(1)), make_sb3_env(Metronome), cfg)
    agent.model.action_space = gym.spaces.Box(-2.0, 2.0, agent.model.action_space.shape, np.float32)
    agent.model.save(tmp_path / "agent.zip")
    with pytest.raises(UsageError, match="acts in Box.-2.0, 2.0.*the task in Box.-1.0, 1.0"):
        Baseline.from_sb3(str(tmp_path / "agent.zip"), spaces_of(metronomes(1)))


def test_algorithms_that_cannot_act_are_refused():
    with pytest.raises(UsageError, match="use ppo or sac"):
        Baseline("dqn", spaces_of(metronomes(1)), None, TrainConfig())


def test_ctrl_c_keeps_the_agent(tmp_path):
    import signal

    cfg = TrainConfig(steps=3000, prefill=100, eval_every=0, log_every=500)
    spaces = spaces_of(metronomes(1))
    agent = Baseline("ppo", spaces, make_sb3_env(Metronome), cfg)
    logger = Logger(tmp_path, cfg.steps, console=False)
    logger.progress = lambda step, _: signal.raise_signal(signal.SIGINT) if step == 150 else None
    store = CheckpointStore(tmp_path, "toy:test", to_dict(Config(agent="ppo")), spaces)
    evaluate = Evaluator(Config().eval, agent, metronomes, 1)
    trainer = BaselineTrainer(cfg, agent, logger, Evaluations(agent, evaluate, logger, store, raised), store)
    assert trainer.run() is False
    logger.close()
    assert torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["step"] == 150


class Breaking(Metronome):
    """Fails, or returns a reward that is not finite, in its step number 150."""

    steps, how = 0, "raise"

    def step(self, action):
        Breaking.steps += 1
        obs, reward, *rest = super().step(action)
        if Breaking.steps == 150 and Breaking.how == "raise":
            raise OSError("no answer")
        return obs, np.nan if Breaking.steps == 150 else reward, *rest


@pytest.mark.parametrize(("how", "error"), [("raise", "OSError: no answer"), ("nan", "reward is nan")])
def test_an_environment_that_fails_is_named_and_the_agent_saved(tmp_path, how, error):
    Breaking.steps, Breaking.how = 0, how
    cfg = TrainConfig(steps=3000, prefill=100, eval_every=0, log_every=500)
    spaces = spaces_of(metronomes(1))
    agent = Baseline("ppo", spaces, make_sb3_env(Breaking), cfg)
    logger = Logger(tmp_path, cfg.steps, console=False)
    store = CheckpointStore(tmp_path, "toy:test", to_dict(Config(agent="ppo")), spaces)
    evaluations = Evaluations(agent, Evaluator(Config().eval, agent, metronomes, 1), logger, store, raised)
    with pytest.raises(EnvironmentFailure, match=error):
        BaselineTrainer(cfg, agent, logger, evaluations, store).run()
    logger.close()
    assert read_checkpoint(tmp_path / "checkpoints" / "latest.pt")["step"] == 149
