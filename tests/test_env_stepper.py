"""Environments that step by themselves while the agent learns."""

import signal

import numpy as np
import pytest
from conftest import Metronome, counters, metronomes
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agent.environment_failures import environment_traceback
from agent.errors import BadStep, EnvironmentFailure
from envs import make_vector_env


class Halves(SyncVectorEnv):
    """Steps in two halves, as environments in processes of their own do, and remembers what happened in between."""

    def __init__(self, count, kind=Metronome):
        super().__init__([kind] * count, autoreset_mode=AutoresetMode.NEXT_STEP)
        self.story = []

    def step_async(self, action):
        self.story.append("begin")
        self.given = np.array(action)

    def step_wait(self):
        self.story.append("end")
        return super().step(self.given)


def told(trainer):
    """Let the updates of a trainer in `Halves` write into their story."""
    update = trainer.execution.update

    def told_update(*words):
        trainer.envs.story.append("update")
        return update(*words)

    trainer.execution.update = told_update
    return trainer.envs.story


def test_updates_happen_while_the_environments_step(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "halves", Halves, steps=160, prefill=100, ratio=0.5, eval_every=0)
    story = told(trainer)
    assert trainer.run()
    plain = make_trainer(tmp_path / "plain", metronomes, steps=160, prefill=100, ratio=0.5, eval_every=0)
    assert plain.run()
    assert story.count("update") == trainer.agent.updates == plain.agent.updates == 40
    open_ = np.cumsum([{"begin": 1, "end": -1}.get(word, 0) for word in story])
    meanwhile = [bool(open_[i]) for i, word in enumerate(story) if word == "update"]
    assert all(meanwhile[:-1])  # what the last step asks for comes after it
    assert trainer.replay.count == plain.replay.count
    assert np.array_equal(trainer.replay.rows["obs/state"][:, :100], plain.replay.rows["obs/state"][:, :100])


def test_rows_from_other_processes_are_those_of_this_one(make_trainer, tmp_path):
    """Without updates the actions are the same, and so has to be every row."""
    options = {"steps": 230, "ratio": 0.0, "eval_every": 0, "envs": 2}
    here = make_trainer(tmp_path / "here", counters, **options)
    assert not here.stepper.asynchronous
    assert here.run()
    there = make_trainer(
        tmp_path / "there",
        lambda count: make_vector_env("toy:counter", count, seed=0, asynchronous=count == 2),
        **options,
    )
    assert there.stepper.asynchronous
    assert there.run()
    for name, rows in here.replay.rows.items():
        assert np.array_equal(rows, there.replay.rows[name]), name


class Broken(Metronome):
    """Fails, or returns what is no number, in its step number 40."""

    steps, how = 0, "raise"

    def step(self, action):
        Broken.steps += 1
        obs, reward, *rest = super().step(action)
        if Broken.steps == 40:
            if Broken.how == "raise":
                raise OSError("no answer")
            reward = np.nan
        return obs, reward, *rest


@pytest.mark.parametrize(("how", "error"), [("raise", EnvironmentFailure), ("nan", BadStep)])
def test_what_goes_wrong_meanwhile_leaves_the_rows_of_before(make_trainer, tmp_path, how, error):
    Broken.steps, Broken.how = 0, how
    trainer = make_trainer(tmp_path, lambda n: Halves(n, Broken), steps=200, prefill=20, eval_every=0)
    with pytest.raises(error):
        trainer.run()
    # 40 steps and the resets of 4 episodes: the row at hand never arrived in the replay
    assert trainer.step == 39
    assert trainer.replay.count == 39 + 3


def killed(envs):
    """End the last process of the environments, as a system short of memory does."""
    envs.processes[-1].kill()
    envs.processes[-1].join()


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_dies_is_a_failure_that_saves_and_closes(make_trainer, tmp_path, count):
    trainer = make_trainer(
        tmp_path, lambda n: make_vector_env("toy:counter", n, seed=0, asynchronous=n == count), envs=count, eval_every=0
    )
    update = trainer.execution.update

    def dying_update(*words):
        result = update(*words)
        if trainer.agent.updates == 30:
            killed(trainer.envs)
        return result

    trainer.execution.update = dying_update
    with pytest.raises(EnvironmentFailure, match="its process has ended") as failure:
        trainer.run()
    assert environment_traceback(failure.value) == ""  # of a pipe, which tells its author nothing
    assert (tmp_path / "checkpoints" / "latest.pt").exists()
    assert trainer.replay.count > 0
    trainer.envs.close()  # neither waits for ever nor raises
    assert not any(process.is_alive() for process in trainer.envs.processes)


def test_a_process_that_dies_in_an_evaluation_is_reported_and_training_goes_on(make_trainer, tmp_path):
    made, failures = [], []

    def envs(count):
        made.append(make_vector_env("toy:counter", count, seed=0, asynchronous=count > 1))
        return made[-1]

    trainer = make_trainer(tmp_path, envs, steps=400, prefill=100, ratio=0.02, eval_every=200, failures=failures)
    evaluate, asked = trainer.evaluations.evaluate, []

    def dying(final, stop):
        def stopping():
            asked.append(None)
            if len(asked) == 5:
                killed(made[-1])
            return stop()

        return evaluate(final, stopping)

    trainer.evaluations.evaluate = dying
    assert trainer.run()
    ((step, what, error),) = failures
    assert (step, what) == (200, "an evaluation")
    assert "its process has ended" in str(error)
    assert trainer.evaluations.means == {}
    assert len(trainer.episodes) == 10


def test_ctrl_c_meanwhile_ends_the_step_first(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, Halves, steps=400, eval_every=0)
    story, update = told(trainer), trainer.execution.update

    def interrupted(*words):
        result = update(*words)
        if trainer.agent.updates == 10:
            signal.raise_signal(signal.SIGINT)
        return result

    trainer.execution.update = interrupted
    assert trainer.run() is False
    assert trainer.agent.updates == 10
    assert story[-2:] == ["update", "end"]
    trainer.replay.sample(2, 4)
    assert trainer.replay.count == story.count("end")
