"""Replay with counting environments: every stored number says where it belongs."""

import copy
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.data.replay import FADING, NEVER, POWER, ReplayBuffer
from agent.training.train_config import TrainConfig
from world_model import LatentState

GROUPS, CLASSES = 2, 5


def make(capacity: int = 40, envs: int = 2, seed: int = 0, sampling: str = "uniform", **sizes) -> ReplayBuffer:
    sizes = {"obs_sizes": {"row": 3, "more": 1}, "action_size": 2, "deter": (2, 1)} | sizes
    return ReplayBuffer(capacity, envs, **sizes, stoch=(GROUPS, CLASSES), seed=seed, sampling=sampling)


def marked(numbers: torch.Tensor) -> LatentState:
    """Latents (..., 2, 1), (..., S, K) that hold a whole number."""
    deter = torch.stack([numbers, -numbers], -1)[..., None].float()
    digits = torch.stack([numbers % CLASSES, (numbers // CLASSES) % CLASSES], -1)
    return LatentState(deter, torch.nn.functional.one_hot(digits, CLASSES).float())


class Counters:
    """Environments that count: episode lengths by environment, rows as a next-step reset gives them."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.row = lengths, 0
        self.step, self.episode = [0] * len(lengths), [0] * len(lengths)

    def fill(self, replay: ReplayBuffer, rows: int) -> None:
        for _ in range(rows):
            step, length = np.array(self.step), np.array(self.lengths)
            row = {
                "obs/row": np.stack([np.full_like(step, self.row), step, np.arange(len(step))], -1),
                "obs/more": np.array(self.episode)[:, None],
                "prev_action": np.where(step[:, None] == 0, 0, np.stack([step - 1, -step], -1)),
                "reward": step * 10.0,
                "is_first": step == 0,
                "is_last": step == length,
                "is_terminal": (step == length) & (np.array(self.episode) % 2 == 0),
            }
            replay.add(row, marked(torch.full((len(step),), self.row)))
            self.row += 1
            for e, ended in enumerate(row["is_last"]):
                self.episode[e] += int(ended)
                self.step[e] = 0 if ended else self.step[e] + 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(4, 60),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 90),
    st.integers(1, 8),
)
def test_counting_environments_come_back_in_order(capacity, lengths, rows, length):
    replay = make(capacity, len(lengths), seed=rows)
    Counters(lengths).fill(replay, rows)
    held = min(rows, max(2, capacity // len(lengths)))
    assert len(replay) == held * len(lengths)
    if held < length + 1:
        with pytest.raises(ValueError, match="rows"):
            replay.sample(4, length)
        return
    batch, where = replay.sample(16, length)
    assert where.shape == (2, 16, length)
    row, step, env = batch.obs["row"].unbind(-1)
    assert torch.equal(env, torch.from_numpy(where[0]).float())
    # Consecutive rows, all of them still held, and the context row before them too.
    assert (row.diff(dim=1) == 1).all()
    assert row[:, 0].min() > rows - held
    assert row[:, -1].max() < rows
    # Every field is that of its own row.
    assert torch.equal(batch.is_first, step == 0)
    assert torch.equal(batch.is_last, step == torch.tensor(lengths)[env.long()])
    assert torch.equal(batch.is_terminal, batch.is_last & (batch.obs["more"][..., 0] % 2 == 0))
    assert torch.equal(batch.reward, step * 10)
    expected = torch.where(batch.is_first[..., None], 0.0, torch.stack([step - 1, -step], -1))
    assert torch.equal(batch.prev_action, expected)
    same = ~batch.is_first[:, 1:]
    assert (step.diff(dim=1)[same] == 1).all()
    assert (batch.obs["more"][..., 0].diff(dim=1) == (~same).float()).all()
    # Each sequence starts from the latent of the row before it.
    before = marked(row[:, 0].long() - 1)
    assert torch.equal(batch.start.deter, before.deter)
    assert torch.equal(batch.start.stoch, before.stoch)


@pytest.mark.parametrize("sampling", get_args(get_type_hints(TrainConfig)["sampling"]))
@pytest.mark.parametrize("rows", [7, 20, 33])  # part full, exactly full, wrapped
def test_every_possible_sequence_is_drawn_and_no_other(rows, sampling):
    replay = make(40, 2, sampling=sampling)
    Counters([3, 4]).fill(replay, rows)
    batch, _ = replay.sample(3000, 3)
    seen = {(int(env), int(row)) for row, _, env in batch.obs["row"][:, 0].tolist()}
    oldest = max(0, rows - 20)
    assert seen == {(env, row) for env in (0, 1) for row in range(oldest + 1, rows - 2)}


def test_types_of_a_batch():
    replay = make()
    Counters([3, 4]).fill(replay, 10)
    batch, _ = replay.sample(5, 4)
    assert list(batch.obs) == ["row", "more"]
    assert batch.obs["row"].shape == (5, 4, 3)
    assert batch.start.stoch.shape == (5, GROUPS, CLASSES)
    assert batch.is_first.dtype == batch.is_last.dtype == batch.is_terminal.dtype == torch.bool
    floats = batch.reward, batch.prev_action, *batch.obs.values(), *batch.start
    assert all(x.dtype == torch.float32 for x in floats)


def test_written_latents_come_back_as_the_context_of_the_next_row():
    replay = make(40, 2)
    Counters([3, 4]).fill(replay, 33)
    batch, where = replay.sample(2, 4)
    written = {}
    numbers = torch.arange(1000, 1008).view(2, 4)
    for b in range(2):
        for t in range(4):
            written[int(where[0, b, t]), int(batch.obs["row"][b, t, 0])] = int(numbers[b, t])
    replay.write_back(where, marked(numbers), torch.zeros(2, 2))
    later, _ = replay.sample(2000, 1)
    seen = set()
    for i, (next_row, _, env) in enumerate(later.obs["row"][:, 0].long().tolist()):
        row = next_row - 1
        expected = marked(torch.tensor(written.get((env, row), row)))
        assert torch.equal(later.start.deter[i], expected.deter)
        assert torch.equal(later.start.stoch[i], expected.stoch)
        seen.add((env, row))
    assert len(seen & set(written)) >= 4


@pytest.mark.parametrize("sampling", get_args(get_type_hints(TrainConfig)["sampling"]))
def test_state_round_trip_gives_the_same_samples(sampling):
    for rows in (9, 33):
        replay = make(sampling=sampling)
        counters = Counters([3, 4])
        counters.fill(replay, rows)
        _, where = replay.sample(3, 4)
        replay.write_back(where, marked(torch.zeros(3, 4, dtype=torch.long)), torch.rand(3, 2))
        saved = copy.deepcopy(replay.state_dict())
        other = make(seed=99, sampling=sampling)
        other.load_state_dict(saved)
        assert len(other) == len(replay)
        for filled in (0, 5):  # and both go on alike
            twin = copy.deepcopy(counters)
            counters.fill(replay, filled)
            twin.fill(other, filled)
            (a, at), (b, also) = replay.sample(8, 4), other.sample(8, 4)
            assert np.array_equal(at, also)
            assert torch.equal(a.obs["row"], b.obs["row"])
            assert torch.equal(a.reward, b.reward)
            assert torch.equal(a.start.deter, b.start.deter)
            assert torch.equal(a.start.stoch, b.start.stoch)


def test_state_can_be_saved_without_pickled_code(tmp_path):
    replay = make()
    Counters([3, 4]).fill(replay, 9)
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    other = make(seed=5)
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert torch.equal(other.sample(6, 3)[0].obs["row"], replay.sample(6, 3)[0].obs["row"])


@pytest.mark.parametrize(
    "mine",
    [
        {"action_size": 3},
        {"deter": (3, 1)},
        {"obs_sizes": {"row": 4, "more": 1}},
        {"obs_sizes": {"row": 3}},
        {"obs_sizes": {"row": 3, "more": 1, "extra": 2}},
        {"envs": 4, "capacity": 80},
        {"capacity": 38},
        {"capacity": 60},
    ],
)
def test_a_replay_of_another_shape_is_refused(mine):
    replay = make()
    Counters([3, 4]).fill(replay, 33)
    other = make(**mine)
    with pytest.raises(ValueError, match="replay"):
        other.load_state_dict(replay.state_dict())
    assert len(other) == 0


def test_too_few_rows_are_an_error():
    replay = make(10, 2)
    with pytest.raises(ValueError, match="0 rows"):
        replay.sample(1, 1)
    Counters([3, 4]).fill(replay, 50)
    replay.sample(1, 4)
    with pytest.raises(ValueError, match="5 rows per environment, a sequence needs 6"):
        replay.sample(1, 5)


# ---------------------------------------------------------------------- which sequences


def first_rows(replay, draws=4000, length=1):
    """Share of the draws in which each row came first, by its number, over all environments."""
    batch, _ = replay.sample(draws, length)
    numbers = batch.obs["row"][:, 0, 0].long()
    return torch.bincount(numbers, minlength=int(replay.count)).double() / draws


def filled(sampling, rows=200):
    replay = make(2 * rows, 2, sampling=sampling)
    Counters([3, 4]).fill(replay, rows)
    return replay


def test_recent_draws_half_of_the_sequences_from_the_newest_tenth():
    shares = first_rows(filled("recent"), 20_000)
    newest = float(shares[-21:].sum())
    assert newest == pytest.approx(0.5 + 0.5 * 21 / 199, abs=0.02)
    assert float(shares[1:-21].max()) < 3 * float(shares[1:-21].mean())


@pytest.mark.parametrize(("sampling", "column"), [("model-error", 0), ("value-error", 1)])
def test_rows_are_drawn_by_their_last_error(sampling, column):
    replay = filled(sampling)
    even = first_rows(replay)
    assert float(even[1:].max()) < 3.0 / 199  # rows that were never learned from count alike
    errors = torch.full((200, 2), 7.0)
    errors[:, column] = 1.0
    errors[50:60, column] = 32.0
    where = np.stack([np.zeros((200, 1), int), np.arange(200)[:, None]])
    for env in (0, 1):
        where[0] = env
        replay.write_back(where, marked(torch.zeros(200, 1, dtype=torch.long)), errors)
    found = first_rows(replay, 400)
    for _ in range(19):
        found = found + first_rows(replay, 400)
    high, low = float(found[50:60].mean()), float(found[60:].mean())
    assert 0.5 * 32**POWER < high / low < 1.1 * 32**POWER  # a few candidates at a time: a little less


def test_an_error_is_that_of_all_rows_of_its_sequence():
    replay = filled("value-error", 20)
    where = np.stack(np.broadcast_arrays(np.array([[0], [1]]), np.array([[2, 3, 4], [7, 8, 9]])))
    replay.write_back(where, marked(torch.zeros(2, 3, dtype=torch.long)), torch.tensor([[0.0, 5.0], [0.0, 0.5]]))
    assert replay.rows["priority"][0, 1:6].tolist() == [NEVER, 5.0, 5.0, 5.0, NEVER]
    assert replay.rows["priority"][1, 6:11].tolist() == [NEVER, 0.5, 0.5, 0.5, NEVER]


def test_rows_that_were_never_learned_from_count_as_much_as_the_largest_error_of_late():
    """Those of the beginning too, whatever the errors were then."""
    replay = filled("value-error")
    errors = torch.full((100, 2), 300.0)
    where = np.stack([np.zeros((100, 1), int), np.arange(100)[:, None]])
    for env in (0, 1):
        where[0] = env
        replay.write_back(where, marked(torch.zeros(100, 1, dtype=torch.long)), errors)
    share = float(first_rows(replay, 400)[100:].sum())
    assert share == pytest.approx(100 / 199, abs=0.1)


def test_the_largest_error_of_late_is_saved():
    replay, other = filled("model-error", 20), make(40, 2, sampling="model-error")
    where = np.stack([np.zeros((1, 1), int), np.full((1, 1), 3)])
    replay.write_back(where, marked(torch.zeros(1, 1, dtype=torch.long)), torch.tensor([[5.0, 0.0]]))
    other.load_state_dict(replay.state_dict())
    assert other.highest == 5.0
    assert np.array_equal(other.rows["priority"], replay.rows["priority"])


def test_new_rows_count_as_much_as_the_largest_error_of_late():
    replay = filled("model-error", 20)
    where = np.stack([np.zeros((1, 1), int), np.full((1, 1), 3)])
    replay.write_back(where, marked(torch.zeros(1, 1, dtype=torch.long)), torch.tensor([[5.0, 0.0]]))
    assert replay.highest == 5.0
    replay.write_back(where, marked(torch.zeros(1, 1, dtype=torch.long)), torch.tensor([[0.5, 0.0]]))
    assert replay.highest == pytest.approx(5.0 * FADING)
    Counters([3, 4]).fill(replay, 1)
    assert replay.rows["priority"][0, replay.count % replay.length - 1] == NEVER


def test_uniform_sampling_holds_no_priorities():
    assert "priority" not in make().rows
    assert "priority" in make(sampling="value-error").rows
