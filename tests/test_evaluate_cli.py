"""The two scripts as a person types them: a whole run, its evaluation, and what is refused."""

import csv
import json
import shutil

import imageio.v3 as iio
import pytest
import torch

import evaluate
import train_agent
from agent.config import load_yaml

RUN_FILES = {"config.yaml", "meta.json", "metrics.jsonl", "episodes.csv", "eval.csv", "curve.png", "videos"}


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """refused(main, *words): the one message of a command that ends with status 2."""
    monkeypatch.chdir(tmp_path)

    def run(main, *words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # tyro's own way out
            status = stop.code
        printed = capsys.readouterr()
        assert status == 2, printed.err
        assert printed.out == ""
        return " ".join(printed.err.replace("│", " ").split())

    return run


def test_a_run_leaves_everything_behind(finished):
    run, printed = finished
    assert run.name.startswith("debug-s3-")
    assert {path.name for path in run.iterdir()} >= RUN_FILES | {"checkpoints"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest.pt", "best.pt"}
    assert list((run / "videos").glob("eval_final.*"))
    assert iio.imread(run / "curve.png").ndim == 3
    with (run / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "episode", "seed", "return", "length", "mean_loops"]
    assert len([row for row in rows if row["step"] == "600"]) == 10
    config = load_yaml(run / "config.yaml")
    assert (config.task, config.seed, config.preset) == ("toy:cue5", 3, "debug")
    meta = json.loads((run / "meta.json").read_text())
    assert meta["finished"] is True
    assert meta["step"] == 600
    assert meta["results"]["final"]["episodes"] == 10
    assert {"commands", "versions", "device", "parameters", "wall_seconds"} <= set(meta)
    for text in ("toy:cue5", "parameters", "tensorboard --logdir", "--resume", "final evaluation: return"):
        assert text in printed


def test_json_on_standard_output_is_nothing_but_json(finished, script):
    run, _ = finished
    result = script("evaluate.py", "policy", run.resolve(), "--json", "-")
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
    words = ["--episodes", "3", "--seed", "7", "--max-loops", "1", "--checkpoint", "best", "--device", "cpu"]
    result = script("evaluate.py", "policy", copy, *words, "--video", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["summary"]["episodes"] == 3
    assert content["summary"]["loops"] == 1.0
    assert [row["seed"] for row in content["episodes"]] == [1_000_000_007 + i for i in range(3)]
    assert "return" in result.stdout
    assert list((copy / "videos").glob("policy_best_*"))


def test_a_refusal_is_a_message_and_not_a_traceback(script):
    for words in (
        ["train_agent.py", "toy:cue5", "--behavior.horizn", "3"],
        ["train_agent.py", "toy:nothing"],
        ["evaluate.py", "policy", "nowhere"],
    ):
        result = script(*words)
        assert result.returncode == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert result.stderr.strip()


def test_what_evaluate_refuses(finished, refused, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    assert "at least 1, got 0" in refused(evaluate.main, "policy", copy, "--episodes", "0")
    assert "--max-loops" in refused(evaluate.main, "policy", copy, "--max-lops", "2")
    assert "is not a run folder" in refused(evaluate.main, "policy", tmp_path)
    assert "expected auto, cpu or cuda" in refused(evaluate.main, "policy", copy, "--device", "tpu")
    latest = copy / "checkpoints" / "latest.pt"
    whole = latest.read_bytes()
    latest.write_bytes(whole[: len(whole) // 2])
    assert "is damaged or not a checkpoint" in refused(evaluate.main, "policy", copy)
    content = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    torch.save(content | {"task": "toy:counter"}, latest)
    assert "other observations or actions" in refused(evaluate.main, "policy", copy)
    del content["agent"]["policy"]
    torch.save(content, latest)
    assert "another version of the model" in refused(evaluate.main, "policy", copy)


def test_what_training_refuses_leaves_runs_alone(finished, refused, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    train = train_agent.main
    assert "--behavior.horizon" in refused(train, "toy:cue5", "--behavior.horizn", "3")
    assert "no toy world" in refused(train, "toy:nothing")
    assert "is not empty" in refused(train, "toy:cue5", "--preset", "debug", "--run-dir", copy)
    assert "is a run of toy:cue5" in refused(train, "toy:serial", "--resume", copy, "--steps", "1k")
    assert "is complete" in refused(train, "--resume", copy)
    assert "--model.units" in refused(train, "--resume", copy, "--steps", "1k", "--model.units", "9")
    best = copy / "checkpoints" / "best.pt"
    assert "holds the agent alone" in refused(train, "--resume", best, "--steps", "1k")
    assert "is not a run folder" in refused(train, "--resume", tmp_path)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "runs").exists()


def test_a_run_can_be_extended(finished, script, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    result = script("train_agent.py", "--resume", copy, "--steps", "700", "--no-video")
    assert result.returncode == 0, result.stderr
    with (copy / "eval.csv").open(newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    assert (steps.count("600"), steps.count("700")) == (10, 10)
    meta = json.loads((copy / "meta.json").read_text())
    assert len(meta["commands"]) == 2
    assert meta["step"] == 700
