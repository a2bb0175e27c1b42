"""toy:words: products against direct composition, what is shown and when, lengths, returns, and refused names."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import TaskError, TaskId, make_env, make_vector_env
from envs.toy import make_toy
from envs.words import ELEMENTS, GENERATORS, LONGEST, Words, product


def composed(word: list[int]) -> list[int]:
    """Where five beads go: each is carried along by hand."""
    ends = []
    for bead in range(5):
        for generator in word:
            if generator == 0:
                bead = {0: 1, 1: 0}.get(bead, bead)
            else:
                bead = (bead + (1 if generator == 1 else -1)) % 5
        ends.append(bead)
    return ends


def read(env: Words, state: np.ndarray) -> tuple[list[int], int | None, list[int] | None]:
    """The generators, the element of the query and the product of an observation."""
    slots, rest = np.split(state, [3 * env.shown])
    word = [int(slot.argmax()) for slot in slots.reshape(env.shown, 3) if slot.any()]
    query, places = rest[:5], rest[5:].reshape(5, 5)
    assert (slots.reshape(env.shown, 3).sum(1) <= 1).all()
    return word, int(query.argmax()) if query.any() else None, places.argmax(1).tolist() if places.any() else None


def play(env: Words, policy: Any, seed: int | None = None) -> tuple[list[int], int, list[int], float, int]:
    """Word, element of the query, product, return and actions of one episode."""
    (observation, info), word, element, total, actions, over = env.reset(seed=seed), [], None, 0.0, 0, False
    length = info["word_length"]
    while not over:
        generators, asked, places = read(env, observation["state"])
        assert places is None
        assert (asked is None) == bool(generators)
        word, element = word + generators, asked if asked is not None else element
        observation, reward, over, truncated, info = env.step(policy(word, asked))
        actions, total = actions + 1, total + reward
        assert (truncated, info["word_length"]) == (False, length)
        assert over == (asked is not None)
    generators, asked, places = read(env, observation["state"])
    assert (generators, asked, len(word)) == ([], None, length)
    assert element is not None
    assert places is not None
    return word, element, places, total, actions


def answer(word: list[int], asked: int | None) -> int:
    """The best policy."""
    return 0 if asked is None else composed(word)[asked]


def test_products_are_compositions() -> None:
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 7, 64):
        word = rng.integers(3, size=length)
        assert product(word).tolist() == composed(word.tolist())
    left, right = rng.integers(3, size=5), rng.integers(3, size=6)
    both = product(np.concatenate([left, right]))
    np.testing.assert_array_equal(both, product(right)[product(left)])


def test_the_generators_make_all_of_s5() -> None:
    reached, edge = {(0, 1, 2, 3, 4)}, [(0, 1, 2, 3, 4)]
    while edge:
        new = {tuple(int(g[p]) for p in places) for places in edge for g in GENERATORS} - reached
        reached |= new
        edge = list(new)
    assert reached == set(permutations(range(ELEMENTS)))


@pytest.mark.parametrize(("name", "lengths", "shown"), [
    ("words", (1, 64), 1), ("words64", (64, 64), 1), ("words1", (1, 1), 1), ("words2-9", (2, 9), 1),
    ("words16x4", (16, 16), 4), ("words5x3", (5, 5), 3), ("words1-7x4", (1, 7), 4), ("wordsx64", (1, 64), 64),
])  # fmt: skip
def test_words_are_shown_and_end_in_their_product(name: str, lengths: tuple[int, int], shown: int) -> None:
    env = make_toy(name)
    assert isinstance(env, Words)
    assert env.observation_space["state"].shape == (3 * shown + 30,)
    seen, products, asked = set(), set(), set()
    for episode in range(60):
        word, element, places, total, actions = play(env, answer, 0 if episode == 0 else None)
        assert places == composed(word)
        assert total == env.optimal_return
        assert actions == -(-len(word) // shown) + 1
        seen.add(len(word))
        products.add(tuple(places))
        asked.add(element)
    assert lengths[0] <= min(seen) <= max(seen) <= lengths[1]
    assert len(seen) >= min(lengths[1] - lengths[0] + 1, 7)
    assert len(products) > (2 if lengths[1] == 1 else 15)
    assert asked == set(range(5))


def test_a_random_and_a_wrong_answer() -> None:
    rng, env = np.random.default_rng(0), Words((1, 4))
    returns = [play(env, lambda *_: int(rng.integers(5)), 1 if i == 0 else None)[3] for i in range(1500)]
    assert np.mean(returns) == pytest.approx(env.random_return, abs=0.04)
    wrong = [play(env, lambda word, asked: (answer(word, asked) + 1) % 5, 2)[3] for _ in range(5)]
    assert wrong == [0.0] * 5


def test_all_elements_are_needed() -> None:
    """Of long words, no answer that ignores the word is right more often than one in five."""
    env = Words((40, 64))
    pairs = [(element, places[element]) for _, element, places, *_ in (play(env, answer) for _ in range(600))]
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.transpose(pairs)), 1)
    assert counts.max() / counts.sum() < 0.08  # 1 / 25 expected


def test_seeds_give_the_same_words() -> None:
    first, again = make_env("toy:words", seed=4), make_env("toy:words", seed=4)
    for _ in range(3):
        np.testing.assert_array_equal(first.reset()[0]["state"], again.reset()[0]["state"])
        for _ in range(65):
            one, other = first.step(2), again.step(2)
            np.testing.assert_array_equal(one[0]["state"], other[0]["state"])
            assert one[1:] == other[1:]
            if one[2]:
                break
    words, same = make_toy("words"), make_toy("words")
    assert [play(words, answer, 5), play(words, answer)] == [play(same, answer, 5), play(same, answer)]
    assert play(make_toy("words64"), answer, 1)[0] != play(make_toy("words64"), answer, 2)[0]


def test_it_is_an_environment_of_gymnasium() -> None:
    check_env(make_toy("words16x2"), skip_render_check=True)
    env = make_env("toy:words", seed=0, render=True)
    env.reset()
    assert env.render().shape == (64, 33 * 4, 3)
    vector = make_vector_env("toy:words3-9", 3, seed=0)
    _, infos = vector.reset()
    assert set(infos["word_length"]) <= set(range(3, 10))
    vector.close()


@pytest.mark.parametrize(("name", "hint"), [
    ("words0", "1 to 64 generators, the shortest first, not 0"), ("words65", "not 65"), ("words9-3", "not 9-3"),
    ("words5-0", "not 5-0"), ("words8x0", "1 to 64 generators at a time, not 0"), ("words8x65", "at a time, not 65"),
    ("words-3", "no toy world 'words-3'"), ("wordsx", "words1-16 "), ("word", "words64"),
])  # fmt: skip
def test_names_out_of_range_are_refused(name: str, hint: str) -> None:
    with pytest.raises(TaskError, match="toy world|words") as caught:
        TaskId.parse(f"toy:{name}")
    assert hint in str(caught.value)


def test_a_name_without_its_suite_is_recognised() -> None:
    assert LONGEST == 64
    for name in ("words64", "words1-16x4", "lights5x3"):
        with pytest.raises(TaskError, match=f"did you mean toy:{name}"):
            TaskId.parse(name)
