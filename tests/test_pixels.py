"""Pictures as observations: dm_control drawn, and images of Gymnasium environments."""

import os
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, spawn
from gymnasium import spaces

from agent.runs.config import Config
from agent.runs.notes import notes
from agent.spaces import ActionSpec, Spaces
from envs import TaskError, TaskId, rendering_backend
from envs.gym_adapter import GymAdapter
from envs.images import resized

drawing = pytest.mark.skipif(rendering_backend() is None, reason="no OpenGL backend works here")


class Camera(gym.Env):
    """Returns what it is told to."""

    action_space = spaces.Discrete(2)

    def __init__(self, space, value):
        self.observation_space, self.value = space, value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.value, {}

    def step(self, action):
        return self.value, 0.0, False, False, {}


def picture(*shape):
    return spaces.Box(0, 255, shape, np.uint8)


@pytest.mark.parametrize("shape", [(64, 64, 3), (96, 80, 3), (32, 40), (50, 50, 1)])
def test_an_image_becomes_a_square_of_64(shape):
    frame = np.zeros(shape, np.uint8)
    frame[: shape[0] // 2] = 200
    env = GymAdapter(Camera(picture(*shape), frame))
    seen = env.reset()[0]["image"]
    colours = shape[2] if len(shape) == 3 else 1
    assert env.observation_space["image"].shape == seen.shape == (64, 64, colours)
    assert seen.dtype == np.uint8
    assert (seen[:31] == 200).all()
    assert (seen[33:] == 0).all()
    assert env.step(0)[0]["image"].shape == (64, 64, colours)


def test_shrinking_takes_the_mean_of_an_area():
    checks = np.indices((128, 128)).sum(0) % 2 * 200
    assert (resized(checks.astype(np.uint8)) == 100).all()


def test_images_and_vectors_of_a_dictionary():
    space = spaces.Dict(eye=picture(64, 64, 3), arm=spaces.Box(-1, 1, (2,)), foot=spaces.Discrete(3))
    value = {"eye": np.full((64, 64, 3), 7, np.uint8), "arm": np.array([0.5, -0.5], np.float32), "foot": 1}
    env = GymAdapter(Camera(space, value))
    seen = env.reset()[0]
    assert seen.keys() == env.observation_space.spaces.keys() == {"eye", "state"}
    assert seen["state"].tolist() == [0.5, -0.5, 0.0, 1.0, 0.0]
    assert (seen["eye"] == 7).all()


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Box(0, 1, (64, 64, 3), np.float32), "uint8"),
        (picture(3, 64, 64), "channels last"),
        (picture(4, 64, 64, 3), "channels last"),
        (spaces.Dict(state=picture(64, 64, 3)), "rename"),
        (spaces.Dict(deep=spaces.Dict(eye=picture(64, 64, 3))), "inside another"),
    ],
)
def test_what_is_no_image_is_refused(space, words):
    with pytest.raises(TaskError, match=words):
        GymAdapter(Camera(space, None))


def test_names_of_drawn_tasks():
    task = TaskId.parse("dmc:cartpole-balance@fast_pixels")
    assert (task.slug, task.draws, task.is_slow) == ("dmc-cartpole_balance-fast_pixels", True, True)
    assert not TaskId.parse("dmc:cartpole_balance@nov").draws
    with pytest.raises(TaskError, match="@pixels"):
        TaskId.parse("dmc:cartpole_balance@pixel")


DRAWN = """
import sys
import numpy as np
from envs import make_env, make_vector_env

if __name__ == "__main__":
    look = sys.argv[1]
    env, state = make_env(f"dmc:walker_walk@{look}", seed=1), make_env("dmc:walker_walk", seed=1)
    first, _ = env.reset()
    state.reset()
    assert env.observation_space["image"].contains(first["image"])
    assert first["image"].std() > 10
    for _ in range(10):
        action = np.ones(6, np.float32)
        seen, reward, *_, info = env.step(action)
        vector, same, *_ = state.step(action)
        assert abs(reward - same) < 1e-9
        assert np.array_equal(info["dm_control.state"], vector["state"])
    assert (seen["image"] != first["image"]).mean() > 0.02
    env.close()
    state.close()
    envs = make_vector_env(f"dmc:cartpole_balance@{look}", 2, seed=0, asynchronous=True)
    seen, _ = envs.reset(seed=0)
    assert seen["image"].shape == (2, 64, 64, 3)
    assert not np.array_equal(seen["image"][0], seen["image"][1])
    _, reward, *_, info = envs.step(envs.action_space.sample())
    assert reward.shape == (2,)
    assert info["dm_control.state"].shape == (2, 5)
    envs.close()
    print("drawn", first["image"].mean())
"""


@drawing
def test_drawn_tasks_show_what_moves_and_run_in_processes(tmp_path):
    """In processes of their own: this one may have chosen not to draw."""
    (tmp_path / "drawn.py").write_text(DRAWN)
    shown = {}
    for look in ("pixels", "fast_pixels"):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "drawn.py"), look], capture_output=True, text=True, timeout=300,
            env={**{k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stdout.startswith("drawn"), done.stderr
        shown[look] = done.stdout
    assert shown["pixels"] != shown["fast_pixels"]


@pytest.mark.parametrize("value", [np.full((64, 64, 3), 0.5, np.float32), np.zeros((3, 64, 64), np.uint8)])
def test_images_that_are_not_what_they_announce_are_refused(value):
    with pytest.raises(TaskError, match="but its observation space says .64, 64, 3. and uint8"):
        GymAdapter(Camera(picture(64, 64, 3), value)).reset()


class Blinker(gym.Env):
    """An image that turns from dark to bright and back, whatever is done; 12 steps."""

    observation_space = spaces.Dict(eye=picture(64, 64, 3), clock=spaces.Box(0, 1, (1,), np.float32))
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def look(self):
        bright = self.time % 2 * 255
        return {"eye": np.full((64, 64, 3), bright, np.uint8), "clock": np.array([self.time / 12], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.look(), {}

    def step(self, action):
        self.time += 1
        return self.look(), float(self.time % 2), False, self.time == 12, {}


def test_an_agent_learns_from_images_and_leaves_what_can_be_looked_at(script, tmp_path):
    gym.register("Blinker-v0", entry_point=Blinker)
    run = tmp_path / "run"
    words = ("train_agent.py", "gym:Blinker-v0", "--preset", "debug", "--no-video", "--eval.episodes", 1)
    done = script(*words, "--steps", 200, "--train.eval-every", 150, "--run-dir", run, "--model.image.base-channels", 2)
    assert done.returncode == 0, done.stderr
    assert "eye (64, 64, 3)" in done.stdout
    assert (run / "videos" / "open_loop_eye.gif").exists()
    assert (run / "replay" / "eye.images").exists()
    more = script("train_agent.py", "--resume", run, "--steps", 240)
    assert more.returncode == 0, more.stderr
    looked = script("evaluate.py", "model", run, "--horizon", 3, "--episodes", 1, "--windows", 2, "--max-loops", 1)
    assert looked.returncode == 0, looked.stderr
    assert (run / "model" / "truth_agent_eye.gif").exists()
    assert (run / "model" / "truth_random_eye.png").exists()
    data = script("evaluate.py", "dataset", run, tmp_path / "data")
    assert data.returncode == 0, data.stderr
    with np.load(tmp_path / "data" / "rows.npz") as rows:
        assert rows["obs/eye"].dtype == np.uint8
        even = np.rint(rows["obs/state"][:, 0] * 12) % 2
        assert np.array_equal(rows["obs/eye"][:, 0, 0, 0], 255 * even)
    shutil.rmtree(run / "replay")
    lost = script("train_agent.py", "--resume", run, "--steps", 300)
    assert lost.returncode == 2
    assert "missing" in lost.stderr


@pytest.mark.parametrize(
    ("preset", "size", "said"),
    [("small", (64, 64, 3), True), ("pixels", (64, 64, 3), False), ("small", 3, False)],
)
def test_who_brings_images_is_told_of_their_preset(preset, size, said):
    words = notes(Config(preset=preset), Spaces({"eye": size}, ActionSpec(1, False)), torch.device("cpu"), None, None)
    assert said == ("--preset pixels" in " ".join(words))


TRAIN_WITH_A_SHORT_VIDEO = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    from agent.evaluation import video
    from train_agent import main
    video.VIDEO_FRAMES = 20
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("task", ["atari100k:pong", pytest.param("dmc:cartpole_balance@fast_pixels", marks=drawing)])
def test_the_tasks_of_images_train_and_are_judged(tmp_path, monkeypatch, task):
    monkeypatch.delenv("MUJOCO_GL", raising=False)  # tests of state tasks have switched drawing off
    words = ("--preset", "debug", "--eval.episodes", 1, "--steps", 220)
    more = ("--train.eval-every", 0, "--train.prefill", 100, "--run-dir", "run")
    (tmp_path / "train.py").write_text(TRAIN_WITH_A_SHORT_VIDEO)
    done = spawn(tmp_path, tmp_path / "train.py", task, *words, *more)
    assert done.returncode == 0, done.stderr
    assert "over 1 episode" in done.stdout
    assert ("human-normalised" in done.stdout) == task.startswith("atari100k")
    assert {"open_loop_image.gif", "eval_final.mp4"} <= {path.name for path in (tmp_path / "run" / "videos").iterdir()}
