"""Environments that fail, or say what is no number, while an agent trains in them."""

import csv
import itertools
import json
import math

import numpy as np
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
        trainer.evaluations.evaluate(False, lambda: False)


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


def test_a_reset_that_fails_on_resuming_adds_no_row(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=200, eval_every=0, save_every=0)
    trainer.begin_episodes()
    for _ in range(3):
        trainer.interact()
    held = trainer.replay.count
    with monkeypatch.context() as broken:
        broken.setattr(Metronome, "look", lambda env: env.no_clock)
        with pytest.raises(EnvironmentFailure):
            trainer.begin_episodes()
    assert trainer.replay.count == held
    trainer.begin_episodes()
    assert trainer.replay.count == held + 1


def test_first_observations_that_are_not_finite_can_be_skipped(make_trainer, tmp_path, monkeypatch):
    looks, look = itertools.count(), Metronome.look

    def bad_at_first(env):
        factor = np.nan if next(looks) < 3 else 1.0
        return {name: value * factor for name, value in look(env).items()}

    monkeypatch.setattr(Metronome, "look", bad_at_first)
    trainer = make_trainer(tmp_path, steps=200, eval_every=0, on_bad_step="skip")
    trainer.begin_episodes()
    assert np.isfinite(trainer.row["obs/state"]).all()


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


@pytest.mark.parametrize(
    ("error", "told"),
    [(SystemExit(4), "SystemExit: 4"), (ValueError("two\nlines"), "two lines"), (MemoryError(), "MemoryError")],
)
def test_an_environment_that_exits_is_a_failure_in_one_line(make_trainer, tmp_path, monkeypatch, error, told):
    def step(env, action):
        raise error

    trainer = make_trainer(tmp_path, steps=200, eval_every=0)
    monkeypatch.setattr(Metronome, "step", step)
    with pytest.raises(EnvironmentFailure, match=f"{told}$"):
        trainer.run()


# ---------------------------------------------------------------------- evaluations that fail


class Level(Metronome):
    """Has no levels for the seeds of evaluations."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and seed >= 1_000_000_000:
            raise ValueError(f"there is no level {seed}")
        return super().reset(seed=seed)


class Unseen(Metronome):
    """Observations that are not numbers, in evaluations alone."""

    judged = False

    def reset(self, *, seed=None, options=None):
        self.judged = seed is not None and seed >= 1_000_000_000
        return super().reset(seed=seed)

    def look(self):
        seen = super().look()
        return {"state": seen["state"] * np.nan} if self.judged else seen


@pytest.mark.parametrize(("kind", "cause"), [(Level, "no level 1"), (Unseen, "observation state is nan")])
def test_evaluations_that_fail_are_reported_and_training_ends_as_it_should(make_trainer, tmp_path, kind, cause):
    failures = []
    trainer = make_trainer(tmp_path, lambda n: metronomes(n, kind), steps=300, eval_every=120, failures=failures)
    assert trainer.run()
    assert [(step, what) for step, what, _ in failures] == [
        (120, "an evaluation"), (240, "an evaluation"), (300, "the final evaluation")
    ]  # fmt: skip
    assert all(cause in str(error) for *_, error in failures)
    assert read_checkpoint(find_checkpoint(tmp_path))["trainer"]["finished"]
    assert find_checkpoint(tmp_path, "best").exists()
    assert trainer.episodes == []


class Robot(Metronome):
    """There is one."""

    taken = False

    def __init__(self):
        super().__init__()
        if Robot.taken:
            raise OSError("address in use")
        Robot.taken = True

    def close(self):
        Robot.taken = False


def robots(count):
    free = not Robot.taken
    try:
        return metronomes(count, Robot)
    except OSError:
        Robot.taken = not free  # the first of several is closed again
        raise


def test_an_environment_of_which_there_is_one_is_evaluated_at_the_end(make_trainer, tmp_path, capsys):
    failures = []
    trainer = make_trainer(tmp_path, robots, steps=300, eval_every=200, failures=failures)
    trainer.run()
    assert [step for step, *_ in failures] == [200]  # training has it
    assert len(trainer.episodes) == 10
    assert "only one copy" in capsys.readouterr().err


ENVIRONMENT = """
import gymnasium as gym, numpy as np

class Levels(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    steps, bad_at = 0, None

    def __init__(self, bad_at=None):
        self.bad_at = bad_at

    def reset(self, *, seed=None, options=None):
        if seed is not None and seed >= 1_000_000_000:
            raise ValueError(f"there is no level {seed}")
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        Levels.steps += 1
        reward = float("nan") if Levels.steps == self.bad_at else 1.0
        return np.zeros(2, np.float32), reward, self.time == 9, False, {}

gym.register("Levels-v0", entry_point=Levels)
gym.register("Bad-v0", entry_point=Levels, kwargs={"bad_at": 240})
"""


def test_a_run_whose_final_evaluation_fails_is_finished(script, tmp_path, monkeypatch):
    (tmp_path / "levels.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("gym:levels:Levels-v0", "--preset", "debug", "--no-video", "--run-dir", "run")
    done = script("train_agent.py", *words)
    assert done.returncode == 0
    said = "the final evaluation failed at step 600: in the reset with the seeds 1000000000 to 1000000009: ValueError"
    assert f"{said}: there is no level 1000000000; reset(seed=...) must accept any whole number" in done.stderr
    assert f"evaluate.py policy {tmp_path}/run" in done.stdout
    meta = json.loads((tmp_path / "run/meta.json").read_text())
    assert meta["finished"]
    assert [failure["step"] for failure in meta["failures"]] == [300, 600]


# ---------------------------------------------------------------------- steps that are not finite


class Sometimes(Metronome):
    """Every 35th step of all copies is bad, in the way of the test: a number, or where."""

    steps, bad = 0, math.nan

    def step(self, action):
        Sometimes.steps += 1
        obs, reward, *rest = super().step(action)
        if Sometimes.steps % 35:
            return obs, reward, *rest
        if Sometimes.bad == "seen":
            return {"state": obs["state"] * np.nan}, reward, *rest
        return obs, Sometimes.bad, *rest


@pytest.mark.parametrize(("bad", "envs"), [(math.nan, 1), (1e39, 2), ("seen", 2)])
def test_bad_steps_can_be_skipped(make_trainer, tmp_path, bad, envs):
    Sometimes.steps, Sometimes.bad = 0, bad
    options = {"steps": 400, "eval_every": 0, "on_bad_step": "skip", "envs": envs}
    trainer = make_trainer(tmp_path, lambda n: metronomes(n, Sometimes), failures=[], **options)
    assert trainer.run()
    skipped = trainer.stepper.bad_steps
    assert skipped >= 400 // 35
    held = trainer.replay.count
    rows = {name: value[:, :held] for name, value in trainer.replay.rows.items()}
    assert all(np.isfinite(rows[name]).all() for name in ("reward", "obs/state"))
    first, last = rows["is_first"], rows["is_last"]
    assert (first[:, 1:] >= last[:, :-1]).all()  # what follows a last row is a first one
    assert not rows["is_terminal"].any()
    assert trainer.step == (~first).sum() + (~trainer.row["is_first"]).sum()
    with (tmp_path / "episodes.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert sum(int(row["length"]) for row in logged) <= trainer.step
    assert sum(int(row["length"]) < 10 for row in logged) >= skipped - 3 * envs  # some were at the first row
    assert read_checkpoint(find_checkpoint(tmp_path))["trainer"]["bad_steps"] == skipped
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("episode/bad_steps", 0) for line in lines) == skipped


def test_an_environment_whose_every_step_is_bad_does_not_go_on_for_ever(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(Metronome, "step", lambda env, action: (env.look(), math.inf, False, False, {}))
    trainer = make_trainer(tmp_path, steps=400, eval_every=0, on_bad_step="skip")
    with pytest.raises(BadStep, match="reward is inf"):
        trainer.run()
    assert trainer.stepper.bad_steps == 100


def test_a_step_that_is_not_finite_ends_the_run_with_all_before_it_saved(script, tmp_path, monkeypatch):
    (tmp_path / "badly.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("--preset", "debug", "--no-video", "--train.eval-every", 0, "--run-dir", "run")
    done = script("train_agent.py", "gym:badly:Bad-v0", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the environment's reward is nan, which is not a finite float32, after step 2")
    assert "--train.on-bad-step skip" in done.stderr
    assert "--resume" in done.stderr
    assert read_checkpoint(find_checkpoint(tmp_path / "run"))["step"] == 239
    done = script("train_agent.py", "--resume", "run", "--train.on-bad-step", "skip")
    assert done.returncode == 0, done.stderr
