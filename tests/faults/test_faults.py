"""The short form of the faults, and whether their checks see what they are there to see."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from tests.faults import checks
from tests.faults.table import Table

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs the processes of Linux")


def play(folder, module, *words):
    """Run one of the programs with its table and its runs in `folder`; what it printed."""
    words = [*words, "--out", str(folder / "t.csv"), "--work", str(folder)]
    command = [sys.executable, "-m", f"tests.faults.{module}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_runs_that_are_ended_at_random_go_on(tmp_path):
    play(tmp_path, "ends", "--count", "2", "--seed", "15067")
    rows = Table(tmp_path / "t.csv", ("number",)).rows()
    assert [row["outcome"] for row in rows] == ["ok"] * 2


def test_malformed_inputs_are_refused_in_one_line(tmp_path):
    said = play(tmp_path, "fuzz", "--count", "25", "--kind", "command line")
    assert re.search(r"^ +25 .* all$", said, re.M)


# ---------------------------------------------------------------------- the checks


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run that ended well."""
    shutil.copytree(finished[0], tmp_path / "run")
    assert checks.problems(tmp_path / "run", 1, True) == []
    return tmp_path / "run"


def change_lines(path, change):
    path.write_text("".join(change(path.read_text().splitlines(True))))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("episodes.csv", lambda lines: [*lines, lines[-1]], "doubled"),
        ("episodes.csv", lambda lines: [*lines[:-1], lines[-1][:-3]], "ends within a line"),
        ("episodes.csv", lambda lines: [lines[0], *lines[:0:-1]], "run backwards"),
        ("episodes.csv", lambda lines: lines[:-4], "are not in episodes.csv"),
        ("episodes.csv", lambda lines: [*lines, "600,0,5.0,3\n"], "are not in the replay"),
        ("eval.csv", lambda lines: lines[:-1], "episodes"),
        ("metrics.jsonl", lambda lines: [*lines, lines[-1]], "doubled"),
        ("metrics.jsonl", lambda lines: [*lines, lines[-1][:40] + "\n"], "torn"),
        ("metrics.jsonl", lambda lines: [*lines, '{"step": 700, "wall": 1e9}\n'], "beyond"),
        ("meta.json", lambda lines: ['{"step": 500, "finished": true}'], "meta.json has step 500"),
        ("meta.json", lambda lines: lines[:-2], "meta.json"),
    ],
)
def test_damage_is_seen(run, name, change, expected):
    change_lines(run / name, change)
    assert any(expected in problem for problem in checks.problems(run, 1, True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda saved: saved.update(step=500), "the run has made 500"),
        (lambda saved: saved["replay"]["rows"]["is_last"].zero_(), "are not in the replay"),
        (lambda saved: saved["replay"].update(count=7), "counts 7 rows"),
    ],
)
def test_a_replay_that_does_not_belong_is_seen(run, change, expected):
    path = run / "checkpoints" / "latest.pt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    assert any(expected in problem for problem in checks.problems(run, 1, True))


def test_what_is_left_over_or_changed_is_seen(run):
    before = checks.settings(run)
    (run / "checkpoints" / "latest.pt.tmp").touch()
    assert checks.problems(run, 1, True, {**before, "seed": 99}) == [
        "left over: checkpoints/latest.pt.tmp", "config.yaml has other settings than at first"
    ]  # fmt: skip


def test_a_table_goes_on_where_it_was(tmp_path):
    table = Table(tmp_path / "t.csv", ("number", "kind", "outcome", "lost"))
    for number, outcome in ((1, "ok"), (0, "wrong")):
        table.add({"number": number, "kind": "a\nb", "outcome": outcome, "lost": number / 2})
    assert table.done() == {0, 1}
    assert json.dumps(table.rows()[0]["kind"]) == '"a | b"'
    assert table.summary("kind", ("lost",)).splitlines()[-1].split() == ["2", "1", "1", "0.5", "all"]
