"""Checkpoints and run folders: what they hold, what is refused, what survives a failure."""

from pathlib import Path

import pytest
import torch
from conftest import metronomes

from agent.data.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from agent.errors import UsageError
from agent.evaluation.episodes import run_episodes
from agent.learning.dreamer import Dreamer
from agent.runs.folder import new_run_dir
from agent.seeds import FINAL_EVALUATION
from agent.spaces import ActionSpec


def test_the_agent_loads_from_its_file_alone(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=200, eval_every=150)
    trainer.run()
    for path in (tmp_path, tmp_path / "checkpoints/best.pt"):
        agent = Dreamer.load(path, "cpu")
        assert agent.spaces.action == ActionSpec(1, False)
    latest = Dreamer.load(tmp_path, "cpu")
    assert run_episodes(latest, metronomes, 10, FINAL_EVALUATION.first) == trainer.episodes
    assert "replay" not in read_checkpoint(tmp_path / "checkpoints/best.pt")


def test_checkpoints_hold_no_more_than_they_need(make_trainer, tmp_path):
    """torch.save writes whole storages, and the replay's arrays are as large as its capacity."""
    trainer = make_trainer(tmp_path, steps=200, envs=2, replay_rows=500_000, eval_every=0)
    trainer.run()
    assert (tmp_path / "checkpoints/latest.pt").stat().st_size < 2_000_000


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "checkpoints/latest.pt"
    write_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(path, {"step": lambda: 2})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["latest.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    write_checkpoint(tmp_path / "latest.pt", {"step": 1})
    before = (tmp_path / "latest.pt").read_bytes()
    (tmp_path / "latest.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot be written.*latest\.pt"):
        write_checkpoint(tmp_path / "latest.pt", {"step": torch.zeros(100_000)})
    assert (tmp_path / "latest.pt").read_bytes() == before


class Trap:
    """Would run code while being unpickled."""

    def __reduce__(self):
        return (open, ("/dev/null",))


def test_files_that_are_not_checkpoints(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(UsageError, match="there is no run"):
        find_checkpoint(tmp_path / "missing")
    with pytest.raises(UsageError, match="is not a run folder"):
        find_checkpoint(tmp_path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="damaged"):
        read_checkpoint(path)
    torch.save({"step": Trap()}, path)
    with pytest.raises(UsageError, match="damaged"):
        read_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match="not a checkpoint of this program"):
        read_checkpoint(path)
    torch.save(dict.fromkeys(("task", "config", "spaces", "step", "agent"), 0) | {"format": 99}, path)
    with pytest.raises(UsageError, match="format 99"):
        read_checkpoint(path)


def test_run_folders_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [new_run_dir(None, "toy-cue", "small-s0") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.parent.as_posix() == "runs/toy-cue" for folder in folders)
    given = new_run_dir("mine", "toy-cue", "small-s0")
    assert given.is_dir()
    assert new_run_dir("mine", "toy-cue", "small-s0") == given  # still empty
    (given / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        new_run_dir("mine", "toy-cue", "small-s0")
    with pytest.raises(UsageError, match="cannot be made"):
        new_run_dir("mine/notes.txt/below", "toy-cue", "small-s0")
