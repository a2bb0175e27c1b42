"""Images of a replay: a file of the run that is the saved replay."""

import copy
import os

import numpy as np
import pytest
import torch

from agent.replay import ReplayBuffer, with_images
from world_model import LatentState

SHAPE = (16, 16, 1)
STATE = LatentState(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2))
OFF = np.zeros(2, bool)


def make(folder, capacity: int = 40, exists: bool = False) -> ReplayBuffer:
    replay = ReplayBuffer(capacity, 2, {"image": SHAPE, "number": 1}, 1, (1, 2), (1, 2))
    if folder is not None:
        replay.keep_images(folder, exists)
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
    oldest = whole["oldest_whole"]
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
    replay.keep_images(tmp_path)
    found = os.stat(tmp_path / "image.images")
    assert found.st_size == 1_000_000 * 64 * 64 * 3 < 13e9
    assert found.st_blocks * 512 < 1e6


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    replay = make(tmp_path / "replay")

    def full(file, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        add(replay, [1])
    assert replay.count == 0
