"""Checkpoints and run folders: what they hold, what is refused, what survives a failure."""

import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, metronomes

from agent.data import checkpoint
from agent.data.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from agent.errors import UsageError
from agent.evaluation.episodes import run_episodes
from agent.learning.dreamer import Dreamer
from agent.runs.folder import claimed, new_run_dir, read_meta
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
    by_hand = tmp_path / "by-hand" / "config.yaml"
    by_hand.parent.mkdir()
    by_hand.write_text("preset: debug  # my own\n")
    with pytest.raises(UsageError, match="is not empty"):
        new_run_dir("by-hand", "toy-cue", "small-s0")
    (by_hand.parent / ".lock").touch()  # but that of a run which ended before its first checkpoint is free
    assert new_run_dir("by-hand", "toy-cue", "small-s0").name == "by-hand"


def test_a_world_model_alone_begins_anew_in_its_folder(tmp_path):
    for name in ("config.yaml", "meta.json", "open_loop.csv", "probe.csv", "metrics.jsonl"):
        (tmp_path / name).write_text("task: toy:cue\nmodel_only: true\n")
    assert new_run_dir(str(tmp_path), "toy-cue", "model-s0") == tmp_path
    with pytest.raises(UsageError, match="a world model alone, which does not go on: give the command anew"):
        find_checkpoint(tmp_path)


def test_a_meta_json_with_values_of_other_kinds_counts_as_damaged(tmp_path):
    for content in ('{"wall_seconds": "x"}', '{"wall_seconds": null}', '{"commands": 5}', "[]", ""):
        (tmp_path / "meta.json").write_text(content)
        assert read_meta(tmp_path) == {}
    (tmp_path / "meta.json").write_text('{"wall_seconds": 3, "finished": true}')
    assert read_meta(tmp_path)["finished"]


# ---------------------------------------------------------------------- from the first moment, and never lost


def test_there_is_a_checkpoint_before_the_first_step(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=200, eval_every=0, save_every=0)
    trainer.begin_episodes = lambda: (_ for _ in ()).throw(MemoryError())  # as a kill, nothing is saved after it
    with pytest.raises(MemoryError):
        trainer.run()
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["step"] == 0
    assert make_trainer(tmp_path, saved=saved, steps=200, eval_every=0).run()


def test_checkpoints_come_by_time_too(make_trainer, tmp_path, monkeypatch):
    """Also between the many updates after the prefill, and before an evaluation, which may take long."""
    clock = [0.0]
    monkeypatch.setattr("agent.training.trainer.time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = make_trainer(tmp_path, steps=550, prefill=500, ratio=0.5, eval_every=520, save_every=0)
    update, store, saves = trainer.execution.update, trainer.store, []

    def slow(*words):
        clock[0] += 30.0
        return update(*words)

    def noted(name, content, beside=False):
        if name == "latest":
            saves.append((clock[0], content["step"]))
        store(name, content, beside)

    trainer.execution.update, trainer.store = slow, noted
    assert trainer.run()
    times = [time for time, _ in saves]
    assert max(np.diff(times)) <= 240.0 + 30.0
    assert [step for _, step in saves].count(500) >= 5  # 50 updates of half a minute
    assert 520 in [step for _, step in saves]


def test_the_one_before_is_used_where_the_last_checkpoint_is_damaged(make_trainer, tmp_path, capsys):
    trainer = make_trainer(tmp_path, steps=300, eval_every=0, save_every=100)
    assert trainer.run()
    store = trainer.store
    latest, previous = tmp_path / "checkpoints/latest.pt", tmp_path / "checkpoints/previous.pt"
    store("latest", {**read_checkpoint(latest), "step": 301})
    whole = latest.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:5000] + b"\0" * 100 + whole[5100:]):
        latest.write_bytes(damaged)
        assert read_checkpoint(find_checkpoint(tmp_path))["step"] == 300
        assert "latest.pt is damaged; the one before it is used, of step 300" in capsys.readouterr().err
    latest.unlink()
    assert find_checkpoint(tmp_path) == previous
    assert Dreamer.load(tmp_path, "cpu").spaces.action.size == 1


def test_large_checkpoints_are_written_beside_training(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=200, eval_every=0)
    store, free = trainer.store, threading.Event()
    monkeypatch.setattr(store, "seconds", 1.0)  # what the last one took
    write = checkpoint.write_checkpoint
    weights = torch.ones(1000)

    def slow(*words):
        assert free.wait(10)
        write(*words)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    store("latest", {"step": 1, "agent": {"weights": weights}}, beside=True)
    weights.zero_()  # training goes on
    assert not (tmp_path / "checkpoints/latest.pt").exists()
    free.set()
    store.wait()
    assert read_checkpoint(tmp_path / "checkpoints/latest.pt")["agent"]["weights"].sum() == 1000

    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    store.seconds = 1.0
    store("latest", {"step": 2, "agent": {}}, beside=True)
    with pytest.raises(OSError, match="No space"):
        store.wait()
    store.wait()  # it is said once


def test_a_save_after_one_that_failed_beside_training_is_written(make_trainer, tmp_path, monkeypatch):
    """The disk was full for a moment, and nobody has looked since."""
    store, write, seen = make_trainer(tmp_path, steps=200, eval_every=0).store, checkpoint.write_checkpoint, []

    def full_once(*words):
        seen.append(1)
        if len(seen) == 1:
            raise OSError(28, "No space left on device")
        write(*words)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full_once)
    store.seconds = 1.0
    store("latest", {"step": 2, "agent": {}}, beside=True)
    store("latest", {"step": 3, "agent": {}}, beside=True)
    assert read_checkpoint(tmp_path / "checkpoints/latest.pt")["step"] == 3
    store.wait()


def test_the_only_whole_checkpoint_survives_the_next_save(make_trainer, tmp_path):
    store = make_trainer(tmp_path, steps=200, eval_every=0).store
    store("latest", {"step": 1, "agent": {}})
    store("latest", {"step": 2, "agent": {}})
    latest = tmp_path / "checkpoints/latest.pt"
    latest.write_bytes(latest.read_bytes()[:-200])
    saved = read_checkpoint(latest)
    assert saved["step"] == 1
    with claimed(str(tmp_path), "task", "name", saved):
        store("latest", {"step": 5, "agent": {}})
    assert read_checkpoint(latest)["step"] == 5
    assert read_checkpoint(tmp_path / "checkpoints/previous.pt")["step"] == 1


def test_what_a_killed_process_was_writing_is_removed(make_trainer, tmp_path):
    left = tmp_path / "checkpoints/latest.pt.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    make_trainer(tmp_path)
    assert not left.exists()


# ---------------------------------------------------------------------- one writer


def test_one_process_at_a_time_writes_into_a_run(tmp_path):
    """The lock ends with the process that has it, however it ends."""
    code = "import sys, time\nfrom pathlib import Path\nfrom agent.runs.folder import Meta, claimed\n"
    code += "with claimed(sys.argv[1], 'toy', 'x') as folder:\n    Meta(folder, 'toy:cue', 'cpu', {})\n"
    code += "    print('in', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    refused = f"is in use by process {other.pid} on {socket.gethostname()}"
    with pytest.raises(UsageError, match=refused), claimed(str(tmp_path / "run"), "toy", "x"):
        pass
    other.kill()
    other.wait()
    with claimed(str(tmp_path / "run"), "toy", "x") as folder:  # there was no checkpoint
        assert folder == tmp_path / "run"


def test_a_run_that_went_on_meanwhile_is_not_resumed_from_where_it_was(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=200, eval_every=0)
    trainer.run()
    saved = read_checkpoint(find_checkpoint(tmp_path))
    with claimed(str(tmp_path), "toy", "x", saved):
        pass
    trainer.save()
    with pytest.raises(UsageError, match="has gone on in another process"), claimed(str(tmp_path), "toy", "x", saved):
        pass
