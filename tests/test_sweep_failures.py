"""Sweeps that meet what they cannot know: logs that cannot be written, errors, damaged files, wrong words."""

import io
import sys

import pytest
from test_sweep import CHILD, TASK, fake, parse, runs_of

from agent.data.checkpoint import write_checkpoint
from agent.errors import UsageError
from agent.runs.cli import save_yaml
from agent.runs.node_run import last_line
from agent.runs.sweep import Local, Sweep
from agent.runs.sweep_grid import parse_sweep


def test_a_run_that_cannot_be_started_does_not_stop_the_others_either(tmp_path):
    runs = fake(tmp_path, "0.01", "0.01", "0.01")
    runs[1].log.mkdir()
    assert Sweep(runs, 2, Local((sys.executable, "-c", CHILD)), io.StringIO()).run(0.01) == 1
    assert [run.state for run in runs] == ["done", "failed", "done"]
    assert "cannot be started: [Errno 21]" in runs[1].note


def test_an_error_in_the_sweep_leaves_no_run_behind(tmp_path, monkeypatch):
    runs = fake(tmp_path, "60")
    sweep = Sweep(runs, 1, Local((sys.executable, "-c", CHILD)), io.StringIO())

    def fail():
        if runs[0].process is not None and "ready" in last_line(runs[0].log):
            raise RuntimeError

    monkeypatch.setattr(sweep, "pass_on", fail)
    with pytest.raises(RuntimeError):
        sweep.run(0.02)
    assert last_line(runs[0].log) == "saved"


def test_a_finished_run_with_a_damaged_meta_json_is_done(tmp_path):
    folder = tmp_path / "seed=0"
    folder.mkdir()
    save_yaml(parse([*TASK, "--seed", "0"]), folder / "config.yaml")
    for finished, state in ((True, "done"), (False, "stopped")):
        content = {"task": "toy:cue5", "config": {}, "spaces": {}, "step": 600, "agent": {}}
        write_checkpoint(folder / "checkpoints" / "latest.pt", content | {"trainer": {"finished": finished}})
        assert [run.state for run in runs_of("--sweep", "seed=0", "--run-dir", tmp_path)] == [state]


@pytest.mark.parametrize("words", [("--jobs", "2"), ("--on=ray",), ("--tune",), ("--commands", "--cpus", "2")])
def test_options_of_a_sweep_without_one_are_refused_by_name(words):
    with pytest.raises(UsageError, match=f"{words[0].partition('=')[0]}.* belongs to a sweep: add --sweep FIELD=V1,V2"):
        parse_sweep([*TASK, *words])


def test_a_home_that_nobody_has_is_a_folder_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run,) = runs_of("--sweep", "seed=0", "--run-dir", "~nobody-of-this-name/x")
    assert run.folder.parts[0] == "~nobody-of-this-name"
