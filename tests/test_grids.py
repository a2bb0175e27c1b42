"""Arrays of integers: which are grids of codes, and that nothing of them is lost."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from envs import TaskError, TaskId, endless, how_shown, make_env, make_vector_env
from envs.gym_adapter import GymAdapter


class Shown(gym.Env):
    """Shows `value`."""

    action_space = spaces.Discrete(2)

    def __init__(self, space, value=None):
        self.observation_space = space
        self.value = space.sample() if value is None else value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.value, {}

    def step(self, action):
        return self.value, 0.0, False, False, {}


def box(high, *shape, dtype=np.uint8):
    return spaces.Box(0, high, shape, dtype)


def adapted(space, value=None, variant=""):
    return GymAdapter(Shown(space, value), variant, "gym:Shown-v0")


@pytest.mark.parametrize(
    ("space", "kind", "numbers"),
    [
        (box(255, 7, 7, 3), "read as", 147),  # MiniGrid, whose codes go to 10
        (box(2, 6, 7), "one-hot", 126),
        (box(10, 20, 5), "one-hot", 1100),
        (box(16, 6, 7), "read as", 42),
        (box(1, 10, 10, 4, dtype=bool), "read as", 400),  # MinAtar
        (box(2, 64, 64), "read as", 4096),
        (box(5, 8, 8, 3, dtype=np.int64), "one-hot", 1152),
        (box(255, 21, 79), "read as", 1659),  # NetHack
        (box(12, 8, 8, 2, dtype=np.int16), "one-hot", 1664),
    ],
)
def test_grids_are_read_code_by_code_and_this_is_said(space, kind, numbers):
    env = adapted(space)
    assert env.observation_space == spaces.Dict(state=spaces.Box(-np.inf, np.inf, (numbers,), np.float32))
    seen = env.reset()[0]["state"]
    assert seen.shape == (numbers,)
    assert seen.sum() == (np.prod(space.shape) if kind == "one-hot" else env.unwrapped.value.astype(int).sum())
    (line,) = env.how_shown
    assert kind in line
    assert f"{numbers} numbers" in line
    assert ("gym:Shown-v0@image" in line) == (len(space.shape) == 2 or space.shape[-1] == 3)


@pytest.mark.parametrize("space", [box(255, 64, 64, 3), box(255, 32, 40), box(255, 96, 80, 1), box(200, 40, 40, 3)])
def test_pictures_stay_pictures(space):
    env = adapted(space)
    assert list(env.observation_space) == ["image"]
    assert env.how_shown == []


def test_arrays_of_one_and_two_axes_stay_numbers():
    for space in (box(255, 128), box(4, 6, 7, dtype=np.int64), spaces.Box(-1, 1, (6, 7))):
        env = adapted(space)
        assert env.observation_space["state"].shape == (np.prod(space.shape),)
        assert env.how_shown == []


def test_one_piece_on_a_large_board_is_refused_or_seen():
    board = np.zeros((128, 128), np.uint8)
    board[77, 33] = 2
    with pytest.raises(TaskError, match="128 x 128 codes, more than 4,096 numbers; gym:Shown-v0@grid .*v0@image shows"):
        adapted(box(2, 128, 128), board)
    seen = adapted(box(2, 128, 128), board, "grid").reset()[0]["state"]
    assert np.flatnonzero(seen).tolist() == [77 * 128 + 33]
    assert adapted(box(2, 128, 128), board, "image").reset()[0]["image"].max() > 30


def test_every_code_of_a_small_board_is_told_apart():
    for one in range(3):
        for other in range(3):
            board = np.array([[one, other], [2, 0]], np.uint8)
            seen = adapted(box(2, 2, 2), board).reset()[0]["state"].reshape(4, 3)
            assert seen.argmax(1).tolist() == [one, other, 2, 0]


def test_codes_outside_of_the_space_are_named():
    env = adapted(box(2, 6, 7), np.full((6, 7), 3, np.uint8))
    with pytest.raises(TaskError, match="observation holds 3, but its space says whole numbers 0 to 2"):
        env.reset()


def test_the_variants_of_a_name_choose(monkeypatch):
    monkeypatch.setitem(
        gym.registry, "Chosen-v0", gym.envs.registration.EnvSpec("Chosen-v0", lambda: Shown(box(2, 6, 7)))
    )
    task = TaskId.parse("gym:Chosen-v0@image")
    assert (str(task), task.slug, task.variant) == ("gym:Chosen-v0@image", "gym-Chosen-v0-image", "image")
    assert endless(task)
    assert not task.draws
    assert TaskId.shows_images(str(task))
    assert not TaskId.shows_images("gym:Chosen-v0")
    assert make_env(task).observation_space["image"].shape == (64, 64, 1)
    envs = make_vector_env("gym:Chosen-v0", 2, seed=0)
    assert how_shown(envs) == [
        "grid         observation, 6 x 7 codes, 0 to 2, is one-hot, 126 numbers; gym:Chosen-v0@image shows a picture "
        "of 64 x 64"
    ]
    assert how_shown(make_vector_env("toy:cue", 1, seed=0)) == []
    with pytest.raises(TaskError, match="gym:Chosen-v0@grid reads"):
        TaskId.parse("gym:Chosen-v0@pixels")
    with pytest.raises(TaskError, match="observes no grid and no image: leave @grid out"):
        make_env("gym:CartPole-v1@grid")


def test_a_picture_is_read_number_by_number_where_that_is_asked_for():
    env = adapted(box(255, 40, 40), variant="grid")
    assert np.array_equal(env.reset()[0]["state"], env.unwrapped.value.ravel())
    floats = spaces.Box(0.0, 1.0, (40, 40, 2))
    with pytest.raises(TaskError, match="gym:Shown-v0@grid reads any array"):
        adapted(floats)
    assert adapted(floats, variant="grid").observation_space["state"].shape == (3200,)


def test_grids_of_a_dictionary_and_inside_of_another():
    space = spaces.Dict(deep=spaces.Dict(map=box(2, 3, 3)), view=box(255, 64, 64, 3), z=spaces.Discrete(2))
    env = adapted(space)
    assert env.observation_space["state"].shape == (29,)
    assert env.observation_space["view"].shape == (64, 64, 3)
    assert env.how_shown[0].startswith("grid         observation['deep']['map'], 3 x 3 codes")
    seen = env.reset()[0]
    assert seen["state"].sum() == 10


def test_more_colours_than_an_image_has_are_refused_as_an_image():
    with pytest.raises(TaskError, match="channels last"):
        adapted(box(1, 10, 10, 4), variant="image")
