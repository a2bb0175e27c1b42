"""The batch script of docs/interruptions.md, with stand-ins for the training and for SLURM."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "interruptions.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)[1]
PYTHON = """#!/bin/bash
echo "$*" >> words
trap 'sleep 0.3; exit 75' USR1
trap 'sleep 0.3; exit 143' TERM
touch begun
for i in {1..100}; do [ -e over ] && exit "$(cat over)"; sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """job(end): the script's exit status, and whether it was queued again. end: a signal or the training's status."""
    for name, text in {"python": PYTHON, "scontrol": '#!/bin/bash\necho "$*" > queued\n', "job.sh": SCRIPT}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}

    def play(end):
        process = subprocess.Popen(["./job.sh"], cwd=tmp_path, env=env, start_new_session=True)
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        if isinstance(end, signal.Signals):
            process.send_signal(end)  # to the script alone, as B: in its head asks for
        else:
            (tmp_path / "over").write_text(str(end))
        status = process.wait(20)
        queued = tmp_path / "queued"
        return status, queued.exists() and queued.read_text().strip()

    return play


@pytest.mark.parametrize(
    ("end", "status", "queued"),
    [
        (signal.SIGUSR1, 75, "requeue 42"), (75, 75, "requeue 42"), (signal.SIGTERM, 143, False), (0, 0, False),
        (1, 1, False), (138, 138, False),
    ],
)  # fmt: skip
def test_the_script_queues_itself_again_as_long_as_there_is_more_to_do(job, tmp_path, end, status, queued):
    assert job(end) == (status, queued)
    assert "--train.slice" in (tmp_path / "words").read_text()
