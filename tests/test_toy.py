"""Toy worlds: their rules, and the returns of the best and of random policies."""

from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import TaskError, make_env, toy


@pytest.mark.parametrize("name", ["cue", "cue0", "cue50", "serial", "serial16", "serial16x2", "counter"])
def test_toy_worlds_pass_the_gymnasium_checker_and_draw(name: str) -> None:
    check_env(toy.make_toy(name), skip_render_check=True)
    env = make_env(f"toy:{name}", seed=0, render=True)
    env.reset()
    frame = env.render()
    assert frame.dtype == np.uint8
    assert frame.shape[2] == 3
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    with pytest.raises(TaskError, match="render=True"):
        toy.make_toy(name).render()


def play(env: toy.ToyWorld, policy: Any, episodes: int) -> float:
    """Mean return; `policy(state, is_first)` sees observations only."""
    total = 0.0
    for episode in range(episodes):
        observation, _ = env.reset(seed=0) if episode == 0 else env.reset()
        first, over = True, False
        while not over:
            action = policy(observation["state"], first)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, first, over = total + reward, False, terminated or truncated
    return total / episodes


class Remember:
    """The best policy for Cue: keep the cue of the first observation."""

    def __call__(self, state: np.ndarray, first: bool) -> int:
        if first:
            self.cue = int(state[:2].argmax())
        return self.cue


def foresee(env: toy.Serial) -> Any:
    """The best policy for Serial: apply the map n times."""

    def policy(state: np.ndarray, first: bool) -> int:
        position = int((state[: env.bits] > 0) @ 2 ** np.arange(env.bits))
        for _ in range(int(state[env.shown :].sum())):
            position = int(env.map[position])
        return position >> env.bits - 1

    return policy


def test_best_and_random_policies_reach_the_stated_returns() -> None:
    rng = np.random.default_rng(0)

    def guess(state: np.ndarray, first: bool) -> int:
        return int(rng.integers(2))

    for delay in (0, 20):
        cue = toy.Cue(delay)
        assert play(cue, Remember(), 20) == cue.optimal_return
    assert play(toy.Cue(3), guess, 600) == pytest.approx(toy.Cue.random_return, abs=0.2)
    assert play(toy.Cue(3), lambda state, first: 0, 600) == pytest.approx(toy.Cue.forgetful_return, abs=0.2)
    assert play(toy.Cue(3), lambda state, first: 1, 600) == pytest.approx(-toy.Cue.forgetful_return, abs=0.2)
    for serial in (toy.Serial(), toy.Serial(positions=8)):
        assert play(serial, foresee(serial), 5) == serial.optimal_return
        assert play(serial, guess, 60) == pytest.approx(serial.random_return, abs=2.0)
    counted = play(toy.Counter(), lambda *_: np.zeros(1, np.float32), 600)
    assert counted == pytest.approx(toy.Counter.optimal_return, abs=3.0)


def test_cue_shows_nothing_between_cue_and_query() -> None:
    seen: dict[int, np.ndarray] = {}
    for seed in range(20):
        env = toy.Cue(delay=4)
        rows = [env.reset(seed=seed)[0]["state"]]
        for step in range(6):
            observation, reward, terminated, truncated, _ = env.step(seed // 10)
            rows.append(observation["state"])
            assert (terminated, truncated) == (step == 5, False)
            assert reward == 0 or step == 5
        cue = int(rows[0][:2].argmax())
        if cue in seen:
            np.testing.assert_array_equal(np.array(rows[1:]), seen[cue])
        seen[cue] = np.array(rows[1:])
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], [[0, 0, 1, 0]] * 4 + [[0, 0, 0, 1], [0, 0, 0, 0]])


def shifted(bits: list[int]) -> list[int]:
    """A move: twice down by a place, the new top bit made of four old ones."""
    for _ in range(2):
        bits = [*bits[1:], (bits[0] + (bits[-1] + bits[-2] + bits[1] >= 2)) % 2]
    return bits


@pytest.mark.parametrize("positions", [4, 8, 16, 256])
def test_the_map_of_serial_is_a_shift_register_and_a_permutation(positions: int) -> None:
    env = toy.Serial(positions)
    assert sorted(env.map) == list(range(positions))
    for position, following in enumerate(env.map):
        bits, after = ([int(at) >> k & 1 for k in range(env.bits)] for at in (position, following))
        assert after == shifted(bits)


@pytest.mark.parametrize("registers", [1, 3])
def test_serial_moves_every_register_by_the_power_it_shows(registers: int) -> None:
    env = toy.Serial(positions=16, registers=registers)
    shown = 4 * registers
    assert env.observation_space["state"].shape == (shown + 8,)
    state = env.reset(seed=0)[0]["state"]
    powers, seen = set(), set()
    for step in range(50):
        assert set(state[:shown]) <= {-1.0, 1.0}
        every, power = (state[:shown] > 0).astype(int).reshape(registers, 4).tolist(), int(state[shown:].sum())
        assert state[shown:].tolist() == [1.0] * power + [0.0] * (8 - power)
        for _ in range(power):
            every = [shifted(bits) for bits in every]
        powers.add(power)
        seen.add(len({tuple(bits) for bits in every}))
        observation, reward, terminated, truncated, _ = env.step(1)
        state = observation["state"]
        assert (state[:shown] > 0).astype(int).reshape(registers, 4).tolist() == every
        assert reward == every[0][-1]
        assert (terminated, truncated) == (False, step == 49)
    assert powers == set(range(9))
    assert max(seen) == registers  # they start apart from one another


def test_names_of_serial() -> None:
    named = (("serial", 256, 2), ("serial256", 256, 1), ("serial64", 64, 1), ("serial16x2", 16, 2))
    for name, positions, registers in named:
        env = toy.make_toy(name)
        assert isinstance(env, toy.Serial)
        assert (env.positions, env.registers) == (positions, registers)
