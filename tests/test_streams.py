"""Printing cannot end a program: readers that are gone, closed terminals, full disks, letters of other alphabets."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.logs.streams import lasting_streams

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import os, sys
from agent.logs.streams import lasting_streams
with lasting_streams():
    for number in range(20_000):
        print("line", number, "\\u20ac", flush=number % 7 == 0)
    print("to the end", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
sys.exit(3)
"""


@pytest.fixture
def program(tmp_path):
    """Runs the program in a shell's pipe; returns its status and standard error."""

    def run(pipe, *, interpreter="", **env):
        command = f'{sys.executable} {interpreter} -c "$PROGRAM" {tmp_path / "done"} {pipe}; exit ${{PIPESTATUS[0]}}'
        result = subprocess.run(
            ["bash", "-c", command], capture_output=True, timeout=60, cwd=ROOT,
            env={**os.environ, "PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT), **env},
        )  # fmt: skip
        assert (tmp_path / "done").read_text() == "done"
        return result.returncode, result.stdout.decode("utf-8", "replace"), result.stderr.decode()

    return run


@pytest.mark.parametrize("interpreter", ["", "-u"])
def test_a_reader_that_has_read_enough_does_not_end_the_program(program, interpreter):
    assert program("| head -1", interpreter=interpreter) == (3, "line 0 €\n", "to the end\n")
    assert program("2>&1 | head -1", interpreter=interpreter) == (3, "line 0 €\n", "")


def test_a_program_without_standard_output_or_error_runs_to_its_end(program):
    assert program(">&-") == (3, "", "to the end\n")
    assert program(">&- 2>&- <&-") == (3, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_under_the_log_is_said_once(program):
    status, _, told = program("> /dev/full")
    assert (status, told) == (3, "note: No space left on device: nothing more is printed\nto the end\n")
    assert program("> /dev/full 2>&1")[0] == 3


@pytest.mark.parametrize("env", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
])  # fmt: skip
def test_letters_that_the_encoding_lacks_are_spelt_out(program, env):
    status, out, _ = program("| tail -1", **env)
    assert (status, out) == (3, "line 19999 \\u20ac\n")


def test_a_terminal_that_is_closed_does_not_end_the_program(tmp_path):
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "done")], stdout=terminal, stderr=terminal, cwd=ROOT
    )
    os.close(terminal)
    os.read(master, 10)
    os.close(master)
    assert process.wait(60) == 3
    assert (tmp_path / "done").exists()


def test_streams_of_a_test_or_a_notebook_stay_and_all_are_put_back(monkeypatch):
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_streams():
        print("seen")
        assert sys.stdout is memory
        print("unseen", file=sys.stderr)
    assert sys.stdout is memory
    assert sys.stderr is None
    assert memory.getvalue() == "seen\n"


def test_descriptors_that_a_test_opens_are_left_alone(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        with lasting_streams():
            print("first")
        print("second")
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


def test_json_that_did_not_arrive_is_an_error(tmp_path):
    code = (
        "import sys\nfrom agent.logs.json_output import json_output\nfrom agent.logs.streams import lasting_streams\n"
        "with lasting_streams():\n with json_output('-') as write:\n  write({'a': 1})"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=-1, text=True, cwd=ROOT)
    assert "UsageError: --json - cannot be written: No space left on device" in result.stderr


def test_a_finished_run_has_status_0_whatever_became_of_its_reader(tmp_path):
    run = tmp_path / "läuft"
    words = f"train_agent.py toy:cue --preset debug --steps 200 --device cpu --no-video --run-dir {run}"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = ["bash", "-c", f"{sys.executable} {words} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout.count("\n")) == (0, 1)
    assert (run / "checkpoints" / "latest.pt").exists()
    assert (run / "curve.png").exists()
