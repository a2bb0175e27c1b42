"""A run of a sweep on a node of a cluster: the part that knows nothing of the cluster."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from agent.data.image_store import ImageStore
from agent.data.replay import with_images
from agent.errors import UsageError
from agent.runs import node_run, tune
from agent.runs.node_run import TOKEN, NodeRun, pack, source_fingerprint, unpack
from agent.training.schedule import UNFINISHED

CHILD = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "checkpoints" / "latest.pt").write_text("new")
def save(*_):
    print("saved", flush=True)
    sys.exit(130)
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """begin(seconds, token): a run that is played by CHILD, in a sweep's folder whose token is "ours"."""
    (tmp_path / "train_agent.py").write_text(CHILD)
    monkeypatch.setattr(node_run, "PROJECT", tmp_path)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / TOKEN).write_text("ours")

    def begin(seconds, token="ours", content=None):
        run, folder = NodeRun(), str(sweep / "seed=0")
        run.begin(folder, [str(seconds), "--run-dir", folder], token, source_fingerprint(), content)
        return run

    return begin


def ended(run, seconds=20.0):
    """What the run says when it has ended."""
    limit = time.monotonic() + seconds
    while (said := run.ask()).status is None:
        assert time.monotonic() < limit
        time.sleep(0.02)
    return said


def test_a_run_works_in_the_folder_of_the_sweep_where_the_node_sees_it(begin, tmp_path):
    run = begin(0.0)
    assert ended(run) == (0, "ready", 0.0)
    assert (tmp_path / "sweep/seed=0/checkpoints/latest.pt").read_text() == "new"
    assert run.packed() is None
    run.forget()
    assert (tmp_path / "sweep/seed=0.log").read_text() == "ready\n"


def test_elsewhere_it_works_in_a_folder_of_the_node_that_is_copied_back_and_forgotten(begin, tmp_path):
    run = begin(0.0, token="of another machine")
    said = ended(run)
    assert said[:2] == (0, "ready")
    assert said.saved > 0.0
    assert not (tmp_path / "sweep/seed=0").exists()
    unpack(run.packed(), tmp_path / "sweep/seed=0")
    assert (tmp_path / "sweep/seed=0/checkpoints/latest.pt").read_text() == "new"
    assert (tmp_path / "sweep/seed=0.log").read_text() == "ready\n"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [TOKEN, "seed=0", "seed=0.log"]
    run.forget()
    assert not run.folder.exists()


def test_it_goes_on_from_the_files_that_come_with_it(begin, tmp_path):
    before = tmp_path / "sweep/seed=0"
    before.mkdir()
    (before / "eval.csv").write_text("1,2,3\n")
    run = begin(0.0, token="of another machine", content=pack(before))
    ended(run)
    assert (run.folder / "eval.csv").read_text() == "1,2,3\n"


def test_an_interrupted_run_saves(begin):
    """Where the process that starts it blocks and ignores SIGINT, too: a worker of a cluster does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    run = begin(60.0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.signal(signal.SIGINT, before)
    while run.ask().line != "ready":
        time.sleep(0.02)
    run.interrupt()
    assert ended(run)[:2] == (130, "saved")
    run.interrupt()  # it has ended: nothing happens


def test_a_node_with_another_version_of_the_project_is_refused(begin, tmp_path):
    source = source_fingerprint()
    (tmp_path / "train_agent.py").write_text(CHILD + "# newer")
    with pytest.raises(UsageError, match="has another version of the project: bring .* up to date"):
        NodeRun().begin(str(tmp_path / "sweep/seed=0"), [], "ours", source)


def test_files_that_vanish_or_grow_while_they_are_packed_do_no_harm(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a.tmp").write_text("gone soon")
    (folder / "b.csv").write_text("1\n")
    opened = type(folder).open

    def open_it(path, *args):
        if path.suffix == ".tmp":
            path.unlink()
        return opened(path, *args)

    monkeypatch.setattr(type(folder), "open", open_it)
    content = pack(folder)
    monkeypatch.undo()
    unpack(content, tmp_path / "other/run")
    assert [path.name for path in (tmp_path / "other/run").iterdir()] == ["b.csv"]


def test_images_that_change_while_they_are_copied_are_not_taken_for_old_ones(monkeypatch, tmp_path):
    """Row 6 takes the place of row 2 in a ring of four, after the checkpoint and before the images are read."""
    folder, size = tmp_path / "run", (8, 8, 3)
    store = ImageStore(folder / "replay/x.images", (1, 4, *size))
    for row in range(6):
        store.write(row, np.full((1, *size), row, np.uint8))
    opened = type(folder).open

    def open_it(path, *args):
        if path.suffix == ".images":
            store.write(6, np.full((1, *size), 6, np.uint8))
        return opened(path, *args)

    monkeypatch.setattr(type(folder), "open", open_it)
    content = pack(folder)
    monkeypatch.undo()
    unpack(content, tmp_path / "other/run")
    saved = {"rows": {"reward": np.zeros((1, 4))}, "count": 6, "first_intact": 2}
    copy = with_images(saved, {"x": size}, tmp_path / "other/run/replay")
    assert copy["first_intact"] == with_images(saved, {"x": size}, folder / "replay")["first_intact"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_run_ends_with_the_process_that_started_it():
    program = """
import subprocess, sys, time
from agent.runs.node_run import prepare_child
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=prepare_child)
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    limit = time.monotonic() + 20.0
    while os.path.exists(f"/proc/{child}") and "Z" not in state_of(child):
        assert time.monotonic() < limit
        time.sleep(0.05)


def state_of(process):
    """S, R, Z, ..: nothing where it has gone."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "Z"


def test_images_are_copied_in_blocks_and_their_holes_stay_holes(tmp_path):
    folder, size = tmp_path / "run", 300 << 20
    folder.mkdir()
    (folder / "small.csv").write_text("1\n")
    with (folder / "images.bin").open("wb") as file:
        file.write(b"first")
        file.seek(200 << 20)
        file.write(b"later")
        file.truncate(size)
    tracemalloc.start()
    content = pack(folder)
    unpack(content, tmp_path / "other/run")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(content) < 4 << 20
    assert most < 32 << 20
    copy = tmp_path / "other/run/images.bin"
    assert copy.stat().st_size == size
    assert copy.stat().st_blocks * 512 < 8 << 20
    with copy.open("rb") as file:
        assert file.read(7) == b"first\0\0"
        file.seek(200 << 20)
        assert file.read(6) == b"later\0"
    assert (tmp_path / "other/run/small.csv").read_text() == "1\n"


def test_a_large_file_that_is_replaced_while_it_is_packed_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(node_run, "LARGE", 1000)
    folder, measure = tmp_path / "run", tarfile.TarFile.gettarinfo
    folder.mkdir()
    (folder / "latest.pt").write_bytes(b"1" * 5000)
    (folder / "last.csv").symlink_to("zz.csv")
    (folder / "zz.csv").write_text("1\n")
    (folder / "zz.csv").chmod(0o600)

    def replace_it(archive, *args, **more):
        found = measure(archive, *args, **more)
        for size in (9000, 200):
            (folder / "new").write_bytes(b"2" * size)
            os.replace(folder / "new", folder / "latest.pt")
        return found

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", replace_it)
    content = pack(folder)
    monkeypatch.undo()
    unpack(content, tmp_path / "other/run")
    assert (tmp_path / "other/run/latest.pt").read_bytes() in (b"1" * 5000, b"2" * 200)
    assert (tmp_path / "other/run/last.csv").read_text() == "1\n"
    assert (tmp_path / "other/run/zz.csv").stat().st_mode & 0o777 == 0o600


def test_tuning_goes_on_with_a_run_that_is_made_in_slices(tmp_path, monkeypatch):
    """It ends with the status of a slice, and is begun again with what it has saved."""
    begun = []

    class Sliced:
        temporary = False

        def begin(self, folder, arguments, token, source):
            begun.append(arguments[0])
            (tmp_path / "checkpoints").mkdir(exist_ok=True)
            (tmp_path / "checkpoints" / "latest.pt").write_text("saved")
            with (tmp_path / "eval.csv").open("a") as file:
                file.write("step,return\n10,1.0\n" if len(begun) == 1 else "20,3.0\n")
            (tmp_path / "meta.json").write_text(json.dumps({"finished": len(begun) == 2}))

        def ask(self):
            return SimpleNamespace(status=UNFINISHED if len(begun) == 1 else 0, line="")

        def forget(self):
            pass

    monkeypatch.setattr(tune, "NodeRun", Sliced)
    trial = tune.Trial(str(tmp_path), ["toy:cue"], "token", "source", 20, 1)
    assert trial.report(pause=0.0) == {"step": 10, "return": 1.0, "done": False}
    assert trial.report(pause=0.0) == {"step": 20, "return": 3.0, "done": True}
    assert begun == ["toy:cue", "--resume"]
