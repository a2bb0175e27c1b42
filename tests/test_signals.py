"""What ends a run from outside: signals, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from agent.data.checkpoint import find_checkpoint, read_checkpoint

WORDS = ("gym:CartPole-v1", "--preset", "debug", "--device", "cpu", "--steps", "200k", "--no-video",
         "--train.threads", "1", "--train.eval-every", "0", "--train.save-every", "0", "--run-dir", "run")  # fmt: skip


def begun(folder, *words):
    """A training in a process of its own that has made some steps."""
    command = [sys.executable, "-u", str(ROOT / "train_agent.py"), *WORDS, *words]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, start_new_session=True)
    episodes = folder / "run/episodes.csv"
    for _ in range(600):
        if episodes.exists() and len(episodes.read_text().splitlines()) > 3:
            return process
        assert process.poll() is None, (folder / "err").read_text()
        time.sleep(0.1)
    raise AssertionError("no episode ended")


@pytest.mark.parametrize(
    ("name", "words", "status"),
    [("SIGTERM", (), 143), ("SIGHUP", (), 129), ("SIGUSR1", (), 138), ("SIGUSR1", ("--train.slice", "60"), 75)],
)
def test_a_signal_saves_and_ends_the_run(tmp_path, name, words, status):
    process = begun(tmp_path, *words)
    os.killpg(process.pid, getattr(signal, name))  # as a terminal or a scheduler does: to every process of the job
    assert process.wait(60) == status
    assert f"{name}: saving" in (tmp_path / "err").read_text()
    assert "stopped and saved at step" in (tmp_path / "out").read_text()
    step = read_checkpoint(find_checkpoint(tmp_path / "run"))["step"]
    rows = (tmp_path / "run/episodes.csv").read_text().splitlines()
    assert step >= int(rows[-1].split(",")[0])
    assert json.loads((tmp_path / "run/meta.json").read_text())["step"] == step


def test_a_run_that_was_killed_goes_on(tmp_path, script):
    """Also where the queue gives the same command again, whether or not there is a checkpoint."""
    process = begun(tmp_path, "--train.slice", "60")
    process.kill()
    process.wait()
    assert read_checkpoint(find_checkpoint(tmp_path / "run"))["step"] == 0
    for _ in range(2):
        done = script("train_agent.py", *WORDS, "--train.slice", "0.02")
        assert done.returncode == 75, done.stderr
    for file in (tmp_path / "run/checkpoints").iterdir():
        file.unlink()
    done = script("train_agent.py", *WORDS, "--train.slice", "0.02")
    assert done.returncode == 75, done.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))
