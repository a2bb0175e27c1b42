"""Data sets that are damaged, hostile or of other programs."""

import json
import os
import zipfile

import numpy as np
import pytest

from agent.data.dataset import load_dataset
from agent.errors import UsageError


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def columns(**changes):
    """Ten episodes of two rows, with columns exchanged or, by None, left out."""
    first = np.tile([True, False], 10)
    rows = {"obs/state": np.ones((20, 1)), "prev_action": np.ones((20, 1)), "reward": np.ones(20)}
    rows |= {"is_first": first, "is_last": ~first, "is_terminal": ~first}
    changed = {name.replace("obs_", "obs/"): value for name, value in changes.items()}
    return {name: value for name, value in (rows | changed).items() if value is not None}


def write_files(folder, rows, metadata=None):
    folder.mkdir()
    spaces = {"obs": {"state": 1}, "action": {"size": 1, "discrete": False}}
    metadata = {"task": "toy:counter", "spaces": spaces} if metadata is None else metadata
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    (folder / "dataset.json").write_text(text)
    np.savez(folder / "rows.npz", **rows)
    return folder


def test_a_data_set_of_other_programs_is_read_where_it_fits(tmp_path):
    dataset = load_dataset(write_files(tmp_path / "data", columns(reward=np.arange(20))))
    assert dataset.train["reward"].dtype == dataset.train["obs/state"].dtype == np.float32
    assert len(dataset.held_out["reward"]) == 2


@pytest.mark.parametrize(("changes", "message"), [
    ({"reward": None}, "has the columns"), ({"deter": np.ones(20)}, "has the columns"),
    ({"reward": np.ones(19)}, "has the shape"), ({"reward": np.ones((20, 1))}, "reward has the shape"),
    ({"reward": np.float64(1)}, "has the shape"), ({"obs_state": np.ones((20, 2))}, "obs/state has the shape"),
    ({"reward": np.full(20, np.nan)}, "reward holds values that are not finite"),
    ({"reward": np.full(20, 1e39)}, "reward holds values that are not finite"),
    ({"reward": np.full(20, "one")}, "reward is of type"), ({"reward": np.full(20, 1j)}, "reward is of type"),
    ({"prev_action": np.full((20, 1), -1.01)}, "actions outside of -1 to 1"),
    ({"is_terminal": np.ones(20, bool)}, "is_terminal is set inside of an episode"),
    ({"is_first": np.ones(20)}, "is_first is of type"), ({"is_first": np.zeros(20, bool)}, "no whole episodes"),
    ({"is_last": np.zeros(20, bool)}, "no whole episodes"),
    ({name: value[:4] for name, value in columns().items()}, "has 2 episodes"),
    ({name: value[:0] for name, value in columns().items()}, "no whole episodes"),
])  # fmt: skip
def test_columns_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset(write_files(tmp_path / "data", columns(**changes)))
    assert len(str(caught.value).splitlines()) == 1


def test_choices_are_one_one_among_zeros(tmp_path):
    spaces = {"obs": {"state": 1}, "action": {"size": 3, "discrete": True}}
    choices = np.tile(np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (10, 1))
    metadata = {"task": "toy:counter", "spaces": spaces}
    dataset = load_dataset(write_files(tmp_path / "good", columns(prev_action=choices), metadata))
    assert dataset.spaces.action.discrete
    for number, wrong in enumerate(([1.0, 1.0, 0.0], [7.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.0])):
        damaged = choices.copy()
        damaged[5] = wrong
        with pytest.raises(UsageError, match="actions that are no choice"):
            load_dataset(write_files(tmp_path / str(number), columns(prev_action=damaged), metadata))


@pytest.mark.parametrize("metadata", [
    "", "[]", "null", "{", "[" * 100_000, '{"task": 3}', {"task": "toy:counter", "spaces": {}},
    *({"task": "toy:counter", "spaces": {"obs": obs, "action": action}} for obs, action in [
        ({}, {"size": 1, "discrete": False}), ({"state": -1}, {"size": 1, "discrete": False}),
        ({"state": "1"}, {"size": 1, "discrete": False}), ({"state": [1, 2]}, {"size": 1, "discrete": False}),
        ({"state": 1.5}, {"size": 1, "discrete": False}), ([1], {"size": 1, "discrete": False}),
        ({"state": 1}, {"size": 0, "discrete": False}), ({"state": 1}, {"size": 1, "discrete": "no"}),
        ({"state": 1}, {"size": 1}), ({"state": 1}, 3), ({"state": True}, {"size": 1, "discrete": False}),
    ]),
])  # fmt: skip
def test_metadata_that_is_none_is_told_in_a_line(tmp_path, metadata):
    with pytest.raises(UsageError, match="is not a data set") as caught:
        load_dataset(write_files(tmp_path / "data", columns(), metadata))
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_in_a_data_set_is_executed(tmp_path):
    with pytest.raises(UsageError, match="is not a data set"):
        load_dataset(write_files(tmp_path / "data", columns(reward=np.array([Hostile(tmp_path / "ran")] * 20))))
    folder = write_files(tmp_path / "pickle", columns())
    np.save(tmp_path / "object.npy", np.array([Hostile(tmp_path / "ran")]))
    for name in ("object.npy", "pickle/dataset.json"):
        (folder / "rows.npz").write_bytes((tmp_path / name).read_bytes())
        with pytest.raises(UsageError, match="is not a data set"):
            load_dataset(folder)
    assert not (tmp_path / "ran").exists()


def test_a_data_set_larger_than_memory_is_not_read(tmp_path):
    folder = write_files(tmp_path / "data", columns())
    with zipfile.ZipFile(folder / "rows.npz", "a", zipfile.ZIP_DEFLATED) as archive, archive.open("big", "w") as file:
        for _ in range(8):
            file.write(bytes(1 << 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent.data.dataset.available_memory", lambda: 20e6)
        with pytest.raises(UsageError, match=r"needs 25.2 MB of memory and 20.0 MB are free"):
            load_dataset(folder)


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path):
    folder = write_files(tmp_path / "data", columns())
    whole, rng = (folder / "rows.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, len(damaged), 4):
            damaged[at] = rng.integers(256)
        (folder / "rows.npz").write_bytes(damaged)
        noticed, dataset = None, None
        try:
            dataset = load_dataset(folder)
        except UsageError as error:
            noticed = str(error)
        assert len(noticed.splitlines()) == 1 if noticed else dataset.train.keys() == columns().keys()
