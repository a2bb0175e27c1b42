"""benchmarks/certificate.py: it compares bounds with attacks, and fails where a bound is exceeded."""

import csv
import sys

import pytest
import torch
from conftest import benchmark


@pytest.fixture
def study():
    module = benchmark("certificate")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def run(study, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["certificate.py", "--attacks", "4", "--steps", "2", *map(str, words)])
    return study.main()


def test_every_core_and_map_has_a_row_and_none_is_exceeded(study, finished, monkeypatch, tmp_path, capsys):
    assert run(study, monkeypatch, "--runs", finished[0], "--out", tmp_path / "rows.csv") == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 * 2 * 3 + 1)
    assert {row["certificate"] for row in rows if row["core"] in ("looped", "LoopedCore")} == {"inf"}
    assert all(float(row["start"]) <= float(row["attacked"]) for row in rows)
    assert "no certificate was exceeded" in capsys.readouterr().out


def test_a_certificate_that_is_wrong_is_found_out(study, monkeypatch, capsys):
    right = study.certificate
    monkeypatch.setattr(study, "certificate", lambda core: right(core)._replace(loop=0.5))
    assert run(study, monkeypatch, "--cores", "certified") == 1
    assert "a certificate was exceeded" in capsys.readouterr().out


def test_a_run_that_is_none_is_refused(study, monkeypatch, capsys, tmp_path):
    assert run(study, monkeypatch, "--runs", tmp_path) == 2
    assert "error:" in capsys.readouterr().err
