"""What `reset` and `step` of an environment may return, and what is said where they return something else."""

import re
from fractions import Fraction

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from envs import TaskError, make_env, make_vector_env
from envs.gym_adapter import GymAdapter

VECTOR = spaces.Box(-1.0, 1.0, (3,))
SEEN = np.zeros(3, np.float32)


class Told(gym.Env):
    """Returns what it is told to."""

    action_space = spaces.Discrete(2)

    def __init__(self, first=(SEEN, {}), then=(SEEN, 0.0, False, False, {}), space=VECTOR):
        self.first, self.then, self.observation_space = first, then, space

    def reset(self, *, seed=None, options=None):
        return self.first

    def step(self, action):
        return self.then


def step(reward=0.0, terminated=False, truncated=False, info=None, seen=SEEN, space=VECTOR):
    env = GymAdapter(Told(then=(seen, reward, terminated, truncated, info), space=space), name="gym:Told-v0")
    return env.step(0)


@pytest.mark.parametrize(
    "reward", [2.0, 2, np.float32(2), np.array([2.0]), np.array(2), [[2.0]], np.array([2], np.int8), Fraction(2)]
)
def test_a_reward_is_one_number_in_any_form(reward):
    if isinstance(reward, Fraction):
        with pytest.raises(TaskError, match="one number is needed"):
            step(reward)
        return
    given = step(reward)[1]
    assert (given, type(given)) == (2.0, float)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (None, "the reward is None"),
        ("1.0", r"the reward is '1.0' \(str\)"),
        (np.zeros(2), r"the reward is an array of shape \(2,\) and type float64"),
        ([], r"the reward is \[\] \(list\)"),
        (10**400, "the reward is 1000"),
        ({"a": 1.0, "b": 2.0}, "the reward is a dictionary with 'a', 'b'"),
        (1j, "the reward is 1j"),
    ],
)
def test_other_rewards_are_named_with_the_step(reward, said):
    with pytest.raises(TaskError, match=f"^gym:Told-v0, in step 1 of an episode: {said}.*one number is needed"):
        step(reward)


@pytest.mark.parametrize(("form", "meant"), [(np.True_, True), (1, True), (0.0, False), (np.array([True]), True)])
def test_flags_in_any_form(form, meant):
    assert step(terminated=form)[2] is meant
    assert step(truncated=form)[3] is meant


@pytest.mark.parametrize("form", [None, {}, "False", 2, np.zeros(2, bool)])
def test_other_flags_are_named(form):
    with pytest.raises(TaskError, match="truncated is .*True or False is needed"):
        step(truncated=form)


def test_the_step_of_the_episode_is_counted():
    inner = Told()
    env = GymAdapter(inner)
    env.reset()
    for _ in range(4):
        env.step(0)
    inner.then = None
    with pytest.raises(TaskError, match=r"in step 5 of an episode: step\(\) returned None"):
        env.step(0)
    env.reset()
    with pytest.raises(TaskError, match="in step 1 of an episode"):
        env.step(0)


@pytest.mark.parametrize("returned", [SEEN, None, (0.5, 0.5), (SEEN,), (SEEN, {}, {})])
def test_a_reset_of_old_gym_is_told_what_to_return(returned):
    with pytest.raises(TaskError, match=r"at a reset: reset\(\) returned .*return observation, {}.*shimmy"):
        GymAdapter(Told(first=returned)).reset()


@pytest.mark.parametrize("arguments", ["self", "self, seed=None", "self, options=None"])
def test_a_reset_without_arguments_is_told_which(arguments):
    scope = {"SEEN": SEEN}
    exec(f"def reset({arguments}): return SEEN, {{}}", scope)
    env = GymAdapter(type("Old", (Told,), {"reset": scope["reset"]})())
    with pytest.raises(TaskError, match=r"takes no (seed|options): write def reset\(self, \*, seed=None, options=None"):
        env.reset(seed=1, options={})


def test_an_error_inside_a_reset_stays_what_it_is():
    class Typed(Told):
        def reset(self, *, seed=None, options=None):
            return len(3), {}

    with pytest.raises(TypeError, match="has no len"):
        GymAdapter(Typed()).reset()


def test_a_step_of_old_gym_is_told_what_to_return():
    with pytest.raises(TaskError, match=r"step\(\) returned 4 values.*five: return observation, reward, terminated"):
        GymAdapter(Told(then=(SEEN, 0.0, False, {}))).step(0)


ARMS = spaces.Dict(arm=VECTOR, deep=spaces.Dict(foot=spaces.Discrete(3, start=1)), pair=spaces.Tuple([VECTOR, VECTOR]))


def arms(**changes):
    return {"arm": SEEN, "deep": {"foot": 3}, "pair": (SEEN, SEEN), **changes}


@pytest.mark.parametrize(
    ("space", "seen", "said"),
    [
        (VECTOR, None, "observation is None"),
        (VECTOR, "abc", "observation is 'abc' (str), and numbers of the shape (3,) are needed"),
        (VECTOR, [1.0, [2.0], 3.0], "observation is [1.0, [2.0], 3.0] (list), and numbers"),
        (VECTOR, np.zeros(5), "observation has 5 numbers, shape (5,), but its space says 3"),
        (VECTOR, np.array([None] * 3), "observation is an array of shape (3,) and type object"),
        (spaces.Box(0, 9, (2, 3), np.int64), np.zeros((3, 2)), "shape (3, 2), but its space says 6, shape (2, 3)"),
        (spaces.Discrete(4), 4, "observation is 4 (int), but its space says a whole number 0 to 3"),
        (spaces.Discrete(4), -1, "its space says a whole number 0 to 3"),
        (spaces.Discrete(4), 1.5, "its space says a whole number 0 to 3"),
        (spaces.MultiDiscrete([2, 3]), [1, 3], "observation holds 3, but its space says whole numbers 0 to 2"),
        (spaces.MultiDiscrete([2, 3]), [np.nan, 0], "observation holds nan"),
        (ARMS, SEEN, "observation is an array of shape (3,) and type float32, and a dictionary with 'arm', 'deep'"),
        (ARMS, {"arm": SEEN, "deep": {"foot": 1}}, "observation lacks 'pair': its space says 'arm', 'deep', 'pair'"),
        (ARMS, arms(leg=1), "observation has 'leg' besides"),
        (ARMS, arms(deep={"foot": 0}), "observation['deep']['foot'] is 0 (int), but its space says a whole number 1"),
        (ARMS, arms(arm=object), "observation['arm'] is <class 'object'>"),
        (ARMS, arms(pair=(SEEN,)), "observation['pair'] is"),
        (ARMS, arms(pair=(SEEN, np.zeros(2))), "observation['pair'][1] has 2 numbers"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value")
def test_observations_that_break_their_space_are_named_at_resets_and_steps(space, seen, said):
    with pytest.raises(TaskError, match=f"in step 1 of an episode: .*{re.escape(said)}"):
        step(seen=seen, space=space)
    with pytest.raises(TaskError, match=f"at a reset: .*{re.escape(said)}"):
        GymAdapter(Told(first=(seen, {}), space=space)).reset()


@pytest.mark.parametrize(
    ("space", "seen", "read"),
    [
        (VECTOR, [1, 2, 3], [1, 2, 3]),
        (VECTOR, np.array([[1.0, 2.0, 3.0]]), [1, 2, 3]),
        (spaces.Box(0, 9, (1,)), 4.0, [4]),
        (spaces.Discrete(3), np.array([2]), [0, 0, 1]),
        (spaces.Discrete(3, start=-1), np.int8(-1), [1, 0, 0]),
        (spaces.MultiDiscrete([2, 3]), (1, 2), [0, 1, 0, 0, 1]),
        (ARMS, arms(pair=[SEEN, SEEN + 1]), [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_observations_whose_meaning_is_clear_are_read(space, seen, read):
    state = step(seen=seen, space=space)[0]["state"]
    assert (state.dtype, state.tolist()) == (np.float32, read)


def test_observations_are_read_as_gymnasium_lays_them_out():
    for space in (ARMS, spaces.MultiDiscrete([[2, 3], [4, 2]]), spaces.MultiBinary([2, 2])):
        space.seed(0)
        for _ in range(20):
            seen = space.sample()
            assert np.array_equal(step(seen=seen, space=space)[0]["state"], spaces.flatten(space, seen))


@pytest.mark.parametrize("info", [None, 3, {"contacts": "many"}, {"path": np.zeros((4, 2))}, {1: 2}])
def test_the_info_never_matters(info):
    assert step(info=info)[4] == {}
    env = GymAdapter(Told(first=(SEEN, info)))
    assert env.reset()[1] == {}


def test_infos_of_different_shapes_play_side_by_side():
    kinds = [
        lambda size=size: GymAdapter(
            Told((SEEN, {"path": np.zeros((size, 2))}), (SEEN, 0.0, False, False, {"path": np.zeros(size)}))
        )
        for size in (2, 5)
    ]
    envs = SyncVectorEnv(kinds)
    assert envs.reset()[1] == {}
    assert envs.step(np.zeros(2, int))[4] == {}


@pytest.fixture
def register():
    """register(entry_point, **options): its name as a task."""
    names = []

    def add(entry_point, **options):
        names.append(f"Returned{len(names)}-v0")
        gym.register(names[-1], entry_point=entry_point, **options)
        return f"gym:{names[-1]}"

    yield add
    for name in names:
        gym.registry.pop(name)


def test_gymnasium_does_not_speak_before_the_checks(register, recwarn):
    task = register(lambda: Told(first=SEEN, then=(SEEN, 0.0, False, {})), max_episode_steps=5)
    env = make_env(task)
    with pytest.raises(TaskError, match="reset.. returned an array"):
        env.reset()
    env.unwrapped.first = (SEEN, {})
    env.reset()
    with pytest.raises(TaskError, match="returned 4 values"):
        env.step(0)
    assert not recwarn.list
    env.unwrapped.then = (SEEN, 0.0, False, False, {})
    env.reset()
    assert [env.step(0)[3] for _ in range(5)] == [False] * 4 + [True]


class Single(Told):
    """One at a time."""

    taken = 0

    def __init__(self):
        if Single.taken:
            raise OSError(98, "Address already in use")
        super().__init__()
        Single.taken += 1

    def close(self):
        Single.taken -= 1


def test_copies_are_closed_where_one_cannot_be_made(register):
    task = register(Single)
    with pytest.raises(TaskError, match="Address already in use"):
        make_vector_env(task, 2, seed=0)
    assert Single.taken == 0
    make_vector_env(task, 1, seed=0).close()


class CloseFails(Told):
    """As where a window was never opened."""

    def close(self):
        self.viewer.close()


def test_a_close_that_fails_is_a_note(register, capsys):
    task = register(CloseFails)
    for _ in range(2):
        make_vector_env(task, 2, seed=0).close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(f"note: closing {task} failed: AttributeError: .*viewer", said)


def test_spaces_that_are_missing_are_named(register):
    with pytest.raises(TaskError, match="needs an observation_space and an action_space"):
        make_env(register(lambda: Told(space=None)))


def test_an_environment_that_cannot_draw_says_so_shortly(register, recwarn):
    with pytest.raises(TaskError, match="cannot be drawn: it does not offer the render mode 'rgb_array'$"):
        make_env(register(Told), render=True)
    assert not recwarn.list
