"""Images of a replay: a file of the run that is the saved replay."""

import copy
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agent.data import image_store
from agent.data.image_store import DeviceImages
from agent.data.replay import ReplayBuffer, with_images
from world_model import LatentState

SHAPE = (16, 16, 1)
STATE = LatentState(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2))
OFF = np.zeros(2, bool)


def make(folder, capacity: int = 40, exists: bool = False) -> ReplayBuffer:
    replay = ReplayBuffer(capacity, 2, {"image": SHAPE, "number": 1}, 1, (1, 2), (1, 2))
    if folder is not None:
        replay.open_image_store(folder, exists)
    return replay


def resumed(folder, saved) -> ReplayBuffer:
    replay = make(folder, exists=True)
    replay.load_state_dict(saved)
    return replay


def add(replay: ReplayBuffer, numbers) -> None:
    """Rows whose image and vector both tell the row's number."""
    for number in numbers:
        row = {
            "obs/image": np.full((2, *SHAPE), number, np.uint8),
            "obs/number": np.full((2, 1), number, np.float32),
            "prev_action": np.zeros((2, 1), np.float32),
            "reward": np.zeros(2, np.float32),
        }
        replay.add({**row, "is_first": OFF, "is_last": OFF, "is_terminal": OFF}, STATE)


def numbers_of(replay: ReplayBuffer, count: int = 200) -> set[int]:
    batch, _ = replay.sample(count, 3)
    image = batch.obs["image"].float().mean((2, 3, 4))
    assert batch.obs["image"].dtype == torch.uint8
    assert torch.equal(image, batch.obs["number"][..., 0])
    return {int(value) for value in image.flatten()}


@pytest.mark.parametrize("on_disk", [True, False])
def test_images_come_back_with_their_rows(tmp_path, on_disk):
    replay = make(tmp_path / "replay" if on_disk else None)
    add(replay, range(50))
    assert numbers_of(replay) == set(range(31, 50))
    assert len(replay) == 40


def test_the_file_is_the_saved_replay(tmp_path):
    replay = make(tmp_path / "replay")
    add(replay, range(50))
    saved = copy.deepcopy(replay.state_dict())  # as on disk
    assert "obs/image" not in saved["rows"]
    del replay
    other = resumed(tmp_path / "replay", saved)
    assert numbers_of(other) == set(range(31, 50))
    add(other, [50])
    assert 50 in numbers_of(other)


def exported(saved, folder) -> set[int]:
    """Numbers of the rows that a data set of the saved replay would have; each image must be its row's own."""
    whole = with_images(saved, {"image": SHAPE, "number": 1}, folder)
    oldest = whole["first_intact"]
    image, number = whole["rows"]["obs/image"][0, :, 0, 0, 0], whole["rows"]["obs/number"][0, :, 0].numpy()
    kept = number >= oldest
    assert np.array_equal(image[kept], number[kept])
    return {int(value) for value in number[kept]}


def test_rows_whose_images_were_overwritten_after_the_checkpoint_are_left_out(tmp_path):
    folder = tmp_path / "replay"
    replay = make(folder)
    add(replay, range(50))
    saved = copy.deepcopy(replay.state_dict())  # as on disk
    assert exported(saved, folder) == set(range(30, 50))
    add(replay, range(50, 57))  # and then the machine died
    assert exported(saved, folder) == set(range(37, 50))
    other = resumed(folder, saved)
    assert numbers_of(other) == set(range(38, 50))
    assert len(other) == 2 * 13
    add(other, range(50, 52))  # and died again, earlier than before
    assert exported(saved, folder) == set(range(37, 50))
    other = resumed(folder, saved)
    assert numbers_of(other) == set(range(38, 50))
    add(other, range(50, 60))
    assert numbers_of(other) == set(range(41, 60))
    assert numbers_of(resumed(folder, other.state_dict())) == set(range(41, 60))


def test_a_checkpoint_whose_images_are_all_overwritten_holds_nothing(tmp_path):
    replay = make(tmp_path / "replay")
    add(replay, range(50))
    saved = copy.deepcopy(replay.state_dict())  # as on disk
    add(replay, range(50, 90))
    other = resumed(tmp_path / "replay", saved)
    assert (len(other), other.held) == (0, 0)
    with pytest.raises(ValueError, match="holds 0 rows"):
        other.sample(1, 3)
    add(other, range(50, 60))
    assert numbers_of(other) <= set(range(50, 60))


def test_a_file_of_another_size_is_never_touched(tmp_path):
    replay = make(tmp_path / "replay")
    add(replay, range(30))
    replay.images["obs/image"].values.flush()
    before = (tmp_path / "replay" / "image.images").read_bytes()
    with pytest.raises(ValueError, match="replay_rows"):
        make(tmp_path / "replay", capacity=60, exists=True)
    assert (tmp_path / "replay" / "image.images").read_bytes() == before


def test_missing_images_are_named_and_not_made_up(tmp_path):
    replay = make(tmp_path / "replay")
    add(replay, range(30))
    saved = copy.deepcopy(replay.state_dict())  # as on disk
    with pytest.raises(ValueError, match="missing"):
        resumed(tmp_path / "elsewhere", saved)
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="missing"):
        with_images(saved, {"image": SHAPE}, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="missing"):
        resumed(tmp_path / "replay", saved | {"count": 31})
    rows = with_images(saved, {"image": SHAPE, "number": 1}, tmp_path / "replay")["rows"]
    assert rows["obs/image"][1, :, 0, 0, 0].tolist() == [*range(20, 30), *range(10, 20)]


def test_a_million_images_start_at_once_and_take_no_room(tmp_path):
    replay = ReplayBuffer(1_000_000, 1, {"image": (64, 64, 3)}, 1, (1, 2), (1, 2))
    replay.open_image_store(tmp_path)
    file = os.stat(tmp_path / "image.images")
    assert file.st_size == 1_000_000 * 64 * 64 * 3 < 13e9
    assert file.st_blocks * 512 < 1e6


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    replay = make(tmp_path / "replay")

    def full(file, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        add(replay, [1])
    assert replay.count == 0


# ---------------------------------------------------------------------- copies on a device


def copied_and_plain(numbers) -> tuple[ReplayBuffer, ReplayBuffer]:
    """Two replays of the same rows and the same seed, the first with a copy of its images."""
    copied, plain = make(None), make(None)
    for replay in (copied, plain):
        add(replay, numbers)
    copied.copy_images_to(torch.device("cpu"))
    return copied, plain


def same_batches(one: ReplayBuffer, other: ReplayBuffer, count: int = 30) -> bool:
    """Whether both sample the same rows from the same places."""
    (batch, where), (same, places) = one.sample(count, 3), other.sample(count, 3)
    pairs = [(batch.obs[name], same.obs[name]) for name in ("image", "number")]
    pairs += [(batch.reward, same.reward), (batch.start.deter, same.start.deter)]
    assert batch.obs["image"].dtype == torch.uint8
    return np.array_equal(where, places) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("before", [10, 20, 27, 50])  # rings of 20 rows: filling, full, wrapped once and twice
def test_copies_on_a_device_change_no_batch(before):
    copied, plain = copied_and_plain(range(before))
    assert same_batches(copied, plain)
    for number in range(before, before + 25):
        for replay in (copied, plain):
            add(replay, [number])
        assert same_batches(copied, plain)
    copied.images["obs/image"].values[:] = 255  # nobody reads them any more
    assert same_batches(copied, plain)


def test_a_loaded_replay_forgets_the_copies_of_what_it_held_before(tmp_path):
    other = make(tmp_path / "replay")
    add(other, range(100, 130))
    saved = copy.deepcopy(other.state_dict())
    replay = make(tmp_path / "replay", exists=True)
    replay.copy_images_to(torch.device("cpu"))
    replay.device_images["obs/image"].values[:] = 7
    replay.load_state_dict(saved)
    assert replay.device_images is None
    assert numbers_of(replay) == set(range(111, 130))
    replay.copy_images_to(torch.device("cpu"))
    assert numbers_of(replay) == set(range(111, 130))


@pytest.mark.parametrize("chunk", [1, 3 * 2 * 16 * 16, 7 * 2 * 16 * 16 + 5])  # bytes: 1, 3 and 7 rows at a time
@pytest.mark.parametrize("count", [0, 1, 13, 20, 33])
def test_copies_made_in_chunks_hold_what_the_rings_hold(monkeypatch, chunk, count):
    monkeypatch.setattr(image_store, "CHUNK_BYTES", chunk)
    values = np.random.default_rng(0).integers(256, size=(2, 20, *SHAPE), dtype=np.uint8)
    held, rows = min(count, 20), DeviceImages(values, count, "cpu")
    assert rows.values.shape == (2, min(20, 2 * held), *SHAPE)
    assert np.array_equal(rows.values[:, :held].numpy(), values[:, :held])
    values[:, 5] = 0
    rows.write(5, values[:, 5])
    assert not rows.values[:, 5].any()
    if count >= 20:
        env, at = np.array([[1], [0], [1]]), np.array([[4, 5], [19, 0], [7, 8]])
        assert np.array_equal(rows.gather(env, at).numpy(), values[env, at])
        rows.values.zero_()
        assert values.any()  # a copy, and no view


ROW = 2 * 16 * 16
"""Bytes of a row of both environments."""


@pytest.mark.parametrize(("free", "fits"), [(2 * 20 * ROW, True), (2 * 20 * ROW - 1, False)])
def test_images_that_would_take_more_than_half_of_what_is_free_stay_where_they_are(monkeypatch, free, fits):
    monkeypatch.setattr(image_store, "free_bytes", lambda device: free)
    copied, plain = copied_and_plain(range(30))
    assert set(copied.device_images) == ({"obs/image"} if fits else set())
    assert same_batches(copied, plain)


def test_copies_grow_with_the_rings_and_go_when_there_is_no_room_left(monkeypatch):
    monkeypatch.setattr(image_store, "free_bytes", lambda device: 2 * 16 * ROW)
    copied, plain = copied_and_plain(range(4))
    for number in range(4, 40):
        for replay in (copied, plain):
            add(replay, [number])
        if number < 8:
            assert copied.device_images["obs/image"].values.shape[1] == 8
        assert set(copied.device_images) == ({"obs/image"} if number < 8 else set())  # 9 rows want room for 18
        assert same_batches(copied, plain)


def test_a_device_that_was_filled_meanwhile_keeps_no_copy(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("taken")

    copied, plain = copied_and_plain(range(4))
    monkeypatch.setattr(image_store.torch, "empty", full)
    for number in range(4, 12):
        for replay in (copied, plain):
            add(replay, [number])
    monkeypatch.undo()
    assert not copied.device_images
    assert same_batches(copied, plain)


def test_a_copy_on_another_device_is_not_asked():
    copied, plain = copied_and_plain(range(10))
    copied.device_images["obs/image"] = SimpleNamespace(values=SimpleNamespace(is_cuda=True))
    assert same_batches(copied, plain)
