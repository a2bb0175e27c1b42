"""Environments in processes of their own: signals, kills, and a beginning that fails."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from envs import TaskError, make_vector_env
from envs.processes import without_signals

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system cannot block signals")
def test_processes_of_environments_never_hear_signals() -> None:
    look = "import signal as s; print({s.SIGINT, s.SIGTERM, s.SIGHUP, s.SIGUSR1} <= s.pthread_sigmask(s.SIG_BLOCK, []))"

    def blocked() -> str:
        return subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.strip()

    with without_signals():
        assert blocked() == "True"
    assert blocked() == "False"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_reach_the_one_who_steps_copies_in_processes_and_not_them(name: str) -> None:
    """A terminal sends the signal to all; copies that died of it would end the run before it is saved."""
    code = """
import os, signal, sys, time
from envs import make_vector_env
if __name__ == "__main__":
    envs = make_vector_env("toy:counter", 2, 0, asynchronous=True)
    envs.reset(seed=0)
    caught = []
    signal.signal(signal.NAME, lambda *_: caught.append(1))
    os.killpg(0, signal.NAME)
    time.sleep(0.3)
    envs.step(envs.action_space.sample())
    envs.close()
    print("stepped", caught)
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stepper.py"
        path.write_text(code.replace("NAME", name))
        done = subprocess.run(
            [sys.executable, str(path)], capture_output=True, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
        )  # fmt: skip
    assert done.stdout.strip() == "stepped [1]", done.stderr


def test_processes_of_a_program_that_is_killed_end_quietly() -> None:
    code = """
import os, signal
from envs import make_vector_env
if __name__ == "__main__":
    envs = make_vector_env("toy:counter", 2, 0, asynchronous=True)
    envs.reset(seed=0)
    envs.step_async(envs.action_space.sample())
    print(*(process.pid for process in envs.processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "killed.py"
        path.write_text(code)
        done = subprocess.run(
            [sys.executable, str(path)], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
        )  # fmt: skip
    assert "Traceback" not in done.stderr
    for pid in map(int, done.stdout.split()):
        for _ in range(100):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"process {pid} lives on")


def test_a_process_that_ends_while_it_begins_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("envs.tasks.ClosableAsyncVectorEnv", broken)
    with pytest.raises(TaskError, match="ended while it began.*--train.envs"):
        make_vector_env("toy:counter", 2, 0, asynchronous=True)
