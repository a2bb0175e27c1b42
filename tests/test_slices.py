"""Long runs in slices: one command, given again until it is done."""

import json


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
    assert steps == sorted(set(steps))
    assert steps[-1] == 600
    again = script(*command)
    assert again.returncode == 2
    assert "is complete" in again.stderr
    other = script(*command, "--seed", "4")
    assert other.returncode == 2
    assert "--seed cannot change" in other.stderr


def test_without_slices_a_folder_is_not_gone_on_with(script, tmp_path):
    command = "train_agent.py", "toy:cue5", "--preset", "debug", "--steps", "260", "--run-dir", "run"
    assert script(*command, "--train.slice", "60").returncode == 0
    refused = script(*command)
    assert refused.returncode == 2
    assert "is not empty" in refused.stderr
