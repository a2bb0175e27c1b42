"""Every value of every choice of the world model and its training makes a whole run: it learns, is stopped and goes on,
is evaluated, and is exported."""

import csv

import pytest
import yaml

from agent.settings import value_of

CHOICES = {
    "model.objective": ["redundancy", "sigreg"],
    "model.latents": ["simplicial", "gaussian"],
    "model.core": ["certified", "contracting", "stacked", "gru"],
    "behavior.decisions": ["plan", "both", "expansion"],
    "behavior.jump": ["3"],
    "train.sampling": ["recent", "model-error", "value-error"],
}
NEEDS = {"behavior.jump": ("--model.jump", "4")}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in CHOICES.items() for value in values])
def test_a_choice_trains_resumes_evaluates_and_exports(field, value, script, tmp_path):
    run, words = tmp_path / "run", ("--preset", "debug", "--no-video", f"--{field}", value, *NEEDS.get(field, ()))
    done = script("train_agent.py", "gym:Pendulum-v1", *words, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    done = script("train_agent.py", "--resume", run, "--steps", "700")
    assert done.returncode == 0, done.stderr
    assert str(value_of(yaml.safe_load((run / "config.yaml").read_text()), field)) == value
    with (run / "eval.csv").open(newline="") as file:
        assert {row["step"] for row in csv.DictReader(file)} >= {"300", "600", "700"}
    done = script("evaluate.py", "policy", run, "--episodes", "2")
    assert done.returncode == 0, done.stderr
    done = script("evaluate.py", "export", run, tmp_path / "policy.pt2")
    assert done.returncode == 0, done.stderr
