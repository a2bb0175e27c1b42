"""benchmarks/update_time.py: it starts without options, and a row holds the time of every part."""

import re
import sys

import pytest
import torch
from conftest import benchmark


@pytest.fixture
def update_time(monkeypatch):
    module = benchmark("update_time")
    monkeypatch.setattr(module, "FIRST", 1)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_a_row_of_times(update_time, monkeypatch, capsys):
    every = update_time.image_rows
    monkeypatch.setattr(update_time, "image_rows", lambda loop: every(loop)[1:2])
    monkeypatch.setattr(sys, "argv", ["update_time.py", "--images", "dmc", "--preset", "debug", "--updates", "1"])
    update_time.main()
    machine, header, row = capsys.readouterr().out.splitlines()
    assert re.search(r", [12] threads, 1 processes", machine)
    label, numbers = row[:34].strip(), [float(word.replace(",", "")) for word in row[34:].split()]
    assert label == "2 fixed loops"
    assert len(numbers) == len(header[34:].replace("mean loops", "mean_loops").split()) == 8
    parameters, *parts, total, loops = numbers
    assert parameters > 0
    assert loops == 2.0
    assert 0.0 < sum(parts) <= total + 0.5  # each is rounded to a tenth
