"""Long runs in slices: one command, given again until it is done."""

import json

from agent.training.schedule import Progress


def test_the_same_command_goes_on_until_the_run_is_done(script, tmp_path):
    command = "train_agent.py", "toy:cue5", "--preset", "debug", "--train.slice", "0.03", "--run_dir", "my_run_dir"
    steps = []
    for _ in range(60):
        done = script(*command)
        steps.append(json.loads((tmp_path / "my_run_dir" / "meta.json").read_text())["step"])
        if done.returncode != 75:
            break
        assert "stopped and saved" in done.stdout
    assert done.returncode == 0, done.stderr
    assert len(steps) > 1
    assert steps[-1] == 600
    trained = steps[:-1] if steps[-2] == 600 else steps  # the final evaluation may have had a slice of its own
    assert trained == sorted(set(trained))
    again = script(*command)
    assert again.returncode == 2
    assert "is complete" in again.stderr
    for spelling in ("./my_run_dir", "my_run_dir/", str(tmp_path / "my_run_dir")):  # as a terminal completes it
        assert "is complete" in script(*command[:-1], spelling).stderr
    elsewhere = script(*command, "--optimizer.gpu", "compiled")  # how a GPU computes may change
    assert "is complete" in elsewhere.stderr
    other = script(*command, "--seed", "4")
    assert other.returncode == 2
    assert "--seed cannot change" in other.stderr


def test_the_final_evaluation_wants_half_a_slice(monkeypatch):
    progress = Progress(100, 0.0, slice_minutes=1.0)
    for seconds, half, whole in ((29.0, False, False), (31.0, True, False), (61.0, True, True)):
        monkeypatch.setattr("agent.training.schedule.time.monotonic", lambda now=progress.start + seconds: now)
        assert (progress.over_for_now(0.5), progress.over_for_now()) == (half, whole)
        assert not Progress(100, 0.0).over_for_now(0.5)  # without slices never


def test_without_slices_a_folder_is_not_gone_on_with(script, tmp_path):
    command = "train_agent.py", "toy:cue5", "--preset", "debug", "--steps", "260", "--run-dir", "run"
    assert script(*command, "--train.slice", "60").returncode == 0
    for words in ((), ("--train.slice", "0")):
        refused = script(*command, *words)
        assert refused.returncode == 2
        assert "is not empty" in refused.stderr
    (tmp_path / "sliced.yaml").write_text("train: {slice: 60.0}\n")
    goes_on = script(*command, "--config", "sliced.yaml")
    assert goes_on.returncode == 2
    assert "is complete" in goes_on.stderr
