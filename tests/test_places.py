"""Commands that are printed run from any folder, and paths may begin with ~."""

import shlex
import subprocess
from pathlib import Path

import pytest

from agent.errors import UsageError
from agent.evaluation.episodes import EvalConfig
from agent.runs.cli import parse_cli
from agent.runs.commands import CollectArgs, CompareArgs, DatasetArgs, ExportArgs, PolicyArgs
from agent.runs.config import Config
from agent.runs.header import evaluate_command, resume_command
from agent.runs.model_commands import ModelArgs
from agent.runs.sweep_grid import make_runs, parse_sweep
from agent.runtime import PROJECT


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_line_that_goes_on_runs_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = resume_command(Path("a run's; 'folder'"))
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: there is no run {tmp_path}/here/a run's; 'folder'; give its folder")


def test_names_that_look_like_options_are_paths_in_the_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(evaluate_command(Path("-x\u00e4")))
    assert words[1:] == [str(PROJECT / "evaluate.py"), "policy", str(tmp_path / "-x\u00e4")]
    assert Path(words[1]).is_file()
    assert parse_cli(["toy:cue", "--run-dir=-x"])[0].run_dir == "-x"


def test_the_home_folder_is_expanded_wherever_a_path_is_given(home):
    x = str(home / "x")
    assert parse_cli(["toy:cue", "--run-dir=~/x"])[0].run_dir == x
    assert Config(dataset="~/x", model_only=True).dataset == Config(resume="~/x").resume == x
    assert Config(dream="~/x", agent="sac").dream == x
    (home / "x.yaml").write_text("task: toy:cue5\n")
    assert parse_cli(["--config=~/x.yaml"])[0].task == "toy:cue5"
    with pytest.raises(UsageError, match=f"there is no run {x};"):
        parse_cli(["--resume=~/x"])
    policy = PolicyArgs("~/x", sb3="~/x", json="~/x")
    assert (policy.run, policy.sb3, policy.json) == (x, x, x)
    model = ModelArgs("~/x", out="~/x", json="-")
    assert (model.run, model.out, model.json) == (x, x, "-")
    compare = CompareArgs(("~/x", "y"), out="~/x")
    assert (compare.runs, compare.out) == ((x, "y"), x)
    assert DatasetArgs("~/x", "~/x").folder == CollectArgs("toy:cue", "~/x").folder == ExportArgs("y", "~/x").file == x


def test_the_commands_of_a_sweep_run_from_any_folder(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in (["--run-dir=~/x y"], ["--run-dir", "~/x y"]):
        grid = parse_sweep(["toy:cue", "--config=c.yaml", "--sweep", "seed=0", "--commands", *option])
        (run,) = make_runs(grid, lambda words: Config(task="toy:cue"))
        words = shlex.split(run.command)
        assert words[1:4] == [str(PROJECT / "train_agent.py"), "toy:cue", f"--config={tmp_path / 'c.yaml'}"]
        assert words[-2:] == ["--run-dir", str(home / "x y" / "seed=0")]


@pytest.mark.parametrize(("name", "message"), [
    ("two\nlines", r"--run-dir 'two\nlines' holds '\n'"), ("\x1b[31mred", "--run-dir '\\x1b[31mred' holds '\\x1b'"),
    ("bytes\udcff", "--run-dir 'bytes\\udcff' holds '\\udcff'"), ("", "--run-dir needs the name of a folder"),
])  # fmt: skip
def test_names_that_no_line_can_hold_are_refused(name, message):
    with pytest.raises(ValueError) as caught:
        Config(run_dir=name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_new_run_needs_a_task(script):
    result = script("train_agent.py", "--preset", "debug")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: which task? For example: python train_agent.py dmc:cartpole_swingup, ")


def test_episodes_are_those_of_the_end_of_training_and_after():
    trained = EvalConfig(seed=1000, episodes=50)
    again = PolicyArgs("run").eval_config(trained)
    assert (again.seed, again.episodes) == (1000, 50)
    others = PolicyArgs("run", seed=50, episodes=3).eval_config(trained)
    assert (others.seed, others.episodes) == (1050, 3)
