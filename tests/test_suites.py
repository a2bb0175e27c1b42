"""Named lists of tasks: what they hold, and sweeps over them."""

import io
import json
import re
import sys

import pytest
from conftest import ROOT

from agent.errors import UsageError
from agent.evaluation.atari_scores import scores
from agent.runs.cli import parse_cli, save_yaml
from agent.runs.config import Config
from agent.runs.published import published_returns
from agent.runs.suites import SUITES, expand, find_suite
from agent.runs.sweep import Local, Sweep
from agent.runs.sweep_grid import make_runs, parse_sweep
from envs import TaskError, TaskId

PLAYED = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True)
if "walker_stand" in sys.argv[1]:
    sys.exit("it broke")
(folder / "meta.json").write_text(json.dumps({"finished": True, "results": {"final": {"mean": 1.0, "std": 0.0}}}))
"""
"""A run that ends at once; that of walker_stand fails."""


def parse(words):
    return parse_cli(words)[0]


def runs_of(folder, tasks, *more):
    words = ["--preset", "debug", "--sweep", f"task={tasks}", *more, "--run-dir", str(folder)]
    return make_runs(parse_sweep(words), parse)


# ---------------------------------------------------------------------- members


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_every_task_of_a_list_exists_under_its_own_name(suite):
    assert len(set(suite.tasks)) == len(suite.tasks) == int(re.search(r"\d+$", suite.name)[0])
    assert suite.source
    for task in suite.tasks:
        try:
            assert str(TaskId.parse(task)) == task
        except TaskError as error:
            if "need the games" not in str(error):
                raise
            pytest.skip("needs the games")


def test_the_lists_are_those_of_their_sources():
    published = published_returns()
    dreamer = {row.task for row in published if row.method == "DreamerV3" and row.task.startswith("dmc:")}
    assert set(SUITES["dmc18"].tasks) == dreamer
    assert {task.partition(":")[2] for task in SUITES["atari26"].tasks} == set(scores())
    assert set(SUITES["easy6"].tasks) < set(SUITES["easy12"].tasks) < set(SUITES["dmc18"].tasks)
    methods = ("TD-MPC2", "BRO", "SimbaV2", "MR.Q")
    early = [row.value for row in published if row.task in SUITES["easy6"].tasks and row.step == 100_000
             and row.method in methods]  # fmt: skip
    assert len(early) == 24
    assert min(early) >= 830

    def bodies(name):
        return {re.match(r"dmc:(ball_in_cup|[a-z]+)", task)[1] for task in SUITES[name].tasks}

    assert bodies("easy12") == bodies("dmc18")
    assert len(bodies("easy12")) == 9


# ---------------------------------------------------------------------- on the command line


def test_a_list_stands_for_its_tasks_and_what_two_hold_is_there_once():
    easy = SUITES["easy6"].tasks
    assert expand(["@easy6", "dmc:cheetah_run"]) == [*easy, "dmc:cheetah_run"]
    assert expand(["dmc:walker_walk", "@easy6"]) == ["dmc:walker_walk", *easy[:-1]]
    assert expand(["@easy6", "@easy12"]) == list(SUITES["easy12"].tasks)
    assert find_suite("@easy6") is find_suite("easy6")


def test_an_unknown_list_is_refused_with_all_that_exist(tmp_path):
    with pytest.raises(UsageError, match=r"no list of tasks @dmc81; did you mean @dmc18\?.*@atari26 \(26 tasks\)"):
        runs_of(tmp_path, "@dmc81")
    with pytest.raises(UsageError, match="holds a value twice"):
        runs_of(tmp_path, "@easy6,@easy6")


def test_a_list_is_not_the_task_of_one_run(tmp_path):
    with pytest.raises(UsageError, match="a list of 18 tasks .* sweep it with --sweep task=@dmc18 --run-dir DIR"):
        parse(["@dmc18"])
    with pytest.raises(UsageError, match="did you mean @dmc18"):
        parse(["@dmc"])
    (tmp_path / "config.yaml").write_text("task: '@easy6'\n")
    with pytest.raises(UsageError, match="a list of 6 tasks"):
        parse(["--config", str(tmp_path / "config.yaml")])


def test_the_page_on_sweeps_names_every_list():
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `@(\w+)`", page, re.M) == list(SUITES)


def test_the_help_names_the_lists(script):
    assert all(name in Config.__doc__ for name in SUITES)
    done = script("train_agent.py", "--help")
    assert "dmc18, easy6, easy12 and atari26" in " ".join(done.stdout.split())


# ---------------------------------------------------------------------- sweeps


def test_a_list_is_swept_as_its_tasks_would_be(tmp_path):
    runs = runs_of(tmp_path, "@easy6,dmc:cheetah_run", "--sweep", "seed=0,1")
    assert len(runs) == 14
    assert runs[1].name == "task=dmc-cartpole_balance,seed=1"
    assert parse(runs[-1].arguments).task == "dmc:cheetah_run"


def test_a_stopped_sweep_goes_on_whatever_the_order_of_its_list(tmp_path):
    """Its folders are its state: one run is done, one was interrupted, and the others are new."""
    for task in ("walker_walk", "reacher_easy"):
        folder = tmp_path / f"task=dmc-{task}"
        folder.mkdir()
        save_yaml(parse([f"dmc:{task}", "--preset", "debug"]), folder / "config.yaml")
    (tmp_path / "task=dmc-walker_walk" / "meta.json").write_text(json.dumps({"finished": True, "results": {}}))
    (tmp_path / "task=dmc-reacher_easy" / "checkpoints").mkdir()
    (tmp_path / "task=dmc-reacher_easy" / "checkpoints" / "latest.pt").write_bytes(b"")
    edited = ",".join(reversed(SUITES["easy6"].tasks))
    for tasks in ("@easy6", edited, "@easy12", "dmc:finger_spin,@easy6"):
        states = {run.name.rpartition("-")[2]: run.state for run in runs_of(tmp_path, tasks)}
        assert (states.pop("walker_walk"), states.pop("reacher_easy")) == ("done", "stopped"), tasks
        assert set(states.values()) == {"waiting"}
    ended = runs_of(tmp_path, "@easy6")
    program = (sys.executable, "-c", "import sys; print(*sys.argv[1:])")
    Sweep(ended, 1, Local(program), io.StringIO()).run(0.01)
    said = {run.name.rpartition("-")[2]: run.log.read_text() for run in ended if run.log.exists()}
    assert "walker_walk" not in said
    assert said["reacher_easy"].startswith("--resume ")
    assert said["walker_stand"].startswith("dmc:walker_stand ")


def test_a_task_that_fails_does_not_stop_the_others(tmp_path):
    runs = runs_of(tmp_path, "@easy6")
    assert Sweep(runs, 2, Local((sys.executable, "-c", PLAYED)), io.StringIO()).run(0.01) == 1
    states = {run.name.rpartition("-")[2]: run.state for run in runs}
    assert states.pop("walker_stand") == "failed"
    assert set(states.values()) == {"done"}
    assert len(states) == 5
