"""benchmarks/choices.py: returns of agents and what models know, a line for each value of a setting."""

import json
import sys

import pytest
import yaml
from conftest import benchmark


def run_of(folder, task, seed, objective, returns, finished=True):
    """An agent with one evaluation of these episodes."""
    folder.mkdir(parents=True)
    settings = {"task": task, "seed": seed, "model": {"objective": objective}, "agent": "dreamer"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "meta.json").write_text(json.dumps({"task": task, "finished": finished}))
    rows = [f"50000,{number},{100 + number},{value},1000,1.0" for number, value in enumerate(returns)]
    (folder / "eval.csv").write_text("\n".join(["step,episode,seed,return,length,mean_loops", *rows, ""]))
    (folder / "episodes.csv").write_text("step,return,length\n")
    line = {"step": 50000, "wall": 600.0, "speed/updates": 20.0 + seed}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def model_of(folder, seed, objective, values, finished=True):
    run_of(folder, "dmc:a", seed, objective, [], finished)
    (folder / "probe.csv").write_text("update,probe,probe_deter,probe_5,probe_15\n1,0,0,0,0\n" + values + "\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"stability/embedding_rank": 0.6}) + "\n")


@pytest.fixture
def choices(tmp_path):
    for number, (task, seed, objective, value) in enumerate(
        [("dmc:a", 11, "sigreg", 5.0), ("dmc:a", 10, "sigreg", 3.0), ("dmc:b", 10, "reconstruct", 9.0)]
    ):
        run_of(tmp_path / "agents" / str(number), task, seed, objective, [value - 1, value + 1])
    run_of(tmp_path / "agents" / "3", "dmc:a", 12, "sigreg", [1.0], finished=False)
    model_of(tmp_path / "models" / "0", 10, "sigreg", "2,0.81,0.5,0.62,0.3")
    model_of(tmp_path / "models" / "1", 11, "sigreg", "1,0.1,0.1,0.1,0.1", finished=False)
    return benchmark("choices")


def test_a_line_for_each_value_holds_the_seeds_side_by_side(choices, tmp_path, monkeypatch, capsys):
    words = ["model.objective", str(tmp_path / "agents"), "--models", str(tmp_path / "models"), "--csv"]
    monkeypatch.setattr(sys, "argv", ["choices.py", *words, str(tmp_path / "rows.csv")])
    assert choices.main() == 0
    *notes, head, _, first, second = capsys.readouterr().out.splitlines()
    unfinished = tmp_path / "agents" / "3", tmp_path / "models" / "1"
    assert notes == [f"left out: {path} is not finished, give the command of its sweep again" for path in unfinished]
    names = [f"dmc:a, model: {name}" for name in ("R^2 now", "R^2 after 5 steps", "after 15", "rank")]
    assert head == "| seeds 10, 11 | " + " | ".join(["dmc:a", "dmc:b", *names, "updates per second"]) + " |"
    assert first == "| sigreg | 3, 5 |  | 0.81, - | 0.62, - | 0.30, - | 0.60, - |  |"  # no task that both values have
    assert second == "| reconstruct |  | 9, - |  |  |  |  |  |"
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert rows[0].startswith("value,task,seed,step,return,minutes")
    assert len(rows) == 5


def test_runs_of_one_cell_and_models_that_diverged_are_told(choices, tmp_path, monkeypatch, capsys):
    meta = tmp_path / "models" / "1" / "meta.json"
    meta.write_text(json.dumps({"task": "dmc:a", "not_finite": "world/kl"}))
    words = ["model.objective", str(tmp_path / "agents"), "--models", str(tmp_path / "models"), "--csv"]
    monkeypatch.setattr(sys, "argv", ["choices.py", *words, str(tmp_path / "rows.csv")])
    assert choices.main() == 0
    assert f"left out: {meta.parent} has diverged: world/kl is not finite" in capsys.readouterr().out
    run_of(tmp_path / "agents" / "again", "dmc:a", 10, "sigreg", [900.0])
    (tmp_path / "rows.csv").unlink()
    assert choices.main() == 2
    assert "two runs have dmc:a, sigreg and seed 10: give one of each" in capsys.readouterr().err
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("file", ["probe.csv", "metrics.jsonl", "config.yaml", "meta.json"])
def test_a_damaged_run_is_left_out_and_without_any_nothing_is_written(choices, tmp_path, monkeypatch, capsys, file):
    folder, table = tmp_path / "models" / "0", tmp_path / "rows.csv"
    text = (folder / file).read_text()
    (folder / file).write_text("{}\n" if file == "config.yaml" else text[: len(text) // 3])
    table.write_text("what was there before\n")
    words = ["model.objective", "--models", str(folder), "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", ["choices.py", *words])
    status = choices.main()
    told = capsys.readouterr()
    if file == "metrics.jsonl":  # whose last line is incomplete: it has no rank
        assert status == 0
        return
    assert status == 2
    assert f"left out: {folder}" in told.err
    assert "no run is left to be compared" in told.err
    assert table.read_text() == "what was there before\n"


def test_speed_is_a_mean_over_the_tasks_that_every_value_has(choices, tmp_path, monkeypatch, capsys):
    run_of(tmp_path / "agents" / "4", "dmc:a", 10, "reconstruct", [7.0])
    monkeypatch.setattr(sys, "argv", ["choices.py", "model.objective", str(tmp_path / "agents"), "--csv", "rows.csv"])
    monkeypatch.chdir(tmp_path)
    assert choices.main() == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == "| sigreg | 3, 5 |  | 30.5 |"
    assert second == "| reconstruct | 7, - | 9, - | 30.0 |"


def test_other_agents_are_left_out_missing_settings_are_defaults_and_differences_are_told(
    choices, tmp_path, monkeypatch, capsys
):
    for name, change in (("5", {"agent": "sac"}), ("6", {"model": {}}), ("7", {"behavior": {"horizon": 4}})):
        run_of(tmp_path / "agents" / name, "dmc:a", 20 + int(name), "sigreg", [1.0])
        config = tmp_path / "agents" / name / "config.yaml"
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | change))
    monkeypatch.setattr(sys, "argv", ["choices.py", "model.objective", str(tmp_path / "agents"), "--csv", "rows.csv"])
    monkeypatch.chdir(tmp_path)
    assert choices.main() == 0
    *notes, _, _, first, second = capsys.readouterr().out.splitlines()
    assert f"left out: {tmp_path / 'agents' / '5'} is a run of sac" in notes
    assert "note: not all else is equal, runs differ in behavior.horizon too" in notes
    assert {first.split(" | ")[0], second.split(" | ")[0]} == {"| reconstruct", "| sigreg"}


def test_a_setting_that_no_run_has_is_an_error(choices, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["choices.py", "model.objectiv", str(tmp_path / "agents"), "--csv", "x.csv"])
    assert choices.main() == 2
    assert "did you mean model.objective?" in capsys.readouterr().err
