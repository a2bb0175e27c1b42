"""The two scripts as a person types them: a whole run, its evaluation, and what is refused.

They run in this process where that shows as much; a Python that imports PyTorch anew takes seconds.
"""

import csv
import json
import shutil

import imageio.v3 as iio
import pytest
import torch
from conftest import spawn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agent import runtime
from agent.logs.logger import CUSTOM_SCALARS
from agent.runs.cli import load_yaml

RUN_FILES = {"config.yaml", "meta.json", "metrics.jsonl", "episodes.csv", "eval.csv", "curve.png", "videos"}


@pytest.fixture
def refused(script):
    """refused("evaluate.py", ...): the one message of a command that ends with status 2."""

    def run(name, *words):
        result = script(name, *words)
        assert result.returncode == 2, result.stderr
        assert result.stdout == ""
        return " ".join(result.stderr.replace("│", " ").split())

    return run


def test_a_run_leaves_everything_behind(finished):
    run, printed = finished
    assert run.name.startswith("debug-s3-")
    assert {path.name for path in run.iterdir()} >= RUN_FILES | {"checkpoints"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "latest.pt", "previous.pt", "best.pt"
    }  # fmt: skip
    assert list((run / "videos").glob("eval_final.*"))
    assert iio.imread(run / "curve.png").ndim == 3
    with (run / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "episode", "seed", "return", "length", "mean_loops"]
    assert len([row for row in rows if row["step"] == "600"]) == 10
    settings = load_yaml(run / "config.yaml")
    assert (settings.task, settings.seed, settings.preset) == ("toy:cue5", 3, "debug")
    meta = json.loads((run / "meta.json").read_text())
    assert meta["finished"] is True
    assert meta["step"] == 600
    assert meta["results"]["final"]["episodes"] == 10
    assert {"commands", "versions", "device", "parameters", "wall_seconds"} <= set(meta)
    assert set(meta["results"]) == {"final", "last_3_evaluations", "last_10_training_episodes"}
    for text in ("toy:cue5", "parameters", "tensorboard.main --logdir", "--resume", "final evaluation: return"):
        assert text in printed


def test_metrics_tell_where_the_time_goes(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(100, 601, 100))
    middle = lines[2]  # with updates and an evaluation
    parts = {name: value for name, value in middle.items() if name.startswith("time/")}
    assert {"time/act", "time/env", "time/replay", "time/evaluate", "time/world_model"} <= set(parts)
    assert 0.7 < sum(parts.values()) < 1.1
    assert middle["speed/updates"] > 0


def test_tensorboard_has_an_open_loop_picture_and_the_depths_of_dreams(finished):
    events = EventAccumulator(str(finished[0]))
    events.Reload()
    assert events.Tags()["images"] == ["open_loop"]
    assert events.Tags()["histograms"] == ["loop/dream_depth"]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    logged = set(events.Tags()["scalars"])
    shown = {tag for charts in CUSTOM_SCALARS.values() for tags in charts.values() for tag in tags}
    assert shown <= logged


def test_json_on_standard_output_is_nothing_but_json(finished, tmp_path):
    run, _ = finished
    result = spawn(tmp_path, "evaluate.py", "policy", run.resolve(), "--json", "-")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["task"] == "toy:cue5"
    assert "over 10 episodes" in result.stderr
    with (run / "eval.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["step"] == "600"]
    assert [float(row["return"]) for row in last] == [row["return"] for row in content["episodes"]]
    assert [int(row["seed"]) for row in last] == [row["seed"] for row in content["episodes"]]


def test_other_episodes_loops_and_a_video(finished, script, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    content = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    content["config"]["train"]["threads"] = 0  # measured, when it was trained
    torch.save(content, copy / "checkpoints" / "best.pt")
    words = ["--episodes", "3", "--seed", "7", "--max-loops", "1", "--checkpoint", "best", "--device", "cpu"]
    result = script("evaluate.py", "policy", copy, *words, "--video", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["summary"]["episodes"] == 3
    assert content["summary"]["loops"] == 1.0
    assert [row["seed"] for row in content["episodes"]] == [1_000_000_007 + i for i in range(3)]
    assert "return" in result.stdout
    assert [path.stem for path in (copy / "videos").glob("policy_*")] == ["policy_best_7_max-loops-1"]


@pytest.mark.parametrize(
    ("words", "loops"),
    [(["fixed", "--max-loops", "3"], 3.0), (["fixed"], 2.0), (["random", "--exit-histogram", "0", "1"], 2.0)],
)
def test_another_exit_rule_than_the_runs(finished, script, tmp_path, words, loops):
    result = script("evaluate.py", "policy", finished[0], "--episodes", "2", "--json", "out.json", "--exit", *words)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["summary"]["loops"] == loops
    assert content["loop_shares"] == [0.0] * int(loops - 1) + [1.0]
    assert content["exit"] == words[0]


def test_what_evaluate_refuses(finished, refused, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    assert "at least 1, got 0" in refused("evaluate.py", "policy", copy, "--episodes", "0")
    assert "--max-loops" in refused("evaluate.py", "policy", copy, "--max-lops", "2")
    assert "is not a run folder" in refused("evaluate.py", "policy", tmp_path)
    assert "--exit" in refused("evaluate.py", "policy", copy, "--exit-threshold", "0.1")
    assert "histogram" in refused("evaluate.py", "policy", copy, "--exit", "random", "--exit-histogram", "0", "0")
    assert "expected auto, cpu or cuda" in refused("evaluate.py", "policy", copy, "--device", "tpu")
    latest = copy / "checkpoints" / "latest.pt"
    (copy / "checkpoints" / "previous.pt").unlink()  # else it would be used
    whole = latest.read_bytes()
    latest.write_bytes(whole[: len(whole) // 2])
    assert "is damaged or not a checkpoint" in refused("evaluate.py", "policy", copy)
    content = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    torch.save(content | {"task": "toy:counter"}, latest)
    assert "other observations or actions" in refused("evaluate.py", "policy", copy)
    del content["agent"]["policy"]
    torch.save(content, latest)
    assert "another version of the model" in refused("evaluate.py", "policy", copy)


def test_what_training_refuses_leaves_runs_alone(finished, refused, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    train = "train_agent.py"
    assert "--behavior.horizon" in refused(train, "toy:cue5", "--behavior.horizn", "3")
    assert "no toy world" in refused(train, "toy:nothing")
    assert "nothing would be learned" in refused(train, "toy:cue5", "--steps", "1000")
    assert "(2000 steps of dmc:cartpole_swingup)" in refused(train, "dmc:cartpole_swingup", "--steps", "2k")
    assert "is not empty" in refused(train, "toy:cue5", "--preset", "debug", "--run-dir", copy)
    assert "is a run of toy:cue5" in refused(train, "toy:serial", "--resume", copy, "--steps", "1k")
    assert "is complete" in refused(train, "--resume", copy)
    assert "--model.units" in refused(train, "--resume", copy, "--steps", "1k", "--model.units", "9")
    best = copy / "checkpoints" / "best.pt"
    assert "give the folder" in refused(train, "--resume", best, "--steps", "1k")
    assert "is not a run folder" in refused(train, "--resume", tmp_path)
    control = "toy:cue5", "--preset", "debug", "--model.core", "gru", "--run-dir", tmp_path / "new"
    assert "must divide" in refused(train, *control, "--model.loop.width", "6")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "runs").exists()


def test_loops_of_an_agent_without_loops_are_refused(script, refused, tmp_path):
    run = tmp_path / "gru"
    words = "--preset", "debug", "--steps", "260", "--model.core", "gru", "--no-video", "--run-dir", run
    assert script("train_agent.py", "toy:cue5", *words).returncode == 0
    for words in (["policy", run], ["model", run], ["export", run, tmp_path / "policy.pt2"]):
        assert "has no loops: leave --max-loops out" in refused("evaluate.py", *words, "--max-loops", "3")
        assert "--max-loops must be from 1 to 10,000" in refused("evaluate.py", *words, "--max-loops", "1000000000000")


def test_plans_of_an_evaluation_look_as_far_as_those_of_the_run(script, tmp_path):
    words = "--preset", "debug", "--steps", "260", "--no-video", "--run-dir", tmp_path / "both"
    plans = "--behavior.decisions", "both", "--behavior.plan-horizon", "5"
    assert script("train_agent.py", "gym:Pendulum-v1", *words, *plans).returncode == 0
    done = script("evaluate.py", "policy", tmp_path / "both", "--plan", "8", "--episodes", "1")
    assert done.returncode == 0, done.stderr
    assert "8 candidates, 5 steps ahead" in done.stdout


def test_a_run_can_be_extended(finished, script, tmp_path, monkeypatch):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    wanted = []
    monkeypatch.setattr(runtime, "set_threads", wanted.append)
    words = ["--resume", copy, "--steps", "700", "--train.threads", "0", "--no-video"]
    result = script("train_agent.py", *words)
    assert result.returncode == 0, result.stderr
    with (copy / "eval.csv").open(newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    assert (steps.count("600"), steps.count("700")) == (10, 10)
    meta = json.loads((copy / "meta.json").read_text())
    assert len(meta["commands"]) == 2
    assert meta["step"] == 700
    assert wanted == [0]


def test_what_cannot_go_on_is_refused_before_anything_is_touched(finished, refused, script, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    latest = copy / "checkpoints" / "latest.pt"
    (copy / "checkpoints" / "previous.pt").unlink()  # else it would be used
    whole = torch.load(latest, weights_only=True)
    words = "train_agent.py", "--resume", copy, "--steps", "1k"

    def with_content(content):
        torch.save(content, latest)
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        message = refused(*words)
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
        return message

    assert "cannot go on" in with_content({name: value for name, value in whole.items() if name != "replay"})
    assert "cannot go on" in with_content(whole | {"trainer": {"finished": False}})
    trainer = whole["trainer"]
    for part in (
        {"random": {**trainer["random"], "numpy": {}}}, {"row": {**trainer["row"], "reward": torch.zeros(3)}},
        {"returns": ["many"]}, {"memory": {**trainer["memory"], "deter": None}}, {"execution": 3},
    ):  # fmt: skip
        assert "cannot go on" in with_content(whole | {"trainer": trainer | part}), part
    for updates in ({}, -1):
        assert "cannot go on" in with_content(whole | {"agent": whole["agent"] | {"updates": updates}})
    assert "cannot go on" in with_content(whole | {"step": -1})
    adams = whole["agent"]["optimizers"]
    for odd in ({"updates": "many"}, {"adam": {"state": {0: {"exp_avg": 1}}, "param_groups": []}}):
        actor = adams | {"actor": adams["actor"] | odd}
        assert "cannot go on" in with_content(whole | {"agent": whole["agent"] | {"optimizers": actor}}), odd
    for part in ("policy", "averaged"):
        weights = dict(whole["agent"][part])
        name = next(name for name, value in weights.items() if value.is_floating_point())
        weights[name] = torch.full_like(weights[name], torch.nan)
        bad = whole | {"agent": whole["agent"] | {part: weights}}
        assert "holds numbers that are not finite" in with_content(bad)
        assert "not finite" in refused("evaluate.py", "policy", copy)
    rows = whole["replay"]["rows"]
    bad = whole["replay"] | {"rows": rows | {"reward": torch.full_like(rows["reward"], torch.inf)}}
    assert "holds numbers that are not finite" in with_content(whole | {"replay": bad})
    lost = {name: value for name, value in whole["replay"].items() if name != "count"}
    torch.save(whole | {"replay": lost}, latest)
    assert "no whole replay" in refused("evaluate.py", "dataset", copy, tmp_path / "data")
    no_rewards = {name: value for name, value in whole["replay"]["rows"].items() if name != "reward"}
    assert "cannot go on" in with_content(whole | {"replay": whole["replay"] | {"rows": no_rewards}})
    assert "is a run of toy:cue5, but" in with_content(
        whole | {"task": "toy:cue7", "config": whole["config"] | {"task": "toy:cue7"}}
    )
    (copy / "meta.json").unlink()
    (copy / "meta.json").mkdir()
    assert "meta.json is a folder where a file should be" in with_content(whole)
    (copy / "meta.json").rmdir()
    torch.save(whole, latest)
    flipped = bytearray(latest.read_bytes())
    middle = len(flipped) // 2
    flipped[middle : middle + 256] = bytes(256)  # more than the padding between two entries
    latest.write_bytes(flipped)
    assert "is damaged" in refused(*words)
    torch.save(whole, tmp_path / "loose.pt")
    assert "has no run around it" in refused("train_agent.py", "--resume", tmp_path / "loose.pt", "--steps", "1k")
    assert "needs the folder of a run" in refused("train_agent.py", "--resume", "")
    torch.save(whole | {"trainer": whole["trainer"] | {"finished": False}}, latest)
    assert "has done 600 already" in refused("train_agent.py", "--resume", copy, "--steps", "500")
    torch.save(whole, latest)
    (copy / "eval.csv").write_text("step,score\n1,2\n")
    assert "eval.csv has the columns" in refused(*words)
    (copy / "eval.csv").write_bytes((run / "eval.csv").read_bytes())
    (copy / "meta.json").write_text("{")
    done = script(*words, "--steps", "620", "--no-video")
    assert done.returncode == 0, done.stderr
    assert json.loads((copy / "meta.json").read_text())["step"] == 620


def test_steps_within_the_random_ones_are_refused(refused):
    assert "200 steps of dmc:cartpole_swingup" in refused(
        "train_agent.py", "dmc:cartpole_swingup", "--preset", "debug", "--steps", "150"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--model.loop.tokens", "0"], ["--model.groups", "0"], ["--model.units", "0"], ["--behavior.units", "-1"],
        ["--train.ratio", "inf"], ["--seed", "9" * 23], ["--optimizer.workers", "0"], ["--optimizer.lr", "-1"],
        ["--behavior.gamma", "2"], ["--behavior.entropy", "nan"], ["--model.classes", "1"],
        ["--behavior.horizon", "0"], ["--model.loop.mean-loops", "1e9"],
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_where_they_are_given(refused, tmp_path, words):
    assert "must be" in refused("train_agent.py", "toy:cue5", "--preset", "debug", "--run-dir", "new", *words)
    assert not (tmp_path / "new").exists()


def test_json_is_checked_before_episodes_are_played_and_kept_apart_from_what_is_printed(finished, refused, script):
    assert "must be a folder" in refused("evaluate.py", "policy", finished[0], "--json", "nowhere/x.json")
    assert script("evaluate.py", "policy", finished[0], "--episodes", "1e0", "--json", "-").returncode == 0
    checkpoint = finished[0] / "checkpoints" / "latest.pt"
    before = checkpoint.read_bytes()
    assert "does not end in .json" in refused("evaluate.py", "policy", finished[0], "--json", checkpoint)
    assert checkpoint.read_bytes() == before


def test_a_data_set_that_cannot_be_written_is_refused_before_episodes_are_played(refused, tmp_path):
    (tmp_path / "there").mkdir()
    words = "evaluate.py", "collect", "toy:cue5"
    assert "choose another name" in refused(*words, "there", "--episodes", "1000000")
    assert "a data set needs at least 10" in refused(*words, "new", "--episodes", "9")


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused("train_agent.py", "toy:cue5", "--preset", "debug", "--run-dir", "file/run")
    assert "cannot be made" in refused("train_agent.py", "toy:cue5", "--preset", "debug", "--run-dir", "x" * 300)
