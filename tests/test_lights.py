"""toy:lights: levels that can be solved, fewest presses against brute force, ends, seeds and refused names."""

from itertools import combinations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import TaskError, TaskId, make_env
from envs.lights import SIDES, Lights, solver, toggled
from envs.toy import make_toy


def board_of(state: np.ndarray) -> int:
    return sum(1 << cell for cell, lit in enumerate(state) if lit)


def by_hand(side: int, state: np.ndarray, cell: int) -> np.ndarray:
    """The board after a press, on an array."""
    after = state.reshape(side, side).copy()
    for row, column in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        r, c = cell // side + row, cell % side + column
        if 0 <= r < side and 0 <= c < side:
            after[r, c] = 1 - after[r, c]
    return after.ravel()


def test_fewest_presses_of_every_board_of_3_by_3() -> None:
    """All 512 sets of presses, smallest first: each makes a board of its own, and the solver finds that set."""
    made = {}
    for count in range(10):
        for cells in combinations(range(9), count):
            presses = sum(1 << cell for cell in cells)
            made.setdefault(solver(3).after(presses), presses)
    assert len(made) == 512
    assert {board: solver(3).solve(board) for board in made} == made


def test_fewest_presses_of_every_board_of_4_by_4() -> None:
    """There, 16 sets of presses make the same board, and only one board in 16 can be made."""
    fewest: dict[int, int] = {}
    toggles = toggled(4)
    boards = np.zeros(1, np.int64)
    for cell in range(16):
        boards = np.concatenate([boards, boards ^ toggles[cell]])  # boards[presses]
    for presses, board in enumerate(boards.tolist()):
        fewest[board] = min(fewest.get(board, 16), presses.bit_count())
    assert len(fewest) == 2**12
    for board in range(2**16):
        found = solver(4).solve(board)
        assert (found is not None) == (board in fewest)
        if found is not None:
            assert found.bit_count() == fewest[board]
            assert solver(4).after(found) == board


@pytest.mark.parametrize(("side", "quiet"), [(3, 1), (4, 16), (5, 4), (6, 1), (7, 1)])
def test_quiet_sets_toggle_nothing(side: int, quiet: int) -> None:
    assert len(set(solver(side).quiet)) == quiet
    assert {solver(side).after(presses) for presses in solver(side).quiet} == {0}


def test_5_by_5_needs_at_most_15_presses() -> None:
    """15 is the largest number over all 2^23 boards that can be made; 3,000 of them come near it."""
    rng = np.random.default_rng(0)
    counts = []
    for presses in rng.integers(2**25, size=3000).tolist():
        found = solver(5).solve(solver(5).after(presses))
        assert found is not None
        assert solver(5).after(found) == solver(5).after(presses)
        counts.append(found.bit_count())
        assert found.bit_count() <= min((presses ^ quiet).bit_count() for quiet in solver(5).quiet)
    assert 13 <= max(counts) <= 15


@pytest.mark.parametrize("side", SIDES)
def test_levels_can_be_solved_and_say_how_far_they_are(side: int) -> None:
    env = Lights(side)
    for level in range(20):
        observation, info = env.reset(seed=0) if level == 0 else env.reset()
        state, least = observation["state"], info["least_presses"]
        assert 1 <= least <= 2 * side
        for left in range(least - 1, -1, -1):
            presses = solver(side).solve(board_of(state))
            assert presses is not None
            cell = presses.bit_length() - 1
            observation, reward, terminated, truncated, info = env.step(cell)
            np.testing.assert_array_equal(observation["state"], by_hand(side, state, cell))
            state = observation["state"]
            assert (reward, terminated, truncated) == (float(left == 0), left == 0, False)
            assert info["least_presses"] == left
        assert not state.any()


def test_the_number_of_presses_is_the_difficulty() -> None:
    for name, least in (("lights3x1", {1}), ("lights3x9", {9}), ("lights7x30", {30}), ("lights6x2-4", {2, 3, 4})):
        env = make_toy(name)
        assert {env.reset(seed=seed)[1]["least_presses"] for seed in range(40)} == least
    five = make_toy("lights5x20")  # there are shorter ways, which the info knows
    assert max(five.reset(seed=seed)[1]["least_presses"] for seed in range(40)) <= 15
    drawn = {make_toy("lights").reset(seed=seed)[1]["least_presses"] for seed in range(200)}
    assert drawn == set(range(1, 11))


def test_an_episode_ends_after_twice_as_many_presses_as_there_are_cells() -> None:
    env = make_toy("lights4x3")
    env.reset(seed=0)
    for step in range(1, 33):
        _, reward, terminated, truncated, _ = env.step(0)  # on and off again
        assert (reward, terminated, truncated) == (0.0, False, step == 32)


def test_random_presses_have_the_stated_return() -> None:
    rng, env, episodes = np.random.default_rng(0), make_toy("lights3x1-2"), 3000
    solved = 0.0
    for episode in range(episodes):
        env.reset(seed=0) if episode == 0 else env.reset()
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(int(rng.integers(9)))
            solved, over = solved + reward, terminated or truncated
    assert 0.1 < env.random_return < 0.2
    assert solved / episodes == pytest.approx(env.random_return, abs=0.02)


def test_seeds_give_the_same_levels() -> None:
    first, again = make_env("toy:lights5x8", seed=4), make_env("toy:lights5x8", seed=4)
    levels = []
    for _ in range(5):
        level, same = first.reset()[0]["state"], again.reset()[0]["state"]
        np.testing.assert_array_equal(level, same)
        levels.append(board_of(level))
    assert len(set(levels)) == 5


def test_it_is_an_environment_of_gymnasium_that_draws_its_board() -> None:
    check_env(make_toy("lights"), skip_render_check=True)
    env = make_env("toy:lights3x1", seed=0, render=True)
    state = env.reset()[0]["state"]
    frame = env.render()
    assert frame.shape == (60, 60, 3)
    np.testing.assert_array_equal(frame[::20, ::20, 0], 255 * state.reshape(3, 3))
    assert make_env("toy:lights7", render=True).observation_space["state"].shape == (49,)


@pytest.mark.parametrize(("name", "hint"), [
    ("lights2", "3 to 7 cells a side, not 2"), ("lights8", "not 8"), ("lights5x0", "1 to 25 presses, the fewest first"),
    ("lights5x26", "not 26"), ("lights5x4-2", "not 4-2"), ("lights5x4-0", "not 4-0"), ("lightsx3", "lights5x4"),
])  # fmt: skip
def test_names_out_of_range_are_refused(name: str, hint: str) -> None:
    with pytest.raises(TaskError, match="toy world|lights") as caught:
        TaskId.parse(f"toy:{name}")
    assert hint in str(caught.value)
