"""benchmarks/gpu_time.py: it can be tried out without a GPU, keeps its time, and says when there is none."""

import csv
import sys
from dataclasses import replace

import pytest
import torch
from conftest import benchmark


@pytest.fixture
def gpu_time(monkeypatch):
    module = benchmark("gpu_time")
    monkeypatch.setattr(module, "ROWS", tuple(row._replace(preset="debug") for row in module.ROWS))
    return module


def run(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gpu_time.py", *map(str, words)])
    return module.main()


def test_every_row_is_timed_and_written(gpu_time, monkeypatch, capsys, tmp_path):
    assert run(gpu_time, monkeypatch, "--device", "cpu", "--updates", 1, "--out", tmp_path / "rows.csv") == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["agent"], row["gradient"]) for row in rows] == [(r.name, r.gradient) for r in gpu_time.ROWS]
    assert all(float(row["ms"]) > 0 for row in rows)
    assert "left out" not in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_is_said(gpu_time, monkeypatch, capsys):
    assert run(gpu_time, monkeypatch, "--device", "cpu", "--updates", 1, "--minutes", 0) == 0
    assert capsys.readouterr().out.count("left out, as 0 minutes are over") == len(gpu_time.ROWS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(gpu_time, monkeypatch, capsys):
    assert run(gpu_time, monkeypatch) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_each_row_asks_for_what_it_says(gpu_time):
    for row in gpu_time.ROWS:
        config = gpu_time.config_of(row, "graphs")
        assert config.behavior.actor_gradient == row.gradient
        assert config.optimizer.gpu == "graphs"
        assert config.model.loop.train_cap == 2
        assert replace(config.model.loop, exit="gate") == config.model.loop
