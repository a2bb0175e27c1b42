"""benchmarks/fidelity.py: known correlations, and checkpoints of real runs."""

import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import benchmark


@pytest.fixture
def study():
    module = benchmark("fidelity")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_known_correlations_and_their_intervals(study):
    rows = [{"run": str(n // 2), "return": n, "error_1": -(n**3), "error_5": (n * 7) % 40} for n in range(40)]
    found, low, high = study.correlation(rows, "error_1")
    assert (found, low, high) == pytest.approx((-1.0, -1.0, -1.0))
    found, low, high = study.correlation(rows, "error_5")
    assert low < found < high
    assert high - low > 0.2


def test_a_run_of_a_baseline_is_left_out(study, monkeypatch, capsys):
    episodes = {"reward": np.zeros(4), "is_first": np.arange(4) == 0}
    monkeypatch.setattr(study, "pad_episodes", lambda rows: rows)
    monkeypatch.setattr(study, "usable_horizons", lambda *args: (1,))
    monkeypatch.setattr(study, "find_checkpoint", lambda path, which: path)
    monkeypatch.setattr(study, "read_checkpoint", lambda path: {"config": {"agent": "sac"}, "step": 1, "task": "a"})
    assert study.points_of(SimpleNamespace(path="runs/sac"), SimpleNamespace(held_out=episodes)) == []
    assert "note: left out: runs/sac is a run of sac, which has no world model" in capsys.readouterr().out


def test_checkpoints_of_runs_are_judged_on_one_data_set(study, script, monkeypatch, tmp_path, capfd):
    for seed in range(3):
        words = "--preset", "debug", "--no-video", "--seed", seed, "--run-dir", tmp_path / "runs" / f"r{seed}"
        assert script("train_agent.py", "gym:Pendulum-v1", *words).returncode == 0
    assert script("evaluate.py", "collect", "gym:Pendulum-v1", tmp_path / "data", "--episodes", 10).returncode == 0
    words = ["fidelity.py", tmp_path / "data", tmp_path / "runs", "--out", tmp_path / "rows.csv"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert study.main() == 0
    line = [line for line in capfd.readouterr().out.splitlines() if line.startswith("return and error_15")][0]
    assert "latest alone" in line
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 3 <= len(rows) <= 6
    assert {row["run"] for row in rows} == {str(tmp_path / "runs" / name) for name in ("r0", "r1", "r2")}
    assert all(float(row["error_1"]) > 0 for row in rows)
    monkeypatch.setattr(sys, "argv", [*map(str, words[:2]), str(tmp_path / "runs" / "r0")])
    assert study.main() == 2
    assert "at least three runs" in capfd.readouterr().err
