"""`make` on a bare machine: one clear message, one installation, nothing half done.

A shell script stands in for Python, so nothing is installed here.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or sys.platform == "win32", reason="needs make and a POSIX shell"
)

# Answers as Python would; every call is noted in calls.txt. `-m venv DIR` puts a copy of itself there.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "{folder}/calls.txt"
case "$*" in
  *"import venv, ensurepip"*) exit {has_venv} ;;
  *version_info*) exit {is_old} ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *"-m pip"*) [ ! -e "{folder}/slow" ] || sleep 1
    [ ! -e "{folder}/offline" ] || {{ echo "no network" >&2; exit 1; }} ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the Makefile and the requirements, without any environment."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "requirements-docs.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    fake_python(tmp_path)
    return tmp_path


def fake_python(folder, has_venv=True, is_old=False):
    path = folder / "fakepython"
    path.write_text(FAKE_PYTHON.format(folder=folder, has_venv=int(not has_venv), is_old=int(is_old)))
    path.chmod(0o755)


def make(folder, *arguments, python="./fakepython"):
    # `make test` runs these tests: the inner make must not take itself for a part of the outer one.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    command = ["make", *arguments, f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def calls(folder, word):
    """Calls of the stand-in that contain `word`; the list is emptied by reading it."""
    path = folder / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if word in line]


def test_help_is_the_default(project):
    result = make(project)
    assert result.returncode == 0
    assert "make train" in result.stdout
    assert "make test" in result.stdout
    assert "make faults" in result.stdout
    assert "make docs" in result.stdout
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ((), "dmc:cartpole_swingup --seed 0 --steps 200k --train.minutes 26"),
        (("MINUTES=0", "ARGS=--no-video"), "dmc:cartpole_swingup --seed 0 --steps 200k --no-video"),
        (("SEED=3", "TASK=gym:Pendulum-v1"), "gym:Pendulum-v1 --seed 3"),
        (("TASK=dmc:walker_walk", "MINUTES=5"), "dmc:walker_walk --seed 0 --train.minutes 5"),
        (("STEPS=5000", "ARGS=--device cpu"), "dmc:cartpole_swingup --seed 0 --steps 5000 --device cpu"),
    ],
)
def test_train_command(project, options, command):
    """The main job has its steps and minutes; another task or STEPS has what train_agent.py takes by itself."""
    last = " ".join(make(project, "-n", "train", *options).stdout.splitlines()[-1].split())
    assert last == f".venv/bin/python train_agent.py {command}"


def test_missing_venv_module_gives_one_message(project):
    fake_python(project, has_venv=False)
    for goal in ("train", "test"):
        result = make(project, goal)
        assert result.returncode != 0
        lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
        assert lines == ["python3-venv is missing: run: apt install python3-venv"]
    assert not (project / ".venv").exists()
    assert not (project / ".venv.lock").exists()


def test_old_or_absent_python_is_named(project):
    fake_python(project, is_old=True)
    result = make(project, "train")
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    result = make(project, "train", python="no-such-python")
    assert result.returncode != 0
    assert "no-such-python was not found" in result.stderr


def test_second_call_installs_nothing(project):
    assert make(project, "train").returncode == 0
    installs = calls(project, "pip install")
    assert any("-r requirements.txt" in line for line in installs)
    assert not any("requirements-dev.txt" in line for line in installs)  # training needs no test tools

    start = time.monotonic()
    assert make(project, "train").returncode == 0
    assert time.monotonic() - start < 15
    assert not calls(project, "pip install")

    assert make(project, "test").returncode == 0
    assert any("-r requirements-dev.txt" in line for line in calls(project, "pip install"))
    assert make(project, "train").returncode == 0
    assert make(project, "test").returncode == 0
    assert not calls(project, "pip install")
    assert not calls(project, "-m venv")


def test_documentation_has_a_stamp_of_its_own(project):
    assert make(project, "docs").returncode == 0
    assert any("-r requirements-docs.txt" in line for line in calls(project, "pip install"))
    assert make(project, "docs").returncode == 0
    seen = calls(project, "")
    assert any("mkdocs build --strict" in line for line in seen)
    assert not any("pip install" in line for line in seen)
    assert make(project, "train").returncode == 0  # the runtime packages are there
    assert not calls(project, "pip install")


def test_faults_need_what_tests_need(project):
    assert make(project, "faults", "JOBS=4").returncode == 0
    seen = calls(project, "")
    assert any("-r requirements-dev.txt" in line for line in seen)
    assert "-m tests.faults --jobs 4" in seen


def test_changed_requirements_are_installed(project):
    make(project, "train")
    calls(project, "")
    with (project / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    assert make(project, "train").returncode == 0
    seen = calls(project, "")
    assert any("pip install" in line for line in seen)
    assert not any("-m venv" in line for line in seen)  # the environment itself is kept


def test_failed_installation_leaves_no_stamp(project):
    (project / "offline").touch()
    result = make(project, "train")
    assert result.returncode != 0
    assert "no network" in result.stderr
    assert not list((project / ".venv").glob(".installed-*"))
    (project / "offline").unlink()
    calls(project, "")
    assert make(project, "train").returncode == 0
    assert calls(project, "pip install")


def test_broken_environment_is_remade(project):
    make(project, "train")
    (project / ".venv" / "bin" / "python").unlink()  # as after an update of the system's Python
    calls(project, "")
    assert make(project, "train").returncode == 0
    seen = calls(project, "")
    assert any("-m venv" in line for line in seen)
    assert any("pip install" in line for line in seen)


def test_cut_off_installation_is_started_over(project):
    make(project, "train")
    (project / ".venv" / ".installed-train").unlink()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (project / ".venv.lock").write_text(f"{gone.pid}\n")  # left by a process that was killed
    calls(project, "")
    result = make(project, "train")
    assert result.returncode == 0
    assert "starting over" in result.stdout
    assert calls(project, "-m venv")
    assert not (project / ".venv.lock").exists()


def start(folder, *arguments):
    """Start make in a process group of its own, as a terminal does, and wait until pip is at work."""
    process = subprocess.Popen(
        ["make", *arguments, "PYTHON=./fakepython"], cwd=folder, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    log = folder / "calls.txt"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (log.exists() and "pip install" in log.read_text()):
        time.sleep(0.02)
    return process


def test_interrupted_installation_leaves_nothing_behind(project):
    (project / "slow").touch()
    process = start(project, "train")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not (project / ".venv").exists()
    assert not (project / ".venv.lock").exists()


def test_two_calls_at_once_install_once(project):
    (project / "slow").touch()
    first = start(project, "train", "SEED=0")
    second = make(project, "train", "SEED=1")
    first.communicate(timeout=20)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting for another make" in second.stdout
    assert len(calls(project, "-r requirements.txt")) == 1


def test_versions_are_pinned_and_agree():
    texts = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-docs.txt")]
    pins = [pin for text in texts for pin in re.findall(r"^[^#\s-].*", text, flags=re.M)]
    assert pins
    assert all(re.match(r"[A-Za-z0-9_-]+==[0-9.]+", pin) for pin in pins)
    alone = re.search(r"^ALONE := (\S+)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert any(pin.startswith(alone.group(1)) for pin in pins)
