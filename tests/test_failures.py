"""Environments that fail, or say what is no number, while an agent trains in them."""

import math

import pytest
from conftest import Metronome, metronomes

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import BadStep, EnvironmentFailure


class Broken(Metronome):
    """Rewards that stop being numbers."""

    steps = 0

    def step(self, action):
        Broken.steps += 1
        obs, reward, *rest = super().step(action)
        return obs, reward if Broken.steps < 240 else math.nan, *rest


def test_rewards_that_are_not_finite_stop_the_run_before_the_replay_has_them(make_trainer, tmp_path):
    Broken.steps = 0
    trainer = make_trainer(tmp_path, lambda n: metronomes(n, Broken), steps=400, eval_every=0, save_every=1)
    with pytest.raises(BadStep, match="the environment's reward is nan"):
        trainer.run()
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["replay"]["rows"]["reward"].isfinite().all()
    with pytest.raises(BadStep, match="in step 1 of an evaluation episode: the environment's reward is nan"):
        trainer.evaluate(False)


class Failing(Metronome):
    """Raises an error of its own once."""

    steps = 0

    def step(self, action):
        Failing.steps += 1
        if Failing.steps == 240:
            raise OSError("the robot does not answer")
        return super().step(action)


def test_a_failing_environment_is_named_and_the_run_saved(make_trainer, tmp_path):
    Failing.steps = 0
    trainer = make_trainer(tmp_path, lambda n: metronomes(n, Failing), steps=400, eval_every=0, save_every=0)
    with pytest.raises(EnvironmentFailure, match="OSError: the robot does not answer"):
        trainer.run()
    assert read_checkpoint(find_checkpoint(tmp_path))["step"] == trainer.step > 200


def test_an_environment_that_fails_to_begin_is_named_and_the_run_can_go_on(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=200, eval_every=0, save_every=0)
    with monkeypatch.context() as broken:
        broken.setattr(Metronome, "look", lambda env: env.no_clock)
        with pytest.raises(EnvironmentFailure, match="AttributeError.*no_clock"):
            trainer.run()
    trainer.load_state_dict(read_checkpoint(find_checkpoint(tmp_path)))
    assert trainer.run()


@pytest.mark.parametrize("words", [(), ("--agent", "ppo")])
def test_whatever_fails_the_environments_are_closed(tmp_path, monkeypatch, words):
    """The run cannot begin, because its folder is taken; nothing that was opened before stays open."""
    import train_agent

    made, closed = [], []

    def counted(make):
        def wrapped(*args, **settings):
            envs = make(*args, **settings)
            made.append(envs)
            close = envs.close
            envs.close = lambda: (closed.append(envs), close())[1]
            return envs

        return wrapped

    for name in ("make_vector_env", "make_env"):
        monkeypatch.setattr(train_agent, name, counted(getattr(train_agent, name)))
    (tmp_path / "taken").write_text("something")
    argv = ["gym:CartPole-v1", "--preset", "debug", "--run-dir", str(tmp_path), "--no-video", *words]
    assert train_agent.main(argv) == 2
    assert made
    assert {id(envs) for envs in made} == {id(envs) for envs in closed}
