"""Runs of several ranks that torchrun has started: one is killed, one gets a signal, and what shares no updates."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from agent.data.checkpoint import find_checkpoint, read_checkpoint

TASK = ("gym:CartPole-v1", "--preset", "debug", "--device", "cpu", "--no-video", "--eval.episodes", "1",
        "--train.eval-every", "0", "--train.save-every", "100", "--run-dir", "run")  # fmt: skip


def launch(folder, name, *words, launcher=("--standalone", "--nproc-per-node", "2")):
    """A torchrun under way, with its output in the file `name`."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train_agent.py"), *words]
    with (folder / name).open("w") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)


def ranks_in(folder):
    """{rank: process id} of the ranks that work in this folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = process.joinpath("cmdline").read_bytes()
            if process.joinpath("cwd").resolve() == folder and b"train_agent.py" in command:
                words = process.joinpath("environ").read_bytes().split(b"\0")
                found |= {int(word[5:]): int(process.name) for word in words if word.startswith(b"RANK=")}
        except OSError:
            continue
    return found


def wait_for(folder, check, *processes, seconds=400):
    """Until check() is true, while all processes run."""
    limit = time.monotonic() + seconds
    while not check():
        out = "\n".join(path.read_text() for path in folder.glob("*.out"))
        assert time.monotonic() < limit, out
        assert all(process.poll() is None for process in processes), out
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_two_nodes_of_which_one_is_killed_and_one_rank_that_goes_on(tmp_path, script):
    """Two torchruns meet at a port; the second one and its rank are killed; a single process finishes the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port))
    nodes = [
        launch(tmp_path, f"{node}.out", *TASK, "--steps", "200k", launcher=(*place, "--node-rank", str(node)))
        for node in (0, 1)
    ]
    try:
        latest = tmp_path / "run/checkpoints/previous.pt"  # there are two, so the last one is of a later step
        wait_for(tmp_path, latest.exists, *nodes)
        ranks = ranks_in(tmp_path)
        assert ranks.keys() == {0, 1}
        os.kill(ranks[1], signal.SIGKILL)
        assert [node.wait(120) for node in nodes] == [1, 1]
    finally:
        for node in nodes:
            node.kill()
    printed = (tmp_path / "0.out").read_text()
    assert "error: a rank has ended (killed, or out of memory?)" in printed, printed
    assert "the last good checkpoint is untouched" in printed
    assert not ranks_in(tmp_path)
    saved = read_checkpoint(find_checkpoint(tmp_path / "run"))
    assert saved["replay"]["rows"]["reward"].shape[0] == 2
    done = script("train_agent.py", "--resume", "run", "--steps", saved["step"] + 60)
    assert done.returncode == 0, done.stderr
    after = read_checkpoint(find_checkpoint(tmp_path / "run"))
    assert after["step"] >= saved["step"] + 60
    assert after["replay"]["rows"]["reward"].shape[0] == 1
    assert after["replay"]["count"] > saved["replay"]["rows"]["reward"].numel()


def test_a_signal_to_torchrun_saves_the_run_and_two_ranks_go_on(tmp_path):
    process = launch(tmp_path, "0.out", *TASK, "--steps", "200k")
    try:
        wait_for(tmp_path, (tmp_path / "run/checkpoints/previous.pt").exists, process)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    printed = (tmp_path / "0.out").read_text()
    assert "stopped and saved at step" in printed, printed
    assert not ranks_in(tmp_path)
    saved = read_checkpoint(find_checkpoint(tmp_path / "run"))
    again = launch(tmp_path, "1.out", "--resume", "run", "--steps", str(saved["step"] + 60))
    assert again.wait(400) == 0, (tmp_path / "1.out").read_text()
    after = read_checkpoint(find_checkpoint(tmp_path / "run"))
    assert after["replay"]["rows"]["reward"].shape[0] == 2
    assert after["replay"]["count"] > saved["replay"]["count"]


def test_what_shares_no_updates_is_refused(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (("--agent", "ppo"), ("--sweep", "seed=0,1", "--run-dir", "runs/x")):
        refused = script("train_agent.py", "gym:CartPole-v1", *words)
        assert refused.returncode == 2
        assert "start " in refused.stderr
        assert "without it" in refused.stderr
